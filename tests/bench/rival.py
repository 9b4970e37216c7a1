"""What the papers' released code does, written anew with hooks that are removed: the rival of two benchmarks."""

from contextlib import contextmanager

import torch

from lib.generation import NEW_TOKENS, batches, end_ids, greedy
from lib.models import d_mlp, mlp_out, n_layers


@contextmanager
def hooked(model, make):
    """Inside, `make(layer)` is a forward pre-hook of every layer's MLP output map; None: no hook there."""
    handles = [
        mlp_out(model, layer)._module.register_forward_pre_hook(hook)
        for layer in range(n_layers(model))
        if (hook := make(layer))
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def clamping(edit, where: slice, device):
    """Hooks that set an edit's neurons to its values."""
    values = {layer: (index.to(device), value.to(device)) for layer, index, value in edit}

    def make(layer: int):
        if layer not in values:
            return None
        index, value = values[layer]

        def hook(module, args):
            args[0][:, where, index] = value.to(args[0].dtype)

        return hook

    return make


def generate_then_read(model, prompts: list[str], batch_size: int) -> torch.Tensor:
    """Mean activations `[n_layers, d_mlp]`: generate, then a second forward pass over prompt and continuation."""
    network, ends = model._module, torch.tensor(sorted(end_ids(model)))
    total, count = torch.zeros(n_layers(model), d_mlp(model), dtype=torch.float64), 0.0
    for batch in batches(model.tokenizer, prompts, batch_size, model.device):
        with torch.no_grad():
            ids = network.generate(**batch, **greedy())
        width = batch["input_ids"].shape[1]
        new = ids[:, width:].cpu()
        before = torch.isin(new, ends).cumsum(1) - torch.isin(new, ends).int()  # ends before a token
        counted = torch.zeros(ids.shape, dtype=torch.float64)
        counted[:, width - 1 : -1] = (before == 0).double()
        attention = torch.cat([batch["attention_mask"], torch.ones_like(ids[:, width:])], 1)
        collected = {}

        def make(layer: int, collected=collected):
            def hook(module, args):
                collected[layer] = args[0]

            return hook

        positions = (attention.cumsum(-1) - 1).clamp(min=0)
        with hooked(model, make), torch.no_grad():
            network(input_ids=ids, attention_mask=attention, position_ids=positions)
        for layer, m in collected.items():
            total[layer] += torch.einsum("bp,bpn->n", counted, m.cpu().double())
        count += float(counted.sum())
    assert new.shape[1] == NEW_TOKENS
    return total / count
