"""What an effect has to be compared with before it says anything: one set of controls for every causal claim.

| control | what it leaves as it was | what it takes away |
|---|---|---|
| `random` | number of neurons, values' rule | which neurons |
| `random_in_layer` | also the number in each layer | which neurons of a layer |
| `matched` | also value norm and mean absolute activation | which neurons of those alike |
| `permuted` | the neurons, each layer's values (shift and scale) | which value goes to which neuron |
| `own_means` | the neurons, that they are clamped | DPO: values are means before it (clamp at strength 0) |
| `flipped` | the neurons, the size of the change | its sign (strength -1) |
| `zero` | everything but the change (strength 0; shift and scale, where it is the unedited model) | the change |
| `gaussian` | the whole procedure | the probe: a random direction instead |
| `permuted_labels` | the whole procedure | the probe's labels: fitted on shuffled ones |
| `reselected` | the whole procedure, each layer's changes by DPO | which neuron changed: groups chosen anew for it |

A shift is one vector a layer (`lib.offsets`), so it has controls of its own, some with a strength chosen for them:

| control | what it leaves as it was | what it takes away |
|---|---|---|
| `matched_push` | number in each layer, length of what each neuron's shift adds | which neurons of those alike |
| `random_at_projection` | as `random`, and the projection on all neurons' offset | which neurons |
| `matched_at_projection` | as `matched`, and the projection on all neurons' offset | which neurons of those alike |
| `random_at_norm` | as `random`, and the length of the offset over all layers | which neurons |
| `matched_at_norm` | as `matched`, and the length of the offset over all layers | which neurons of those alike |
| `permuted_at_norm` | as `permuted`, and the length of the offset over all layers | which value goes to which neuron |
| `probe_direction` | what each layer writes is as long | all but the probe: away from it at every layer |

Tensors in and out are float64 or bool on the CPU.
`matched` draws from outside the set while they last: of a set that holds half of all neurons, nearly the other half.
"""

from collections.abc import Iterator
from dataclasses import astuple, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file

from lib.families import value_vectors
from lib.interventions import NO_EDIT, Edit, Plan
from lib.neurons import Means
from lib.probes import Probe, fit

DRAWS = {"none": 0, "quick": 3, "full": 20}
FEATURES = "features.safetensors"  # beside a probe: what it was fitted on
DOSED = ("random", "matched", "permuted")  # controls of a shift that are measured at its dose too
BINS = 5  # of value norm and of activation, in each layer


class Control(NamedTuple):
    """A control of an edit (its own `plan` and `strength`), or of the probe (a `direction` in its place)."""

    name: str
    draw: int = 0
    plan: Plan | None = None
    strength: float = 1.0
    direction: Probe | None = None

    @property
    def edit(self) -> Edit:
        """The edit of a control that has a plan."""
        return NO_EDIT if self.name == "zero" else self.plan.edit(self.strength)


def draws(level: str, run: int, runs: int) -> list[int]:
    """The draws of each random control that one of several runs (seeds) measures; over all: `quick` 3, `full` 20.

    Each run measures as many, so that all weigh the same: over all then a few more, where the runs do not divide them.
    """
    return list(range(run, -(-DRAWS[level] // runs) * runs, runs))


def of_plan(plan: Plan, draws: list[int], seed: int, features: list[torch.Tensor]) -> Iterator[Control]:
    """Every control of an edit but those of its direction.

    features: what `matched` holds alike, `[n_layers, d_mlp]` each: norms of value vectors first.
    """
    yield Control("own_means" if plan.kind == "clamp" else "zero", plan=plan, strength=0.0)
    yield Control("flipped", plan=plan, strength=-1.0)
    for draw in draws:
        generator = torch.Generator().manual_seed(hash_seed(seed, draw))
        if not plan.mask.all():  # where all neurons are edited, there are no others to take
            for name, mask in other_neurons(plan.mask, features, generator):
                yield Control(name, draw, replace(plan, mask=mask))
            if plan.kind == "shift":
                push = plan.target.abs() * features[0]
                yield Control("matched_push", draw, replace(plan, mask=matched(plan.mask, [push], generator)))
        if plan.kind != "clamp":
            yield Control("permuted", draw, replace(plan, target=permuted(plan.mask, plan.target, generator)))


def other_neurons(
    mask: torch.Tensor, features: list[torch.Tensor], generator: torch.Generator
) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, mask) of the controls that take other neurons; `[n_layers, d_mlp]` all."""
    yield "random", random_mask(mask, generator)
    yield "random_in_layer", random_in_layer(mask, generator)
    yield "matched", matched(mask, features, generator)


def at_dose(drawn: list[Control], own: torch.Tensor, real: torch.Tensor, full: torch.Tensor) -> Iterator[Control]:
    """Controls of a shift again, each as strong as makes its offset like the real one's.

    Args:
        drawn: `random`, `matched` and `permuted` ones.
        own: their offsets `[n_drawn, n_layers, d_model]`; real, full: the edit's, and that of all neurons' shift.
    """
    for control, offset in zip(drawn, own, strict=True):
        yield control._replace(name=f"{control.name}_at_norm", strength=share(real.norm(), offset.norm()))
        if control.name != "permuted":  # which has next to no projection
            strength = share((real * full).sum(), (offset * full).sum())
            yield control._replace(name=f"{control.name}_at_projection", strength=strength)


def share(real: torch.Tensor, own: torch.Tensor) -> float:
    """How often `own` goes into `real`; 0 where there is nothing: no strength makes something of it."""
    return float(real / own) if own else 0.0


def reselected(pre: Means, post: Means, seed: int, draw: int) -> Means:
    """Means after DPO had each layer's changes gone to other neurons, for which groups are then chosen anew."""
    generator = torch.Generator().manual_seed(hash_seed(seed, draw))
    order = torch.rand(pre.activation.shape, generator=generator).argsort(-1)  # one for activation and write
    return Means(*(x + (y - x).gather(-1, order) for x, y in zip(astuple(pre), astuple(post), strict=True)))


def of_direction(probe: Probe, probe_file: Path | None, draws: list[int], seed: int) -> Iterator[Control]:
    """Random directions, and probes fitted on shuffled labels, in place of the probe.

    The second needs the comments' features, which train_probe.py leaves beside the probe; without them there is none.
    """
    for draw in draws:
        generator = torch.Generator().manual_seed(hash_seed(seed, draw))
        yield Control("gaussian", draw, direction=Probe(torch.randn(probe.direction.shape, generator=generator), 0.0))
    beside = probe_file and Path(probe_file).with_name(FEATURES)
    if beside and beside.is_file():
        stored = load_file(beside)
        features, labels = stored["features"].numpy(), stored["labels"].numpy()
        fitted = np.setdiff1d(np.arange(len(labels)), stored["held_out"].numpy())
        for draw in draws:
            shuffled = np.random.default_rng(hash_seed(seed, draw)).permutation(labels[fitted])
            yield Control("permuted_labels", draw, direction=fit(features[fitted], shuffled, seed))


def hash_seed(seed: int, draw: int) -> int:
    """Another stream for each seed and draw."""
    return int(np.random.SeedSequence([seed, draw]).generate_state(1)[0])


def random_mask(mask: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """As many neurons, drawn from all. mask `[n_layers, d_mlp]` bool."""
    chosen = torch.zeros(mask.numel(), dtype=torch.bool)
    chosen[torch.randperm(mask.numel(), generator=generator)[: int(mask.sum())]] = True
    return chosen.view_as(mask)


def random_in_layer(mask: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """As many neurons in each layer, drawn from the layer. mask `[n_layers, d_mlp]` bool."""
    return torch.stack([random_mask(row, generator) for row in mask])


def matched(mask: torch.Tensor, features: list[torch.Tensor], generator: torch.Generator) -> torch.Tensor:
    """As many neurons of each layer and each bin of every feature, drawn from those outside the mask while they last.

    mask `[n_layers, d_mlp]` bool; features `[n_layers, d_mlp]` each, cut into BINS quantiles within a layer. A bin that
    holds fewer unmasked neurons than masked ones is filled up with masked ones.
    """
    chosen = torch.zeros_like(mask)
    for layer, row in enumerate(mask):
        cell = torch.zeros(len(row), dtype=torch.long)
        for feature in features:
            rank = feature[layer].argsort().argsort()
            cell = cell * BINS + rank * BINS // len(row)
        for occupied in cell[row].unique():
            here = cell == occupied
            outside, inside = (here & ~row).nonzero()[:, 0], (here & row).nonzero()[:, 0]
            drawn = [part[torch.randperm(len(part), generator=generator)] for part in (outside, inside)]
            chosen[layer, torch.cat(drawn)[: len(inside)]] = True
    return chosen


def permuted(mask: torch.Tensor, value: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Values shuffled among the masked neurons of each layer. Both `[n_layers, d_mlp]`."""
    shuffled = value.clone()
    for layer, row in enumerate(mask):
        index = row.nonzero()[:, 0]
        shuffled[layer, index] = value[layer, index[torch.randperm(len(index), generator=generator)]]
    return shuffled


def value_norms(model) -> torch.Tensor:
    """Norms of all value vectors, `[n_layers, d_mlp]` float64. `model`: torch or nnsight."""
    layers = range(model.config.num_hidden_layers)
    return torch.stack([value_vectors(model, layer).cpu().double().norm(dim=-1) for layer in layers])
