"""Steering with the probe (Yang et al. 2025, section 3.2; tables 2, 11, 12; Lee et al. 2024, section 3.3, table 2).

The claim: if the probe's direction W writes toxicity, then subtracting alpha W at the last layer, at every token, makes
the text less toxic; the paper takes it as a baseline, with alpha chosen to keep perplexity. W enters as the probe file
has it, so an alpha belongs to one probe; run.json gives |W| and the length of the stream that it is subtracted from.

Without --alpha, alpha is searched: the largest whose perplexity stays within --factor of the base model's (with every
token steered). That alpha, its half and its double are then measured.

sound:    subtracted from the residual stream after the last layer, as the paper's equation says.
faithful: subtracted from the last layer's MLP output, as its code does; in Gemma a norm follows there, so that a large
          alpha drowns the layer's own output and then grows no stronger.

`--controls quick`: -alpha, random directions of the same length, and probes fitted on shuffled labels.

Writes run.json, generations.jsonl (RAW TEXT: profanity), measurements.jsonl and figures/ to runs/steer/<model>/.

    python experiments/steer.py --controls quick            # 10 minutes on two CPU cores
    python experiments/steer.py --model gpt2 --protocol faithful --alpha 30,40
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import click

from lib.cli import CAUSAL, numbers, options

SEARCH_STEPS = 6  # bisections of alpha's logarithm after it is bracketed
SMALLEST = 0.01  # of the residual stream's length, where the search starts


@dataclass(frozen=True)
class Steering:
    """Subtract a vector `[d_model]` after the last layer (`residual`) or from its MLP's output (`mlp`)."""

    vector: Any
    at: str


def _alphas(context, parameter, value):
    return numbers(context, parameter, value) if value else None


@click.command(help=__doc__.split("\n")[0])
@options(*CAUSAL)
@click.option("--vector", type=click.Choice(["probe"]), default="probe", show_default=True, help="What is subtracted.")
@click.option("--alpha", callback=_alphas, help="Grid of alphas, such as 3,5.  [default: searched]")
@click.option(
    "--factor",
    type=click.FloatRange(1, min_open=True),
    default=1.2,
    show_default=True,
    help="The search keeps perplexity within this factor of the base model's.",
)
def main(vector, alpha, factor, **options):
    from lib import experiment

    with experiment.begin("steer", {**options, "vector": vector, "alpha": alpha, "factor": factor}) as run:
        searched = {}
        length = residual_length(run)
        for stage in run.stages():
            if alpha is None:
                searched[stage.seed] = found = search(run, stage, factor, length)
                chosen = {"alpha*": found, "alpha*/2": found / 2, "alpha*x2": found * 2}
            else:
                chosen = {f"a={value:g}": value for value in alpha}
            edits = {}
            for name, value in chosen.items():
                edits[stage.condition(f"steer {name}", "steer")] = steering(run, stage.probe, value)
            edits |= controlled(run, stage, *next(iter(chosen.items())))
            run.measure(stage, edits, generate, negative_log_likelihood)
            norm = float(stage.probe.direction.norm())
        record = write(run, searched, length, norm)
    run.report(record, ("none", "dpo", "steer alpha*", *(f"steer a={value:g}" for value in alpha or [])))


def steering(run, probe, alpha: float) -> Steering:
    """alpha times a probe's direction, as it is."""
    return Steering(alpha * probe.direction, run.protocol.steer_at)


def search(run, stage, factor: float, length: float) -> float:
    """The largest alpha whose log-perplexity, with every token steered, rises by at most log(factor)."""
    import math

    from lib.evaluation import EVERYWHERE, PERPLEXITY_TOKENS
    from lib.generation import right_padded
    from lib.results import once

    rows = max(1, PERPLEXITY_TOKENS // max(map(len, run.texts.windows)))
    tokens = sum(len(ids) - 1 for ids in run.texts.windows)

    def log_perplexity(alpha: float) -> float:
        batches = right_padded(run.texts.windows, rows, run.base.device)
        edit, remote = steering(run, stage.probe, alpha), run.options["remote"] or False
        sums = [negative_log_likelihood(run.base, batch, edit, EVERYWHERE, remote).sum() for batch in batches]
        return float(sum(sums)) / tokens

    def find() -> dict:
        limit = log_perplexity(0.0) + math.log(factor)
        low = high = SMALLEST * length / float(stage.probe.direction.norm())
        while log_perplexity(high) <= limit:
            if high > 1e6 * low:  # a direction that the model does not notice
                return {"alpha": high}
            high *= 2
        if high == low:
            while log_perplexity(low) > limit:
                low /= 2
        else:
            low = high / 2
        for _ in range(SEARCH_STEPS):
            middle = math.sqrt(low * high)
            low, high = (middle, high) if log_perplexity(middle) <= limit else (low, middle)
        return {"alpha": low}

    return once(run.work / "conditions" / f"search_{stage.seed}.json", find)["alpha"]


def residual_length(run) -> float:
    """Mean length of the residual stream after the last layer (or of the last MLP output), over the first prompts."""
    from lib.generation import batches

    (batch,) = batches(run.base.tokenizer, run.prompts.items[: run.batch_size], run.batch_size, run.base.device)
    place = steered(run.base, run.protocol.steer_at)
    with run.base.trace(batch, logits_to_keep=1):
        lengths = place.output.float().norm(dim=-1).save()  # [batch, positions]
    return float(lengths[batch["attention_mask"].bool()].double().mean())


def controlled(run, stage, name: str, alpha: float) -> dict:
    """The controls of the first alpha: its sign, and other directions of the same length in the probe's place."""
    from lib.interventions import NO_EDIT

    if run.options["controls"] == "none":
        return {}
    size = stage.probe.direction.norm()
    condition = partial(stage.condition, kind="steer", of=f"steer {name}")
    edits = {
        condition("control:zero"): NO_EDIT,
        condition("control:flipped"): steering(run, stage.probe, -alpha),
    }
    for control, draw, probe in run.other_directions(stage):
        vector = alpha * size * probe.unit.float()
        edits[condition(f"control:{control}", draw=draw)] = Steering(vector, run.protocol.steer_at)
    return edits


def steered(model, at: str):
    """The module whose output is steered: the last layer, or its MLP."""
    from lib.models import layers

    last = layers(model)[-1]
    return last if at == "residual" else last.mlp


def generate(model, batch: dict, edit, where: slice, remote=False):
    """Greedy new tokens `[batch, NEW_TOKENS]` with the vector subtracted at every step."""
    from lib.generation import NEW_TOKENS, greedy

    vector = getattr(edit, "vector", None)  # None: the model as it is
    place = steered(model, getattr(edit, "at", "residual"))
    with model.generate(batch, remote=remote, **greedy()) as tracer:
        for _ in tracer.iter[:NEW_TOKENS]:
            if vector is not None:
                place.output[:, where] -= vector.to(place.output)  # [batch, positions, d_model]
        ids = tracer.result.save()
    return ids[:, batch["input_ids"].shape[1] :]


def negative_log_likelihood(model, batch: dict, edit, where: slice, remote=False):
    """Summed negative log-likelihood of each row's tokens but the first, `[batch]` float64, nats."""
    from lib.evaluation import summed_nll

    vector = getattr(edit, "vector", None)
    place = steered(model, getattr(edit, "at", "residual"))
    with model.trace(batch, remote=remote):
        if vector is not None:
            place.output[:, where] -= vector.to(place.output)
        losses = summed_nll(model.output.logits, batch["input_ids"], batch["attention_mask"]).save()
    return losses


def write(run, searched: dict, length: float, norm: float) -> dict:
    """The figure and the record; tables 11 and 12 stand beside the alphas that they give."""
    from lib import paper, plots
    from lib.evaluation import published_row

    name = run.options["model"]
    theirs = paper.counterpart(name)
    rows = {f"steer a={alpha:g}": numbers for alpha, numbers in paper.STEERING.get(theirs, {}).items()}
    if rows:
        rows["steer alpha*"] = next(iter(rows.values()))  # the alpha that table 11 chose to keep perplexity

    def published(condition: str, kind: str) -> dict:
        if condition not in rows:
            return published_row(condition, kind, name)
        toxicity, log_ppl, f1 = rows[condition]
        return {"published": {"model": theirs, "toxicity": toxicity, "log_ppl": log_ppl, "f1": f1}}

    record = run.finish(
        published,
        searched_alpha={str(seed): alpha for seed, alpha in searched.items()},
        probe_norm=norm,
        stream_length=length,
        published_alphas=sorted(paper.STEERING.get(theirs, {})),
    )
    plots.trade_off(record["rows"], record["params"]["scorer"], run.work / "figures" / "toxicity_perplexity.png")
    return record


if __name__ == "__main__":
    main()
