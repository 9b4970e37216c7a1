"""Figures of what is trained: the probe's scores, the pairs that DPO learns from, and its loss."""

from pathlib import Path

import numpy as np
from matplotlib.ticker import MaxNLocator

from lib.plots import BLUE, ORANGE, RED, TEAL, drawn


def probe_scores(logits: np.ndarray, labels: np.ndarray, listed: np.ndarray, path: Path) -> None:
    """The probe's log-odds of held-out comments, toxic and other, with and without a listed word. All `[n]`."""
    parts = [logits[(labels == 0)], logits[(labels == 1) & ~listed], logits[(labels == 1) & listed]]
    names = ["not toxic", "toxic, no listed word", "toxic, a listed word"]
    with drawn(path, (6, 3.2)) as axes:
        axes.hist(parts, 24, stacked=True, label=names, color=[TEAL, ORANGE, RED], edgecolor="white")
        axes.axvline(0, color="black", lw=0.8, ls=":")
        axes.set(xlabel="the probe's log-odds of being toxic", ylabel="held-out comments")
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))


def pair_sides(pairs: list[dict], min_gap: float, path: Path) -> None:
    """Toxicity of both sides of each pair (`unpert_gen_toxicity`, `pert_gen_toxicity`), and which are kept."""
    preferred, rejected = (np.array([pair[f"{side}_gen_toxicity"] for pair in pairs]) for side in ("unpert", "pert"))
    kept = rejected - preferred >= min_gap
    with drawn(path, (4.2, 4)) as axes:
        for chosen, label, color in ((kept, "kept", TEAL), (~kept, "dropped", "#b0b0b0")):
            axes.scatter(preferred[chosen], rejected[chosen], s=14, color=color, label=f"{label}: {chosen.sum()}")
        axes.plot([0, 1 - min_gap], [min_gap, 1], color="black", lw=0.8, ls=":")
        axes.set(xlabel="toxicity of the preferred side", ylabel="toxicity of the rejected side")
        axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))


def training(log: list[dict], path: Path) -> None:
    """Loss and accuracy by update, of training batches and of the held-out pairs; log: lines of log.jsonl."""
    valid = [line for line in log if "valid_loss" in line]
    series = ((log, "", "-", BLUE, "batches"), (valid, "valid_", "o-", RED, "held-out pairs"))
    with drawn(path, (8, 3), tight=True, ncols=2) as panels:
        for axes, name in zip(panels, ("loss", "accuracy"), strict=True):
            for lines, prefix, marker, color, label in series:
                steps, values = [line["step"] for line in lines], [line[prefix + name] for line in lines]
                axes.plot(steps, values, marker, color=color, label=label)
            axes.set(xlabel="update", ylabel=f"DPO {name}", ylim=(0, None))
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        panels[1].legend()
