"""Figures that more than one script draws; each function writes one PNG."""

from pathlib import Path

import matplotlib
import numpy as np

from lib import paper

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  the backend comes first
from matplotlib.ticker import MaxNLocator  # noqa: E402

COLORS = {"TP": "#c0392b", "TN": "#2c5aa0", "AP": "#148f77", "AN": "#e08e0b"}  # Yang's: red, blue, teal, orange
GROUP_NAMES = {"TP": "toxic, positive", "TN": "toxic, negative", "AP": "anti-toxic, positive", "AN": "anti-toxic, neg."}


def _save(figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)


def group_shares(ours: dict[str, float], reduction: dict[str, float], theirs: str | None, path: Path) -> None:
    """Each group's share of the neurons that reduce (Yang table 5), and of the reduction (figures 2a, 6a), in %."""
    published = dict(zip(ours, paper.GROUP_SHARES[theirs], strict=False)) if theirs else None
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.4), gridspec_kw={"width_ratios": [1.6, 1]})
    names, colors = list(ours), [COLORS[name] for name in ours]
    width = 0.4 if published else 0.8
    places = np.arange(len(names))
    bars = left.bar(places - (width / 2 if published else 0), list(ours.values()), width, color=colors)
    left.bar_label(bars, fmt="%.1f", fontsize=8)
    if published:
        bars = left.bar(
            places + width / 2, [published[n] for n in names], width, color="white", edgecolor=colors, hatch="///",
            label=f"published, {theirs}",
        )  # fmt: skip
        left.bar_label(bars, fmt="%.1f", fontsize=8)
        left.legend(frameon=False, fontsize=8)
    left.set_xticks(places, [f"{n}↓\n{GROUP_NAMES[n]}" for n in names], fontsize=7)
    left.set_ylabel("% of the neurons that reduce")
    left.set_ylim(0, max([*ours.values(), *(published or {"": 0}).values()]) * 1.3)
    left.set_title("Neurons (cf. Yang et al. table 5)", fontsize=10)
    bars = right.bar(places, [reduction[n] for n in names], 0.8, color=colors)
    right.bar_label(bars, fmt="%.1f", fontsize=8)
    right.set_xticks(places, [f"{n}↓" for n in names], fontsize=8)
    right.set_ylabel("% of the reduction")
    right.set_title("Reduction (cf. figures 2a, 6a)", fontsize=10)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    _save(figure, path)


def cumulative_reduction(delta: np.ndarray, masks: dict[str, np.ndarray], path: Path) -> None:
    """Reduction of toxic projection summed over neurons in the order of their own reduction (Yang figure 2b).

    delta `[n_layers, d_mlp]`; masks: group -> `[n_layers, d_mlp]` bool.
    """
    order = np.argsort(-delta, axis=None)
    order = order[delta.flat[order] > 0]
    figure, axes = plt.subplots(figsize=(5.5, 3.4))
    for name, mask in masks.items():
        axes.plot(np.cumsum(delta.flat[order] * mask.flat[order]), color=COLORS[name], label=f"{name}↓")
    axes.set_xlabel("neurons, ranked by reduction")
    axes.set_ylabel("cumulative reduction\nof toxic projection")
    axes.set_title("Cumulative reduction by group (cf. Yang et al. figure 2b)", fontsize=10)
    axes.legend(frameon=False, loc="center right")
    axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def activation_shifts(
    delta: np.ndarray,
    pre: np.ndarray,
    post: np.ndarray,
    masks: dict[str, np.ndarray],
    ranks: tuple[int, int],
    path: Path,
) -> None:
    """Activation shifts of the neurons of some ranks, by group (Yang figures 2c, 6c and 7).

    delta, pre, post `[n_layers, d_mlp]`; ranks: from (inclusive) and to (exclusive) in the order of reduction.
    """
    order = np.argsort(-delta, axis=None)[slice(*ranks)]
    figure, axes = plt.subplots(1, len(masks), figsize=(9, 3), sharey=True)
    for panel, (name, mask) in zip(axes, masks.items(), strict=True):
        chosen = order[mask.flat[order]]
        place = np.flatnonzero(mask.flat[order]) + ranks[0]
        shift = post.flat[chosen] - pre.flat[chosen]
        panel.axhline(0, color="0.7", lw=0.8)
        panel.scatter(place, shift, s=6, color=COLORS[name], alpha=0.7, linewidths=0)
        falls = f"{100 * (shift < 0).mean():.0f} % fall" if len(chosen) else "none"
        panel.set_title(f"{name}↓  ({len(chosen)} neurons, {falls})", fontsize=8)
        panel.set_xlabel("rank by reduction", fontsize=8)
        panel.tick_params(labelsize=7)
        panel.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("activation shift\n(mean after - before DPO)", fontsize=8)
    figure.suptitle(
        f"Activation shifts of ranks {ranks[0]:,}-{ranks[1]:,} (cf. Yang et al. figures 2c, 7)", fontsize=10, y=1.04
    )
    _save(figure, path)


def reduction_by_layer(delta: np.ndarray, masks: dict[str, np.ndarray], path: Path) -> None:
    """Stacked reduction of the four groups in each layer, and the layer's net change (Yang figure 8)."""
    figure, axes = plt.subplots(figsize=(6.5, 3.4))
    bottom = np.zeros(len(delta))
    for name, mask in masks.items():
        part = (delta * mask).sum(1)
        axes.bar(range(len(delta)), part, bottom=bottom, color=COLORS[name], label=f"{name}↓", width=0.8)
        bottom += part
    axes.plot(delta.sum(1), "o-", color="black", ms=3, lw=1, label="net of all neurons")
    axes.axhline(0, color="0.5", lw=0.8)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("layer")
    axes.set_ylabel("reduction of toxic projection")
    axes.set_title("Reduction by layer (cf. Yang et al. figure 8)", fontsize=10)
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def toxicity_perplexity(rows: list[dict], scorer: str, path: Path) -> None:
    """Toxicity with intervals against log-perplexity with every position edited, one point per condition."""
    figure, axes = plt.subplots(figsize=(7, 4.6))
    style = {"none": ("k", "s"), "clamp": ("#c0392b", "o"), "shift": ("#2c5aa0", "^"), "scale": ("#148f77", "D")}
    named = set()
    for row in rows:
        kind = "none" if row["condition"] in {"none", "dpo"} else row["kind"]
        color, marker = style[kind]
        toxicity = row["toxicity"]
        around = [[toxicity["mean"] - toxicity["low"]], [toxicity["high"] - toxicity["mean"]]]
        axes.errorbar(
            row["log_ppl"], toxicity["mean"], yerr=around, color=color, marker=marker, ms=6, lw=0, elinewidth=0.7,
            alpha=0.9, label=kind if kind not in named | {"none"} else None,
        )  # fmt: skip
        named.add(kind)
    axes.set_xlabel("log-perplexity, every position edited (nats per token; lower is better)")
    axes.set_ylabel(f"toxicity ({scorer}), 95 % interval")
    axes.set_title("Toxicity against perplexity", fontsize=10)
    axes.legend(frameon=False, title="edit", fontsize=8)
    axes.grid(color="0.93")
    axes.margins(x=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    figure.canvas.draw()  # settles the axes' limits, which the labels' places depend on
    taken = []
    for row in rows:
        text = {"none": "base model", "dpo": "DPO"}.get(row["condition"], row["condition"].replace("_", " "))
        taken.append(_label(figure, axes, text, (row["log_ppl"], row["toxicity"]["mean"]), taken))
    _save(figure, path)


def _label(figure, axes, text: str, point: tuple[float, float], taken: list):
    """Write `text` beside a point where it covers no earlier label; returns the box that it takes, in pixels."""
    for dy in (3, -8, 13, -18, 23, -28):
        for dx, side in ((6, "left"), (-6, "right")):
            label = axes.annotate(text, point, (dx, dy), textcoords="offset points", fontsize=7, ha=side)
            box = label.get_window_extent(figure.canvas.get_renderer())
            if not any(box.overlaps(other) for other in taken):
                return box
            label.remove()
    axes.annotate(text, point, (6, 3), textcoords="offset points", fontsize=7)
    return box
