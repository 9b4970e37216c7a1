"""Where each family of models keeps its neurons: one table, and the functions that read a model by it.

A neuron is `(layer, index)`. Its activation is one entry of the input of the MLP's last linear map (`mlp.c_proj` in
GPT-2, `mlp.down_proj` elsewhere), and its value vector is that map's row (Geva et al. 2022; Yang et al. 2025, eq. 1).
"""

import json
import re
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from lib.errors import UserError, brief

MAX_POSITIONS = 1024  # where a configuration says nothing


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
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), Family()),
    **dict.fromkeys(("gemma2", "gemma3_text"), GEMMA),
}


def read_family(folder: Path, name: str) -> Family:
    """The family of a model folder, from its config.json. Raises UserError: unreadable, or not supported."""
    try:
        model_type = json.loads((folder / "config.json").read_text())["model_type"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{name}: its config.json cannot be read ({error!r}).") from error
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise UserError(f"{name}: family {model_type!r} is not supported; supported: {', '.join(FAMILIES)}.")
    return FAMILIES[model_type]


@dataclass(frozen=True)
class Shape:
    """A model's sizes, from its configuration alone."""

    model_type: str
    n_layers: int
    d_model: int
    d_mlp: int
    vocabulary: int  # rows of the embedding
    max_positions: int  # as many as the model was trained for; longer texts are not given to it


def shape_of(folder: Path, name: str) -> Shape:
    """The shape of a model folder. Raises UserError: its configuration cannot be read."""
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True).get_text_config()
        d_mlp = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * config.hidden_size
        longest = getattr(config, "max_position_embeddings", None) or MAX_POSITIONS
        sizes = (config.num_hidden_layers, config.hidden_size, d_mlp, config.vocab_size, longest)
        if not all(isinstance(size, int) and size > 0 for size in sizes):
            raise ValueError(f"sizes {sizes}")
        return Shape(config.model_type, *sizes)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StrictDataclassError) as error:
        raise UserError(f"{name}: its config.json cannot be read ({brief(error)}).") from error


def input_device(model):
    """Where a batch of tokens belongs: with the weights, or on the CPU when they are on a server."""
    return "cpu" if model.device.type == "meta" else model.device


def reach(module, path: str):
    """Follow a dotted path from a torch module or an nnsight envoy."""
    return attrgetter(path)(module)


def family_of(model) -> Family:
    """The family of a model, torch or nnsight."""
    return FAMILIES[model.config.model_type]


def layers(model):
    """The decoder layers of a model, torch or nnsight, in order."""
    return reach(model, family_of(model).layers)


def mlp_out(model, layer: int):
    """The map whose `.input` `[batch, positions, d_mlp]` holds a layer's neuron activations."""
    return reach(layers(model)[layer], family_of(model).mlp_out)


def key(model, layer: int):
    """The map whose `.output` `[batch, positions, d_mlp]` decides which of a layer's neurons fire.

    GPT-2: `c_fc`, whose columns are the key vectors (Lee eq. 2). Gated MLPs have two maps: an activation is
    act(gate . x) (up . x). The gate's rows are the keys: they alone decide in which region of x a neuron fires.
    """
    return reach(layers(model)[layer], family_of(model).key)


def mlp_norm(model, layer: int):
    """The norm whose `.input` `[batch, positions, d_model]` is the residual stream between attention and MLP."""
    return reach(layers(model)[layer], family_of(model).mlp_norm)


def unembed(model, residual):
    """Logits `[..., vocab]`, float32, of a residual stream `[..., d_model]`, inside a trace (the logit lens)."""
    normed = reach(model, family_of(model).final_norm)(residual)
    logits = model.lm_head(normed).float()
    cap = getattr(model.config, "final_logit_softcapping", None)
    return cap * (logits / cap).tanh() if cap else logits


def value_vectors(model, layer: int):
    """Value vectors of one layer, `[d_mlp, d_model]`, float32. `model`: torch or nnsight."""
    family = family_of(model)
    weight = mlp_out(model, layer).weight.detach().float()
    rows = weight if family.transposed else weight.T
    if added := model.__dict__.get("lora", {}).get(f"{family.layers}.{layer}.{family.mlp_out}"):  # see `adapted`
        down, up = (part.to(rows) for part in added)
        rows = rows + down.T @ up.T
    return rows


def write_gain(model, layer: int):
    """What the residual stream sees of a value vector, elementwise, `[d_model]`: ones, or Gemma's norm weight.

    Gemma 2 and 3 pass the MLP's output y through `post_feedforward_layernorm` before adding it: y / rms(y) * (1 + g).
    So a neuron writes (m / rms(y)) * (v * (1 + g)): `write_gain` is 1 + g, and `lib.neurons` averages m / rms(y).
    """
    family = family_of(model)
    if family.post_norm is None:
        return torch.ones(model.config.hidden_size, device=model.device)
    return 1 + reach(layers(model)[layer], family.post_norm).weight.detach().float()


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
    return model.config.num_hidden_layers


def d_mlp(model) -> int:
    """Neurons per layer."""
    return mlp_out(model, 0).weight.shape[0 if family_of(model).transposed else 1]
