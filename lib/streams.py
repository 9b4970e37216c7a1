"""What is kept of residual streams before and after DPO: how far they moved, and what a figure shows of it."""

import torch


def reduced(before, after) -> dict:
    """What is kept of a layer's residual streams `[n_prompts, d_model]` before and after DPO.

    Returns: the `offset`, the mean shift `[d_model]`; the streams' mean `length` before DPO; `along` `[n_prompts]`:
        each prompt's shift times the others' offset; and for the figure `points` `[2, 2, n_prompts // 2]`: the streams
        before and after, on the offset and on the first principal component of the rest.
    """
    own = after - before
    offset = own[::2].mean(0)  # every second prompt's; the others are the points: noise has no part in both
    unit = offset / offset.norm().clamp(min=1e-30)
    both = torch.cat([before[1::2], after[1::2]])
    rest = both - both.mean(0)
    rest = rest - (rest @ unit)[:, None] * unit
    component = torch.linalg.svd(rest, full_matrices=False).Vh[0] if len(rest) else unit
    component = component * component[component.abs().argmax()].sign()  # a component has no sign of its own
    return {
        "offset": own.mean(0),
        "length": float(before.norm(dim=1).mean()),
        "along": (own * (own.sum(0) - own)).sum(1),
        "points": torch.stack([both @ unit, both @ component]).unflatten(1, (2, len(rest) // 2)).transpose(0, 1),
    }
