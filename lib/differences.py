"""Differences of mean residual streams: what separates two kinds of text at every layer, without a fit."""

import nnsight
import torch

from lib.families import input_device, layers
from lib.generation import right_padded
from lib.probes import TEXT_LENGTH
from lib.remote import session
from lib.tokens import encode, opening


def differences(model, texts: list[str], labelings: torch.Tensor, batch_size: int, remote=False) -> torch.Tensor:
    """Mean residual stream of the texts with a label less that of those without, after every layer.

    A text counts once, as the mean over its tokens (no BOS). On a server all texts are one request.

    Args:
        model: nnsight.
        labelings: `[n_labelings, n_texts]` bool; each gives a difference, all in one pass.

    Returns: `[n_labelings, n_layers, d_model]` float64, CPU.
    """
    chosen = labelings.double()
    signs = chosen / chosen.sum(1, keepdim=True) - (1 - chosen) / (1 - chosen).sum(1, keepdim=True)
    order = sorted(range(len(texts)), key=lambda row: len(texts[row]))  # neighbours pad little
    device, bos = input_device(model), len(opening(model.tokenizer))
    prepared = []
    for start in range(0, len(order), batch_size):
        which = order[start : start + batch_size]
        (batch,) = right_padded(encode(model.tokenizer, [texts[row] for row in which], TEXT_LENGTH), len(which), device)
        counted = batch["attention_mask"].double().cpu()
        counted[:, :bos] = 0
        mean = counted / counted.sum(-1, keepdim=True).clamp(min=1)  # [batch, positions]
        prepared.append((batch, signs[:, which, None] * mean))  # [n_labelings, batch, positions]
    total = torch.zeros(len(signs), model.config.num_hidden_layers, model.config.hidden_size, dtype=torch.float64)
    for request in [prepared] if remote else [[part] for part in prepared]:
        with session(model, remote):
            sums = nnsight.save([])
            for batch, weights in request:
                with model.trace(batch) as tracer:
                    for layer in layers(model):
                        residual = layer.output.cpu().double()  # [batch, positions, d_model]
                        sums.append(torch.einsum("lbp,bpd->ld", weights, residual))
                    tracer.stop()  # the head is not needed
        total += torch.stack(list(sums)).view(len(request), total.shape[1], *total.shape[::2]).sum(0).transpose(0, 1)
    return total
