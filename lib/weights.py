"""How far training moved a model's weights."""

import torch

KINDS = {"embedding": ("embed", "wte", "wpe", "lm_head"), "attention": ("attn",), "MLP": ("mlp",)}


def changes(base, post) -> dict[str, dict[str, float]]:
    """What training changed of the parameters, by kind, and of `all` (Lee et al. 2024, 5.1).

    Args:
        base, post: torch models before and after. A bias that training added starts at 0.

    Returns: for each kind `entries` and how many of them `changed`; the `lowest_cosine` of a parameter with itself;
        the `mean_change` of an entry; and `relative_change`, the length of the change over that of the parameters.
    """
    before, sums = dict(base.named_parameters()), {}
    for name, parameter in post.named_parameters():
        y = parameter.detach().flatten().cpu().float()
        x = before[name].detach().flatten().cpu().float() if name in before else 0 * y
        # One sum in float64 at a time: a float64 copy of an embedding would take gigabytes.
        dot, xx, yy = (float((a * b).sum(dtype=torch.float64)) for a, b in ((x, y), (x, x), (y, y)))
        moved = (y - x).abs()
        for kind in ("all", _kind(name)):
            one = sums.setdefault(
                kind, {"lowest": 1.0, "n": 0, "changed": 0, "change": 0.0, "squares": 0.0, "own": 0.0}
            )
            if xx and yy:
                one["lowest"] = min(one["lowest"], dot / (xx * yy) ** 0.5)
            one["n"] += len(x)
            one["changed"] += int((moved != 0).sum())
            one["change"] += float(moved.sum(dtype=torch.float64))
            one["squares"] += float(moved.square().sum(dtype=torch.float64))
            one["own"] += xx
    return {
        kind: {
            "entries": one["n"],
            "changed": one["changed"],
            "lowest_cosine": one["lowest"],
            "mean_change": one["change"] / one["n"],
            "relative_change": (one["squares"] / (one["own"] or 1)) ** 0.5,
        }
        for kind, one in sums.items()
    }


def _kind(name: str) -> str:
    if "norm" in name:
        return "norm"
    return next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), "norm")
