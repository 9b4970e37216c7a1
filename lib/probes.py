"""The linear toxicity probe: a direction in the residual stream and a bias (Lee 3.1; Yang 3.2)."""

from dataclasses import dataclass
from pathlib import Path

import nnsight
import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lib.errors import UserError
from lib.families import family_of, input_device, layers, reach
from lib.generation import padded, right_padded
from lib.remote import session
from lib.tokens import encode, filler_id, opening

PADDED_LENGTH = 128  # tokens, as the released code pads
TEXT_LENGTH = 256  # longer comments are cut


@dataclass(frozen=True)
class Probe:
    """P(toxic | x) = sigmoid(direction . x + bias), x a mean residual-stream vector."""

    direction: torch.Tensor  # [d_model], float32
    bias: float

    @property
    def unit(self) -> torch.Tensor:
        """The direction at length 1, `[d_model]`, float64: w / |w| of Yang eq. 2."""
        direction = self.direction.double()
        return direction / direction.norm()

    def save(self, path: Path) -> None:
        """Write `direction` `[d_model]` and `bias` `[1]` as safetensors."""
        save_file({"direction": self.direction.float().contiguous(), "bias": torch.tensor([self.bias])}, path)


def load_probe(path: str | Path, d_model: int) -> Probe:
    """Read a probe that `train_probe.py` or a user wrote: safetensors with `direction` `[d_model]`, `bias` optional.

    Raises:
        UserError: not a safetensors file, no direction, another model's size, or not finite.
    """
    given = f"--probe {path}"
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(
            f"{given}: not a readable safetensors file ({error}); write one with train_probe.py."
        ) from error
    if "direction" not in tensors:
        raise UserError(f"{given}: holds no tensor `direction` (it holds: {', '.join(tensors) or 'nothing'}).")
    direction = tensors["direction"].float()
    if direction.shape != (d_model,):
        raise UserError(
            f"{given}: direction has shape {list(direction.shape)}, this model needs [{d_model}]; "
            "the probe belongs to another model."
        )
    if not direction.isfinite().all() or not direction.any():
        raise UserError(f"{given}: direction is zero or holds NaN or infinity.")
    bias = tensors.get("bias", torch.zeros(1)).float()
    return Probe(direction, float(bias.reshape(-1)[0]) if bias.numel() else 0.0)


def mean_residuals(model, texts: list[str], batch_size: int, over: str, remote=False) -> np.ndarray:
    """Mean residual stream after the last layer of each text, `[n_texts, d_model]`, float32, as NumPy's array.

    over: `tokens`: the real ones (no padding, no BOS), before the final norm. `padded`: all 128 positions, padded on
    the left with end-of-text tokens, after the final norm, as Yang's released code.
    """
    released = over == "padded"
    order = sorted(range(len(texts)), key=lambda row: len(texts[row]))  # neighbours pad little
    residuals = np.zeros((len(texts), model.config.hidden_size), dtype=np.float32)
    place = reach(model, family_of(model).final_norm) if released else layers(model)[-1]
    device, bos, filler = input_device(model), len(opening(model.tokenizer)), filler_id(model.tokenizer)
    prepared = []
    for start in range(0, len(order), batch_size):
        which = order[start : start + batch_size]
        ids = encode(model.tokenizer, [texts[row] for row in which], PADDED_LENGTH if released else TEXT_LENGTH)
        if released:
            (batch,) = padded(ids, len(ids), device, left=True, filler=filler, width=PADDED_LENGTH)
            counted = torch.ones_like(batch["input_ids"])
            # The released code hands over no position ids: padding counts.
            batch["position_ids"] = torch.arange(PADDED_LENGTH, device=device).expand(len(ids), -1)
        else:
            (batch,) = right_padded(ids, len(ids), device)
            counted = batch["attention_mask"].clone()
            counted[:, :bos] = 0
        prepared.append((which, batch, (counted / counted.sum(-1, keepdim=True).clamp(min=1))[..., None]))
    requests = [prepared] if remote else [[part] for part in prepared]  # on a server all are one request
    for request in track(requests, "Probe features", console=Console(stderr=True), disable=len(requests) < 4):
        with session(model, remote):
            features = nnsight.save([])
            for _, batch, weights in request:
                with model.trace(batch) as tracer:
                    residual = place.output  # [batch, positions, d_model]
                    features.append((residual.float() * weights.to(residual.device)).sum(1).cpu())
                    tracer.stop()  # the head is not needed
        for (which, _, _), part in zip(request, features, strict=True):
            residuals[which] = part.numpy()
    return residuals


def fit(features: np.ndarray, labels: np.ndarray, seed: int, inverse_l2: float | None = None) -> Probe:
    """L2 logistic regression.

    Args:
        features: `[n, d_model]`.
        labels: `[n]`, 0 or 1.
        inverse_l2: scikit-learn's C on features as they are, as in the papers' code. None: the mean is taken off and
            all is divided by one number, the root mean square of what is left (residual streams differ in size by
            orders of magnitude between models, and a constant of 35,000 in one dimension is no feature); neither
            turns a direction. C: the strongest L2 whose 5-fold AUROC is within one standard error of the best.
    """
    # Half a second that no other function needs.
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_score

    if inverse_l2 is not None:
        model = LogisticRegression(C=inverse_l2, max_iter=500).fit(features, labels)
        return Probe(torch.tensor(model.coef_[0], dtype=torch.float32), float(model.intercept_[0]))
    center = features.mean(0, dtype=np.float64)
    size = float(np.sqrt(np.mean((features - center) ** 2)))
    scaled = ((features - center) / size).astype(np.float32)
    folds = StratifiedKFold(int(min(5, np.bincount(labels).min())), shuffle=True, random_state=seed)
    candidates = [LogisticRegression(C=c, max_iter=5000) for c in np.logspace(-4, 0, 9)]
    aurocs = np.array([cross_val_score(m, scaled, labels, cv=folds, scoring="roc_auc") for m in candidates])
    best = aurocs.mean(1).argmax()
    enough = aurocs[best].mean() - aurocs[best].std(ddof=1) / np.sqrt(aurocs.shape[1])
    model = candidates[(aurocs.mean(1) >= enough).argmax()].fit(scaled, labels)
    direction = model.coef_[0].astype(np.float64) / size
    return Probe(torch.tensor(direction, dtype=torch.float32), float(model.intercept_[0] - direction @ center))


def scores(probe: Probe, features: np.ndarray) -> np.ndarray:
    """Logits of the probe, `[n]`."""
    return features.astype(np.float64) @ probe.direction.double().numpy() + probe.bias
