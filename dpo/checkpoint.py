"""Training state on disk: safetensors and JSON, written whole or not at all."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def save_state(folder: Path, model, optimizer, progress: dict) -> None:
    """Write weights, optimizer state and progress, and only then let go of the state before it."""
    work = folder.with_name(folder.name + ".new")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    save_file({name: p.detach().contiguous() for name, p in model.named_parameters()}, work / "weights.safetensors")
    save_file(_optimizer_tensors(model, optimizer), work / "optimizer.safetensors")
    (work / "progress.json").write_text(json.dumps(progress))
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    work.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def load_state(folder: Path, model, optimizer) -> dict | None:
    """Restore the last whole state into model and optimizer; returns its progress, or None when there is none."""
    if not (folder / "progress.json").exists():
        folder = folder.with_name(folder.name + ".old")  # killed between the two renames
    if not (folder / "progress.json").exists():
        return None
    weights = load_file(folder / "weights.safetensors")
    tensors = load_file(folder / "optimizer.safetensors")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
            prefix = f"{name}|"
            state = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            if state:
                optimizer.state[parameter] = {
                    key: value.cpu() if key == "step" else value.to(parameter.device) for key, value in state.items()
                }
    return json.loads((folder / "progress.json").read_text())


def _optimizer_tensors(model, optimizer) -> dict[str, torch.Tensor]:
    return {
        f"{name}|{key}": value.detach().contiguous()
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, torch.Tensor)
    }
