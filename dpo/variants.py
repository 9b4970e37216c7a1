"""DPO runs that train a part of the model: their learning rates and their checkpoints, made where they are missing.

A variant is named as `--trainable` names what it trains, or as `values:128` or `keys:128`: those of the 128 neurons
whose value vectors align best with a direction.
"""

import json
import math
from pathlib import Path

import click
import torch

from dpo.config import default_preset, make_config
from lib import chain, models, vectors

# Times the preset's learning rate: what --search found on gemma-270m (results/robust_alignment/search).
LEARNING_RATES = {"all": 1, "biases": 33.4, "late": 4, "values": 300, "keys": 900, "lora": 40}


def arguments(name: str, rate: float, cosine: torch.Tensor | None) -> list[str]:
    """Arguments of `python -m dpo` for a variant.

    cosine: of each value vector with the direction, `[n_layers, d_mlp]`; None: not known yet.
    """
    part, _, rest = name.partition(":")
    if part in ("values", "keys") and rest.isdecimal():
        names = f"<{rest} neurons>" if cosine is None else ",".join(best_aligned(cosine, int(rest)))
        name = f"{part}:{names}"
    return ["--trainable", name, "--learning-rate", f"{rate:g}"]


def best_aligned(cosine: torch.Tensor, count: int) -> list[str]:
    """Names, such as `L19.N770`, of the neurons with the largest cosines, the largest first."""
    places = (divmod(at, cosine.shape[1]) for at in vectors.ranked(cosine)[:count].tolist())
    return [f"L{layer}.N{index}" for layer, index in places]


def learning_rate(options: dict, name: str, steps: int = 0) -> float:
    """A variant's own learning rate, or one some threefold steps from it."""
    preset = make_config(options["preset"] or default_preset(options["model"]), options["model"])
    first = preset.learning_rate * LEARNING_RATES.get(name.partition(":")[0], 1)
    return float(f"{first * 3.0**steps:.3g}")


def trained(options: dict, seed: int, name: str, rate: float, cosine: torch.Tensor) -> models.Source:
    """A variant's checkpoint. Raises click's exit code of the trainer, which has said what was wrong."""
    return chain.post_source(options, seed, *arguments(name, rate, cosine))


def losses_by_rate(options: dict, seed: int, name: str, cosine: torch.Tensor, search: bool) -> dict[float, float]:
    """Learning rates and the validation losses that a variant reaches with them.

    search: go on in threefold steps while the loss falls. False: the variant's own rate alone.
    """
    losses = {}

    def loss(steps: int) -> float:
        rate = learning_rate(options, name, steps)
        if rate not in losses:
            try:
                source = trained(options, seed, name, rate, cosine)
            except click.exceptions.Exit:
                if not steps:
                    raise
                losses[rate] = math.inf  # it diverged
            else:
                log = Path(source.adapter or source.path) / "training.json"
                losses[rate] = json.loads(log.read_text(encoding="utf-8"))["best_valid_loss"] or math.inf
        return losses[rate]

    loss(0)
    for way in (1, -1) if search else ():
        at = 0
        while loss(at + way) < loss(at):
            at += way
        if at:
            break
    return losses
