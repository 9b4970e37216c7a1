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

from dataclasses import dataclass

import click

from lib.cli import CAUSAL, numbers, options
from lib.families import key, mlp_out
from lib.generation import NEW_TOKENS, greedy, summed_nll

KINDS = ("keys", "keys and bias", "values")


def _counts(context, parameter, value):
    found = numbers(context, parameter, value)
    if not all(count >= 1 and count == int(count) for count in found):
        raise click.BadParameter(f"{value} given, expected numbers of neurons such as 7,64.")
    return [int(count) for count in found]


@dataclass(frozen=True)
class KeyScaling:
    """Multiply keys or activations of neurons by one factor."""

    kind: str  # one of KINDS
    layers: tuple  # (layer, index [n]) pairs
    factor: float

    @property
    def n_neurons(self) -> int:
        """How many neurons are scaled."""
        return sum(len(index) for _, index in self.layers)


@click.command(help=__doc__.split("\n")[0])
@options(*(name for name in CAUSAL if name != "holdout"))  # no edit here depends on a mean
@click.option("--top", default="7", show_default=True, callback=_counts, help="How many neurons; several for a sweep.")
@click.option("--factor", default="10", show_default=True, callback=numbers, help="Factors; several for a sweep.")
def main(top, factor, **options):
    from lib import controls, experiment, neurons

    with experiment.begin("unalign", {**options, "top": top, "factor": factor, "holdout": False}) as run:
        kinds = [kind for kind in KINDS if kind != "keys and bias" or has_bias(run.base._module)]
        norms = run.at_weights(controls.value_norms)
        for stage in run.stages():
            cosine = run.cosines(stage.probe)
            edits = {}
            for count in top:
                mask = neurons.top(cosine, count)
                for kind in kinds:
                    for value in factor:
                        edits[stage.condition(label(count, value), kind)] = scaling(kind, mask, value)
            features = [norms, stage.post_means.activation.abs()]
            edits |= controlled(run, stage, neurons.top(cosine, top[0]), top[0], factor[0], features)
            post = (stage.post, run.artifacts_of[stage.seed][1])
            run.measure(stage, edits, generate, negative_log_likelihood, on=post)
            if options["controls"] != "none":
                in_base = stage.condition("control:in_base_model", "keys", label(top[0], factor[0]))
                edit = scaling("keys", neurons.top(cosine, top[0]), factor[0])
                run.measure(stage, {in_base: edit}, generate, negative_log_likelihood)
        record = write(run)
    run.report(record, ("none", "dpo", label(top[0], factor[0])), lambda console: report(console, record))


def label(count: int, factor: float) -> str:
    """`unalign k=7 x10`."""
    return f"unalign k={count} x{factor:g}"


def has_bias(module) -> bool:
    """Whether the family's key map has a bias."""
    from lib.families import FAMILIES, reach

    kind = FAMILIES[module.config.model_type]
    return reach(reach(module, kind.layers)[0], kind.key).bias is not None


def scaling(kind: str, mask, factor: float) -> KeyScaling:
    """The edit of the masked neurons, `[n_layers, d_mlp]` bool."""
    indices = [row.nonzero()[:, 0] for row in mask]
    return KeyScaling(kind, tuple((layer, index) for layer, index in enumerate(indices) if len(index)), factor)


def controlled(run, stage, mask, count: int, factor: float, features: list) -> dict:
    """The controls of the first edit: other neurons' keys, other directions' neurons, and factor 1."""
    import torch

    from lib import controls, neurons

    if run.options["controls"] == "none":
        return {}

    def condition(control: str, draw: int = 0):
        return stage.condition(f"control:{control}", "keys", label(count, factor), draw)

    edits = {condition("factor_1"): scaling("keys", mask, 1.0)}
    for draw in run.draws(stage):
        generator = torch.Generator().manual_seed(controls.hash_seed(stage.seed, draw))
        for name, other in (
            ("random", controls.random_mask(mask, generator)),
            ("random_in_layer", controls.random_in_layer(mask, generator)),
            ("matched", controls.matched(mask, features, generator)),
        ):
            edits[condition(name, draw)] = scaling("keys", other, factor)
    for name, draw, probe in run.other_directions(stage):
        edits[condition(name, draw)] = scaling("keys", neurons.top(run.cosines(probe), count), factor)
    return edits


def scaled(kind: str, h, factor: float, bias):
    """Pre-activations (or, for `values`, activations) of the scaled neurons. h `[batch, positions, n]`, bias `[n]`."""
    return factor * (h - bias) + bias if kind == "keys" and bias is not None else factor * h


def generate(model, batch: dict, edit, where: slice, remote=False):
    """Greedy new tokens `[batch, NEW_TOKENS]`; scaled weights act at every position, whatever `where` says."""
    with model.generate(batch, remote=remote, **greedy()) as tracer:
        for _ in tracer.iter[:NEW_TOKENS]:
            for layer, index in getattr(edit, "layers", ()):
                if edit.kind == "values":
                    m = mlp_out(model, layer).input  # [batch, positions, d_mlp], after the activation function
                    m[..., index] = scaled(edit.kind, m[..., index], edit.factor, None)
                else:
                    keys = key(model, layer)
                    h = keys.output  # [batch, positions, d_mlp], before the activation function
                    bias = None if keys.bias is None else keys.bias[index]
                    h[..., index] = scaled(edit.kind, h[..., index], edit.factor, bias)
        ids = tracer.result.save()
    return ids[:, batch["input_ids"].shape[1] :]


def negative_log_likelihood(model, batch: dict, edit, where: slice, remote=False):
    """Summed negative log-likelihood of each row's tokens but the first, `[batch]` float64, nats."""
    with model.trace(batch, remote=remote):
        for layer, index in getattr(edit, "layers", ()):
            if edit.kind == "values":
                m = mlp_out(model, layer).input
                m[..., index] = scaled(edit.kind, m[..., index], edit.factor, None)
            else:
                keys = key(model, layer)
                h = keys.output
                bias = None if keys.bias is None else keys.bias[index]
                h[..., index] = scaled(edit.kind, h[..., index], edit.factor, bias)
        losses = summed_nll(model.output.logits, batch["input_ids"], batch["attention_mask"]).save()
    return losses


def write(run) -> dict:
    """The record and the figure."""
    from lib import paper, plots

    def published(condition: str, kind: str) -> dict:
        return paper.lee("unalign" if condition == "unalign k=7 x10" and kind == "keys" else condition)

    record = run.finish(published)
    plots.restored([(row, restored(row)) for row in record["rows"]], run.work / "figures" / "restored.png")
    return record


def restored(row: dict) -> dict | None:
    """How much of what DPO cut an edit brings back, in %; None for what is no edit of the DPO model or has no share."""
    share = row["percent_of_dpo"]
    elsewhere = row["kind"] == "none" or row["condition"] == "control:in_base_model"
    if elsewhere or share["mean"] is None or share["low"] is None:
        return None
    return {"mean": 100 - share["mean"], "low": 100 - share["high"], "high": 100 - share["low"]}


def report(console, record: dict) -> None:
    """Print how much of what DPO cut comes back."""
    from lib.tables import with_interval

    for row in record["rows"]:
        if (back := restored(row)) and not row["of"]:
            console.print(
                f"{row['condition']}, {row['kind']}: {with_interval(back, 0)} % of DPO's cut come back", markup=False
            )


if __name__ == "__main__":
    main()
