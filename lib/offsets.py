"""A shift of neurons is a bias: what it adds to each layer's MLP output, and how much of DPO's full shift that is.

Adding fixed amounts s to a layer's neurons at every position adds one constant vector, s W, to the output of the MLP's
last map W (before Gemma's norm, where one follows). So a shift of thousands of neurons is `n_layers` vectors of width
`d_model`, and sets of neurons that share none of them may still add nearly the same.
"""

import torch

from lib.families import value_vectors, write_gain
from lib.interventions import Edit


def offsets(model, edits: list[Edit]) -> torch.Tensor:
    """What each shift adds to the output of each layer's last MLP map, `[n_edits, n_layers, d_model]` float64, CPU.

    model: torch or nnsight.
    """
    added = torch.zeros(len(edits), model.config.num_hidden_layers, model.config.hidden_size, dtype=torch.float64)
    by_layer = [{layer: (index, value) for layer, index, value in edit} for edit in edits]
    for layer in range(added.shape[1]):
        vectors = value_vectors(model, layer).cpu().double()  # [d_mlp, d_model]
        for row, layers in zip(added, by_layer, strict=True):
            if layer in layers:
                index, value = layers[layer]
                row[layer] = value.cpu().double() @ vectors[index.cpu()]
    return added


def against(own: torch.Tensor, full: torch.Tensor) -> dict[str, list[float]]:
    """Layer by layer the cosine of an offset with DPO's full one, and its projection on it (1: all of it).

    own, full: `[n_layers, d_model]` float64. Both are 0 where one of the two is.
    """
    product, length = (own * full).sum(-1), full.norm(dim=-1)
    cosine = product / (own.norm(dim=-1) * length).clamp(min=1e-30)
    return {"cosine": cosine.tolist(), "projection": (product / length.square().clamp(min=1e-30)).tolist()}


def away_from(model, direction: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    """The smallest shift of all neurons that writes against a direction as strongly, in each layer, as an offset does.

    Args:
        model: torch or nnsight.
        direction: `[d_model]`, of the residual stream.
        offset: `[n_layers, d_model]` float64, before a norm that follows the MLP.

    Returns: `[n_layers, d_mlp]` float64, CPU.
    """
    unit, shifts = direction.cpu().double() / direction.cpu().double().norm(), []
    for layer, own in enumerate(offset):
        gain = write_gain(model, layer).cpu().double()
        wanted = -(own * gain).norm() * torch.where(gain == 0, 0, unit / gain)  # nothing is written where it is 0
        vectors = value_vectors(model, layer).cpu().double()  # more neurons than dimensions: many shifts would do
        shifts.append(torch.linalg.lstsq(vectors.T, wanted[:, None], driver="gelsd").solution[:, 0])
    return torch.stack(shifts)
