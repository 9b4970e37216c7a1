"""Figures of neurons (groups, activations, layers, toxic subspace) and of the residual stream that they write to."""

from pathlib import Path

import numpy as np
from matplotlib.ticker import MaxNLocator

from lib import paper
from lib.plots import BEFORE_AFTER, BLUE, ORANGE, RED, TEAL, drawn, error_bars

COLORS = {"TP": RED, "TN": BLUE, "AP": TEAL, "AN": ORANGE}
GROUP_NAMES = {"TP": "toxic, positive", "TN": "toxic, negative", "AP": "anti-toxic, positive", "AN": "anti-toxic, neg."}
Masks = dict[str, np.ndarray]


def group_shares(ours: dict[str, float], reduction: dict[str, float], theirs: str | None, path: Path) -> None:
    """Each group's share of the neurons that reduce (Yang table 5), and of the reduction (figures 2a, 6a), in %."""
    names, colors, places = list(ours), [COLORS[name] for name in ours], np.arange(len(ours))
    neurons = [(list(ours.values()), {"color": colors})]
    if theirs:
        style = {"color": "white", "edgecolor": colors, "hatch": "///", "label": f"published, {theirs}"}
        neurons.append((paper.GROUP_SHARES[theirs][: len(ours)], style))
    parts = [([reduction[name] for name in names], {"color": colors})]
    with drawn(path, (9.5, 3.4), tight=True, ncols=2, width_ratios=[1.6, 1]) as (left, right):
        for axes, series in ((left, neurons), (right, parts)):
            width = 0.8 / len(series)
            for at, (heights, style) in enumerate(series):
                bars = axes.bar(places + width * (at - (len(series) - 1) / 2), heights, width, **style)
                axes.bar_label(bars, fmt="%.1f", fontsize=8)
        left.set_xticks(places, [f"{name}↓\n{GROUP_NAMES[name]}" for name in names], fontsize=7)
        left.set(ylabel="% of the neurons that reduce", title="Neurons (cf. Yang et al. table 5)")
        left.set_ylim(0, 1.3 * max(max(heights) for heights, _ in neurons))
        right.set_xticks(places, [f"{name}↓" for name in names], fontsize=8)
        right.set(ylabel="% of the reduction", title="Reduction (cf. figures 2a, 6a)")


def cumulative_reduction(delta: np.ndarray, masks: Masks, path: Path) -> None:
    """Reduction of toxic projection summed over neurons in the order of their own reduction (Yang figure 2b).

    delta `[n_layers, d_mlp]`; masks: group -> `[n_layers, d_mlp]` bool.
    """
    order = np.argsort(-delta, axis=None)
    order = order[delta.flat[order] > 0]
    with drawn(path, (5.5, 3.4), legend=10) as axes:
        for name, mask in masks.items():
            axes.plot(np.cumsum(delta.flat[order] * mask.flat[order]), color=COLORS[name], label=f"{name}↓")
        axes.set(xlabel="neurons, ranked by reduction", ylabel="cumulative reduction\nof toxic projection")
        axes.set_title("Cumulative reduction by group (cf. Yang et al. figure 2b)")
        axes.legend(loc="center right")


def activation_shifts(
    delta: np.ndarray, pre: np.ndarray, post: np.ndarray, masks: Masks, ranks: tuple[int, int], path: Path
) -> None:
    """Activation shifts of the neurons of some ranks, by group (Yang figures 2c, 6c and 7).

    delta, pre, post `[n_layers, d_mlp]`; ranks: from (inclusive) and to (exclusive) in the order of reduction.
    """
    order = np.argsort(-delta, axis=None)[slice(*ranks)]
    with drawn(path, (9, 3), title=8, label=8, ncols=len(masks), sharey=True) as panels:
        for axes, (name, mask) in zip(panels, masks.items(), strict=True):
            places = np.flatnonzero(mask.flat[order])
            shift = (post - pre).flat[order[places]]
            axes.axhline(0, color="0.7", lw=0.8)
            axes.scatter(places + ranks[0], shift, s=6, color=COLORS[name], alpha=0.7, linewidths=0)
            falls = f"{100 * (shift < 0).mean():.0f} % fall" if len(shift) else "none"
            axes.set(title=f"{name}↓  ({len(shift)} neurons, {falls})", xlabel="rank by reduction")
            axes.tick_params(labelsize=7)
        panels[0].set_ylabel("activation shift\n(mean after - before DPO)")
        title = f"Activation shifts of ranks {ranks[0]:,}-{ranks[1]:,} (cf. Yang et al. figures 2c, 7)"
        panels[0].figure.suptitle(title, fontsize=10, y=1.04)


def reduction_by_layer(delta: np.ndarray, masks: Masks, path: Path) -> None:
    """Stacked reduction of the four groups in each layer, and the layer's net change (Yang figure 8)."""
    bottom = np.zeros(len(delta))
    with drawn(path, (6.5, 3.4)) as axes:
        for name, mask in masks.items():
            part = (delta * mask).sum(1)
            axes.bar(range(len(delta)), part, bottom=bottom, color=COLORS[name], label=f"{name}↓")
            bottom += part
        axes.plot(delta.sum(1), "o-", color="black", ms=3, lw=1, label="net of all neurons")
        axes.axhline(0, color="0.5", lw=0.8)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set(xlabel="layer", ylabel="reduction of toxic projection")
        axes.set_title("Reduction by layer (cf. Yang et al. figure 8)")


def opposing_by_layer(delta: np.ndarray, path: Path) -> None:
    """What each layer's neurons take away from the toxic projection and what they add (Yang figures 1 and 5).

    The area between is the net change: blue where the layer reduces, orange where it increases. delta
    `[n_layers, d_mlp]`.
    """
    layers, less, more = np.arange(len(delta)), np.clip(delta, 0, None).sum(1), -np.clip(delta, None, 0).sum(1)
    net = 100 * (less - more).sum() / ((less + more).sum() or 1)
    with drawn(path, (7, 3.6)) as axes:
        for part, other, color, does in ((less, more, BLUE, "reduce"), (more, less, ORANGE, "increase")):
            axes.fill_between(layers, more, less, part >= other, color=color, interpolate=True, alpha=0.25, lw=0)
            axes.plot(layers, part, "o-", ms=4, lw=0.8, color=color, label=f"neurons that {does}")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set(xlabel="layer", ylabel="summed change of\ntoxic projection (absolute)", ylim=(0, None))
        axes.set_title(f"Opposing effects (cf. Yang et al. figures 1, 5); net: {net:.1f} % of both sums")


def shift_density(shift: np.ndarray, path: Path) -> None:
    """Density of all neurons' activation shifts, before - after DPO (Yang figure 4), on a log scale for the tails."""
    mean, sd = shift.mean(), shift.std()
    label = f"mean {mean:.2g} ± 1 SD, {sd:.3g}"
    with drawn(path, (7, 3.6)) as axes:
        axes.hist(shift.ravel(), 201, density=True, histtype="stepfilled", color=BLUE)
        axes.axvspan(mean - sd, mean + sd, color=ORANGE, alpha=0.4, lw=0, zorder=0, label=label)
        axes.set(yscale="log", xlabel="activation shift (mean before - after DPO)", ylabel="density")
        axes.set_title("Activation shifts of all neurons (cf. Yang et al. figure 4)")


def top_activations(pre: np.ndarray, post: np.ndarray, path: Path) -> None:
    """Mean activations before and after DPO of the neurons best aligned with the probe, in that order (Yang figure 3).

    pre, post `[n]`.
    """
    places = np.arange(1, len(pre) + 1)
    with drawn(path, (7, 3.2)) as axes:
        axes.axhline(0, color="0.6", lw=0.8)
        axes.vlines(places, pre, post, color="0.75", lw=1)
        for values, (_, color, when) in zip((pre, post), BEFORE_AFTER, strict=True):
            negative = f"{100 * (values < 0).mean():.0f} % negative"
            axes.plot(places, values, "o", ms=3, color=color, label=f"{when} ({negative})")
        axes.set_yscale("symlog", linthresh=float(np.median(np.abs(pre))) or 1.0)
        axes.set(xlabel="neurons, ranked by cosine with the probe", ylabel="mean activation")
        axes.set_title(f"The {len(pre)} neurons best aligned with the probe (cf. Yang et al. figure 3)")


def toxic_activations(neurons: list[dict], path: Path) -> None:
    """Mean activations of toxic neurons before and after DPO, on own and on shared text (Lee figure 2).

    neurons: `neurons` of residual_shift.py's record.
    """
    texts = {"own": "each model's own text", "shared": "the base model's text", "last": "end of the prompt"}
    places, names = np.arange(len(neurons)), [neuron["neuron"] for neuron in neurons]
    with drawn(path, (9.5, 3.2), title=9, tight=True, ncols=len(texts), sharey=True) as panels:
        for axes, (text, title) in zip(panels, texts.items(), strict=True):
            for side, (name, color, _) in zip((-0.2, 0.2), BEFORE_AFTER, strict=True):
                axes.bar(
                    places + side, [neuron[text][name] for neuron in neurons], 0.4, color=color, label=f"{name}-DPO"
                )
            axes.axhline(0, color="0.5", lw=0.8)
            axes.set_xticks(places, names, rotation=45, ha="right", fontsize=7)
            axes.set_title(title)
        panels[0].set_ylabel("mean activation")
        panels[0].legend()
        panels[0].figure.suptitle("Toxic neurons before and after DPO (cf. Lee et al. figure 2)", fontsize=10)


def subspace(row: dict, published: dict, independent: float, path: Path) -> None:
    """Shares of neurons with conflicting signs beside their controls, and how stable the subspace is (Yang app. G).

    row: of toxic_subspace.py's record; independent: the share (%) that three independent signs give.
    """
    names = {"alignment": "alignment conflicts", "change": "change after DPO conflicts"}
    bars = {
        "toxic subspace": ("#dd6b5e", [row[name] for name in names], None),
        "its 4 sign choices": ("#f3cdc8", *error_bars([row[f"{name}_sign_choices"] for name in names])),
        "random directions": ("0.65", *error_bars([row[f"{name}_random"] for name in names])),
        f"published, {published['model']}": ("white", [published[name] for name in names], None),
    }
    places, style = np.arange(len(names)), {"edgecolor": "0.3", "lw": 0.6, "capsize": 3}
    with drawn(path, (10.5, 3.8), legend=7, tight=True, ncols=2, width_ratios=[1.3, 1]) as (left, right):
        for at, (label, (color, heights, around)) in enumerate(bars.items()):
            bar = left.bar(places + 0.2 * (at - 1.5), heights, 0.19, yerr=around, color=color, label=label, **style)
            left.bar_label(bar, fmt="%.1f", fontsize=7, label_type="center")
        left.axhline(independent, color="black", ls=":", lw=1, label=f"independent signs, {independent:.0f} %")
        left.set_xticks(places, names.values(), fontsize=8)
        left.set(ylim=(0, 135), yticks=range(0, 101, 25), ylabel="% of neurons")
        left.set_title("Conflicting signs along three directions")
        left.legend(ncols=2, loc="upper center")
        for step, marker in zip(row["stability"], "os", strict=False):
            vectors = "{} to {}".format(*step["vectors"])
            for name, color, of in (("angles", RED, "best aligned"), ("angles_random", "0.5", "random neurons")):
                right.plot([1, 2, 3], step[name], marker + "-", ms=5, lw=0.8, color=color, label=f"{of}, {vectors}")
        right.set(xticks=[1, 2, 3], ylim=(0, 90), yticks=range(0, 91, 15), xlabel="principal angle", ylabel="degrees")
        right.set_title("How far more vectors turn the subspace")
        right.legend()


def logit_lens(row: dict, path: Path) -> None:
    """Probability of the base model's next token after each half-layer, before and after DPO (Lee figure 1).

    Shaded: the half-layers that raise it most before DPO. row: of logit_lens.py's record.
    """
    kinds = [kind for kind in ("toxic", "plain") if row[kind]["prompts"]]
    grid = {"ncols": len(kinds), "squeeze": False}
    with drawn(path, (5.2 * len(kinds), 3.6), title=9, label=8, tight=True, **grid) as [panels]:
        for axes, kind in zip(panels, kinds, strict=True):
            for name, color, label in BEFORE_AFTER:
                lens = row[kind][name]
                # The embedding is at -1/2, the middle of layer l at l, its end at l + 1/2.
                places = np.arange(-1, len(lens["probability"]) - 1) / 2
                axes.plot(places, lens["probability"], "o-", ms=2.5, lw=1, color=color, label=label)
                axes.fill_between(places, lens["low"], lens["high"], color=color, alpha=0.15, lw=0)
            for layer, half in (place.removeprefix("L").split() for place in row[kind]["pre"]["raised_most"]):
                end = int(layer) + (half == "end") / 2
                axes.axvspan(end - 0.5, end, color="0.85" if half == "end" else "#f3e3c3", lw=0, zorder=0)
            axes.set_xlabel("layer (after attention at l, after the MLP at l + 1/2)")
            axes.set_title(f"next token {kind} ({row[kind]['prompts']} prompts)")
        panels[0].set_ylabel("probability of that token", fontsize=10)
        panels[0].legend()
        title = "Logit lens (cf. Lee et al. figure 1); grey: MLPs, ochre: attention that raise it most"
        panels[0].figure.suptitle(title, fontsize=9)


def offset(points: np.ndarray, activations: np.ndarray, name: str, path: Path) -> None:
    """Residual streams on their mean shift and first principal component, coloured by a neuron (Lee figures 4, 6).

    points `[2, 2, n_prompts]`: before and after DPO, both axes, of the stream before the neuron's MLP; activations
    `[2, n_prompts]`: the neuron's.
    """
    limit = (float(np.quantile(np.abs(activations), 0.95)) if activations.size else 0) or 1.0
    style = {"cmap": "coolwarm", "vmin": -limit, "vmax": limit, "s": 22, "edgecolor": "0.3", "linewidths": 0.3}
    with drawn(path, (6.2, 4.4)) as axes:
        axes.plot(points[:, 0], points[:, 1], ":", color="0.8", lw=0.6, zorder=0)  # a line for each prompt
        for (x, y), m, marker, (_, _, when) in zip(points, activations, "o^", BEFORE_AFTER, strict=True):
            label = f"{when} ({100 * (m > 0).mean():.0f} % fire)"
            shown = axes.scatter(x, y, c=m, marker=marker, label=label, **style)
        axes.figure.colorbar(shown, label=f"activation of {name}")
        axes.locator_params(axis="x", nbins=5)
        axes.set_xlabel("projection on the mean shift of other prompts")
        axes.set_ylabel("first principal component of the rest")
        axes.set_title(f"Streams before the MLP of {name} (cf. Lee et al. figure 4)")


def shift_cosines(cosines: list[np.ndarray], activation: np.ndarray, layer: int, path: Path) -> None:
    """How earlier layers' value vectors moved relative to a layer's offset, and their activations (Lee figure 5).

    cosines: `[d_mlp]` for each earlier layer; activation `[n earlier layers, d_mlp]`: means before DPO.
    """
    shown = sorted(range(len(cosines) - 1, -1, -max(1, len(cosines) // 8))[:8])
    limit = float(np.quantile(np.abs(activation), 0.98)) or 1.0
    grid = {"nrows": 2, "ncols": len(shown), "sharey": "row", "squeeze": False}
    with drawn(path, (1.5 * len(shown) + 1, 3.6), title=8, label=7, tight=True, **grid) as panels:
        for column, earlier in zip(panels.T, shown, strict=True):
            histograms = ((cosines[earlier], 1, BLUE), (activation[earlier], limit, ORANGE))
            for axes, (values, end, color) in zip(column, histograms, strict=True):
                weights = np.full(len(values), 100 / len(values))
                axes.hist(np.clip(values, -end, end), np.linspace(-end, end, 41), weights=weights, color=color)
                axes.axvline(0, color="0.4", lw=0.8)
                axes.text(0.03, 0.9, f"{100 * (values < 0).mean():.0f} % < 0", transform=axes.transAxes, fontsize=6)
                axes.tick_params(labelsize=6)
            column[0].set_title(f"layer {earlier}")
        panels[0, 0].set_ylabel("% of value vectors")
        panels[1, 0].set_ylabel("% of neurons")
        title = f"Above: cosine of a value vector's move with layer {layer}'s offset; below: mean activation "
        panels[0, 0].figure.suptitle(title + "(cf. Lee et al. figure 5)", fontsize=8)


def listed_vectors(rows: list[dict], path: Path) -> None:
    """Of each kind of vector the share with a listed word among its nearest tokens: a dot a seed (Lee table 1)."""
    kinds = dict(reversed(rows[0]["counts"].items()))
    with drawn(path, (6, 2.8)) as axes:
        for at, name in enumerate(kinds):
            shares = [100 * row["counts"][name]["listed"] / row["counts"][name]["vectors"] for row in rows]
            axes.plot(shares, [at] * len(shares), "o", color=BLUE if "random" in name else RED, alpha=0.6)
        labels = [f"{name} ({counts['vectors']})" for name, counts in kinds.items()]
        axes.set_yticks(range(len(kinds)), labels, fontsize=8)
        axes.set(xlim=(-3, 103), xlabel="% with a listed word among the nearest tokens")
