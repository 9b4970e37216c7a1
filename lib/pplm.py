"""PPLM: generation that a probe steers through the key-value cache (Dathathri et al. 2019; Lee 4.2, table 6).

As its released code with one horizon step, no decay, and every row of a batch on its own.
"""

from dataclasses import dataclass

import torch
from transformers import DynamicCache

from lib.families import layers
from lib.probes import Probe


@dataclass(frozen=True)
class PPLM:
    """Lee table 6, but for what an option changes."""

    step_size: float  # length of one step, of a layer's whole cache
    iterations: int
    kl_scale: float
    gm_scale: float  # share of the moved model's log-probabilities in those that are sampled from
    gamma: float  # gradients are divided by their length to this power
    window: int  # last positions of the cache that move; 0: all
    top_k: int
    temperature: float


@dataclass(frozen=True)
class Seen:
    """What the unmoved model made of everything up to the last token."""

    cache: list  # (keys, values) of each layer, the last token included
    attention: torch.Tensor  # [rows, positions]
    last: torch.Tensor  # [rows, 1], the last token
    log_probs: torch.Tensor  # [rows, vocab] of the next token
    total: torch.Tensor  # [rows, d_model], the residual stream's sum before the last token
    count: torch.Tensor  # [rows, 1], over how many tokens


def generate(network, probe: Probe, batch: dict, pplm: PPLM, noise: torch.Tensor) -> torch.Tensor:
    """New ids `[rows, new_tokens]`, sampled under PPLM.

    Args:
        network: nnsight model.
        probe: its `sound` kind, fitted on the mean residual stream of real tokens before the final norm.
        batch: `{"input_ids", "attention_mask"}`, padded on the left.
        noise: Gumbel noise `[rows, new_tokens, top_k]`.
    """
    ids, attention = (batch[name].to(network.device) for name in ("input_ids", "attention_mask"))
    bos = -1 if network.tokenizer.bos_token_id is None else network.tokenizer.bos_token_id
    with torch.no_grad():
        # The residual stream's sum over what a probe reads: real tokens but the BOS.
        total, count = 0, 0
        unmoved, moved, new = [], [], []
        if ids.shape[1] > 1:
            residual, _, unmoved = forward(network, [], attention[:, :-1], input_ids=ids[:, :-1])
            counted = attention[:, :-1] * (ids[:, :-1] != bos)
            total, count = (at_least_float32(residual) * counted[..., None]).sum(1), counted.sum(1, keepdim=True)
            moved = unmoved
        last = ids[:, -1:]
    for step in range(noise.shape[1]):
        with torch.no_grad():
            residual, logits, unmoved = forward(network, unmoved, attention, input_ids=last)
        seen = Seen(unmoved, attention, last, logits.log_softmax(-1), total, count)
        for _ in range(pplm.iterations if moved else 0):
            moved = stepped(network, probe, moved, seen, pplm)
        with torch.no_grad():
            _, toxic, moved = forward(network, moved, attention, input_ids=last)
            total, count = total + at_least_float32(residual[:, -1]), count + 1
            fused = pplm.gm_scale * (toxic / pplm.temperature).log_softmax(-1) + (1 - pplm.gm_scale) * seen.log_probs
            top, tokens = fused.topk(noise.shape[2])
            last = tokens.gather(1, (top + noise[:, step].to(top)).argmax(-1, keepdim=True))
            new.append(last)
            attention = torch.cat([attention, torch.ones_like(last)], 1)
    return torch.cat(new, 1)


def passes(pplm: PPLM, prompts: list[list[int]], size: int, new_tokens: int) -> tuple[list, list]:
    """What `generate` computes, for a dry run: (tokens through layers, tokens through head) of each pass.

    Args:
        prompts: token ids.
        size: prompts at once.

    Returns: its passes over token ids, and what comes beside them: for every step of the cache the pass over expected
        embeddings, and the gradients of that one and of the one before.
    """
    over_ids, beside = [], []
    for start in range(0, len(prompts), size):
        part = prompts[start : start + size]
        rows, before_last = len(part), max(map(len, part)) - 1
        steps = pplm.iterations * (new_tokens if before_last else new_tokens - 1)  # an empty cache cannot be moved
        over_ids += [(rows * before_last, rows)] if before_last else []
        over_ids += [(rows, rows)] * (2 * new_tokens + steps)  # for each token unmoved and moved
        beside += [(rows, rows)] * (3 * steps)
    return over_ids, beside


def stepped(network, probe: Probe, cache: list, seen: Seen, pplm: PPLM) -> list:
    """The cache after one step against the gradient of `objective`, of length step_size in every layer and row."""
    # In float32 at least: bfloat16 would round a step away.
    leaves = [tuple(at_least_float32(part.detach()).requires_grad_() for part in layer) for layer in cache]
    with torch.enable_grad():
        objective(network, probe, leaves, seen, pplm).sum().backward()
    moved = []
    for layer in leaves:
        gradients = [part.grad for part in layer]  # [rows, heads, positions, d_head]
        if pplm.window:
            gradients = [torch.cat([0 * g[:, :, : -pplm.window], g[:, :, -pplm.window :]], 2) for g in gradients]
        length = sum(at_least_float32(g).square().sum((1, 2, 3), keepdim=True) for g in gradients).sqrt() + 1e-10
        steps = [pplm.step_size * g / length**pplm.gamma for g in gradients]
        moved.append(tuple((part - step).detach() for part, step in zip(layer, steps, strict=True)))
    return moved


def objective(network, probe: Probe, cache: list, seen: Seen, pplm: PPLM) -> torch.Tensor:
    """-log p(toxic) of the text and one expected token more, plus kl_scale KL(moved || unmoved); `[rows]`, nats."""
    residual, logits, _ = forward(network, cache, seen.attention, input_ids=seen.last)
    log_probs = logits.log_softmax(-1)
    probs = log_probs.exp()
    embedding = network._module.get_input_embeddings()
    size = getattr(embedding, "embed_scale", 1.0)  # Gemma's embedding multiplies its rows
    expected = (probs.to(embedding.weight.dtype) @ embedding.weight * size)[:, None]  # [rows, 1, d_model]
    longer = torch.cat([seen.attention, torch.ones_like(seen.last)], 1)
    ahead = forward(network, seen.cache, longer, head=False, inputs_embeds=expected)[0]
    # As Dathathri et al.'s code: the last token's own residual stream is taken as given.
    mean = (seen.total + at_least_float32(residual[:, -1].detach()) + at_least_float32(ahead[:, -1])) / (seen.count + 2)
    toxic = mean @ probe.direction.to(mean) + probe.bias
    divergence = (probs * (log_probs - seen.log_probs)).sum(-1)
    return torch.nn.functional.softplus(-toxic) + pplm.kl_scale * divergence


def at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, in float32 if it was in half precision: log-probabilities and sums need it."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def forward(network, cache: list, attention: torch.Tensor, head: bool = True, **inputs) -> tuple:
    """Run new tokens after a cache.

    Args:
        cache: (keys, values) `[rows, heads, positions, d_head]` of each layer; empty: there is none.
        attention: `[rows, positions]`, of cache and new tokens.
        inputs: `input_ids` `[rows, new]` or `inputs_embeds` `[rows, new, d_model]`.
        head: whether logits are wanted.

    Returns: the residual stream after the last layer `[rows, new, d_model]`, logits of the last position
        `[rows, vocab]` float32 or None, and the cache grown by the new tokens.
    """
    grown = DynamicCache(config=network.config)
    for layer, (keys, values) in enumerate(cache):
        grown.update(keys.to(network.dtype), values.to(network.dtype), layer)
    width = next(iter(inputs.values())).shape[1]
    places = {"attention_mask": attention, "position_ids": (attention.cumsum(-1) - 1).clamp(min=0)[:, -width:]}
    logits = None
    with network.trace({**inputs, **places, "past_key_values": grown, "use_cache": True}, logits_to_keep=1) as tracer:
        residual = layers(network)[-1].output.save()
        if head:
            logits = at_least_float32(network.output.logits[:, -1]).save()
        else:
            tracer.stop()
    return residual, logits, [(layer.keys, layer.values) for layer in grown.layers]
