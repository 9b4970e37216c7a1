"""Which parameters DPO trains: all of them, or one part of the model alone (Lee et al. 2024, section 6.1).

| --trainable | what is trained |
|---|---|
| `all` | every parameter, as in both papers |
| `biases` | the bias terms; in families without any, a bias added to each MLP's last map, zero at the start |
| `late:K` | the last K layers |
| `values:NEURONS` | the value vectors of some neurons |
| `keys:NEURONS` | their key vectors (GPT-2: columns of c_fc; gated MLPs: rows of the gate) |
| `lora:R` | low-rank adapters of rank R on every linear map but the head, by PEFT |

NEURONS: names such as `L19.N770,L12.N771`, or a file of them, one a line (toxic_vectors.py writes one).
"""

import os
from pathlib import Path

import torch

from lib.errors import UserError
from lib.families import FAMILIES, parse_neuron, reach

CHOICES = "all, biases, late:K, values:NEURONS, keys:NEURONS or lora:R"


def read(given: str) -> str:
    """An option's value with a file of neurons replaced by their names, so that it says what is trained by itself.

    Raises:
        UserError: no such choice, a number that is none, a file without neurons.
    """
    name, _, rest = given.partition(":")
    if given in ("all", "biases") or name in ("late", "lora") and rest.isdecimal() and int(rest):
        return given
    if name not in ("values", "keys") or not rest:
        raise UserError(f"--trainable {given}: expected {CHOICES}.")
    try:
        text = Path(rest).read_text(encoding="utf-8") if os.path.isfile(rest) else rest.replace(",", " ")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--trainable {given}: not readable as UTF-8 text ({error}).") from error
    if not text.split():
        raise UserError(f"--trainable {given}: holds no neuron; give names such as L19.N770.")
    return f"{name}:{','.join(text.split())}"


def check_choice(choice: str, shape) -> None:
    """Raise UserError for layers and neurons that a model of this shape (`lib.families.Shape`) does not have."""
    name, _, rest = choice.partition(":")
    if name == "late" and int(rest) > shape.n_layers:
        raise UserError(f"--trainable {choice}: this model has {shape.n_layers} layers.")
    if name in ("values", "keys"):
        for neuron in rest.split(","):
            parse_neuron(neuron, shape.n_layers, shape.d_mlp, "--trainable")


def choose(model, choice: str) -> tuple[torch.nn.Module, dict[torch.nn.Parameter, torch.Tensor]]:
    """Leave the chosen parameters trainable and freeze the rest.

    Args:
        model: a transformers model; changed in place.
        choice: what `read` returned.

    Returns: the model (for `lora` wrapped by PEFT), and for parameters of which only some entries are trained a mask of
        those entries, of the parameter's shape.

    Raises:
        UserError: a layer or neuron that the model does not have.
    """
    name, _, rest = choice.partition(":")
    if name == "all":
        return model, {}
    model.requires_grad_(False)
    kind = FAMILIES[model.config.model_type]
    layers = reach(model, kind.layers)
    if name == "lora":
        return _with_adapters(model, int(rest)), {}
    if name == "biases":
        own = [parameter for path, parameter in model.named_parameters() if path.endswith(".bias")]
        for parameter in own or _add_biases(model, layers, kind.mlp_out):
            parameter.requires_grad_(True)
        return model, {}
    if name == "late":
        if int(rest) > len(layers):
            raise UserError(f"--trainable {choice}: this model has {len(layers)} layers.")
        for layer in layers[-int(rest) :]:
            layer.requires_grad_(True)
        return model, {}
    # A value vector is a row of a Conv1D and a column of a Linear; a key vector the other way round.
    path, by_row = (kind.mlp_out, kind.transposed) if name == "values" else (kind.key, not kind.transposed)
    weight = reach(layers[0], path).weight
    chosen = [parse_neuron(n, len(layers), weight.shape[0 if by_row else 1], "--trainable") for n in rest.split(",")]
    masks = {}
    for layer, index in chosen:
        weight = reach(layers[layer], path).weight
        mask = masks.setdefault(weight.requires_grad_(True), torch.zeros_like(weight, dtype=torch.bool))
        mask[index if by_row else (slice(None), index)] = True
    return model, masks


def layers_of(model):
    """The decoder layers of a transformers model, also inside PEFT's wrapping."""
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    return reach(plain, FAMILIES[plain.config.model_type].layers)


def _add_biases(model, layers, path: str) -> list[torch.nn.Parameter]:
    """Give every MLP's last map a bias of zeros.

    Llama's configuration knows biases in MLPs, of all three maps: the others get zeros that stay. Other architectures
    have no place for one, and `dpo.sharding.save_pretrained` writes files that plain transformers does not load.
    """
    known = hasattr(model.config, "mlp_bias")
    for layer in layers:
        last = reach(layer, path)
        for linear in [m for m in layer.mlp.children() if isinstance(m, torch.nn.Linear)] if known else [last]:
            zeros = linear.weight.new_zeros(linear.out_features)
            linear.bias = torch.nn.Parameter(zeros, requires_grad=linear is last)
    if known:
        model.config.mlp_bias = True
    return [reach(layer, path).bias for layer in layers]


def has_added_biases(model) -> bool:
    """Whether a model has biases that its architecture's configuration does not know."""
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    kind, config = FAMILIES[plain.config.model_type], plain.config
    if kind.transposed or getattr(config, "mlp_bias", False):
        return False
    return reach(reach(plain, kind.layers)[0], kind.mlp_out).bias is not None


def _with_adapters(model, rank: int):
    import peft  # here: 1.3 s, and only `lora` needs it

    transposed = FAMILIES[model.config.model_type].transposed
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules="all-linear",
        fan_in_fan_out=transposed,
        task_type="CAUSAL_LM",
    )
    return peft.get_peft_model(model, config)
