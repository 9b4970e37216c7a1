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
    """Toxicity with intervals against log-perplexity with every position edited; controls hollow and without a name."""
    rows = [row for row in rows if "log_ppl" in row]  # of controls under the faithful protocol it is not measured
    figure, axes = plt.subplots(figsize=(7, 4.6))
    style = {"none": ("k", "s"), "clamp": ("#c0392b", "o"), "shift": ("#2c5aa0", "^"), "scale": ("#148f77", "D")}
    named = set()
    for row in rows:
        kind = "none" if row["condition"] in {"none", "dpo"} else row["kind"]
        color, marker = style[kind]
        toxicity = row["toxicity"]
        if row["of"]:
            label = None if f"control {kind}" in named else f"controls, {kind}"
            axes.plot(row["log_ppl"], toxicity["mean"], marker, color=color, mfc="none", ms=4, alpha=0.6, label=label)
            named.add(f"control {kind}")
            continue
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
    for row in (row for row in rows if not row["of"]):
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


def top_activations(pre: np.ndarray, post: np.ndarray, path: Path) -> None:
    """Mean activations before and after DPO of the neurons best aligned with the probe, in that order (Yang figure 3).

    pre, post `[n]`.
    """
    figure, axes = plt.subplots(figsize=(7, 3.2))
    places = np.arange(1, len(pre) + 1)
    axes.axhline(0, color="0.6", lw=0.8)
    axes.vlines(places, pre, post, color="0.75", lw=1)
    axes.plot(places, pre, "o", ms=3, color="#c0392b", label=f"before DPO ({100 * (pre < 0).mean():.0f} % negative)")
    axes.plot(places, post, "o", ms=3, color="#2c5aa0", label=f"after DPO ({100 * (post < 0).mean():.0f} % negative)")
    axes.set_yscale("symlog", linthresh=float(np.median(np.abs(pre))) or 1.0)
    axes.set_xlabel("neurons, ranked by cosine with the probe")
    axes.set_ylabel("mean activation")
    axes.set_title(f"The {len(pre)} neurons best aligned with the probe (cf. Yang et al. figure 3)", fontsize=10)
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def reduction_bars(rows: list[dict], path: Path) -> None:
    """Share of DPO's cut in toxicity that each edit makes (%), with intervals, and the published one (table 3)."""
    edits = [row for row in rows if row["kind"] != "none" and "percent_of_dpo" in row]  # not with --post means:FILE
    shown = [row for row in edits if row["percent_of_dpo"]["mean"] is not None]
    figure, axes = plt.subplots(figsize=(7.5, 0.34 * len(shown) + 1.4))
    colors = {"clamp": "#c0392b", "shift": "#2c5aa0", "scale": "#148f77"}
    for place, row in enumerate(shown):
        value = row["percent_of_dpo"]
        axes.barh(place, value["mean"], color=colors[row["kind"]], alpha=0.35 if row["of"] else 0.85, height=0.7)
        if value["low"] is not None:
            axes.plot([value["low"], value["high"]], [place, place], color="0.2", lw=1)
        if "percent_of_dpo" in row.get("published", {}):
            axes.plot(row["published"]["percent_of_dpo"], place, "kD", ms=5, mfc="white")
    labels = [
        f"{row['condition'].replace('_', ' ')}{' (held out)' if row['means'] == 'held_out' else ''}, {row['kind']}"
        for row in shown
    ]
    axes.set_yticks(range(len(shown)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.axvline(0, color="0.5", lw=0.8)
    axes.axvline(100, color="0.5", lw=0.8, ls=":")
    axes.set_xlabel("% of DPO's cut in toxicity (100: DPO itself; diamonds: published; pale: controls)", fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def restored(rows: list[tuple[dict, dict | None]], path: Path) -> None:
    """How much of DPO's cut in toxicity each un-aligning brings back (%), with intervals; controls pale.

    rows: of a record, each with its share, or None where there is none.
    """
    shown = [(row, share) for row, share in rows if share]
    colors = {"keys": "#c0392b", "keys and bias": "#8e44ad", "values": "#2c5aa0"}
    figure, axes = plt.subplots(figsize=(7.5, 0.32 * max(3, len(shown)) + 1.3))
    for place, (row, share) in enumerate(shown):
        axes.barh(place, share["mean"], color=colors[row["kind"]], alpha=0.35 if row["of"] else 0.85, height=0.7)
        axes.plot([share["low"], share["high"]], [place, place], color="0.2", lw=1)
    axes.set_yticks(
        range(len(shown)), [f"{row['condition'].replace('_', ' ')}, {row['kind']}" for row, _ in shown], fontsize=8
    )
    axes.invert_yaxis()
    axes.axvline(0, color="0.5", lw=0.8)
    axes.axvline(100, color="0.5", lw=0.8, ls=":")
    axes.set_xlabel("% of DPO's cut in toxicity that comes back (100: the base model; pale: controls)", fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def robustness(variants: list[dict], rows: list[dict], path: Path) -> None:
    """Toxicity and perplexity of each variant of DPO, and the share of its cut that un-aligning brings back.

    variants, rows: `robustness` and `rows` of robust_alignment.py's record.
    """
    by_name = {row["condition"]: row for row in rows if not row["of"]}
    names = [one["variant"] for one in variants]
    labels = ["plain DPO" if name == "dpo" else name for name in names]
    figure, panels = plt.subplots(1, 3, figsize=(11, 0.4 * len(names) + 1.5), sharey=True)
    places = np.arange(len(names))
    for shift, suffix, color, label in (
        (-0.18, "", "#2c5aa0", "as trained"),
        (0.18, " un-aligned", "#c0392b", "un-aligned"),
    ):
        found = [by_name[name + suffix] for name in names]
        mean = np.array([row["toxicity"]["mean"] for row in found])
        around = np.abs([[row["toxicity"][end] for row in found] for end in ("low", "high")] - mean)
        panels[0].barh(places + shift, mean, 0.34, xerr=around, color=color, label=label, error_kw={"lw": 0.8})
        panels[1].plot([row["log_ppl"] for row in found], places + shift, "o", color=color)
    base = by_name["none"]
    panels[0].axvline(base["toxicity"]["mean"], color="0.4", ls=":", lw=1, label="base model")
    panels[1].axvline(base["log_ppl"], color="0.4", ls=":", lw=1)
    for place, one in enumerate(variants):
        if share := one.get("percent_restored"):
            panels[2].errorbar(
                share["mean"], place, xerr=[[share["mean"] - share["low"]], [share["high"] - share["mean"]]],
                fmt="o", color="#c0392b", elinewidth=0.8,
            )  # fmt: skip
        if random := one.get("percent_restored_random"):
            panels[2].plot(random["mean"], place, "o", mfc="none", color="0.5")
    panels[2].axvline(0, color="0.5", lw=0.8)
    panels[0].set_yticks(places, labels, fontsize=8)
    panels[0].invert_yaxis()
    panels[0].legend(frameon=False, fontsize=7)
    titles = ("toxicity", "log-perplexity", "% of its cut that comes back\n(hollow: random keys)")
    for axes, title in zip(panels, titles, strict=True):
        axes.set_title(title, fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    _save(figure, path)


def trade_off(rows: list[dict], scorer: str, path: Path) -> None:
    """Toxicity against log-perplexity with every position edited, intervals on both; one line for each series of edits.

    A series holds the conditions whose names differ in alpha alone. Controls are small and pale. The grey step is the
    Pareto front: nothing measured lies below and left of it.
    """
    shown = [row for row in rows if "log_ppl" in row and row["means"] != "same"]  # held-out means where there are any
    base = next(row for row in rows if row["condition"] == "none")
    figure, axes = plt.subplots(figsize=(8, 5))
    series: dict[tuple, list] = {}
    for row in shown:
        if row["kind"] == "none":
            continue
        words = [word for word in row["condition"].split() if not word.startswith(("a=", "x", "alpha"))]
        series.setdefault((" ".join(words), row["kind"]) if not row["of"] else ("control", row["kind"]), []).append(row)
    markers = {"clamp": "o", "shift": "^", "scale": "D", "steer": "s"}
    palette = plt.get_cmap("tab10").colors
    names = [key for key in series if key[0] != "control"]
    for (name, kind), points in series.items():
        control = name == "control"
        points.sort(key=lambda row: row["log_ppl"])
        x = np.array([row["log_ppl"] for row in points])
        y = np.array([row["toxicity"]["mean"] for row in points])
        color = "0.65" if control else palette[names.index((name, kind)) % 10]
        label = f"controls, {kind}" if control else f"{name}, {kind}".strip(", ")
        if control:
            axes.plot(x, y, markers[kind], color=color, ms=3, label=label)
            continue
        spread = [[row["toxicity"][end] for row in points] for end in ("low", "high")]
        change = [[base["log_ppl"] + row["log_ppl_change"][end] for row in points] for end in ("low", "high")]
        axes.errorbar(
            x, y, yerr=np.abs(np.array(spread) - y), xerr=np.abs(np.array(change) - x), fmt=markers[kind] + "-",
            ms=4, lw=0.9, elinewidth=0.5, color=color, label=label,
        )  # fmt: skip
    for name, text in (("none", "base model"), ("dpo", "DPO")):
        for row in (row for row in rows if row["condition"] == name):
            axes.plot(row["log_ppl"], row["toxicity"]["mean"], "k*" if name == "dpo" else "kX", ms=11, label=text)
    front = pareto_front([(row["log_ppl"], row["toxicity"]["mean"]) for row in shown])
    axes.step(*zip(*front, strict=True), where="post", color="0.5", lw=0.8, ls=":")
    axes.set_xscale("log")
    ticks = [
        t for t in (3, 3.5, 4, 4.5, 5, 6, 7, 8, 10, 12, 15, 20, 30) if min(r["log_ppl"] for r in shown) * 0.97 <= t
    ]
    top = max(row["log_ppl"] for row in shown) * 1.03
    axes.set_xticks([t for t in ticks if t <= top], [f"{t:g}" for t in ticks if t <= top])
    axes.minorticks_off()
    axes.set_xlabel("log-perplexity, edited at every position (nats per token)")
    axes.set_ylabel(f"toxicity ({scorer})")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def pareto_front(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points (both lower is better) that no other is at least as good as in both; from the left to the right."""
    front, best = [], np.inf
    for x, y in sorted(points):
        if y < best:
            front.append((x, y))
            best = y
    return front


def opposing_by_layer(delta: np.ndarray, path: Path) -> None:
    """What each layer's neurons take away from the toxic projection and what they add (Yang figures 1 and 5).

    The area between is the net change: blue where the layer reduces, orange where it increases. delta
    `[n_layers, d_mlp]`.
    """
    reduction, increase = np.clip(delta, 0, None).sum(1), -np.clip(delta, None, 0).sum(1)
    blue, orange, layers = "#2c5aa0", "#e08e0b", np.arange(len(delta))
    figure, axes = plt.subplots(figsize=(7, 3.6))
    for where, color in ((reduction >= increase, blue), (reduction <= increase, orange)):
        axes.fill_between(layers, increase, reduction, where, color=color, interpolate=True, alpha=0.25, linewidth=0)
    axes.plot(layers, reduction, "o-", ms=4, lw=0.8, color=blue, label="neurons that reduce")
    axes.plot(layers, increase, "o-", ms=4, lw=0.8, color=orange, label="neurons that increase")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylim(0)
    axes.set_xlabel("layer")
    axes.set_ylabel("summed change of\ntoxic projection (absolute)")
    net = 100 * (reduction - increase).sum() / ((reduction + increase).sum() or 1)
    axes.set_title(f"Opposing effects (cf. Yang et al. figures 1, 5); net: {net:.1f} % of both sums", fontsize=10)
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def shift_density(shift: np.ndarray, path: Path) -> None:
    """Density of all neurons' activation shifts, before - after DPO (Yang figure 4), on a log scale for the tails."""
    mean, sd = shift.mean(), shift.std()
    figure, axes = plt.subplots(figsize=(7, 3.6))
    axes.hist(shift.ravel(), 201, density=True, histtype="stepfilled", color="#2c5aa0")
    axes.axvspan(
        mean - sd, mean + sd, color="#e08e0b", alpha=0.4, lw=0, zorder=0, label=f"mean {mean:.2g} ± 1 SD, {sd:.3g}"
    )
    axes.set_yscale("log")
    axes.set_xlabel("activation shift (mean before - after DPO)")
    axes.set_ylabel("density")
    axes.set_title("Activation shifts of all neurons (cf. Yang et al. figure 4)", fontsize=10)
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def subspace(row: dict, published: dict, independent: float, path: Path) -> None:
    """Shares of neurons with conflicting signs beside their controls, and how stable the subspace is (Yang app. G).

    row: of toxic_subspace.py's record; independent: the share (%) that three independent signs give.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 3.8), gridspec_kw={"width_ratios": [1.3, 1]})
    names = {"alignment": "alignment conflicts", "change": "change after DPO conflicts"}
    bars = {
        "toxic subspace": ("#dd6b5e", [row[name] for name in names], None),
        "its 4 sign choices": ("#f3cdc8", *_range([row[f"{name}_sign_choices"] for name in names])),
        "random directions": ("0.65", *_range([row[f"{name}_random"] for name in names])),
        f"published, {published['model']}": ("white", [published[name] for name in names], None),
    }
    for at, (label, (color, heights, around)) in enumerate(bars.items()):
        places = np.arange(len(names)) + 0.2 * (at - 1.5)
        drawn = left.bar(
            places, heights, 0.19, yerr=around, color=color, edgecolor="0.3", lw=0.6, capsize=3, label=label
        )
        left.bar_label(drawn, [f"{height:.1f}" for height in heights], fontsize=7, label_type="center")
    left.axhline(independent, color="black", ls=":", lw=1, label=f"independent signs, {independent:.0f} %")
    left.set_xticks(range(len(names)), names.values(), fontsize=8)
    left.set_ylim(0, 135)
    left.set_yticks(range(0, 101, 25))
    left.set_ylabel("% of neurons")
    left.set_title("Conflicting signs along three directions", fontsize=10)
    left.legend(frameon=False, fontsize=7, ncols=2, loc="upper center")
    for step, marker in zip(row["stability"], "os", strict=False):
        smaller, larger = step["vectors"]
        for name, color, label in (("angles", "#c0392b", "best aligned"), ("angles_random", "0.5", "random neurons")):
            right.plot(
                [1, 2, 3], step[name], marker + "-", ms=5, lw=0.8, color=color, label=f"{label}, {smaller} to {larger}"
            )
    right.set_xticks([1, 2, 3])
    right.set_ylim(0, 90)
    right.set_yticks(range(0, 91, 15))
    right.set_xlabel("principal angle")
    right.set_ylabel("degrees")
    right.set_title("How far more vectors turn the subspace", fontsize=10)
    right.legend(frameon=False, fontsize=7)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    _save(figure, path)


def logit_lens(row: dict, path: Path) -> None:
    """Probability of the base model's next token after each half-layer, before and after DPO (Lee figure 1).

    Shaded: the half-layers that raise it most before DPO. row: of logit_lens.py's record.
    """
    kinds = [kind for kind in ("toxic", "plain") if row[kind]["prompts"]]
    figure, panels = plt.subplots(1, len(kinds), figsize=(5.2 * len(kinds), 3.6), squeeze=False)
    for axes, kind in zip(panels[0], kinds, strict=True):
        for name, color, label in (("pre", "#c0392b", "before DPO"), ("post", "#2c5aa0", "after DPO")):
            found = row[kind][name]
            places = (
                np.arange(-1, len(found["probability"]) - 1) / 2
            )  # embedding, mid of layer l at l, its end at l + 1/2
            axes.plot(places, found["probability"], "o-", ms=2.5, lw=1, color=color, label=label)
            axes.fill_between(places, found["low"], found["high"], color=color, alpha=0.15, lw=0)
        for place in row[kind]["pre"]["raised_most"]:
            layer, half = place.removeprefix("L").split()
            end = int(layer) + (half == "end") / 2
            axes.axvspan(end - 0.5, end, color="0.85" if half == "end" else "#f3e3c3", lw=0, zorder=0)
        axes.set_xlabel("layer (after attention at l, after the MLP at l + 1/2)", fontsize=8)
        axes.set_title(f"next token {kind} ({row[kind]['prompts']} prompts)", fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_ylabel("probability of that token")
    panels[0][0].legend(frameon=False, fontsize=8)
    figure.suptitle("Logit lens (cf. Lee et al. figure 1); grey: MLPs, ochre: attention that raise it most", fontsize=9)
    figure.tight_layout()
    _save(figure, path)


def toxic_activations(found: list[dict], path: Path) -> None:
    """Mean activations of toxic neurons before and after DPO, on own and on shared text (Lee figure 2).

    found: `neurons` of residual_shift.py's record.
    """
    texts = {"own": "each model's own text", "shared": "the base model's text", "last": "end of the prompt"}
    figure, panels = plt.subplots(1, len(texts), figsize=(9.5, 3.2), sharey=True)
    places = np.arange(len(found))
    for axes, (text, title) in zip(panels, texts.items(), strict=True):
        for name, color, side in (("pre", "#c0392b", -0.2), ("post", "#2c5aa0", 0.2)):
            axes.bar(places + side, [one[text][name] for one in found], 0.4, color=color, label=f"{name}-DPO")
        axes.axhline(0, color="0.5", lw=0.8)
        axes.set_xticks(places, [one["neuron"] for one in found], rotation=45, ha="right", fontsize=7)
        axes.set_title(title, fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("mean activation")
    panels[0].legend(frameon=False, fontsize=8)
    figure.suptitle("Toxic neurons before and after DPO (cf. Lee et al. figure 2)", fontsize=10)
    figure.tight_layout()
    _save(figure, path)


def offset(points: np.ndarray, activations: np.ndarray, name: str, path: Path) -> None:
    """Residual streams on their mean shift and first principal component, coloured by a neuron (Lee figures 4, 6).

    points `[2, 2, n_prompts]`: before and after DPO, both axes, of the stream before the neuron's MLP; activations
    `[2, n_prompts]`: the neuron's.
    """
    figure, axes = plt.subplots(figsize=(6.2, 4.4))
    limit = (float(np.quantile(np.abs(activations), 0.95)) if activations.size else 0) or 1.0
    axes.plot(points[:, 0], points[:, 1], ":", color="0.8", lw=0.6, zorder=0)  # a line for each prompt
    for (x, y), m, marker, label in zip(points, activations, "o^", ("before", "after"), strict=True):
        shown = axes.scatter(
            x, y, c=m, cmap="coolwarm", vmin=-limit, vmax=limit, marker=marker, s=22, edgecolor="0.3",
            linewidths=0.3, label=f"{label} DPO ({100 * (m > 0).mean():.0f} % fire)",
        )  # fmt: skip
    figure.colorbar(shown, label=f"activation of {name}")
    axes.set_xlabel("projection on the mean shift of other prompts")
    axes.locator_params(axis="x", nbins=5)
    axes.set_ylabel("first principal component of the rest")
    axes.set_title(f"Streams before the MLP of {name} (cf. Lee et al. figure 4)", fontsize=10)
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def shift_cosines(cosines: list[np.ndarray], activation: np.ndarray, layer: int, path: Path) -> None:
    """How earlier layers' value vectors moved relative to a layer's offset, and their activations (Lee figure 5).

    cosines: `[d_mlp]` for each earlier layer; activation `[n earlier layers, d_mlp]`: means before DPO.
    """
    step = max(1, len(cosines) // 8)
    shown = range(len(cosines) - 1, -1, -step)[:8]
    figure, panels = plt.subplots(2, len(shown), figsize=(1.5 * len(shown) + 1, 3.6), sharey="row", squeeze=False)
    limit = float(np.quantile(np.abs(activation), 0.98)) or 1.0
    for column, earlier in enumerate(sorted(shown)):
        for axes, values, bins, color in (
            (panels[0][column], cosines[earlier], np.linspace(-1, 1, 41), "#2c5aa0"),
            (panels[1][column], activation[earlier], np.linspace(-limit, limit, 41), "#e08e0b"),
        ):
            axes.hist(
                np.clip(values, bins[0], bins[-1]), bins, weights=np.full(len(values), 100 / len(values)), color=color
            )
            axes.axvline(0, color="0.4", lw=0.8)
            axes.text(0.03, 0.9, f"{100 * (values < 0).mean():.0f} % < 0", transform=axes.transAxes, fontsize=6)
            axes.tick_params(labelsize=6)
            axes.spines[["top", "right"]].set_visible(False)
        panels[0][column].set_title(f"layer {earlier}", fontsize=8)
    panels[0][0].set_ylabel("% of value vectors", fontsize=7)
    panels[1][0].set_ylabel("% of neurons", fontsize=7)
    figure.suptitle(
        f"Above: cosine of a value vector's move with layer {layer}'s offset; below: mean activation "
        "(cf. Lee et al. figure 5)", fontsize=8,
    )  # fmt: skip
    figure.tight_layout()
    _save(figure, path)


def _range(values: list[dict]) -> tuple[list[float], list[list[float]]]:
    """Means and the error bars down to `low` and up to `high`, as matplotlib takes them."""
    means = [value["mean"] for value in values]
    return means, [[v["mean"] - v["low"] for v in values], [v["high"] - v["mean"] for v in values]]


def probe_scores(logits: np.ndarray, labels: np.ndarray, listed: np.ndarray, path: Path) -> None:
    """The probe's log-odds of held-out comments, toxic and other, with and without a listed word. All `[n]`."""
    figure, axes = plt.subplots(figsize=(6, 3.2))
    edges = np.histogram_bin_edges(logits, 24)
    parts = [logits[(labels == 0)], logits[(labels == 1) & ~listed], logits[(labels == 1) & listed]]
    names = ["not toxic", "toxic, no listed word", "toxic, a listed word"]
    axes.hist(parts, edges, stacked=True, label=names, color=["#148f77", "#e08e0b", "#c0392b"], edgecolor="white")
    axes.axvline(0, color="black", linewidth=0.8, linestyle=":")
    axes.set_xlabel("the probe's log-odds of being toxic")
    axes.set_ylabel("held-out comments")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def listed_vectors(rows: list[dict], path: Path) -> None:
    """Of each kind of vector the share with a listed word among its nearest tokens: a dot a seed (Lee table 1)."""
    names = list(rows[0]["counts"])
    figure, axes = plt.subplots(figsize=(6, 2.8))
    for at, name in enumerate(reversed(names)):
        shares = [100 * row["counts"][name]["listed"] / row["counts"][name]["vectors"] for row in rows]
        axes.plot(shares, [at] * len(shares), "o", color="#2c5aa0" if "random" in name else "#c0392b", alpha=0.6)
    labels = [f"{name} ({rows[0]['counts'][name]['vectors']})" for name in reversed(names)]
    axes.set_yticks(range(len(names)), labels, fontsize=8)
    axes.set_xlim(-3, 103)
    axes.set_xlabel("% with a listed word among the nearest tokens")
    axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def pair_sides(pairs: list[dict], min_gap: float, path: Path) -> None:
    """Toxicity of both sides of each pair (`unpert_gen_toxicity`, `pert_gen_toxicity`), and which are kept."""
    preferred, rejected = (np.array([pair[f"{side}_gen_toxicity"] for pair in pairs]) for side in ("unpert", "pert"))
    kept = rejected - preferred >= min_gap
    figure, axes = plt.subplots(figsize=(4.2, 4))
    for chosen, label, color in ((kept, "kept", "#148f77"), (~kept, "dropped", "#b0b0b0")):
        axes.scatter(preferred[chosen], rejected[chosen], s=14, color=color, label=f"{label}: {chosen.sum()}")
    axes.plot([0, 1 - min_gap], [min_gap, 1], color="black", linewidth=0.8, linestyle=":")
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    axes.set_xlabel("toxicity of the preferred side")
    axes.set_ylabel("toxicity of the rejected side")
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def training(log: list[dict], path: Path) -> None:
    """Loss and accuracy by update, of training batches and of the held-out pairs; log: lines of log.jsonl."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3))
    valid = [line for line in log if "valid_loss" in line]
    for axes, name in ((left, "loss"), (right, "accuracy")):
        axes.plot([line["step"] for line in log], [line[name] for line in log], color="#2c5aa0", label="batches")
        axes.plot([line["step"] for line in valid], [line[f"valid_{name}"] for line in valid], "o-", color="#c0392b",
                  label="held-out pairs")  # fmt: skip
        axes.set_xlabel("update")
        axes.set_ylabel(f"DPO {name}")
        axes.set_ylim(0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.spines[["top", "right"]].set_visible(False)
    right.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    _save(figure, path)
