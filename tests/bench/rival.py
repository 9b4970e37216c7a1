"""What the papers' released code does, written anew with hooks that are removed: the rival of two benchmarks."""

from contextlib import contextmanager

import torch

from lib.families import FAMILIES, reach
from lib.generation import batches, greedy


def load(folder, device: str, dtype):
    """A model as transformers loads it, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device), AutoTokenizer.from_pretrained(folder)


@contextmanager
def hooked(network, make):
    """Inside, `make(layer)` is a forward pre-hook of every layer's MLP output map; None: no hook there."""
    kind = FAMILIES[network.config.model_type]
    handles = [
        reach(layer, kind.mlp_out).register_forward_pre_hook(hook)
        for at, layer in enumerate(reach(network, kind.layers))
        if (hook := make(at))
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


def end_ids(network) -> list[int]:
    eos = network.generation_config.eos_token_id
    return eos if isinstance(eos, list) else [eos]


def generate_then_read(network, tokenizer, prompts: list[str], batch_size: int) -> torch.Tensor:
    """Mean activations `[n_layers, d_mlp]`: generate, then a second forward pass over prompt and continuation."""
    ends, total, count = torch.tensor(end_ids(network)), 0, 0.0
    for batch in batches(tokenizer, prompts, batch_size, network.device):
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
        with hooked(network, make), torch.no_grad():
            network(input_ids=ids, attention_mask=attention, position_ids=positions)
        total = total + torch.stack(
            [torch.einsum("bp,bpn->n", counted, m.cpu().double()) for _, m in sorted(collected.items())]
        )
        count += float(counted.sum())
    return total / count
