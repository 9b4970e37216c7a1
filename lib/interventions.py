"""Edits of neurons, as data: which neurons of which layer, and by what.

The lines that apply them stand in each script, in its `intervene`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch


class LayerEdit(NamedTuple):
    """The edit of one layer: one index and one value tensor, which is also all that travels to a server."""

    layer: int
    index: torch.Tensor  # [n_edited], int64, into the layer's neurons
    value: torch.Tensor  # [n_edited], float32


@dataclass(frozen=True)
class Edit:
    """An edit of neurons; layers without an edited neuron are left out. For kinds see `edited`."""

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


def edited(kind: str, m: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """The activations that an edit leaves. m `[batch, positions, n_edited]`, value `[n_edited]`.

    clamp: the value, whatever m was (what the papers' code does). shift: m + value. scale: m * value.
    """
    value = value.to(m)
    return {"clamp": value.expand_as(m), "shift": m + value, "scale": m * value}[kind]


@dataclass(frozen=True)
class Plan:
    """A family of edits of the masked neurons, from the one that changes least (strength 0) to the full one (1).

    `start` and `target` are the values at strength 0 and 1. For `shift` and `scale` strength 0 is the unedited model;
    for `clamp` it is not: it sets every activation to its own mean before DPO. All `[n_layers, d_mlp]`, and both are
    defined on all neurons, so that a control can take other neurons with the same rule.
    """

    kind: str
    mask: torch.Tensor  # bool
    start: torch.Tensor
    target: torch.Tensor

    def edit(self, strength: float = 1.0) -> Edit:
        """The edit of a strength: value = start + strength * (target - start)."""
        value = self.start + strength * (self.target - self.start)
        indices = [row.nonzero()[:, 0] for row in self.mask]
        return Edit(
            self.kind,
            tuple(LayerEdit(at, index, value[at, index].float()) for at, index in enumerate(indices) if len(index)),
        )


def clamp(mask: torch.Tensor, pre: torch.Tensor, post: torch.Tensor) -> Plan:
    """Set the masked neurons to their mean after DPO. All `[n_layers, d_mlp]`."""
    return Plan("clamp", mask, pre, post)


def shift(mask: torch.Tensor, pre: torch.Tensor, post: torch.Tensor) -> Plan:
    """Add `post - pre` to the masked neurons' own activations. All `[n_layers, d_mlp]`."""
    return Plan("shift", mask, 0 * pre, post - pre)


def scale(mask: torch.Tensor, factor: torch.Tensor) -> Plan:
    """Multiply the masked neurons' own activations by a factor each. All `[n_layers, d_mlp]`."""
    return Plan("scale", mask, 0 * factor + 1, factor)


def scaled_by(kind: str, mask: torch.Tensor, factor: float) -> Edit:
    """One factor for all masked neurons, `[n_layers, d_mlp]` bool; kind names what the script multiplies by it."""
    return replace(scale(mask, torch.full(mask.shape, factor, dtype=torch.float64)), kind=kind).edit()
