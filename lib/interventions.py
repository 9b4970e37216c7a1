"""Edits of neuron activations, as data: which neurons of which layer, and by what.

The line that applies them stands in each script, inside its trace.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch


class LayerEdit(NamedTuple):
    """The edit of one layer: one index and one value tensor, which is also all that travels to a server."""

    layer: int
    index: torch.Tensor  # [n_edited], int64, into the layer's neurons
    value: torch.Tensor  # [n_edited], float32


@dataclass(frozen=True)
class Edit:
    """An edit of activations m; layers without an edited neuron are left out.

    kind: `clamp` sets m to the value (what the papers' code does); `shift` adds the value to each token's own m;
    `none` edits nothing.
    """

    kind: str
    layers: tuple[LayerEdit, ...] = ()

    def __iter__(self) -> Iterator[LayerEdit]:
        """The layers in the order in which the model runs them."""
        return iter(self.layers)

    @property
    def n_neurons(self) -> int:
        """How many neurons are edited."""
        return sum(len(layer.index) for layer in self.layers)


NO_EDIT = Edit("none")


def clamp(mask: torch.Tensor, value: torch.Tensor) -> Edit:
    """Set the masked neurons to a constant. mask `[n_layers, d_mlp]` bool, value `[n_layers, d_mlp]`."""
    return Edit("clamp", _by_layer(mask, value))


def shift(mask: torch.Tensor, pre: torch.Tensor, post: torch.Tensor) -> Edit:
    """Add `post - pre` to the masked neurons' own activations. All `[n_layers, d_mlp]`."""
    return Edit("shift", _by_layer(mask, post - pre))


def _by_layer(mask: torch.Tensor, value: torch.Tensor) -> tuple[LayerEdit, ...]:
    indices = [row.nonzero()[:, 0] for row in mask]
    return tuple(
        LayerEdit(layer, index, value[layer, index].float()) for layer, index in enumerate(indices) if len(index)
    )
