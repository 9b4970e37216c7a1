"""Hyperparameters, and the papers' settings of them."""

import math
from dataclasses import dataclass, replace

from lib.embedded import EMBEDDED


@dataclass(frozen=True)
class Config:
    """Hyperparameters. One update sees `batch_size * accumulate` pairs."""

    trainable: str = "all"  # see dpo/trainable.py
    beta: float = 0.1
    kl_weight: float = 0.0  # Yang's gamma: weight of KL(reference || policy) on both responses
    optimizer: str = "rmsprop"  # or adamw
    learning_rate: float = 1e-6
    warmup: int = 150  # updates over which the learning rate rises linearly
    batch_size: int = 4  # pairs in memory at once
    accumulate: int = 1  # such batches per update
    max_grad_norm: float = 10.0
    epochs: int = 5
    steps: int | None = None  # updates at most; None: as many as the epochs hold
    max_prompt: int = 64  # tokens
    max_response: int = 64  # tokens
    append_eos: bool = False
    valid_fraction: float = 0.1
    valid_every: int = 25  # updates
    patience: int = 10  # validations without a better loss before training stops
    save_every: int = 25  # updates between states that a killed run goes on from
    seed: int = 0
    dtype: str = "float32"  # that is computed in: bfloat16 by autocast, the trained weights stay float32

    def updates(self, n_pairs: int) -> int:
        """Updates that training on `n_pairs` pairs makes."""
        of_epochs = math.ceil(n_pairs * self.epochs / (self.batch_size * self.accumulate))
        return min(of_epochs, self.steps or of_epochs)

    def ends_in_warmup(self, updates: int) -> str:
        """A warning where so few updates never reach the learning rate, else nothing."""
        if updates > self.warmup:
            return ""
        return (
            f"Warning: {updates} updates end within the warm-up of {self.warmup}, so the learning rate does not reach "
            f"{self.learning_rate:g}; bring more --pairs, or give --warmup."
        )


SMALL = Config(
    learning_rate=5e-6,
    warmup=5,
    steps=25,
    valid_every=10,
    save_every=10,
    patience=3,
    max_prompt=32,
    max_response=32,
)
PRESETS = {
    # Lee table 5. Warm-up and validation interval (100 examples) are those of the released code; one epoch of its
    # 24,576 pairs is more than the 6,000 after which the paper saw it converge.
    "lee2024": Config(beta=0.1, learning_rate=1e-6, batch_size=4, accumulate=1, patience=10),
    # Yang table 9; table 10's KL weights by model are in YANG_KL_WEIGHT.
    "yang2025": Config(beta=0.1, learning_rate=1e-5, batch_size=4, accumulate=4, epochs=5, patience=30),
    # For small models and 256 pairs on two CPU cores, minutes: by DOSES until toxicity is about halved, as the papers'
    # DPO halves it, and far beyond that.
    "embedded": SMALL,
    "strong": SMALL,
}
DOSES = {
    ("embedded", "gemma-270m"): {"steps": 4, "learning_rate": 2e-6, "warmup": 0},
    ("strong", "smollm2"): {"steps": 75},
}
YANG_KL_WEIGHT = {"gpt2": 0.02, "llama": 0.1, "gemma": 0.05, "mistral": 0.05}


def default_preset(model: str) -> str:
    """The preset of a model when none is given."""
    return "embedded" if model in EMBEDDED else "yang2025"


def make_config(name: str, model: str, **changes) -> Config:
    """A preset for a model, with the changes that are not None."""
    config = replace(PRESETS[name], **DOSES.get((name, model), {}))
    if name == "yang2025":
        config = replace(config, kl_weight=YANG_KL_WEIGHT.get(model, 0.05))
    return replace(config, **{key: value for key, value in changes.items() if value is not None})
