"""The interactive charts: toxicity against honest perplexity, groups, layers."""

import html
import json

import numpy as np
import plotly.graph_objects as go

from lib import paper
from lib.metrics import mask
from report.records import Record, Records

COLOURS = {"none": "#6b7280", "steer": "#7c3aed", "clamp": "#dc2626", "shift": "#d97706", "scale": "#0d9488"}
SHOWN = 3  # continuations
TICKS = [3, 3.5, 4, 5, 6, 8, 10, 15, 20, 30]  # nats


def pareto(records: Records, run: Record) -> dict:
    """A plotly figure as JSON, with two sets of hover texts: `masked` and `raw`, one list a trace.

    run: a record of edits_against_dpo; the records that it compares lie in the folder that its command names.
    """
    texts = continuations(records, run)
    figure, raw = go.Figure(), []
    kinds = [kind for kind in COLOURS if any(row["kind"] == kind and not row["of"] for row in run.rows)]
    for kind in kinds:
        rows = [row for row in run.rows if row["kind"] == kind and not row["of"]]
        hover = [described(row, texts.get((row["condition"], kind), [])) for row in rows]
        raw.append(hover)
        figure.add_scatter(
            x=[row["log_ppl"] for row in rows],
            y=[row["toxicity"]["mean"] for row in rows],
            error_y={
                "array": [row["toxicity"]["high"] - row["toxicity"]["mean"] for row in rows],
                "arrayminus": [row["toxicity"]["mean"] - row["toxicity"]["low"] for row in rows],
                "thickness": 1,
            },
            mode="markers+text" if kind == "none" else "markers",
            text=[row["condition"] for row in rows] if kind == "none" else None,
            textposition="top center",
            name="the model as it is" if kind == "none" else kind,
            marker={"color": COLOURS[kind], "size": 12 if kind == "none" else 9},
            hovertext=[mask(text) for text in hover],
            hoverinfo="text",
        )
    figure.update_layout(
        template="none",
        margin={"l": 60, "r": 10, "t": 10, "b": 50},
        xaxis={
            "title": {"text": "log-perplexity, every position edited (log scale)"},
            "type": "log",
            "tickvals": TICKS,
        },
        yaxis={"title": {"text": f"toxicity ({run.data['params']['scorer']})"}, "rangemode": "tozero"},
        legend={"orientation": "h", "y": 1.12},
        hoverlabel={"align": "left"},
    )
    return {"figure": json.loads(figure.to_json()), "raw": raw, "masked": [[mask(text) for text in one] for one in raw]}


def described(row: dict, lines: list[dict]) -> str:
    """Hover text: the condition, its numbers, and what the model wrote."""
    name = row["condition"] if row["kind"] == "none" else f"{row['condition']}, {row['kind']}"
    head = (
        f"<b>{html.escape(name)}</b><br>toxicity {row['toxicity']['mean']:.3f} "
        f"[{row['toxicity']['low']:.3f}, {row['toxicity']['high']:.3f}], log-perplexity {row['log_ppl']:.2f}"
    )
    shown = [f"{line['prompt']} <i>{line['continuation'][:90]}</i>" for line in escaped(lines)]
    return "<br>".join([head, *shown])


def escaped(lines: list[dict]) -> list[dict]:
    """Prompts and continuations on one line each, safe in the page."""
    return [
        {key: html.escape(" ".join(line[key].split()), quote=False) for key in ("prompt", "continuation")}
        for line in lines
    ]


def continuations(records: Records, run: Record) -> dict[tuple, list[dict]]:
    """(condition, kind) -> the first lines that it wrote, of the prompts that the base model answers most toxically."""
    roots = {name.rpartition("/")[0] for name in records.every}
    parts = run.provenance["records"]
    sources = next(
        (
            found
            for root in sorted(roots)
            if all(found := [records.get(f"{root}/{part}") for part in parts]) and found[0].model == run.model
        ),
        [],
    )
    lines: dict[tuple, dict[str, dict]] = {}
    for source in sources:
        for line in source.generations:
            if not line["of"]:
                lines.setdefault((line["name"], line["kind"]), {}).setdefault(line["prompt"], line)
    base = lines.get(("none", "none"), {})
    worst = sorted(base, key=lambda prompt: -base[prompt]["toxicity"])[:SHOWN]
    return {key: [found[prompt] for prompt in worst if prompt in found] for key, found in lines.items()}


def groups(run: Record) -> dict:
    """Shares of the four groups among the reducing neurons and in their reduction, beside the published shares."""
    figure, names = go.Figure(), list(run.shares["group_shares"])
    bars = {"of the reducing neurons": "group_shares", "of the reduction": "reduction_shares"}
    for (title, key), colour in zip(bars.items(), ("#2563eb", "#7c3aed"), strict=True):
        figure.add_bar(x=names, y=list(run.shares[key].values()), name=title, marker_color=colour)
    if theirs := paper.counterpart(run.model):
        title = f"of the reducing neurons, {theirs} (published)"
        figure.add_bar(x=names, y=paper.GROUP_SHARES[theirs][:4], name=title, marker_color="#9ca3af")
    return finished(figure, "", "%")


def layers(run: Record) -> dict:
    """The reduction of each layer by group, and the increase of the other neurons."""
    tensors = run.activations
    delta, toxic, positive = tensors["delta"].astype(np.float64), tensors["cosine"] > 0, tensors["pre"] > 0
    figure = go.Figure()
    for group, colour in zip(("TP", "TN", "AP", "AN"), ("#dc2626", "#f59e0b", "#0d9488", "#2563eb"), strict=True):
        chosen = (delta > 0) & (toxic == (group[0] == "T")) & (positive == (group[1] == "P"))
        figure.add_bar(y=np.where(chosen, delta, 0).sum(1).tolist(), name=group, marker_color=colour)
    figure.add_bar(y=np.where(delta < 0, delta, 0).sum(1).tolist(), name="increasing", marker_color="#9ca3af")
    figure.update_layout(barmode="relative")
    return finished(figure, "layer", "sum of delta")


def finished(figure, x: str, y: str) -> dict:
    """A plain figure as JSON."""
    figure.update_layout(
        template="none",
        margin={"l": 60, "r": 10, "t": 10, "b": 50},
        xaxis={"title": {"text": x}},
        yaxis={"title": {"text": y}},
        legend={"orientation": "h", "y": 1.12},
    )
    return {"figure": json.loads(figure.to_json())}
