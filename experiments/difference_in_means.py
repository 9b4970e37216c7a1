"""Subtracting a difference of means: an edit without preference pairs, training or a probe, against DPO.

Yang et al. (2025, section 6) ask for an edit that lowers toxicity as DPO does without DPO's weights or data; none of
theirs does here (edits_against_dpo.py). This one takes labelled comments alone. At a layer it subtracts, at every
position,

    strength * (mean residual stream of toxic comments - mean of the others)

from the residual stream: a difference of means, as Marks and Tegmark (2023) and Arditi et al. (2024) use it. --layers
names where: `middle`, `last`, a number, a range such as 6-11, or `all`; over several layers each gets its own
difference, divided by their number.

Without --strength it is searched: the largest that keeps perplexity within --factor of the base model's, or at the DPO
model's (--factor dpo). That strength and its half are measured; no prompt enters the search.

--controls quick: reversed; and in its place, as long in each layer: random vectors, the difference with its dimensions
permuted (which keeps outlying ones), and differences by shuffled labels.

Writes run.json, generations.jsonl (RAW TEXT: profanity), measurements.jsonl, figures/ and difference.safetensors
(`[n_layers, d_model]`) to runs/difference_in_means/<model>/.

    python experiments/difference_in_means.py --controls quick
    python experiments/difference_in_means.py --layers middle,all --factor dpo --seeds 0,1,2
"""

import re

import click

from lib import cli
from lib.cli import CAUSAL, check, numbers, options


def _layers(context, parameter, value):
    names = [part.strip() for part in value.split(",")]
    if wrong := [name for name in names if not re.fullmatch(r"middle|last|all|\d+|\d+-\d+", name)]:
        raise click.BadParameter(f"{wrong[0]!r} given, expected middle, last, all, a layer or a range such as 6-11.")
    return names


@click.command(help=__doc__.split("\n")[0])
@options(*(name for name in CAUSAL if name not in ("holdout", "probe", "protocol", "released")))
@click.option("--layers", "places", default="middle,all", show_default=True, callback=_layers,
              help="Where: middle, last, all, 9, 6-11.")  # fmt: skip
@click.option("--strength", callback=lambda c, p, value: value and numbers(c, p, value),
              help="Grid of strengths, such as 1,2.  [default: searched]")  # fmt: skip
@click.option("--factor", default="1.2", show_default=True, callback=cli.factor,
              help="The search keeps perplexity within this factor of the base model's; dpo: at DPO's.")  # fmt: skip
def command(**options):
    main(**options)


check(command, __name__)  # --help and wrong options end here, before torch is imported

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from lib import chain, data, experiment, plots
from lib.controls import Control, draws, hash_seed
from lib.differences import differences
from lib.dry_run import Planned, Traces, Workload
from lib.errors import UserError
from lib.families import layers, shape_of
from lib.generation import NEW_TOKENS, greedy, token_losses
from lib.interventions import NO_EDIT
from lib.steering import allowed, search
from lib.table import Table

DRAWN = ("random", "permuted", "permuted_labels")  # controls that are drawn


@dataclass(frozen=True)
class Subtraction:
    """Subtract a vector `[d_model]` after each of some layers."""

    vectors: dict[int, torch.Tensor]
    kind: str = "subtract"

    def __iter__(self) -> Iterator[tuple[int, torch.Tensor]]:
        """The layers in the order in which the model runs them."""
        return iter(self.vectors.items())


def main(places, strength, factor, **options):
    comments = data.comments(options["comments"])
    source = chain.base_source(options)
    n_layers = shape_of(Path(source.path), source.name).n_layers
    where = {name: layers_of(name, n_layers) for name in places}
    plan = make_workload(options, places, strength, comments.items)
    options |= {"layers": places, "strength": strength, "factor": factor}

    with experiment.begin("difference_in_means", options, plan, needs=("post",)) as inputs:
        model = inputs.base
        texts, labels = [text for text, _ in comments.items], torch.tensor([label == 1 for _, label in comments.items])
        drawn = draws(options["controls"], 0, 1)
        labelings = torch.stack([labels, *(shuffled(labels, options["seed"], draw) for draw in drawn)])
        difference, *by_shuffled = inputs.fitting(
            lambda: differences(model, texts, labelings, inputs.batch_size, inputs.remote)
        )
        save_file({"difference": difference}, inputs.work / "difference.safetensors")

        table, searched = Table(inputs, generate, likelihood), {}
        table.add("none")
        for run in inputs.runs(means=False):  # one for each seed
            table.add("dpo", run=run, model=run.post, source=run.post_source)
            if run.seed != inputs.seeds[0]:  # no seed enters the edit
                table.measure()
                continue
            limit = None if strength else allowed(table, run, factor)
            for name, chosen in where.items():
                if strength:
                    strengths = {f"x{value:g}": value for value in strength}
                else:
                    best = search(table, name, lambda s, chosen=chosen: subtraction(difference, chosen, s), limit, 1.0)
                    searched[name] = best
                    strengths = {"x*": best, "x*/2": best / 2}
                for which, value in strengths.items():
                    table.add(f"{name} {which}", "subtract", subtraction(difference, chosen, value), run=run)
                (which, value), *_ = strengths.items()
                for control, other in controls_of(options, difference, dict(zip(drawn, by_shuffled, strict=True))):
                    edit = NO_EDIT if control.name == "zero" else subtraction(other, chosen, value)
                    table.add_control(control, "subtract", edit, run=run, control_of=f"{name} {which}")
            table.measure()

        lengths = difference.norm(dim=-1).tolist()
        record = table.save(lambda name, kind: {}, searched_strength=searched, difference_lengths=lengths)
        file = inputs.work / "figures" / "toxicity_perplexity.png"
        plots.trade_off(record["rows"], record["params"]["scorer"], file)
    table.show(record, ("none", "dpo", *(f"{name} x*" for name in places)))


def make_workload(options: dict, places: list[str], strength: list[float] | None, comments: list) -> Workload:
    """What `main` will measure, for --dry-run."""
    edits = [Planned("subtract")] * len(places) * (len(strength) if strength else 2)
    n_drawn = len(draws(options["controls"], 0, 1))
    n_controls = len(places) * (1 + len(DRAWN) * n_drawn) if options["controls"] != "none" else 0
    first = [*edits, *[Planned("subtract", control=True)] * n_controls]
    others = [[] for _ in (options["seeds"] or [0])[1:]]
    traces = [Traces("read texts", texts=[text for text, _ in comments], once=True)]
    search_too = "" if strength else "the search for a strength"
    return Workload([first, *others], means=False, traces=traces, uncounted=search_too)


def layers_of(name: str, n_layers: int) -> list[int]:
    """The layers that --layers names. Raises UserError: the model has no such layer."""
    named = {"middle": [n_layers // 2], "last": [n_layers - 1], "all": list(range(n_layers))}
    if name in named:
        return named[name]
    first, _, last = name.partition("-")
    chosen = list(range(int(first), int(last or first) + 1))
    if not chosen or chosen[-1] >= n_layers:
        raise UserError(f"--layers {name}: this model has the layers 0 to {n_layers - 1}.")
    return chosen


def subtraction(difference: torch.Tensor, chosen: list[int], strength: float) -> Subtraction:
    """The edit of some layers: each gets its difference `[d_model]`, divided by their number."""
    return Subtraction({layer: (strength / len(chosen) * difference[layer]).float() for layer in chosen})


def shuffled(labels: torch.Tensor, seed: int, draw: int) -> torch.Tensor:
    """The labels of other comments, `[n_texts]` bool."""
    return labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(hash_seed(seed, draw)))]


def controls_of(options: dict, difference: torch.Tensor, by_shuffled: dict[int, torch.Tensor]) -> Iterator[tuple]:
    """(control, what stands in the difference's place, `[n_layers, d_model]`, as long in each layer)."""
    if options["controls"] != "none":
        yield Control("zero"), difference
        yield Control("flipped"), -difference
    for draw, other in by_shuffled.items():
        generator = torch.Generator().manual_seed(hash_seed(options["seed"], draw))
        order = torch.randperm(difference.shape[1], generator=generator)
        random = torch.randn(difference.shape, generator=generator, dtype=torch.float64)
        for name, vectors in zip(DRAWN, (random, difference[:, order], other), strict=True):
            length = difference.norm(dim=-1, keepdim=True) / vectors.norm(dim=-1, keepdim=True)
            yield Control(name, draw), length * vectors


def intervene(model, edit, where: slice) -> None:
    """Inside a trace: the vectors subtracted at the positions `where`; nothing for NO_EDIT."""
    for layer, vector in edit:
        residual = layers(model)[layer].output  # [batch, positions, d_model]
        residual[:, where] -= vector.to(residual)


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
