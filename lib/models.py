"""Model names, loading, and where each family keeps its neurons.

A neuron is `(layer, index)`. Its activation is one entry of the input of the MLP's last linear map (`mlp.c_proj` in
GPT-2, `mlp.down_proj` elsewhere), and its value vector is that map's row (Geva et al. 2022; Yang et al. 2025, eq. 1).
"""

import hashlib
import json
import math
import re
import warnings
from dataclasses import dataclass
from pathlib import Path

import click

from lib.artifacts import file_sha256
from lib.embedded import EMBEDDED, unpack
from lib.errors import UserError

ROOM = 1.2  # times the weights: what a batch takes beside them
MODELS = {
    "gpt2": "openai-community/gpt2-medium",
    "llama": "meta-llama/Llama-3.1-8B",
    "gemma": "google/gemma-2-2b",
    "mistral": "mistralai/Mistral-7B-v0.1",
}


@dataclass(frozen=True)
class Family:
    """Paths inside the Hugging Face module, relative to the model (`layers`, `final_norm`) or to one layer."""

    layers: str = "model.layers"
    mlp_out: str = "mlp.down_proj"
    key: str = "mlp.gate_proj"  # the map whose output decides whether a neuron fires
    mlp_norm: str = "post_attention_layernorm"  # the norm that reads the residual stream for the MLP
    final_norm: str = "model.norm"
    transposed: bool = False  # True: the weight is [d_mlp, d_model] (Conv1D); False: [d_model, d_mlp] (Linear)
    post_norm: str | None = None  # a norm between the MLP's output and the residual stream


GEMMA = Family(mlp_norm="pre_feedforward_layernorm", post_norm="post_feedforward_layernorm")
FAMILIES = {
    "gpt2": Family("transformer.h", "mlp.c_proj", "mlp.c_fc", "ln_2", "transformer.ln_f", transposed=True),
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(),
    "qwen3": Family(),
    "gemma2": GEMMA,
    "gemma3_text": GEMMA,
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
    """A folder name for a model: `gemma-270m`, `Qwen3-0.6B`, the last part of a path."""
    return name.rstrip("/").split("/")[-1]


def folder_sha256(folder: Path) -> str:
    """Hex sha256 over the names and contents of a model folder's configuration and weights."""
    described = {"config.json", "adapter_config.json"}
    files = sorted(p for p in folder.iterdir() if p.suffix in {".safetensors", ".bin"} or p.name in described)
    return hashlib.sha256("".join(f"{p.name} {file_sha256(p)}\n" for p in files).encode()).hexdigest()


def resolve(name: str, revision: str | None = None, option: str = "--model", weights: bool = True) -> Source:
    """Turn what an option was given into files: an embedded model is unpacked, a Hub id is pinned to its commit.

    weights: False leaves them where they are: the model runs on NDIF, which knows models by their Hub ids alone.

    Raises:
        UserError: unknown name, unsupported family, gated or missing repository, no network, no disk space.
    """
    if (Path(name) / "adapter_config.json").is_file():
        adapter, revision = str(Path(name).resolve()), "sha256:" + folder_sha256(Path(name))
        if not weights:
            return Source(name, "", revision, adapter)
        base = resolve(*_base_of(Path(name), option), option=option)
        if base.adapter:
            raise UserError(f"{option} {name}: adapts a model that is a LoRA checkpoint itself; merge that one first.")
        return Source(name, base.path, revision, adapter)
    on_hub = name in MODELS or name.count("/") == 1 and not name.startswith((".", "/", "~"))
    if not weights and (Path(name).is_dir() or not on_hub):
        raise UserError(
            f"{option} {name}: with --remote a model is named by its Hub id (owner/name, or {', '.join(MODELS)}); "
            "run this one without --remote."
        )
    if name in EMBEDDED:
        folder = unpack(name)
        source = Source(name, str(folder), json.loads((folder / "source.json").read_text())["gguf_sha256"])
    elif Path(name).is_dir():
        if not (Path(name) / "config.json").is_file():
            raise UserError(f"{option} {name}: the folder holds no config.json; give one written by save_pretrained.")
        source = Source(name, str(Path(name).resolve()), "sha256:" + folder_sha256(Path(name)))
    elif on_hub:
        from lib.hub import model_folder

        folder, commit = model_folder(MODELS.get(name, name), revision, read_family, weights)
        source = Source(name, str(folder), commit, asked=revision)
    else:
        known = ", ".join([*EMBEDDED, *MODELS])
        raise UserError(f"{option} {name}: no such folder, Hub id (owner/name) or known name; known names: {known}.")
    read_family(Path(source.path), f"{option} {name}")
    return source


def _base_of(folder: Path, option: str) -> tuple[str, str | None]:
    try:
        config = json.loads((folder / "adapter_config.json").read_text())
        return config["base_model_name_or_path"], config.get("revision")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{option} {folder}: its adapter_config.json cannot be read ({error!r}).") from error


def read_family(folder: Path, name: str) -> Family:
    """The family of a model folder, from its config.json. Raises UserError: unreadable, or not supported."""
    try:
        model_type = json.loads((folder / "config.json").read_text())["model_type"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{name}: its config.json cannot be read ({error!r}).") from error
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise UserError(f"{name}: family {model_type!r} is not supported; supported: {', '.join(FAMILIES)}.")
    return FAMILIES[model_type]


def pick_device(device: str) -> str:
    """`auto` becomes cuda, mps or cpu, in this order. Raises UserError for a device that is not there."""
    import torch

    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if device == "auto":
        return next(d for d in ("cuda", "mps", "cpu") if there[d])
    if not there[device]:
        have = ", ".join(d for d, yes in there.items() if yes)
        raise UserError(f"--device {device}: this machine has none; available: {have}.")
    return device


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
    import torch

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
    from safetensors import safe_open

    entries: dict[str, int] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():
                part = tensors.get_slice(name)
                entries[part.get_dtype()] = entries.get(part.get_dtype(), 0) + math.prod(part.get_shape())
    return entries


def load(source: Source, device: str = "cpu", dtype: str = "auto", hosted: bool = False):
    """Load a model with its weights, ready for `model.trace` and `model.generate`; its tokenizer pads on the left.

    Args:
        device, dtype: where the weights are, and what they are; `auto` by `pick_device` and `pick_dtype`.
        hosted: without its weights, for traces on NDIF.

    Raises:
        UserError: files missing, gated, truncated, or weights that are not finite.
    """
    from nnsight import TransformersModel
    from safetensors import SafetensorError
    from transformers.utils import logging

    logging.disable_progress_bar()  # of single weights: the scripts show their own steps
    if hosted:
        return _load_hosted(source)
    import torch

    device = pick_device(device)
    dtype = pick_dtype(dtype, device, [source])
    # Both: the map loads weights straight onto a GPU, and without `device` the pipeline inside takes a GPU that it sees.
    place = {"device": device} if device == "cpu" else {"device_map": device}
    try:
        model = TransformersModel(
            source.path,
            task="text-generation",
            **place,
            dtype=getattr(torch, dtype),
            dispatch=True,
        )
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{source.name}: the model cannot be read from {source.path} ({error}).") from error
    complete(model._module, source)
    for name, weight in model._module.named_parameters():
        # A finite sum has finite terms, and is quicker to take; it can overflow where no term does.
        if not weight.sum().isfinite() and not weight.isfinite().all():
            raise UserError(f"{source.name}: weight {name} holds NaN or infinity; the checkpoint is broken.")
    model._module.requires_grad_(False)  # nothing here trains; traces keep no autograd graph
    # transformers hands the head a slice of the hidden states, whose rows torch would multiply one by one, the weight
    # being one without a gradient.
    model._module.lm_head.register_forward_pre_hook(lambda module, given: (given[0].contiguous(), *given[1:]))
    return model


def _load_hosted(source: Source):
    """A model of the right shape without weights, under the Hub id that NDIF knows it by."""
    from nnsight import TransformersModel
    from transformers import GenerationConfig

    from lib.hub import hub_errors

    repository = MODELS.get(source.name, source.name)
    with hub_errors(repository):
        model = TransformersModel(repository, task="text-generation", tokenizer=repository, revision=source.asked)
    if (Path(source.path) / "generation_config.json").is_file():  # a model built from its configuration leaves it out
        model._module.generation_config = GenerationConfig.from_pretrained(source.path)
    return model


def input_device(model):
    """Where a batch of tokens belongs: with the weights, or on the CPU when they are on a server."""
    return "cpu" if model.device.type == "meta" else model.device


def complete(module, source: Source) -> None:
    """Add what transformers leaves out of a checkpoint, in place: LoRA weights, and biases that `python -m dpo` added.

    `--trainable biases` gives families without bias terms some that their architecture's configuration does not know.

    Raises:
        UserError: an adapter that does not fit the model.
    """
    import torch
    from safetensors import safe_open

    if source.adapter:
        import peft

        try:
            peft.PeftModel.from_pretrained(module, source.adapter).merge_and_unload()
        except (RuntimeError, ValueError, KeyError, OSError) as error:
            raise UserError(f"{source.name}: the LoRA weights do not fit {source.path} ({error}).") from error
    kind = FAMILIES[module.config.model_type]
    for file in Path(source.path).glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            names = [name for name in tensors.keys() if name.endswith(f"{kind.mlp_out}.bias")]
            for name in names:
                linear = module.get_submodule(name.removesuffix(".bias"))
                if linear.bias is None:
                    linear.bias = torch.nn.Parameter(tensors.get_tensor(name).to(linear.weight))


def load_like(base, source: Source, device: str = "cpu", dtype: str = "auto", traced: bool = False):
    """Load a model that was trained from `base`. Raises UserError when its shape is another one.

    traced: a LoRA checkpoint stays beside `base` and is added inside every trace (`adapted`), as on NDIF, which hosts
        no model but the base.
    """
    if traced and source.adapter:
        return adapted(base, source)
    model = load(source, device, dtype)
    for name in ("model_type", "num_hidden_layers", "hidden_size", "vocab_size"):
        ours, theirs = getattr(base._module.config, name), getattr(model._module.config, name)
        if ours != theirs:
            raise UserError(
                f"--post {source.name}: its {name} is {theirs}, the base model's is {ours}; it is another model."
            )
    return model


def adapted(base, source: Source):
    """`base` with a LoRA checkpoint in PEFT's format, applied inside every trace: the base model's weights stay as is.

    Each adapted linear map's output gains `scale * (x A^T) B^T`, A `[r, in]`, B `[out, r]` (Hu et al. 2021). What a
    script's trace writes into such a map's input in place is part of its x.

    Returns: an nnsight model that shares `base`'s weights; its `.lora` holds {path of the map: (A, scale * B)}.

    Raises:
        UserError: unreadable, another kind of adapter, or one of another model's shape.
    """
    lora = read_lora(base, source)
    ordered = [path for path, _ in base._module.named_modules() if path in lora]  # as the model runs them
    # The loop below ends when the model does, which nnsight takes for a mistake.
    warnings.filterwarnings("ignore", rf"'model\.{re.escape(ordered[0])}\.input\.i\d+' was never reached")
    with base.edit() as (tracer, model):
        for _ in tracer.iter[:]:
            for path in ordered:
                down, up = lora[path]
                linear = reach(model, path)
                x, y = linear.input, linear.output  # x is read when it is used: edits in place have happened
                linear.output = y + ((x.to(down.dtype) @ down.T.to(x.device)) @ up.T.to(x.device)).to(y.dtype)
    tracer.info = None  # it holds a frame that is gone, and has to travel
    model.__dict__["lora"] = lora
    return model


def read_lora(base, source: Source) -> dict:
    """{path of a linear map: (A `[r, in]`, scale * B `[out, r]`)} of a LoRA checkpoint in PEFT's format.

    Raises:
        UserError: unreadable, another kind of adapter, or one of another model's shape.
    """
    import peft
    from safetensors import SafetensorError

    given = f"--post {source.name}"
    try:
        config = peft.PeftConfig.from_pretrained(source.adapter)
        weights = peft.load_peft_weights(source.adapter, device="cpu")
    except (SafetensorError, OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{given}: not a readable adapter in PEFT's format ({error}).") from error
    plain = all(name.endswith((".lora_A.weight", ".lora_B.weight")) for name in weights)
    if not weights or not plain or getattr(config, "use_dora", False) or config.rank_pattern or config.alpha_pattern:
        raise UserError(f"{given}: holds more than plain LoRA weights of one rank; merge it, and run it locally.")
    scale = config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r)
    shapes = {path: module for path, module in base._module.named_modules() if hasattr(module, "weight")}
    lora = {}
    for name in weights:
        if not name.endswith(".lora_A.weight"):
            continue
        path = name.removesuffix(".lora_A.weight").removeprefix("base_model.model.")
        down, up = weights[name], scale * weights[name.replace("lora_A", "lora_B")]
        shape = tuple(shapes[path].weight.shape) if path in shapes else None
        ours = (up.shape[0], down.shape[1])
        if shape != (ours[::-1] if FAMILIES[base._module.config.model_type].transposed else ours):
            raise UserError(
                f"{given}: its {path} is of shape {list(ours)}, the model's {shape}; it is another model's."
            )
        lora[path] = (down, up)
    return lora


def torch_module(model):
    """The torch module of an nnsight model; a torch module itself."""
    return getattr(model, "_module", model)


def reach(module, path: str):
    """Follow a dotted path from a torch module or an nnsight envoy."""
    for part in path.split("."):
        module = getattr(module, part)
    return module


def layers(model):
    """The decoder layers of an nnsight model, in order."""
    return reach(model, FAMILIES[model._module.config.model_type].layers)


def mlp_out(model, layer: int):
    """The map whose `.input` `[batch, positions, d_mlp]` holds a layer's neuron activations."""
    return reach(layers(model)[layer], FAMILIES[model._module.config.model_type].mlp_out)


def key(model, layer: int):
    """The map whose `.output` `[batch, positions, d_mlp]` decides which of a layer's neurons fire.

    GPT-2: `c_fc`, whose columns are the key vectors (Lee eq. 2). Gated MLPs have two maps: an activation is
    act(gate . x) (up . x). The gate's rows are the keys: they alone decide in which region of x a neuron fires.
    """
    return reach(layers(model)[layer], FAMILIES[model._module.config.model_type].key)


def mlp_norm(model, layer: int):
    """The norm whose `.input` `[batch, positions, d_model]` is the residual stream between attention and MLP."""
    return reach(layers(model)[layer], FAMILIES[model._module.config.model_type].mlp_norm)


def unembed(model, residual):
    """Logits `[..., vocab]`, float32, of a residual stream `[..., d_model]`, inside a trace (the logit lens)."""
    normed = reach(model, FAMILIES[model._module.config.model_type].final_norm)(residual)
    logits = model.lm_head(normed).float()
    cap = getattr(model._module.config, "final_logit_softcapping", None)
    return cap * (logits / cap).tanh() if cap else logits


def value_vectors(model, layer: int):
    """Value vectors of one layer, `[d_mlp, d_model]`, float32. `model`: torch or nnsight."""
    kind = FAMILIES[model.config.model_type]
    weight = reach(reach(model, kind.layers)[layer], kind.mlp_out).weight.detach().float()
    rows = weight if kind.transposed else weight.T
    if added := model.__dict__.get("lora", {}).get(f"{kind.layers}.{layer}.{kind.mlp_out}"):  # see `adapted`
        down, up = (part.to(rows) for part in added)
        rows = rows + down.T @ up.T
    return rows


def write_gain(model, layer: int):
    """What the residual stream sees of a value vector, elementwise, `[d_model]`: ones, or Gemma's norm weight.

    Gemma 2 and 3 pass the MLP's output y through `post_feedforward_layernorm` before adding it: y / rms(y) * (1 + g).
    So a neuron writes (m / rms(y)) * (v * (1 + g)): `write_gain` is 1 + g, and `lib.neurons` averages m / rms(y).
    """
    import torch

    kind = FAMILIES[model.config.model_type]
    if kind.post_norm is None:
        return torch.ones(model.config.hidden_size, device=model.device)
    return 1 + reach(reach(model, kind.layers)[layer], kind.post_norm).weight.detach().float()


def parse_neuron(name: str, layers: int, neurons: int, given: str) -> tuple[int, int]:
    """(layer, index) of `L19.N770`. Raises UserError for another form, and for a neuron that the model does not have.

    layers, neurons: how many the model has, and each layer. given: names the option in the message.
    """
    parts = re.fullmatch(r"L(\d+)\.N(\d+)", name.strip())
    if not parts:
        raise UserError(f"{given}: {name.strip()!r} is no neuron; expected names such as L19.N770.")
    layer, index = map(int, parts.groups())
    if layer >= layers or index >= neurons:
        raise UserError(
            f"{given}: no neuron {name.strip()}; this model has layers 0 to {layers - 1}, neurons 0 to {neurons - 1}."
        )
    return layer, index


def n_layers(model) -> int:
    """Number of layers."""
    return model._module.config.num_hidden_layers


def d_mlp(model) -> int:
    """Neurons per layer."""
    weight = mlp_out(model, 0)._module.weight
    return weight.shape[0] if FAMILIES[model._module.config.model_type].transposed else weight.shape[1]
