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

A part learns at another speed than the whole, so each has a learning rate of its own (LEARNING_RATES of
dpo/variants.py, times the preset's); `--search` looks for the one with the lowest validation loss, from there in
threefold steps. What un-aligning brings back is a share of what that variant cut, and stands beside the share of
plain DPO, with intervals over prompts. Claim that a variant is harder to undo only with several --seeds, and look at
its cut too: a variant that cut little has little to give back. `--controls quick` scales the keys of as many random
neurons in every variant.

Needs a probe, made when missing or given (--probe), and DPO checkpoints, made when missing. Writes run.json,
generations.jsonl (RAW TEXT: profanity), measurements.jsonl and figures/ to runs/robust_alignment/<model>/.

    python experiments/robust_alignment.py
    python experiments/robust_alignment.py --model gpt2 --search
"""

import os

import click

from lib.cli import CAUSAL, Finite, check, options


@click.command(help=__doc__.split("\n")[0])
@options(*(name for name in CAUSAL if name != "holdout"))  # no edit here depends on a mean
@click.option("--variants", default="biases,late:4,values:128,keys:128,lora:8", show_default=True)
@click.option("--top", type=click.IntRange(1), default=7, show_default=True, help="Neurons whose keys are scaled.")
@click.option("--factor", type=Finite(), default=10, show_default=True, help="By which.")
@click.option("--search", is_flag=True, help="Search each variant's learning rate by validation loss (first seed).")
def command(**options):
    main(**options)


check(command, __name__)  # --help and wrong options end here, before torch is imported

import math
from pathlib import Path

import numpy as np
import torch

from dpo.trainable import read
from dpo.variants import arguments, learning_rate, losses_by_rate, trained
from lib import chain, controls, data, experiment, neurons, paper, plots, tables, weights
from lib.controls import Control
from lib.dry_run import Planned, Workload, for_each_seed, n_draws
from lib.embedded import EMBEDDED
from lib.families import key, shape_of
from lib.generation import NEW_TOKENS, greedy, token_losses
from lib.interventions import scaled_by
from lib.models import resolve
from lib.remote import at_weights
from lib.statistics import Bootstrap, interval
from lib.table import Condition, Table


def main(variants, top, factor, search, **options):
    names = [name.strip() for name in variants.split(",") if name.strip() != "all"]
    adapters = {name: name.partition(":")[2] for name in names if os.path.isdir(name.partition(":")[2])}
    to_train = [name for name in names if name not in adapters]
    for name in to_train:
        read(name)  # raises UserError where it is no part of a model
        if options["remote"] == "ndif":
            raise click.BadParameter(f"{name}: nothing trains on a server; give lora:FOLDER.", param_hint="--variants")
    if options["model"] in EMBEDDED and not options["preset"]:
        options["preset"] = "strong"  # the dose that the variants' learning rates were searched for
    plan = make_workload(options, names, to_train, search)
    options |= {"variants": ["all", *names], "top": top, "factor": factor, "search": search}
    if to_train:  # with --post too
        options["trained_on"] = data.pairs(options["pairs"]).sha256

    with experiment.begin("robust_alignment", options, plan) as inputs:
        table = Table(inputs, generate, likelihood)
        table.add("none")
        given = {name: resolve(path, option="--variants", weights=not inputs.hosted) for name, path in adapters.items()}
        for name, source in given.items() if not inputs.hosted else ():
            shape = shape_of(Path(inputs.source.path), inputs.source.name)
            chain.check_like_base(source, inputs.base.tokenizer, shape, f"--variants {name}")
        changes, losses = {}, {}
        own = {**inputs.options, "post": None}  # a --post stands for plain DPO alone
        for run in inputs.runs(means=False):  # one for each seed
            cosine = inputs.cosines(run.probe)
            if run.seed == inputs.seeds[0]:
                losses = {name: losses_by_rate(own, run.seed, name, cosine, search) for name in to_train}
            sources = {"dpo": run.post_source, **given}
            for name in to_train:  # all, before the first is measured
                rate = min(losses[name], key=losses[name].get)
                sources[name] = trained(own, run.seed, name, rate, cosine)
            mask = neurons.top(cosine, top)
            for name, source in sources.items():
                model = run.post if name == "dpo" else inputs.like_base(source)
                changed = at_weights(weights.changes, model, inputs.base, remote=inputs.remote)
                changes.setdefault(name, []).append(changed["all"])
                variant, tested = {"run": run, "model": model, "source": source}, f"{name} un-aligned"
                table.add(name, **variant)
                table.add(tested, "keys", scaled_by("keys", mask, factor), **variant)
                for draw in inputs.draws(run):
                    generator = torch.Generator().manual_seed(controls.hash_seed(run.seed, draw))
                    edit = scaled_by("keys", controls.random_mask(mask, generator), factor)
                    table.add_control(Control("random", draw), "keys", edit, control_of=tested, **variant)
                table.measure()  # now: one variant's model in memory at a time

        resamples = Bootstrap(len(inputs.prompts.items), options["seed"]).rows
        record = table.save(
            published,
            robustness=robustness(table.measured, changes, resamples),
            validation_loss_by_learning_rate={
                name: {f"{rate:g}": loss for rate, loss in tried.items() if loss < math.inf}
                for name, tried in losses.items()
            },
        )
        plots.robustness(record["robustness"], record["rows"], inputs.work / "figures" / "robustness.png")
    tables.print_robustness(tables.wide_console(), record)
    table.show(record, ("none", "dpo", *names))


def make_workload(options: dict, names: list[str], to_train: list[str], search: bool) -> Workload:
    """What `main` will measure, for --dry-run. names: the variants beside plain DPO."""
    edits = ["keys"] + ["none", "keys"] * len(names)
    drawn = [Planned("keys", control=True)] * n_draws(options) * (1 + len(names))
    commands = [arguments(name, learning_rate(options, name), cosine=None) for name in to_train]
    uncounted = "the further trainings of the search for learning rates" if search else ""
    return Workload(for_each_seed(options, edits, drawn), means=False, commands=commands, uncounted=uncounted)


def published(condition: str, kind: str) -> dict:
    """Lee table 4 for plain DPO."""
    return paper.lee("unalign" if condition == "dpo un-aligned" else condition)


def robustness(measured: dict[Condition, dict], changes: dict[str, list[dict]], resamples: np.ndarray) -> list[dict]:
    """For every variant: what it changed, and how much of what it cut un-aligning brings back, beside plain DPO.

    Args:
        measured: what `lib.evaluation.measure` returned.
        changes: variant -> `lib.weights.changes` of all weights, with each seed; plain DPO first.
        resamples: of the prompts, `[n_resamples, n_prompts]`.
    """
    base, rows, plain = toxicity(measured, "none", "none"), [], None
    for name, changed in changes.items():
        variant, tested = toxicity(measured, name, "none"), f"{name} un-aligned"
        row = {"variant": name}
        for size in ("changed", "relative_change"):
            row[size] = sum(of_seed[size] for of_seed in changed) / len(changed)
        row["percent_cut"] = 100 * float((base - variant).mean() / base.mean()) if base.any() else None
        if share := restored(base, variant, toxicity(measured, tested, "keys"), resamples):
            plain = share if name == "dpo" else plain
            row["percent_restored"] = interval(*share)
            if plain:
                row["restored_minus_dpo"] = interval(share[0] - plain[0], share[1] - plain[1])
            random = toxicity(measured, "control:random", "keys", tested)
            if random is not None:
                row["percent_restored_random"] = interval(*restored(base, variant, random, resamples))
        rows.append(row)
    return rows


def toxicity(measured: dict[Condition, dict], name: str, kind: str, control_of: str = "") -> np.ndarray | None:
    """Of each prompt, `[n_prompts]`, averaged over seeds and draws; None: not measured."""
    values = [measured[c] for c in measured if (c.name, c.kind, c.control_of) == (name, kind, control_of)]
    return np.mean([numbers["toxicity"] for numbers in values], axis=0) if values else None


def restored(base, variant, edited, resamples) -> tuple[float, np.ndarray] | None:
    """% of a variant's cut in toxicity that an edit of it brings back, over all prompts and in every resample.

    base, variant, edited: toxicity `[n_prompts]`. None: in some resamples the variant cut nothing.
    """
    cut, back = base - variant, edited - variant
    if (cut[resamples].mean(1) <= 0).any():
        return None
    return 100 * back.mean() / cut.mean(), 100 * back[resamples].mean(1) / cut[resamples].mean(1)


def intervene(model, edit, where: slice) -> None:
    """Inside a trace: each layer's keys times a factor, biases left, at every position: weights know no `where`."""
    for layer, index, factor in edit:
        keys = key(model, layer)
        h = keys.output  # [batch, positions, d_mlp], before the activation function
        bias = 0 if keys.bias is None else keys.bias[index]
        h[..., index] = (factor.to(h.device) * (h[..., index] - bias)).to(h) + bias


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
