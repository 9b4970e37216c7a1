"""The style that all figures share, and figures of conditions: of edits, of un-aligned and of robustly trained models.

Each figure is one PNG. The others are in plots_neurons and plots_training.
"""

from collections.abc import Callable
from contextlib import contextmanager
from itertools import cycle, product
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure  # without pyplot: a PNG needs no window, and no figure stays open

RED, BLUE, TEAL, ORANGE, PURPLE = "#c0392b", "#2c5aa0", "#148f77", "#e08e0b", "#8e44ad"  # Yang's four, and one more
BEFORE_AFTER = (("pre", RED, "before DPO"), ("post", BLUE, "after DPO"))
COLORS = {"clamp": RED, "shift": BLUE, "scale": TEAL, "keys": RED, "values": BLUE, "keys and bias": PURPLE, "none": "k"}
MARKERS = {"clamp": "o", "shift": "^", "scale": "D", "steer": "s", "subtract": "v", "none": "s"}


@contextmanager
def drawn(path: Path, size: tuple[float, float], title=10, label=10, legend=8, tight=False, **grid):
    """The axes of a new figure, which is written to `path` once they are drawn; a legend is added where there is none.

    size: inches; title, label, legend: font sizes, points; tight: move the panels apart by what they say; grid:
    arguments of `Figure.subplots`.
    """
    style = {"axes.titlesize": title, "axes.labelsize": label, "legend.fontsize": legend, "legend.frameon": False}
    with matplotlib.rc_context({**style, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=size)
        yield figure.subplots(**grid)
        if not any(axes.get_legend() for axes in figure.axes):
            for axes in (axes for axes in figure.axes if any(axes.get_legend_handles_labels())):
                axes.legend()
        if tight:
            figure.tight_layout()
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=130, bbox_inches="tight", metadata={"Software": None})


def error_bars(values: list[dict]) -> tuple[np.ndarray, np.ndarray]:
    """The means `[n]`, and how far their error bars go down to `low` and up to `high`, `[2, n]`: 0 for no interval.

    A share of nothing has no mean: NaN, which is not drawn.
    """
    mean, low, high = (
        np.array([value["mean"] if value[key] is None else value[key] for value in values], dtype=float)
        for key in ("mean", "low", "high")
    )
    return mean, np.abs([mean - low, high - mean])


def damages(rows: list[dict]) -> list[tuple[str, str, Callable[[dict], float]]]:
    """Axes that toxicity is drawn against: log-perplexity, and KL from the base model where all rows have it.

    A label, the key that holds the interval, and the value of a row, each.
    """
    axes = [("log-perplexity, every position edited (nats a token)", "log_ppl_change", lambda row: row["log_ppl"])]
    if all("kl" in row for row in rows):
        axes.append(("KL(base || edited), every position edited (nats a token)", "kl", lambda row: row["kl"]["mean"]))
    return axes


def toxicity_perplexity(rows: list[dict], scorer: str, path: Path) -> None:
    """Toxicity with intervals against both measures of damage; controls hollow and without a name."""
    rows = [row for row in rows if "log_ppl" in row]  # of controls under the faithful protocol it is not measured
    panels = damages(rows)
    with drawn(path, (7.5 * len(panels), 5.5), ncols=len(panels), squeeze=False, sharey=True) as grid:
        _log_ticks(grid[0, 0], [row["log_ppl"] for row in rows])
        if len(panels) > 1:
            grid[0, 1].set_xscale("symlog", linthresh=0.02)  # a KL of 0 is the base model's
        for axes, (label, _, damage) in zip(grid[0], panels, strict=True):
            axes.set_xlabel(label)
            _points(axes, rows, damage)
        grid[0, 0].set(ylabel=f"toxicity ({scorer}), 95 % interval")
        grid[0, 0].legend(title="edit")


def _points(axes, rows: list[dict], damage: Callable[[dict], float]) -> None:
    """Each row's toxicity at its damage, with names that do not cover one another."""
    named, taken = {"none"}, []
    for row in rows:
        kind = "none" if row["condition"] in {"none", "dpo"} else row["kind"]
        name = f"controls, {kind}" if row["of"] else kind
        style = {"color": COLORS[kind], "marker": MARKERS[kind], "lw": 0, "label": None if name in named else name}
        named.add(name)
        if row["of"]:
            axes.plot(damage(row), row["toxicity"]["mean"], mfc="none", ms=4, alpha=0.6, **style)
        else:
            mean, around = error_bars([row["toxicity"]])
            axes.errorbar(damage(row), mean, around, ms=6, elinewidth=0.7, alpha=0.9, **style)
    axes.margins(x=0.18)
    axes.grid(color="0.93")
    axes.figure.draw_without_rendering()  # settles the axes' limits, which the labels' places depend on
    for row in (row for row in rows if not row["of"]):
        text = {"none": "base model", "dpo": "DPO"}.get(row["condition"], row["condition"].replace("_", " "))
        taken.append(_label(axes, text, (damage(row), row["toxicity"]["mean"]), taken))


def _label(axes, text: str, point: tuple[float, float], taken: list):
    """Write `text` beside a point where it covers no earlier label; returns the box that it takes, in pixels."""
    style = {"textcoords": "offset points", "fontsize": 7}
    for dy, (dx, side) in product((3, -8, 13, -18, 23, -28), ((6, "left"), (-6, "right"))):
        label = axes.annotate(text, point, (dx, dy), ha=side, **style)
        box = label.get_window_extent()
        if not any(box.overlaps(other) for other in taken):
            return box
        label.remove()
    axes.annotate(text, point, (6, 3), **style)
    return box


def trade_off(rows: list[dict], scorer: str, path: Path) -> None:
    """Toxicity against both measures of damage, intervals on both; one line for each series of edits.

    A series holds the conditions whose names differ in alpha alone. Controls are small and pale. The grey step is the
    Pareto front: nothing measured lies below and left of it.
    """
    shown = [row for row in rows if "log_ppl" in row and row["means"] != "same"]  # held-out means where there are any
    panels = damages(shown)
    with drawn(path, (7 * len(panels), 5), legend=7, ncols=len(panels), squeeze=False, sharey=True) as grid:
        for axes, (label, interval, damage) in zip(grid[0], panels, strict=True):
            _series(axes, shown, interval, damage)
            axes.set_xlabel(label)
        _log_ticks(grid[0, 0], [row["log_ppl"] for row in shown])
        grid[0, 0].set(ylabel=f"toxicity ({scorer})", ylim=(0, None))
        if len(panels) > 1:
            grid[0, 1].set_xscale("symlog", linthresh=0.1)
        grid[0, -1].legend(loc="center left", bbox_to_anchor=(1, 0.5))


def _series(axes, shown: list[dict], interval: str, damage: Callable[[dict], float]) -> None:
    """The lines, base model and DPO, and the front of one panel of `trade_off`."""
    series: dict[tuple[str, str], list[dict]] = {}
    for row in (row for row in shown if row["kind"] != "none"):
        words = [word for word in row["condition"].split() if not word.startswith(("a=", "x", "alpha"))]
        series.setdefault(("controls" if row["of"] else " ".join(words), row["kind"]), []).append(row)
    palette = cycle(matplotlib.colormaps["tab10"].colors)
    for (name, kind), points in series.items():
        points.sort(key=damage)
        x, label = [damage(row) for row in points], f"{name}, {kind}".strip(", ")
        y, along = error_bars([row["toxicity"] for row in points])
        if name == "controls":
            axes.plot(x, y, MARKERS[kind], color="0.65", ms=3, label=label)
        else:
            style = {"fmt": MARKERS[kind] + "-", "color": next(palette), "ms": 4, "lw": 0.9, "elinewidth": 0.5}
            _, across = error_bars([row[interval] for row in points])
            axes.errorbar(x, y, along, across, label=label, **style)
    for name, marker, label in (("none", "kX", "base model"), ("dpo", "k*", "DPO")):
        for row in (row for row in shown if row["condition"] == name):
            axes.plot(damage(row), row["toxicity"]["mean"], marker, ms=11, label=label)
    front = pareto_front([(damage(row), row["toxicity"]["mean"]) for row in shown])
    axes.step(*zip(*front, strict=True), where="post", color="0.5", lw=0.8, ls=":")


def _log_ticks(axes, values: list[float]) -> None:
    """A logarithmic axis of log-perplexities, with plain numbers at its ticks."""
    least, most = 0.97 * min(values), 1.03 * max(values)
    ticks = [t for t in (3, 3.5, 4, 4.5, 5, 6, 7, 8, 10, 12, 15, 20, 30) if least <= t <= most]
    axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axes.minorticks_off()


def pareto_front(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points (both lower is better) that no other is at least as good as in both; from the left to the right."""
    points = sorted(points)
    return [(x, y) for at, (x, y) in enumerate(points) if all(y < before for _, before in points[:at])]


def reduction_bars(rows: list[dict], path: Path) -> None:
    """Share of DPO's cut in toxicity that each edit makes (%), with intervals, and the published one (table 3)."""
    edits = [row for row in rows if row["kind"] != "none" and "percent_of_dpo" in row]  # not with --post means:FILE
    bars = [(row, row["percent_of_dpo"]) for row in edits if row["percent_of_dpo"]["mean"] is not None]
    label = "% of DPO's cut in toxicity (100: DPO itself; diamonds: published; pale: controls)"
    _shares(bars, 0.34 * len(bars) + 1.4, label, path)


def share_by_dose(doses: list[dict], path: Path) -> None:
    """What share of DPO's reduction each shift makes, against how much DPO reduces toxicity; bands: 95 % intervals.

    doses: rows of dose.py's record.
    """
    x = [dose["percent_reduced"] for dose in doses]
    palette = cycle(matplotlib.colormaps["tab10"].colors)
    with drawn(path, (8, 5), legend=7) as axes:
        for name, color in zip(doses[0]["shifts"], palette, strict=False):
            shares = [dose["shifts"][name]["percent_of_dpo"] for dose in doses]
            mean, (down, up) = error_bars(shares)
            axes.plot(x, mean, "o-", color=color, ms=4, label=name.replace("_", " "))
            axes.fill_between(x, mean - down, mean + up, color=color, alpha=0.12, lw=0)
        axes.axhline(100, color="0.5", lw=0.8, ls=":")
        axes.axhline(0, color="0.5", lw=0.8)
        axes.set(xlabel="DPO's reduction of toxicity, %", ylabel="share of that reduction, %", ylim=(-60, 160))
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))


def scorers(rows: list[dict], labels: dict[str, dict[str, int]], path: Path) -> None:
    """Each condition's mean score by each scorer, beside the shares that were labelled toxic, and no text."""
    names, by_hand = list(labels), ("toxic", "no text")
    bars = {row["condition"]: [row["labels"]["by_condition"][name] for name in names] for row in rows}
    for label in by_hand:
        bars[f"labelled {label}"] = [labels[name].get(label, 0) / sum(labels[name].values()) for name in names]
    colors = [*matplotlib.colormaps["tab10"].colors[: len(rows)], "0.2", "0.7"]
    with drawn(path, (8, 4)) as axes:
        for at, (name, values) in enumerate(bars.items()):
            places = np.arange(len(names)) + (at - (len(bars) - 1) / 2) * 0.8 / len(bars)
            axes.bar(places, values, 0.8 / len(bars), color=colors[at], label=name)
        axes.set_xticks(range(len(names)), [name.replace("_", " ") for name in names])
        axes.set(ylabel="mean score, or share of continuations", ylim=(0, 1))


def restored(rows: list[tuple[dict, dict | None]], path: Path) -> None:
    """How much of DPO's cut in toxicity each un-aligning brings back (%), with intervals; controls pale.

    rows: of a record, each with its share, or None where there is none.
    """
    bars = [(row, share) for row, share in rows if share]
    label = "% of DPO's cut in toxicity that comes back (100: the base model; pale: controls)"
    _shares(bars, 0.32 * max(3, len(bars)) + 1.3, label, path)


def _shares(bars: list[tuple[dict, dict]], height: float, label: str, path: Path) -> None:
    """A bar for each row of a record, as long as its share, and a diamond for the published one."""
    note = {"held_out": " (held out)"}
    names = [f"{row['condition'].replace('_', ' ')}{note.get(row['means'], '')}, {row['kind']}" for row, _ in bars]
    with drawn(path, (7.5, height), label=8) as axes:
        for place, (row, share) in enumerate(bars):
            axes.barh(place, share["mean"], 0.7, color=COLORS[row["kind"]], alpha=0.35 if row["of"] else 0.85)
            if share["low"] is not None:
                axes.plot([share["low"], share["high"]], [place, place], color="0.2", lw=1)
            if "percent_of_dpo" in row.get("published", {}):
                axes.plot(row["published"]["percent_of_dpo"], place, "kD", ms=5, mfc="white")
        axes.set_yticks(range(len(bars)), names, fontsize=8)
        axes.invert_yaxis()
        axes.axvline(0, color="0.5", lw=0.8)
        axes.axvline(100, color="0.5", lw=0.8, ls=":")
        axes.set_xlabel(label)


def robustness(variants: list[dict], rows: list[dict], path: Path) -> None:
    """Toxicity and perplexity of each variant of DPO, and the share of its cut that un-aligning brings back.

    variants, rows: `robustness` and `rows` of robust_alignment.py's record.
    """
    by_name = {row["condition"]: row for row in rows if not row["of"]}
    names, places, base = [variant["variant"] for variant in variants], np.arange(len(variants)), by_name["none"]
    size = (11, 0.4 * len(names) + 1.5)
    with drawn(path, size, title=9, legend=7, tight=True, ncols=3, sharey=True) as (toxicity, perplexity, back):
        for side, suffix, color, label in ((-0.18, "", BLUE, "as trained"), (0.18, " un-aligned", RED, "un-aligned")):
            of_variants = [by_name[name + suffix] for name in names]
            mean, around = error_bars([row["toxicity"] for row in of_variants])
            toxicity.barh(places + side, mean, 0.34, xerr=around, color=color, label=label, error_kw={"lw": 0.8})
            perplexity.plot([row["log_ppl"] for row in of_variants], places + side, "o", color=color)
        toxicity.axvline(base["toxicity"]["mean"], color="0.4", ls=":", lw=1, label="base model")
        perplexity.axvline(base["log_ppl"], color="0.4", ls=":", lw=1)
        for place, one in enumerate(variants):
            if share := one.get("percent_restored"):
                mean, around = error_bars([share])
                back.errorbar(mean, place, xerr=around, fmt="o", color=RED, elinewidth=0.8)
            if random := one.get("percent_restored_random"):
                back.plot(random["mean"], place, "o", mfc="none", color="0.5")
        back.axvline(0, color="0.5", lw=0.8)
        toxicity.set_yticks(places, ["plain DPO" if name == "dpo" else name for name in names], fontsize=8)
        toxicity.invert_yaxis()
        toxicity.set_title("toxicity")
        perplexity.set_title("log-perplexity")
        back.set_title("% of its cut that comes back\n(hollow: random keys)")
