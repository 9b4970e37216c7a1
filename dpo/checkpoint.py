"""Training state on disk: a distributed checkpoint in safetensors files, and JSON; written whole or not at all.

Each process writes its own shards; a run of another number of processes reads them too.
"""

import json
import shutil
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from dpo.sharding import rank, world

# With one process that is what is meant.
warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")


def save_state(folder: Path, model, optimizer, progress: dict) -> None:
    """Write weights, optimizer state and progress, and only then let go of the state before it."""
    work = folder.with_name(folder.name + ".new")
    if rank() == 0:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
    _together()
    tensors = {name: p.detach() for name, p in model.named_parameters()} | _optimizer_tensors(model, optimizer)
    writer = dcp.HuggingFaceStorageWriter(str(work), save_distributed=True)
    dcp.save(tensors, storage_writer=writer, no_dist=world() == 1)
    _together()
    if rank() == 0:
        (work / "progress.json").write_text(json.dumps(progress))
        old = folder.with_name(folder.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        work.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    _together()


def load_state(folder: Path, model, optimizer) -> dict | None:
    """Restore the last whole state into model and optimizer; returns its progress, or None when there is none."""
    if not (folder / "progress.json").exists():
        folder = folder.with_name(folder.name + ".old")  # killed between the two renames
    if not (folder / "progress.json").exists():
        return None
    reader = dcp.HuggingFaceStorageReader(str(folder))
    parameters = dict(model.named_parameters())
    tensors = {name: p.detach() for name, p in parameters.items()}
    for name, about in reader.read_metadata().state_dict_metadata.items():
        of, _, key = name.partition("|")
        if key:
            like = parameters[of]
            of_its_shape = tuple(about.size) == tuple(like.shape)  # a step's number is a tensor of its own
            value = torch.zeros_like(like) if of_its_shape else torch.zeros(about.size, dtype=about.properties.dtype)
            tensors[name] = value.detach()
            optimizer.state[like][key] = tensors[name]
    dcp.load(tensors, storage_reader=reader, no_dist=world() == 1)
    return json.loads((folder / "progress.json").read_text())


def _optimizer_tensors(model, optimizer) -> dict[str, torch.Tensor]:
    return {
        f"{name}|{key}": value.detach()
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, torch.Tensor)
    }


def _together() -> None:
    if world() > 1:
        dist.barrier()
