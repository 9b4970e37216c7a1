"""Mean activations of all neurons, what each contributes to the toxic direction, and the four groups.

All that is `[n_layers, d_mlp]` and leaves a function here is float64 (masks: bool) on the CPU, whatever the model's
device and dtype; sums are taken in float64 where the model is.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import nnsight
import torch
from rich.console import Console
from rich.progress import track
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lib import artifacts, checkpoints, generation
from lib.data import Dataset
from lib.errors import UserError
from lib.families import FAMILIES, d_mlp, input_device, mlp_out, n_layers, value_vectors, write_gain
from lib.generation import NEW_TOKENS, batches, end_ids, greedy, right_padded
from lib.models import Source, short_name
from lib.probes import Probe
from lib.protocol import Protocol
from lib.remote import Server, at_weights, session

GROUPS = ("TP", "TN", "AP", "AN")


@dataclass(frozen=True)
class Means:
    """Means over the tokens that a model generates, each `[n_layers, d_mlp]` float64."""

    activation: torch.Tensor  # mean of m
    write: torch.Tensor  # mean of m / rms(MLP output): what reaches the residual stream; equals `activation` where
    # the family has no norm after its MLP

    def save(self, path: Path) -> None:
        """Write `activation` and `write`, which `load_activations` reads (`--post means:FILE`)."""
        save_file({"activation": self.activation, "write": self.write.clone()}, path)


def mean_activations(
    model, prompts: list[str], batch_size: int, new_tokens: int = NEW_TOKENS, remote=False
) -> Iterator[Means]:
    """Mean activations over greedily generated tokens (Yang 3.2); yields once a batch, the last one is the result.

    The sums are taken in float64 inside the generation's own trace, at the position that predicts each new token (the
    prompt's last token and the new tokens but the last); steps after a row's end of text do not count. No second
    forward pass is run. On a server all batches are one request, and two `[n_layers, d_mlp]` tensors come back.
    """
    kind = FAMILIES[model._module.config.model_type]
    sizes = (2, n_layers(model), d_mlp(model))
    epsilon = getattr(model._module.config, "rms_norm_eps", 0.0)
    ends = torch.tensor(sorted(end_ids(model)))
    total, count = torch.zeros(sizes, dtype=torch.float64), 0.0
    every = list(batches(model.tokenizer, prompts, batch_size, input_device(model)))
    for part in [every] if remote else [[batch] for batch in every]:
        with session(model, remote):
            place = "cpu" if model.device.type == "mps" else model.device  # where float64 is: Apple's GPUs have none
            sums = nnsight.save(torch.zeros(sizes, dtype=torch.float64, device=place))
            steps = nnsight.save(torch.zeros(1, dtype=torch.float64, device=place))
            for batch in part:
                alive = torch.ones(len(batch["input_ids"]), dtype=torch.float64, device=place)
                with model.generate(batch, **greedy(new_tokens)) as tracer:
                    for _ in tracer.iter[:new_tokens]:
                        for layer in range(sizes[1]):
                            neurons = mlp_out(model, layer)
                            m = neurons.input[:, -1].to(place).double()  # [rows, d_mlp]
                            sums[0, layer] += alive @ m
                            if kind.post_norm:
                                power = neurons.output[:, -1].to(place).double().square().mean(-1)  # [rows]
                                sums[1, layer] += (alive * (power + epsilon).rsqrt()) @ m
                        steps += alive.sum()
                        token = model.output.logits[:, -1].float().argmax(-1).to(place)  # the greedy choice
                        alive = alive * ~torch.isin(token, ends.to(place))
        total += sums.cpu()
        count += float(steps)
        yield Means(total[0] / count, (total[1] if kind.post_norm else total[0]) / count)


def text_means(model, rows: list[list[int]], counted: list[range], batch_size: int, remote=False) -> Means:
    """Mean activations over given positions of given texts, without generating: for two models on the same text.

    Args:
        rows: token ids of each text.
        counted: the positions of each text that count; `range(len(prompt) - 1, len(text) - 1)` are those that
            `mean_activations` counts of a prompt and its continuation.
    """
    weighted = []
    for start in range(0, len(rows), batch_size):
        part = slice(start, start + batch_size)
        (batch,) = right_padded(rows[part], batch_size, input_device(model))
        weights = torch.zeros(batch["input_ids"].shape, dtype=torch.float64)
        for row, positions in enumerate(counted[part]):
            weights[row, positions.start : positions.stop] = 1
        weighted.append((batch, weights))
    return _weighted_means(model, weighted, remote)


def released_means(model, prompts: list[str], batch_size: int, seed: int, remote=False) -> Means:
    """Mean activations as Yang's released code takes them (activation_projection.py).

    Prompts are not cut to 32 tokens, decoding follows the model's own generation configuration (which samples for some
    models), and a second forward pass over prompt and continuation counts the last 20 positions of every row, among
    them the new tokens' own positions, and end-of-text padding after a row that ended. Sums in float64, where the
    released code's float16 overflows.
    """
    longest = getattr(model._module.config, "max_position_embeddings", 1024) - NEW_TOKENS
    every = list(batches(model.tokenizer, prompts, batch_size, input_device(model), max_tokens=longest))
    with session(model, remote):
        texts = nnsight.save([])
        torch.manual_seed(seed)
        for batch in every:
            with model.generate(batch, max_new_tokens=NEW_TOKENS) as tracer:
                ids = tracer.result.save()
            texts.append(ids.cpu())
    weighted = []
    for batch, ids in zip(every, texts, strict=True):
        new = torch.ones_like(ids[:, batch["input_ids"].shape[1] :])
        mask = torch.cat([batch["attention_mask"].cpu(), new], 1)
        weights = torch.zeros(ids.shape, dtype=torch.float64)
        weights[:, -NEW_TOKENS:] = 1
        place = input_device(model)
        # The released code hands over no position ids: padding counts.
        positions = torch.arange(ids.shape[1], device=place).expand(len(ids), -1)
        read = {"input_ids": ids.to(place), "attention_mask": mask.to(place), "position_ids": positions}
        weighted.append((read, weights))
    return _weighted_means(model, weighted, remote)


def _weighted_means(model, weighted: list[tuple[dict, torch.Tensor]], remote) -> Means:
    """Means of m and of m / rms(MLP output) over weighted positions of (batch, weights `[batch, positions]`) pairs."""
    kind = FAMILIES[model._module.config.model_type]
    epsilon = getattr(model._module.config, "rms_norm_eps", 0.0)
    sizes = (2, n_layers(model), d_mlp(model))
    # The traces run on past the last activation: an adapter (`lib.models.adapted`) has work to do there.
    with session(model, remote):
        place = "cpu" if model.device.type == "mps" else model.device
        sums = nnsight.save(torch.zeros(sizes, dtype=torch.float64, device=place))
        for batch, weights in weighted:
            weight = weights.to(place)
            with model.trace(batch, logits_to_keep=1):
                for layer in range(sizes[1]):
                    neurons = mlp_out(model, layer)
                    m = neurons.input.to(place).double()  # [batch, positions, d_mlp]
                    sums[0, layer] += torch.einsum("bp,bpn->n", weight, m)
                    if kind.post_norm:
                        power = neurons.output.to(place).double().square().mean(-1)  # [batch, positions]
                        sums[1, layer] += torch.einsum("bp,bpn->n", weight * (power + epsilon).rsqrt(), m)
    count = sum(float(weights.sum()) for _, weights in weighted)
    activation, write = sums.cpu() / count
    return Means(activation, write if kind.post_norm else activation)


def cached_means(
    model, source: Source, prompts: Dataset, batch_size: int, protocol: Protocol, seed: int = 0, remote=False
) -> Means:
    """A model's mean activations on prompts as the protocol takes them, made once and kept in the cache."""
    released = protocol.means_over == "last20"
    fields = {
        "model": source.revision,
        "means_over": protocol.means_over,
        "seed": seed if released else None,
        "device": model.device.type,
        "dtype": str(model.dtype),
        "prompts": prompts.sha256,
        "n_prompts": len(prompts.items),
        "batch_size": batch_size,
        "remote": remote.host if isinstance(remote, Server) else remote,
        "code": artifacts.code_version(__file__, generation.__file__, *checkpoints.CODE),
        "versions": artifacts.versions("torch", "transformers", "nnsight", "peft"),
    }

    def build(folder: Path) -> None:
        if released:
            released_means(model, prompts.items, batch_size, seed, remote).save(folder / "means.safetensors")
            return
        n_batches = -(-len(prompts.items) // batch_size)
        running = mean_activations(model, prompts.items, batch_size, remote=remote)
        console = Console(stderr=True)
        for means in track(running, f"Mean activations of {short_name(source.name)}", n_batches, console=console):
            final = means
        final.save(folder / "means.safetensors")

    folder = artifacts.make("activations", fields, build)
    return load_activations(folder / "means.safetensors", (n_layers(model), d_mlp(model)))


def value_projections(model, unit: torch.Tensor, through_norm: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Each value vector's product with a unit direction, and its cosine, `[n_layers, d_mlp]` float64 on the CPU each.

    Args:
        model: torch or nnsight.
        unit: `[d_model]` float64, such as a probe's.
        through_norm: see each value vector as the residual stream does, after Gemma's `post_feedforward_layernorm`
            (`lib.models.write_gain`). False: the weight's own row, as the papers' code does. No difference for
            families without that norm.
    """
    projections, cosines = [], []
    for layer in range(model.config.num_hidden_layers):
        vectors = value_vectors(model, layer)  # [d_mlp, d_model]
        if vectors.device.type == "mps":  # Apple's GPUs have no float64
            vectors = vectors.cpu()
        vectors = vectors.double()
        if through_norm:
            vectors = vectors * write_gain(model, layer).to(vectors)
        product = vectors @ unit.to(vectors)
        projections.append(product.cpu())
        cosines.append((product / vectors.norm(dim=-1).clamp(min=1e-30)).cpu())
    return torch.stack(projections), torch.stack(cosines)


def attribution(
    pre: torch.Tensor, projection_pre: torch.Tensor, post: torch.Tensor, projection_post: torch.Tensor
) -> torch.Tensor:
    """Yang eq. 2: `(m_pre v_pre - m_post v_post) . w / |w|`; above 0 means that DPO reduced the neuron's toxic write.

    All `[n_layers, d_mlp]`; `pre` and `post` are mean activations (or `Means.write` for projections through the norm).
    """
    return pre * projection_pre - post * projection_post


def groups(cosine: torch.Tensor, pre: torch.Tensor, delta: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """Yang table 4: T or A by the sign of the cosine, P or N by the sign of the mean activation before DPO.

    With `delta` only neurons with delta > 0 belong to a group (section 5.2); without it all do (section 6). Neurons
    that are exactly 0 belong to none. Returns masks `[n_layers, d_mlp]` bool, which do not overlap.
    """
    chosen = torch.ones_like(cosine, dtype=torch.bool) if delta is None else delta > 0
    toxic, anti, positive, negative = cosine > 0, cosine < 0, pre > 0, pre < 0
    return {
        "TP": chosen & toxic & positive,
        "TN": chosen & toxic & negative,
        "AP": chosen & anti & positive,
        "AN": chosen & anti & negative,
    }


def group_summary(masks: dict[str, torch.Tensor], delta: torch.Tensor, pre: torch.Tensor) -> dict:
    """Sizes and shares of the groups (Yang table 5), % of neurons that reduce (table 18), % negative before (13).

    `reduction_shares`: the share of the four groups' whole reduction that each group makes (figures 2a and 6a).
    """
    sizes = {name: int(mask.sum()) for name, mask in masks.items()}
    reduction = {name: float(delta[mask].sum()) for name, mask in masks.items()}
    return {
        "groups": sizes,
        "group_shares": {name: 100 * size / max(1, sum(sizes.values())) for name, size in sizes.items()},
        "reduction_shares": {name: 100 * part / (sum(reduction.values()) or 1) for name, part in reduction.items()},
        "percent_reducing": 100 * float((delta > 0).double().mean()),
        "percent_negative": 100 * float((pre < 0).double().mean()),
    }


def top(scores: torch.Tensor, n: int) -> torch.Tensor:
    """Mask `[n_layers, d_mlp]` of the n largest scores over all layers."""
    mask = torch.zeros(scores.numel(), dtype=torch.bool)
    mask[scores.flatten().topk(min(n, scores.numel())).indices] = True
    return mask.view_as(scores)


@dataclass(frozen=True)
class Attribution:
    """What each neuron writes along a direction before and after DPO; `[n_layers, d_mlp]` all, float64 but for groups.

    `delta` is Yang eq. 2, `groups` the four of table 4 with delta > 0.
    """

    pre: torch.Tensor  # mean activation before DPO
    post: torch.Tensor  # and after it
    cosine: torch.Tensor  # of the base model's value vector with the direction
    delta: torch.Tensor
    groups: dict[str, torch.Tensor]

    def save(self, path: Path) -> None:
        """Write `pre`, `post`, `cosine` and `delta`, float32."""
        tensors = {name: getattr(self, name).float().contiguous() for name in ("pre", "post", "cosine", "delta")}
        save_file(tensors, path)


def attribute(base, post, probe: Probe, pre: Means, after: Means, protocol: Protocol, remote=False) -> Attribution:
    """What each neuron writes along the probe before and after DPO, and the groups that follow.

    Args:
        base, post: the nnsight models before and after DPO. post None: only its means are known, and the base model's
            value vectors, which DPO hardly moves (Lee 5.1), stand for its own.
        pre, after: their mean activations.
        protocol: `value_vectors` says whether a write is what reaches the residual stream (Gemma's norm after the MLP
            is part of it; other families have none) or the weight's own row times the plain mean activation.
    """
    written = protocol.value_vectors == "written"
    projection_pre, cosine = at_weights(value_projections, base, probe.unit, written, remote=remote)
    projection_post = projection_pre
    if post is not None:
        projection_post, _ = at_weights(value_projections, post, probe.unit, written, remote=remote)
    pre_write, post_write = (means.write if written else means.activation for means in (pre, after))
    delta = attribution(pre_write, projection_pre, post_write, projection_post)
    return Attribution(pre.activation, after.activation, cosine, delta, groups(cosine, pre.activation, delta))


def select(
    masks: dict[str, torch.Tensor], cosine: torch.Tensor, pre: torch.Tensor, fraction: float, order: str
) -> dict[str, torch.Tensor]:
    """The share `fraction` (Yang's beta) of each group, `[n_layers, d_mlp]` bool each (Yang 6.1).

    order:
        aligned: the largest |cosine| with the direction first, in every group.
        released: as the released notebook: the largest |cosine| first in TP and AN, the smallest first in AP and TN.
        activation: the smallest absolute mean activation first (Yang table 19, `ascending activation`).
    """
    aligned = cosine.abs()
    chosen = {}
    for name, mask in masks.items():
        last = order == "released" and name in ("AP", "TN")
        score = -pre.abs() if order == "activation" else -aligned if last else aligned
        among = torch.where(mask, score, -torch.inf)
        chosen[name] = top(among, round(fraction * int(mask.sum()))) & mask
    return chosen


def load_activations(path: str | Path, shape: tuple[int, int]) -> Means:
    """Read mean activations from safetensors: `activation` `[n_layers, d_mlp]`, and `write` likewise (optional).

    Raises:
        UserError: unreadable, another model's shape, or not finite.
    """
    given = f"activations {path}"
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(f"{given}: not a readable safetensors file ({error}).") from error
    if "activation" not in tensors:
        raise UserError(f"{given}: holds no tensor `activation` (it holds: {', '.join(tensors) or 'nothing'}).")
    for name, tensor in tensors.items():
        if name in {"activation", "write"} and tuple(tensor.shape) != tuple(shape):
            raise UserError(
                f"{given}: {name} has shape {list(tensor.shape)}, this model needs {list(shape)}; "
                "the file belongs to another model."
            )
        if not tensor.isfinite().all():
            raise UserError(f"{given}: {name} holds NaN or infinity.")
    activation = tensors["activation"].double()
    return Means(activation, tensors.get("write", activation).double())
