"""Un-aligning the model after DPO by scaling a few key vectors (Lee et al. 2024, section 5.3, table 4).

The claim: DPO leaves toxic neurons in place and merely steers around the regions where they fire, so making those
regions larger, by scaling the key vectors of the 7 best aligned neurons by 10, brings toxicity back and keeps
perplexity. The scaling is applied to the pre-activation inside the trace, in the model after DPO:

keys           in GPT-2 the column of `c_fc`: k . x becomes 10 k . x, the bias stays (as in the released code)
keys and bias  10 (k . x + b), where the family has such a bias
values         the neuron's activation, times 10: the value vector scaled instead of the key

A gated MLP has two maps before the activation, act(gate . x) (up . x). The gate is the key: it alone decides in which
region of x a neuron fires, as GPT-2's key does; scaling `up` is scaling the value vector.

`--controls quick`: the keys of random neurons, of random neurons of the same layers, of neurons matched by value norm
and mean activation, of neurons aligned with a random direction or a probe fitted on shuffled labels, factor 1, and the
same keys scaled in the base model (does scaling undo DPO, or add toxicity to any model?).

Needs a probe and a DPO checkpoint, made when missing or given (--probe, --post). Writes run.json, generations.jsonl
(RAW TEXT: profanity), measurements.jsonl and figures/ to runs/unalign/<model>/.

    python experiments/unalign.py --controls quick
    python experiments/unalign.py --top 7,64,512 --factor 10,100
"""

import click

from lib.cli import CAUSAL, EXPORT, check, counts, numbers, options


@click.command(help=__doc__.split("\n")[0])
@options(*(name for name in CAUSAL if name != "holdout"), *EXPORT)  # no edit here depends on a mean
@click.option("--top", default="7", show_default=True, callback=counts, help="How many neurons; several for a sweep.")
@click.option("--factor", default="10", show_default=True, callback=numbers, help="Factors; several for a sweep.")
def command(**options):
    main(**options)


check(command, __name__)  # --help and wrong options end here, before torch is imported

from collections.abc import Iterator
from itertools import product

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lib import chain, controls, experiment, export, neurons, paper, plots, tables
from lib.controls import Control
from lib.dry_run import Planned, Workload, directions, for_each_seed, n_draws
from lib.families import key, mlp_out
from lib.generation import NEW_TOKENS, greedy, token_losses
from lib.interventions import Edit, scaled_by
from lib.protocol import chosen_protocol
from lib.table import Table

KINDS = ("keys", "keys and bias", "values")


def main(top, factor, **options):
    plan = Workload(plan_conditions(options, top, factor))
    kinds = kinds_of(empty_model(options)) if options["export"] else ()
    exportable = [(label(*edit), kind) for edit in product(top, factor) for kind in kinds]
    wanted = export.asked(options, exportable, chosen_protocol(options))
    options |= {"top": top, "factor": factor}
    tested = label(top[0], factor[0])

    with experiment.begin("unalign", options, plan) as inputs:
        table = Table(inputs, generate, likelihood, wanted)
        table.add("none")
        norms = inputs.at_weights(controls.value_norms)
        for run in inputs.runs():  # one for each seed
            post = {"model": run.post, "source": run.post_source}
            table.add("dpo", run=run, **post)
            cosine = inputs.cosines(run.probe)
            for count, kind, value in product(top, kinds_of(inputs.base), factor):
                edit = scaled_by(kind, neurons.top(cosine, count), value)
                table.add(label(count, value), kind, edit, run=run, **post)
            mask = neurons.top(cosine, top[0])
            if options["controls"] != "none":
                factor_1 = scaled_by("keys", mask, 1.0)
                table.add_control(Control("factor_1"), "keys", factor_1, run=run, control_of=tested, **post)
            for control, other in other_keys(inputs, run, mask, [norms, run.post_means.activation.abs()]):
                edit = scaled_by("keys", other, factor[0])
                table.add_control(control, "keys", edit, run=run, control_of=tested, **post)
            if options["controls"] != "none":
                edit = scaled_by("keys", mask, factor[0])
                table.add_control(Control("in_base_model"), "keys", edit, run=run, control_of=tested)
            table.measure()

        record = table.save(published)
        shares = [(row, restored(row)) for row in record["rows"]]
        plots.restored(shares, inputs.work / "figures" / "restored.png")
    show_restored(record)
    table.show(record, ("none", "dpo", tested))


def plan_conditions(options: dict, top: list[int], factor: list[float]) -> Iterator[list[Planned]]:
    """What `main` will measure with each seed. A generator: --dry-run alone reads it, after the model was checked."""
    model = empty_model(options)
    drawn = ["random", "random_in_layer", "matched", *directions(options)] * n_draws(options)
    names = ["factor_1", *drawn, "in_base_model"] if options["controls"] != "none" else []
    edits = kinds_of(model) * len(top) * len(factor)
    yield from for_each_seed(options, edits, [Planned("keys", control=True)] * len(names))


def empty_model(options: dict):
    """The base model without its weights."""
    config = AutoConfig.from_pretrained(chain.base_source(options).path)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def label(count: int, factor: float) -> str:
    """`unalign k=7 x10`."""
    return f"unalign k={count} x{factor:g}"


def kinds_of(model) -> list[str]:
    """The kinds of scaling that differ: where the key map has no bias, none can be scaled along."""
    return [kind for kind in KINDS if kind != "keys and bias" or key(model, 0).bias is not None]


def other_keys(inputs, run, mask, features: list) -> Iterator[tuple[Control, torch.Tensor]]:
    """(control, mask of its neurons): other neurons in the place of the best aligned, or other directions' neurons.

    mask and features `[n_layers, d_mlp]`; the features are what `matched` holds alike.
    """
    for draw in inputs.draws(run):
        generator = torch.Generator().manual_seed(controls.hash_seed(run.seed, draw))
        for name, other in controls.other_neurons(mask, features, generator):
            yield Control(name, draw), other
    for control in inputs.other_directions(run):
        yield control, neurons.top(inputs.cosines(control.direction), int(mask.sum()))


def published(condition: str, kind: str) -> dict:
    """Lee table 4 for the condition that is theirs."""
    return paper.lee("unalign" if condition == "unalign k=7 x10" and kind == "keys" else condition)


def restored(row: dict) -> dict | None:
    """How much of what DPO cut an edit brings back, in %; None for what is no edit of the DPO model or has no share."""
    share = row["percent_of_dpo"]
    elsewhere = row["kind"] == "none" or row["condition"] == "control:in_base_model"
    if elsewhere or share["mean"] is None or share["low"] is None:
        return None
    return {"mean": 100 - share["mean"], "low": 100 - share["high"], "high": 100 - share["low"]}


def show_restored(record: dict) -> None:
    """Print how much of what DPO cut comes back."""
    console = tables.wide_console()
    for row in record["rows"]:
        if (share := restored(row)) and not row["of"]:
            back = tables.with_interval(share, 0)
            console.print(f"{row['condition']}, {row['kind']}: {back} % of DPO's cut come back", markup=False)


def scaled(kind: str, h, factor, bias):
    """Pre-activations (or, for `values`, activations) of the scaled neurons, in the dtype of h.

    h `[batch, positions, n]`; factor `[n]` float32; bias `[n]`, or None.
    """
    factor = factor.to(h.device)
    if kind == "keys" and bias is not None:
        return (factor * (h - bias)).to(h) + bias
    return (factor * h).to(h)


def intervene(model, edit: Edit, where: slice) -> None:
    """Inside a trace: each layer's keys or activations scaled, at every position: weights know no `where`."""
    for layer, index, factor in edit:
        if edit.kind == "values":
            m = mlp_out(model, layer).input  # [batch, positions, d_mlp], after the activation function
            m[..., index] = scaled(edit.kind, m[..., index], factor, None)
        else:
            keys = key(model, layer)
            h = keys.output  # [batch, positions, d_mlp], before the activation function
            bias = None if keys.bias is None else keys.bias[index]
            h[..., index] = scaled(edit.kind, h[..., index], factor, bias)


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
