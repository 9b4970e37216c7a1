"""Several processes as one trainer (`torchrun -m dpo`): weights, gradients and optimizer state in shards (FSDP2).

Without torchrun there is one process, and every function here does nothing or the plain thing.
"""

import copy
import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from dpo.trainable import has_added_biases, layers_of
from lib.checkpoints import ADDED_BIASES


def begin(device: str) -> str:
    """Join the processes that torchrun has started; returns the device of this one."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
    return f"cuda:{torch.cuda.current_device()}" if device == "cuda" and world() > 1 else device


def end() -> None:
    """Leave the other processes."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """This process's number; 0 writes files and talks."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def said_by_first(value):
    """What process 0 says, in all of them."""
    if world() > 1:
        box = [value]
        dist.broadcast_object_list(box)
        (value,) = box
    return value


def shared(parts: list) -> list:
    """Every process's list, dealt out in turn: the first of each, the second of each, and so on."""
    if world() == 1:
        return parts
    lists = [None] * world()
    dist.all_gather_object(lists, parts)
    return [part for turn in zip(*lists, strict=True) for part in turn]


def summed(totals: dict[str, float]) -> dict[str, float]:
    """Each entry's sum over the processes."""
    if world() == 1:
        return totals
    values = torch.tensor(list(totals.values()), dtype=torch.float64)
    if dist.get_backend() == "nccl":
        values = values.cuda()
    dist.all_reduce(values)
    return dict(zip(totals, values.tolist(), strict=True))


def shard(model, masks: dict) -> tuple[dict, object]:
    """Keep a share of every weight in each process, in place: one group a layer, gathered when it runs.

    masks: of parameters (see `dpo.trainable.choose`).

    Returns: the masks of the sharded parameters, and a copy of the model without weights, which knows how to save them;
        with one process the masks, and the model itself.
    """
    if world() == 1:
        return masks, model

    weightless = {id(p): torch.nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in model.parameters()}
    skeleton = copy.deepcopy(model, weightless)
    by_name = {name: masks[p] for name, p in model.named_parameters() if p in masks}
    for layer in layers_of(model):
        fully_shard(layer)
    # The rest too is let go of after each forward pass: else `model.parameters()` would be whole ones after a pass
    # without gradients, and an optimizer would hold tensors that the shards know nothing of.
    fully_shard(model, reshard_after_forward=True)
    parameters = dict(model.named_parameters())
    sharded_masks = {
        parameters[name]: distribute_tensor(mask, parameters[name].device_mesh, parameters[name].placements)
        for name, mask in by_name.items()
    }
    return sharded_masks, skeleton


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A sharded tensor as one."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def save_pretrained(model, skeleton, tokenizer, folder: Path) -> None:
    """Write the model and its tokenizer as transformers (or PEFT) does; with several processes, process 0 does."""
    # Under its usual name plain transformers would load the file without these biases, which is the base model.
    named = {"variant": ADDED_BIASES} if has_added_biases(skeleton) else {}
    if world() == 1:
        model.save_pretrained(folder, **named)
        tokenizer.save_pretrained(folder)
        return
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    stored = dict(model.named_parameters())
    for name, _ in model.named_parameters(remove_duplicate=False):
        if name not in stored:  # a head tied to the embedding
            weights.pop(name, None)
    if rank() == 0:
        skeleton.save_pretrained(folder, state_dict=weights, **named)
        tokenizer.save_pretrained(folder)
