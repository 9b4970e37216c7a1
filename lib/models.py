"""Model names, where their files are, and loading for traces."""

import hashlib
import json
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import click
import torch
from nnsight import TransformersModel
from safetensors import SafetensorError, safe_open
from transformers import GenerationConfig

from lib.adapters import adapted
from lib.artifacts import file_sha256
from lib.checkpoints import read_module, read_tokenizer
from lib.embedded import EMBEDDED, unpack
from lib.errors import UserError, brief
from lib.families import read_family
from lib.hub import hub_errors, model_folder
from lib.tokens import check_vocabulary

ROOM = 1.2  # times the weights: what a batch takes beside them
LONGEST_NAME = 1000  # of a path or Hub id
NO_PART = {"training.json", "run.json", ".written.json", "source.json"}  # of what a model is
MODELS = {
    "gpt2": "openai-community/gpt2-medium",
    "llama": "meta-llama/Llama-3.1-8B",
    "gemma": "google/gemma-2-2b",
    "mistral": "mistralai/Mistral-7B-v0.1",
}


@dataclass(frozen=True)
class Source:
    """Where a model's files are. `revision`: a commit for a Hub id, a sha256 for files on disk."""

    name: str  # as the user wrote it
    path: str  # a folder
    revision: str
    adapter: str | None = None  # a folder of LoRA weights in PEFT's format, for the model in `path`
    asked: str | None = None  # the Hub revision that the user asked for


def short_name(name: str) -> str:
    """A folder name for a model: `gemma-270m`, `Qwen3-0.6B`, the name of the folder that a path leads to."""
    return Path(name).resolve().name if Path(name).is_dir() else name.rstrip("/").split("/")[-1]


def folder_sha256(folder: Path) -> str:
    """Hex sha256 over the names and contents of all files of a model folder that can change a number.

    That is weights, configurations (of generation too) and tokenizer; not what training left beside them.
    """
    kinds = {".safetensors", ".bin", ".json", ".model", ".txt", ".jinja"}
    files = sorted(p for p in folder.iterdir() if p.is_file() and p.suffix in kinds and p.name not in NO_PART)
    return hashlib.sha256("".join(f"{p.name} {file_sha256(p)}\n" for p in files).encode()).hexdigest()


def resolve(name: str, revision: str | None = None, option: str = "--model", weights: bool = True) -> Source:
    """Turn what an option was given into files: an embedded model is unpacked, a Hub id is pinned to its commit.

    weights: False leaves them where they are: the model runs on NDIF, which knows models by their Hub ids alone.

    Raises:
        UserError: unknown name, unsupported family, gated or missing repository, no network, no disk space.
    """
    if len(name) > LONGEST_NAME:
        raise UserError(
            f"{option} {name[:40]}...: {len(name)} characters are no model's name; give a folder or Hub id."
        )
    given, folder = f"{option} {name}", Path(name)
    if revision and folder.is_dir():
        raise UserError(f"--revision {revision}: {name} is a folder; only a model of the Hub has revisions.")
    if folder.is_file():
        raise UserError(
            f"{given}: is a file; give a folder written by save_pretrained (a policy.pt: load its state dictionary "
            "into the base model with load_state_dict and save that)."
        )
    if (folder / "adapter_config.json").is_file():
        return resolve_adapter(folder, name, option, weights)
    if not weights and (folder.is_dir() or not on_hub(name)):
        raise UserError(
            f"{given}: with --remote a model is named by its Hub id (owner/name, or {', '.join(MODELS)}); "
            "run this one without --remote."
        )
    if name in EMBEDDED:
        unpacked = unpack(name)
        source = Source(name, str(unpacked), "sha256:" + folder_sha256(unpacked))
    elif folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(f"{given}: the folder holds no config.json; give one written by save_pretrained.")
        source = Source(name, str(folder.resolve()), "sha256:" + folder_sha256(folder))
    elif on_hub(name):
        downloaded, commit = model_folder(MODELS.get(name, name), revision, read_family, weights)
        source = Source(name, str(downloaded), commit, asked=revision)
    else:
        known = ", ".join([*EMBEDDED, *MODELS])
        raise UserError(f"{given}: no such folder, Hub id (owner/name) or known name; known names: {known}.")
    read_family(Path(source.path), given)
    return source


def on_hub(name: str) -> bool:
    """Whether a name is one of MODELS, or has the form of a Hub id."""
    return name in MODELS or name.count("/") == 1 and not name.startswith((".", "/", "~"))


def resolve_adapter(folder: Path, name: str, option: str, weights: bool) -> Source:
    """The source of an adapter in PEFT's format; its revision is that of both its own files and its base model's."""
    own = "sha256:" + folder_sha256(folder)
    adapter, (base_name, base_revision) = str(folder.resolve()), base_of(folder, option)
    if (Path(base_name) / "adapter_config.json").is_file():
        raise UserError(f"{option} {name}: adapts {base_name}, which is an adapter itself; merge that one first.")
    if not weights:
        return Source(name, "", f"{own} on {base_name} {base_revision}", adapter)
    try:
        base = resolve(base_name, base_revision, option=option)
    except UserError as error:
        raise UserError(
            f"{option} {name}: the adapter asks for the base model {base_name!r}, which is not to be had "
            f"({brief(error)}); write where it is into base_model_name_or_path of its adapter_config.json."
        ) from error
    return Source(name, base.path, f"{own} on {base.revision}", adapter)


def base_of(folder: Path, option: str) -> tuple[str, str | None]:
    """The base model that an adapter's configuration names, and its revision (of the Hub alone)."""
    try:
        config = json.loads((folder / "adapter_config.json").read_text())
        base, revision = config["base_model_name_or_path"], config.get("revision")
        if not isinstance(base, str) or not isinstance(revision, str | None):
            raise TypeError("base_model_name_or_path is no text")
        return base, None if Path(base).is_dir() else revision
    except (OSError, ValueError, KeyError, TypeError, RecursionError, AttributeError) as error:
        raise UserError(f"{option} {folder}: its adapter_config.json cannot be read ({brief(error)}).") from error


def pick_device(device: str) -> str:
    """`auto` becomes cuda, mps or cpu, in this order. Raises UserError for a device that is not there."""
    here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    available = [name for name in here if here[name]]
    if device not in ("auto", *available):
        raise UserError(f"--device {device}: this machine has none; available: {', '.join(sorted(available))}.")
    return available[0] if device == "auto" else device


def pick_dtype(dtype: str, device: str, compared: list[Source], trained: bool = False) -> str:
    """What `auto` stands for: `float32` or `bfloat16`. Any other value is returned as it is.

    What is compared is loaded in the dtype that one of them was trained in: rounded to bfloat16, most of what DPO
    changed is lost. So `auto` is bfloat16 only on CUDA, where all files hold bfloat16, or where float32 does not fit.

    Args:
        device: what `pick_device` returned.
        compared: all models that are in memory at once; those without weights here take none.
        trained: whether `python -m dpo` trains one of them, in float32.
    """
    if dtype != "auto" or device != "cuda":
        return "float32" if dtype == "auto" else dtype
    stored = [stored_entries(Path(source.path)) for source in compared if source.path]
    trained = trained or any(source.adapter for source in compared)  # what an adapter adds is no bfloat16 number
    if not trained and stored and all(entries.keys() == {"BF16"} for entries in stored):
        return "bfloat16"
    needed = 4 * ROOM * sum(sum(entries.values()) for entries in stored)
    free = torch.cuda.mem_get_info()[0]
    if needed <= free:
        return "float32"
    click.echo(
        f"--dtype auto: {len(stored)} models in float32 take {needed / 1e9:.0f} GB, the GPU has {free / 1e9:.0f} GB "
        "free: bfloat16 (--dtype float32 on a larger GPU keeps all of what DPO changed).",
        err=True,
    )
    return "bfloat16"


def stored_entries(folder: Path) -> dict[str, int]:
    """How many numbers a folder's safetensors hold in each dtype (`F32`, `BF16`, ...), from their headers alone."""
    entries = Counter()
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, "pt") as tensors:
                for name in tensors.keys():
                    part = tensors.get_slice(name)
                    entries[part.get_dtype()] += math.prod(part.get_shape())
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file}: the weights cannot be read ({brief(error)}); copy the file anew.") from error
    return entries


def load(source: Source, device: str = "cpu", dtype: str = "auto", hosted: bool = False, tokenizer=None):
    """Load a model with its weights, ready for `model.trace` and `model.generate`.

    Args:
        device, dtype: where the weights are, and what they are; `auto` by `pick_device` and `pick_dtype`.
        hosted: without its weights, for traces on NDIF.
        tokenizer: instead of the folder's own.

    Raises:
        UserError: files missing, gated, truncated, quantised, weights that are missing or not finite, no tokenizer.
    """
    if hosted:  # a model of the right shape, under the Hub id that NDIF knows it by
        repository, generation = MODELS.get(source.name, source.name), Path(source.path) / "generation_config.json"
        with hub_errors(repository):
            model = TransformersModel(repository, task="text-generation", tokenizer=repository, revision=source.asked)
        if generation.is_file():  # a model built from its configuration leaves it out
            model._module.generation_config = GenerationConfig.from_pretrained(source.path)
        return model
    device = pick_device(device)
    dtype = pick_dtype(dtype, device, [source])
    tokenizer = tokenizer or read_tokenizer(source)
    module = read_module(source, dtype, device)
    check_vocabulary(tokenizer, module.get_input_embeddings().num_embeddings, source.name)
    # Without `device` the pipeline inside takes a GPU that it sees, whatever the weights are on.
    model = TransformersModel(module, task="text-generation", tokenizer=tokenizer, device=device)
    module.requires_grad_(False)  # nothing here trains; traces keep no autograd graph
    # transformers hands the head a slice of the hidden states, whose rows torch would multiply one by one, the weight
    # being one without a gradient.
    module.lm_head.register_forward_pre_hook(lambda module, given: (given[0].contiguous(), *given[1:]))
    return model


def load_like(base, source: Source, device: str = "cpu", dtype: str = "auto", traced: bool = False):
    """Load a model that was trained from `base`; `lib.chain.check_given` has compared shapes and tokenizers.

    traced: a LoRA checkpoint stays beside `base` and is added inside every trace (`adapted`), as on NDIF, which hosts
        no model but the base.
    """
    if traced and source.adapter:
        return adapted(base, source)
    return load(source, device, dtype, tokenizer=base.tokenizer)  # its own might make other ids of the prompts
