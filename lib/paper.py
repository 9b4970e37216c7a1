"""Published numbers, by the names that the scripts use; models are named as `--model` names them.

The tables stand in lib/assets/published.json, each with its source in the papers and what its columns are. Yang et al.
measured toxicity with Detoxify and give perplexity's logarithm; Lee et al. toxicity with Perspective, and perplexity.
"""

import json
import math
from pathlib import Path

from lib.errors import UserError

# The paper's model that a model from PyPI resembles most, for a column of published numbers beside ours.
COUNTERPART = {"gemma-270m": "gemma", "smollm2": "llama"}


def _with_tuples(value):
    """A value read from JSON with tuples in place of its lists."""
    if isinstance(value, dict):
        return {key: _with_tuples(part) for key, part in value.items()}
    return tuple(map(_with_tuples, value)) if isinstance(value, list) else value


_tables = json.loads((Path(__file__).parent / "assets" / "published.json").read_text(encoding="utf-8"))
_rows = {name: _with_tuples(table["rows"]) for name, table in _tables.items()}

PATCHING = _rows["patching"]
EDITING = _rows["editing"]
PUBLISHED = PATCHING | EDITING
STEERING = {model: {int(alpha): row for alpha, row in rows.items()} for model, rows in _rows["steering"].items()}
TOXIC_TOKEN_NEURONS = _rows["toxic_token_neurons"]
TOP_256 = _rows["top_256"]
SHIFT_CORRELATIONS = _rows["shift_correlations"]
SUBSPACE = _rows["subspace"]
GROUP_SHARES = _rows["group_shares"]
PERCENT_NEGATIVE = _rows["percent_negative"]
PERCENT_REDUCING = _rows["percent_reducing"]
PROBE_ACCURACY = _rows["probe_accuracy"]
TOXIC_WORDS = _rows["toxic_words"]
PLAIN_WORDS = _rows["plain_words"]
MISNAMED = {model: dict(pairs) for model, pairs in _rows["misnamed"].items()}  # (layer, index): printed -> right
LEE = _rows["lee"]
LEE_SCALES = _rows["lee_scales"]
LEE_TOXIC_VECTORS = _rows["lee_toxic_vectors"]


def neuron(flat: int, d_mlp: int) -> tuple[int, int]:
    """(layer, index) of a flat index over all layers' neurons."""
    return divmod(flat, d_mlp)


def counterpart(model: str) -> str | None:
    """The model whose published numbers stand beside ours: itself, or its nearest relative; None for any other."""
    return model if model in PROBE_ACCURACY else COUNTERPART.get(model)


def published_row(condition: str, kind: str, model: str) -> dict:
    """`{"published": ...}` for a condition of Yang tables 2 and 19, or nothing; the papers' edits are clamps."""
    theirs = counterpart(model)
    if kind not in {"none", "clamp"} or theirs not in PUBLISHED.get(condition, {}):
        return {}
    return _published(theirs, *PUBLISHED[condition][theirs])


def lee(condition: str) -> dict:
    """`{"published": ...}` of a condition of Lee's tables, as rows of a record hold it, or nothing."""
    if condition not in LEE:
        return {}
    toxicity, perplexity, f1 = LEE[condition]
    return _published("gpt2", toxicity, round(math.log(perplexity), 3), f1)


def steering_scales(model: str, vector: str) -> list[float]:
    """The papers' scales of a steering vector. Raises UserError where they give none."""
    scales = set(STEERING.get(model, {})) if vector == "probe" else set()
    if model == "gpt2" and vector in LEE_SCALES:
        scales.add(LEE_SCALES[vector])
    if not scales:
        raise UserError(
            f"--alpha published: the papers give none for {vector} of {model}; give numbers, or leave it out."
        )
    return sorted(map(float, scales))


def lee_steering(condition: str, kind: str) -> dict:
    """`{"published": ...}` for a condition of steer.py from Lee table 2, or nothing."""
    for vector, scale in LEE_SCALES.items():
        label = "steer" if vector == "probe" else f"steer {vector}"
        if condition in (f"{label} alpha*", f"{label} a={scale}"):
            return lee(f"steer {vector}")
    return lee(condition)


def yang_steering(model: str, condition: str, kind: str) -> dict:
    """`{"published": ...}` for a condition of steer.py from Yang tables 2 and 12, or nothing."""
    theirs = counterpart(model)
    rows = {f"steer a={alpha:g}": row for alpha, row in STEERING.get(theirs, {}).items()}
    if rows:
        rows["steer alpha*"] = next(iter(rows.values()))  # the alpha that table 11 chose to keep perplexity
    return _published(theirs, *rows[condition]) if condition in rows else published_row(condition, kind, model)


def _published(model: str, toxicity: float, log_ppl: float, f1: float) -> dict:
    return {"published": {"model": model, "toxicity": toxicity, "log_ppl": log_ppl, "f1": f1}}
