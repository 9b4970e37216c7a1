"""Is DPO harder to undo when it may change only a part of the model? (Lee et al. 2024, section 6.1, open questions)

The paper finds that DPO leaves toxic neurons in place and moves the residual stream around them, so that scaling
their keys brings toxicity back, and asks: what if only the weights that elicit toxicity were updated, or only the bias
terms, or only late layers? Each entry of --variants is a DPO run with `python -m dpo --trainable ...` on the same
pairs, measured as it is and un-aligned as in unalign.py (the keys of the --top best aligned neurons, times --factor),
beside plain DPO (`all`):

biases          the bias terms (in families without any: one added to each MLP's last map)
late:K          the last K layers
values:N        the N value vectors that align best with the probe; values:FILE: a file's neurons
keys:N          their key vectors
lora:R          low-rank adapters of rank R
lora:FOLDER     an adapter that was trained elsewhere, as with --remote, where nothing trains

A part learns at another speed than the whole, so each has a learning rate of its own (LEARNING_RATES, times the
preset's); `--search` looks for the one with the lowest validation loss, from there in threefold steps. What
un-aligning brings back is a share of what that variant cut, and stands beside the share of plain DPO, with intervals
over prompts. Claim that a variant is harder to undo only with several --seeds, and look at its cut too: a variant that
cut little has little to give back. `--controls quick` scales the keys of as many random neurons in every variant.

Needs a probe, made when missing or given (--probe), and DPO checkpoints, made when missing. Writes run.json,
generations.jsonl (RAW TEXT: profanity), measurements.jsonl and figures/ to runs/robust_alignment/<model>/.

    python experiments/robust_alignment.py
    python experiments/robust_alignment.py --model gpt2 --search
"""

import os
from dataclasses import dataclass
from pathlib import Path

import click

from lib.cli import CAUSAL, Finite, options
from lib.families import key
from lib.generation import NEW_TOKENS, greedy, summed_nll

# Times the preset's learning rate: what --search found on gemma-270m (results/robust_alignment/search).
LEARNING_RATES = {"all": 1, "biases": 33.4, "late": 4, "values": 300, "keys": 900, "lora": 40}


@dataclass(frozen=True)
class KeyScaling:
    """Multiply the keys of neurons by one factor."""

    layers: tuple  # (layer, index [n]) pairs
    factor: float

    @property
    def n_neurons(self) -> int:
        """How many neurons are scaled."""
        return sum(len(index) for _, index in self.layers)


@click.command(help=__doc__.split("\n")[0])
@options(*(name for name in CAUSAL if name != "holdout"))  # no edit here depends on a mean
@click.option("--variants", default="biases,late:4,values:128,keys:128,lora:8", show_default=True)
@click.option("--top", type=click.IntRange(1), default=7, show_default=True, help="Neurons whose keys are scaled.")
@click.option("--factor", type=Finite(), default=10, show_default=True, help="By which.")
@click.option("--search", is_flag=True, help="Search each variant's learning rate by validation loss (first seed).")
def main(variants, top, factor, search, **options):
    from dpo.trainable import read
    from lib import experiment, weights
    from lib.interventions import NO_EDIT
    from lib.models import resolve
    from lib.remote import at_weights

    names = ["all", *(name.strip() for name in variants.split(",") if name.strip() != "all")]
    adapters = {name: name.partition(":")[2] for name in names if os.path.isdir(name.partition(":")[2])}
    for name in names[1:]:
        if name not in adapters:
            read(name)
            if options["remote"] == "ndif":
                raise click.BadParameter(
                    f"{name}: nothing trains on a server; give lora:FOLDER.", param_hint="--variants"
                )
    given = {**options, "variants": names, "top": top, "factor": factor, "search": search, "holdout": False}
    with experiment.begin("robust_alignment", given) as run:
        sizes, tried = {}, {}
        sources = {name: resolve(path, option="--variants", weights=not run.hosted) for name, path in adapters.items()}
        trainable = [name for name in names[1:] if name not in adapters]
        for stage in run.stages(means=False):
            if not tried:
                tried = {name: rates(run, stage, name, search) for name in trainable}
            # All are trained before the first is measured.
            sources |= {name: trained(run, stage, name, min(tried[name], key=tried[name].get)) for name in trainable}
            for name, source in {"all": run.artifacts_of[stage.seed][1], **sources}.items():
                model = stage.post if name == "all" else run.like_base(source)
                label = "dpo" if name == "all" else name
                changed = at_weights(weights.changes, model, run.base, remote=run.remote)
                sizes.setdefault(label, []).append(changed["all"])
                edits = {} if name == "all" else {stage.condition(name, "none"): NO_EDIT}
                edits |= unaligned(run, stage, label, top, factor)
                run.measure(stage, edits, generate, negative_log_likelihood, on=(model, source))
        record = write(run, sizes, tried)
    run.report(record, ("none", "dpo", *names[1:]), lambda console: report(console, record))


def rates(run, stage, name: str, search: bool) -> dict[float, float]:
    """Learning rates and the validation losses that a variant reaches with them; one alone without a search."""
    import json
    import math

    from dpo.config import default_preset, make_config

    model = run.options["model"]
    first = make_config(default_preset(model), model).learning_rate * LEARNING_RATES.get(name.partition(":")[0], 1)
    tried = {}

    def loss(steps: int) -> float:
        rate = float(f"{first * 3.0**steps:.3g}")
        if rate not in tried:
            try:
                source = trained(run, stage, name, rate)
            except click.exceptions.Exit:  # of the trainer, which has said what was wrong
                if not steps:
                    raise
                tried[rate] = math.inf
            else:
                log = Path(source.adapter or source.path) / "training.json"
                tried[rate] = json.loads(log.read_text(encoding="utf-8"))["best_valid_loss"] or math.inf
        return tried[rate]

    loss(0)
    for way in (1, -1) if search else ():
        at = 0
        while loss(at + way) < loss(at):
            at += way
        if at:
            break
    return tried


def trained(run, stage, name: str, rate: float):
    """The checkpoint of a variant, trained when missing. Raises click's exit code of the trainer for a wrong name."""
    from lib import chain

    part, _, rest = name.partition(":")
    if part in ("values", "keys") and rest.isdecimal():
        name = f"{part}:{','.join(best(run, stage.probe, int(rest)))}"
    return chain.post_source(run.options, stage.seed, "--trainable", name, "--learning-rate", f"{rate:g}")


def best(run, probe, count: int) -> list[str]:
    """Names of the neurons whose value vectors align best with the probe."""
    from lib import vectors

    cosine = run.cosines(probe)
    return [f"L{at // cosine.shape[1]}.N{at % cosine.shape[1]}" for at in vectors.ranked(cosine)[:count].tolist()]


def unaligned(run, stage, label: str, top: int, factor: float) -> dict:
    """The keys of the best aligned neurons scaled, and those of as many random ones."""
    import torch

    from lib import controls, neurons

    mask = neurons.top(run.cosines(stage.probe), top)
    name = f"{label} un-aligned"
    edits = {stage.condition(name, "keys"): scaling(mask, factor)}
    for draw in run.draws(stage):
        generator = torch.Generator().manual_seed(controls.hash_seed(stage.seed, draw))
        other = controls.random_mask(mask, generator)
        edits[stage.condition("control:random", "keys", name, draw)] = scaling(other, factor)
    return edits


def scaling(mask, factor: float) -> KeyScaling:
    """The edit of the masked neurons, `[n_layers, d_mlp]` bool."""
    indices = [row.nonzero()[:, 0] for row in mask]
    return KeyScaling(tuple((layer, index) for layer, index in enumerate(indices) if len(index)), factor)


def generate(model, batch: dict, edit, where: slice, remote=False):
    """Greedy new tokens `[batch, NEW_TOKENS]`; scaled keys act at every position, whatever `where` says."""
    with model.generate(batch, remote=remote, **greedy()) as tracer:
        for _ in tracer.iter[:NEW_TOKENS]:
            for layer, index in getattr(edit, "layers", ()):
                keys = key(model, layer)
                h = keys.output  # [batch, positions, d_mlp], before the activation function
                bias = 0 if keys.bias is None else keys.bias[index]
                h[..., index] = edit.factor * (h[..., index] - bias) + bias
        ids = tracer.result.save()
    return ids[:, batch["input_ids"].shape[1] :]


def negative_log_likelihood(model, batch: dict, edit, where: slice, remote=False):
    """Summed negative log-likelihood of each row's tokens but the first, `[batch]` float64, nats."""
    with model.trace(batch, remote=remote):
        for layer, index in getattr(edit, "layers", ()):
            keys = key(model, layer)
            h = keys.output
            bias = 0 if keys.bias is None else keys.bias[index]
            h[..., index] = edit.factor * (h[..., index] - bias) + bias
        losses = summed_nll(model.output.logits, batch["input_ids"], batch["attention_mask"]).save()
    return losses


def robustness(run, sizes: dict[str, list[dict]]) -> list[dict]:
    """For every variant: what it changed, and how much of what it cut un-aligning brings back, beside plain DPO."""
    import numpy as np

    from lib.evaluation import average
    from lib.statistics import Bootstrap, interval

    resamples = Bootstrap(len(run.prompts.items), run.options["seed"]).rows

    def level(name: str, kind: str, of: str = ""):
        found = [m for c, m in run.measured.items() if (c.name, c.kind, c.of) == (name, kind, of)]
        return np.array(average(found)["toxicity"]) if found else None

    def shares(variant, edited):
        """% of the variant's cut that comes back, over all prompts and in every resample; None: it cut nothing."""
        cut, back = base - variant, edited - variant
        if (cut[resamples].mean(1) <= 0).any():
            return None
        return 100 * back.mean() / cut.mean(), 100 * back[resamples].mean(1) / cut[resamples].mean(1)

    base, rows, plain = level("none", "none"), [], None
    for name, found in sizes.items():
        variant = level(name, "none")
        row = {"variant": name}
        row |= {key: sum(one[key] for one in found) / len(found) for key in ("changed", "relative_change")}
        row["percent_cut"] = 100 * float((base - variant).mean() / base.mean()) if base.any() else None
        if share := shares(variant, level(f"{name} un-aligned", "keys")):
            plain = share if name == "dpo" else plain
            row["percent_restored"] = interval(*share)
            if plain:
                row["restored_minus_dpo"] = interval(share[0] - plain[0], share[1] - plain[1])
            control = level("control:random", "keys", f"{name} un-aligned")
            if control is not None:
                row["percent_restored_random"] = interval(*shares(variant, control))
        rows.append(row)
    return rows


def write(run, sizes: dict[str, list[dict]], tried: dict[str, dict]) -> dict:
    """The record and the figure."""
    import math

    from lib import paper, plots

    def published(condition: str, kind: str) -> dict:
        return paper.lee("unalign" if condition == "dpo un-aligned" else condition)

    losses = {
        name: {f"{rate:g}": loss for rate, loss in found.items() if loss < math.inf} for name, found in tried.items()
    }
    record = run.finish(published, robustness=robustness(run, sizes), validation_loss_by_learning_rate=losses)
    plots.robustness(record["robustness"], record["rows"], run.work / "figures" / "robustness.png")
    return record


def report(console, record: dict) -> None:
    """Print the table of variants."""
    from rich import box
    from rich.table import Table

    from lib.tables import with_interval

    view = Table(title="Which parameters DPO trained, and how much un-aligning brings back", box=box.SIMPLE_HEAD)
    for name in ("trained", "numbers changed", "relative change", "cut, %", "back, %", "minus plain DPO's", "random"):
        view.add_column(name, justify="left" if name == "trained" else "right", no_wrap=True)
    shares = ("percent_restored", "restored_minus_dpo", "percent_restored_random")
    for row in record["robustness"]:
        cut = "-" if row["percent_cut"] is None else f"{row['percent_cut']:.0f}"
        view.add_row(
            "all (plain DPO)" if row["variant"] == "dpo" else row["variant"],
            f"{row['changed']:,.0f}", f"{row['relative_change']:.1e}", cut,
            *(with_interval(row.get(key), 0) for key in shares),
        )  # fmt: skip
    console.print(view)


if __name__ == "__main__":
    main()
