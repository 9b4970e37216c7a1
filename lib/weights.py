"""How far training moved a model's weights, and how much of that a narrower dtype keeps."""

import math
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open

from lib.families import family_of, value_vectors, write_gain

# Parts of a parameter's name that say its kind, the first that fits; without any it belongs to the norms.
KINDS = {"norm": ("norm",), "embedding": ("embed", "wte", "wpe", "lm_head"), "attention": ("attn",), "MLP": ("mlp",)}
CHUNK = 1 << 22  # entries in float64 at once: a whole embedding would take gigabytes


def rounded_update(base: dict, post: dict, dtype: str) -> dict[str, float] | None:
    """What is left of training's update when both models' weights are rounded to a dtype.

    Args:
        base, post: name -> weight before and after, as `stored_weights` or `plain_names` give them.
        dtype: `bfloat16` or `float32`.

    Returns: `cosine` of the rounded models' difference with the true one, and the share of changed `entries` that
        still differ; None: nothing is rounded, or nothing differs. Sums are in float64.
    """
    target = getattr(torch, dtype)
    dot = own = left = changed = differing = 0.0
    for name in base.keys() & post.keys():
        first, second = (weight() if callable(weight) else weight for weight in (base[name], post[name]))
        if first.shape != second.shape:
            continue
        for x, y in zip(first.flatten().split(CHUNK), second.flatten().split(CHUNK), strict=True):
            true = y.double() - x.double()
            rounded = y.to(target).double() - x.to(target).double()
            dot, own, left = dot + float(true @ rounded), own + float(true @ true), left + float(rounded @ rounded)
            changed += int((true != 0).sum())
            differing += int(((rounded != 0) & (true != 0)).sum())
    if not changed or left == own == dot:
        return None
    return {"cosine": dot / math.sqrt(own * left) if left else 0.0, "entries": differing / changed}


def stored_weights(folder: Path) -> dict[str, Callable]:
    """{name: reads the weight} of a folder's safetensors, one at a time: a model of 8B is 32 GB."""
    weights = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            weights |= {key: partial(_read_weight, file, key) for key in tensors.keys()}
    return plain_names(weights)


def _read_weight(file: Path, key: str) -> torch.Tensor:
    with safe_open(file, "pt") as tensors:
        return tensors.get_tensor(key)


def plain_names(weights: dict) -> dict:
    """Weights by their names in the base class, without `transformer.` or `model.`."""
    return {name.removeprefix("transformer.").removeprefix("model."): weight for name, weight in weights.items()}


def changes(post, base) -> dict[str, dict[str, float]]:
    """What training changed of the parameters, by kind, and of `all` (Lee et al. 2024, 5.1).

    Args:
        post, base: models after and before, torch or nnsight. A bias that training added starts at 0.

    Returns: for each kind `entries` and how many of them `changed`; the `lowest_cosine` of a parameter with itself;
        the `mean_change` of an entry; and `relative_change`, the length of the change over that of the parameters.
    """
    before, after = (dict(getattr(model, "_module", model).named_parameters()) for model in (base, post))
    lora = post.__dict__.get("lora", {})  # see `lib.adapters.adapted`
    totals, lowest = {}, {}
    for name, parameter in after.items():
        y = parameter.detach()
        if added := lora.get(name.removesuffix(".weight")):
            down, up = (part.to(y) for part in added)
            change = up @ down
            y = y + (change.T if family_of(post).transposed else change)
        y = y.flatten()
        x = before[name].detach().flatten() if name in before else torch.zeros_like(y)
        sums = Counter()
        for first, second in zip(x.split(CHUNK), y.split(CHUNK), strict=True):
            first, second = first.cpu().double(), second.cpu().double()
            moved = (second - first).abs()
            sums["entries"] += len(first)
            sums["changed"] += int((moved != 0).sum())
            sums["change"] += float(moved.sum())
            sums["change_squared"] += float(moved @ moved)
            sums["before_squared"] += float(first @ first)
            sums["after_squared"] += float(second @ second)
            sums["product"] += float(first @ second)
        lengths = (sums["before_squared"] * sums["after_squared"]) ** 0.5
        own_kind = next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), "norm")
        for kind in ("all", own_kind):
            totals.setdefault(kind, Counter()).update(sums)
            lowest[kind] = min(lowest.get(kind, 1.0), sums["product"] / lengths if lengths else 1.0)
    return {
        kind: {
            "entries": total["entries"],
            "changed": total["changed"],
            "lowest_cosine": lowest[kind],
            "mean_change": total["change"] / total["entries"],
            "relative_change": (total["change_squared"] / (total["before_squared"] or 1)) ** 0.5,
        }
        for kind, total in totals.items()
    }


def moves(post, base, below: int, unit: torch.Tensor, random: torch.Tensor) -> list[tuple]:
    """How value vectors moved from `base` to `post`, as the residual stream sees them (Lee et al. 2024, 5.2).

    Args:
        below: the layers before this one are looked at.
        unit: `[d_model]`, float64, of length 1, as each of random `[n_random, d_model]`.

    Returns: for each layer the moves' cosines with unit `[d_mlp]`, both models' products with it `[d_mlp]`, float64,
        and how many moves point against each random direction `[n_random]`.
    """
    layers = []
    for layer in range(below):
        first, second = (  # [d_mlp, d_model]
            value_vectors(m, layer).cpu().double() * write_gain(m, layer).cpu().double() for m in (base, post)
        )
        moved = second - first
        length = moved.norm(dim=1).clamp(min=1e-30)
        layers.append((moved @ unit / length, first @ unit, second @ unit, (moved @ random.T < 0).sum(0)))
    return layers


def lowest_value_cosine(post, base) -> float:
    """Lowest cosine of a value vector before and after DPO (Yang 5.1: 0.99 for all). Models: torch or nnsight."""
    pairs = ((value_vectors(base, at), value_vectors(post, at)) for at in range(base.config.num_hidden_layers))
    return min(float(torch.cosine_similarity(before.double(), after.double()).min()) for before, after in pairs)
