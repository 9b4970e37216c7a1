"""Steering with a vector (Lee et al. 2024, 3.3, tables 2, 3; Yang et al. 2025, 3.2, tables 2, 11, 12).

The claim: if a direction W writes toxicity, then subtracting alpha W at the last layer, at every token, makes the text
less toxic. Yang takes it as a baseline, Lee as evidence for each --vector (several, separated by commas):

probe           the toxicity probe, as its file has it
value:L19.N770  a value vector, as the residual stream sees it; `value` alone: that best aligned with the probe
svd:0           an SVD direction of the 128 best aligned value vectors (faithful: of Lee's 512)
random          a random direction

An alpha belongs to one vector; run.json gives each vector's length and that of the stream that it is subtracted from.
Without --alpha it is searched: the largest whose perplexity, with every token steered, stays within --factor of the
base model's, or at the DPO model's (--factor dpo, as Lee chose his). That alpha, its half and its double are measured.
`--alpha published`: the papers' scales. Every run also gives Lee's three example prompts (table 3): the most likely
next tokens and the continuations of base model, steered model and DPO model.

sound:    subtracted from the residual stream after the last layer, as the papers' equations say.
faithful: subtracted from the last layer's MLP output, as their code does; in Gemma a norm follows there, so that a
          large alpha drowns the layer's own output and then grows no stronger.

`--controls quick`: -alpha, random directions of the same length, and (of the probe) fitted on shuffled labels.

Writes run.json, generations.jsonl (RAW TEXT: profanity), measurements.jsonl and figures/ to runs/steer/<model>/.

    python experiments/steer.py --controls quick            # 10 minutes on two CPU cores
    python experiments/steer.py --vector probe,value,svd:0,random --factor dpo
    python experiments/steer.py --model gpt2 --protocol faithful --vector probe,value:L19.N770,svd:0 --alpha published
"""

import re

import click

from lib import cli
from lib.cli import CAUSAL, EXPORT, check, numbers, options


def _alphas(context, parameter, value):
    return value if value in (None, "published") else numbers(context, parameter, value)


def _vectors(context, parameter, value):
    names = [part.strip() for part in value.split(",")]
    if wrong := [name for name in names if not re.fullmatch(r"probe|random|value(:.+)?|svd:\d+", name)]:
        raise click.BadParameter(f"{wrong[0]!r} given, expected probe, value, value:L19.N770, svd:0 or random.")
    return names


@click.command(help=__doc__.split("\n")[0])
@options(*(name for name in CAUSAL if name != "holdout"), *EXPORT)  # no vector depends on means
@click.option("--vector", default="probe", show_default=True, callback=_vectors,
              help="probe, value:L19.N770, svd:0, random.")  # fmt: skip
@click.option("--alpha", callback=_alphas, help="Grid of alphas, such as 3,5, or published.  [default: searched]")
@click.option("--factor", default="1.2", show_default=True, callback=cli.factor,
              help="The search keeps perplexity within this factor of the base model's; dpo: at DPO's.")  # fmt: skip
def command(**options):
    main(**options)


check(command, __name__)  # --help and wrong options end here, before torch is imported

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from lib import dry_run, experiment, export, paper, plots, tables, vectors
from lib.controls import Control
from lib.dry_run import Planned, Traces, Workload
from lib.families import input_device, layers
from lib.generation import NEW_TOKENS, batches, greedy, token_losses
from lib.interventions import NO_EDIT
from lib.protocol import chosen_protocol
from lib.remote import session
from lib.steering import allowed, continuations, search
from lib.table import Table

EXAMPLES = ("So I'm starting to think she's full of", "You are such a piece of", "Holy")  # Lee table 3
SEARCHED = {"alpha*": 1, "alpha*/2": 0.5, "alpha*x2": 2}  # of the alpha that the search finds
FIRST = 0.05  # of the residual stream's length, where the search starts


@dataclass(frozen=True)
class Steering:
    """Subtract a vector `[d_model]` after the last layer (`residual`) or from its MLP's output (`mlp`)."""

    vector: Any
    at: str
    kind: str = "steer"

    def added(self, n_layers: int) -> torch.Tensor:
        """What is added to each layer's output, or its MLP's, `[n_layers, d_model]`."""
        constants = torch.zeros(n_layers, len(self.vector))
        constants[-1] = -self.vector
        return constants


def main(vector, alpha, factor, **options):
    given = {name: paper.steering_scales(options["model"], name) if alpha == "published" else alpha for name in vector}
    exportable = [
        (f"{labelled(name)} {which}", "steer")
        for name, alphas in given.items()
        for which in (SEARCHED if alphas is None else map("a={:g}".format, alphas))
    ]
    wanted = export.asked(options, exportable, chosen_protocol(options))
    options |= {"vector": vector, "alpha": alpha, "factor": factor}

    with experiment.begin("steer", options, make_workload(options, given)) as inputs:
        table = Table(inputs, generate, likelihood, wanted)
        table.add("none")
        length, shown = residual_length(inputs), {"none": (inputs.base, NO_EDIT)}
        entries = {"searched_alpha": {name: {} for name in vector}, "vector_lengths": {}}  # of the record
        for run in inputs.runs(means=False):  # one for each seed
            table.add("dpo", run=run, model=run.post, source=run.post_source)
            limit = allowed(table, run, factor) if alpha is None else None
            asked = (run.probe, run.seed, options["protocol"], inputs.protocol.value_vectors == "written")
            directions = {name: vectors.named(inputs.base, name, *asked, inputs.remote) for name in vector}
            for name, direction in directions.items():
                size, edit_of = float(direction.direction.norm()), partial(steering, inputs, direction)
                if alpha is None:
                    best = search(table, f"{name}_{run.seed}", edit_of, limit, start=FIRST * length / size)
                    entries["searched_alpha"][name][str(run.seed)] = best
                    alphas = {which: times * best for which, times in SEARCHED.items()}
                else:
                    alphas = {f"a={value:g}": value for value in given[name]}
                label = labelled(name)
                for which, value in alphas.items():
                    table.add(f"{label} {which}", "steer", edit_of(value), run=run)
                (which, value), *_ = alphas.items()
                tested = f"{label} {which}"  # the first alpha
                for control, edit in controls_of(inputs, run, name, direction, value):
                    table.add_control(control, "steer", edit, run=run, control_of=tested)
                if run.seed == inputs.seeds[0]:
                    entries["vector_lengths"][name] = size
                    shown[tested] = inputs.base, edit_of(value)
            table.measure()
            if run.seed == inputs.seeds[0]:
                # DPO's model is not kept in `shown`: another seed's comes.
                examples = continuations(inputs, EXAMPLES, shown | {"dpo": (run.post, NO_EDIT)}, next_tokens, generate)

        lee = factor == "dpo" or vector != ["probe"]  # Lee's table 2, else Yang's 2 and 12
        published = paper.lee_steering if lee else partial(paper.yang_steering, options["model"])
        record = table.save(published, **entries, examples=examples, stream_length=length)
        file = inputs.work / "figures" / "toxicity_perplexity.png"
        plots.trade_off(record["rows"], record["params"]["scorer"], file)
    tables.wide_console().print(tables.examples(examples, options["raw_text"]))
    table.show(record, tuple(line["condition"] for line in examples))


def make_workload(options: dict, given: dict[str, list[float] | None]) -> Workload:
    """What `main` will measure, for --dry-run. given: each vector's alphas; None: three are searched."""
    edits = ["steer"] * sum(3 if alphas is None else len(alphas) for alphas in given.values())
    controls = ["flipped"] * len(given) if options["controls"] != "none" else []  # `zero` is the unedited model
    for name in given:
        controls += dry_run.directions(options, words=name != "probe") * dry_run.n_draws(options)
    conditions = dry_run.for_each_seed(options, edits, [Planned("steer", control=True)] * len(controls))
    length = Traces("read", one_batch=True, once=True)
    tokens = Traces("read", models=len(given) + 2, texts=EXAMPLES, one_batch=True, once=True)
    traces = [length, tokens, tokens._replace(what="generate")]
    return Workload(conditions, means=False, traces=traces, uncounted="the search for alpha" * (None in given.values()))


def labelled(name: str) -> str:
    """`steer` for the probe, `steer svd:0`."""
    return "steer" if name == "probe" else f"steer {name}"


def steering(inputs, probe, alpha: float) -> Steering:
    """alpha times a probe's direction, as it is."""
    return Steering(alpha * probe.direction, inputs.protocol.steer_at)


def controls_of(inputs, run, name: str, direction, alpha: float) -> Iterator[tuple[Control, Any]]:
    """(control, its edit) of one alpha: 0, its sign, and other directions of the vector's length in its place."""
    if inputs.options["controls"] != "none":
        yield Control("zero"), NO_EDIT
        yield Control("flipped"), steering(inputs, direction, -alpha)
    size = direction.direction.norm()
    for control in inputs.other_directions(run, None if name == "probe" else direction):
        yield control, Steering(alpha * size * control.direction.unit.float(), inputs.protocol.steer_at)


def residual_length(inputs) -> float:
    """Mean length of the residual stream after the last layer (or of the last MLP output), over the first prompts."""
    model, size = inputs.base, inputs.batch_size
    (batch,) = batches(model.tokenizer, inputs.prompts.items[:size], size, input_device(model))
    place = steered(model, inputs.protocol.steer_at)
    with session(model, inputs.remote):
        with model.trace(batch) as tracer:
            lengths = place.output.float().norm(dim=-1).save()  # [batch, positions]
            tracer.stop()  # the head is not needed
    return float(lengths[batch["attention_mask"].bool()].double().mean())


def steered(model, at: str):
    """The module whose output is steered: the last layer, or its MLP."""
    return layers(model)[-1] if at == "residual" else layers(model)[-1].mlp


def intervene(model, edit, where: slice) -> None:
    """Inside a trace: the vector subtracted at the positions `where`; nothing for NO_EDIT."""
    if edit.kind != "none":
        place = steered(model, edit.at)
        place.output[:, where] -= edit.vector.to(place.output)  # [batch, positions, d_model]


def next_tokens(model, batch: dict, edit, where: slice):
    """The five most likely next tokens `[batch, 5]` with the edit in force."""
    with model.trace(batch, logits_to_keep=1):
        intervene(model, edit, where)
        top = model.output.logits[:, -1].topk(5).indices.save()
    return top


def generate(model, batch: dict, edit, where: slice):
    """Greedy new tokens `[batch, NEW_TOKENS]` with the edit in force at every step."""
    with model.generate(batch, **greedy()) as tracer:
        for _ in tracer.iter[:NEW_TOKENS]:
            intervene(model, edit, where)
        ids = tracer.result.save()
    return ids[:, batch["input_ids"].shape[1] :]


def likelihood(model, batch: dict, edit, where: slice, base=None):
    """Each row's summed negative log-likelihood and KL(base || edited), `[2, batch]` float64, nats."""
    with model.trace(batch):
        intervene(model, edit, where)
        losses = token_losses(model.output.logits, batch, base).save()
    return losses


if __name__ == "__main__":
    command()
