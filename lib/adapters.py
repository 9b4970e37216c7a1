"""A LoRA checkpoint beside its base model, added inside every trace, as on NDIF, which hosts no model but the base."""

import re
import warnings

from safetensors import SafetensorError
from transformers.pytorch_utils import Conv1D

from lib.errors import UserError, brief
from lib.families import reach

LEAVES_BASE = (True, False, "gaussian", "eva", "orthogonal")  # starts that change no weight of the base model
# Parts of a LoRA configuration that add something else than B A x to a map.
NOT_PLAIN = (
    "use_dora", "rank_pattern", "alpha_pattern", "lora_bias", "modules_to_save", "target_parameters", "use_qalora",
    "layer_replication", "trainable_token_indices", "alora_invocation_tokens",
)  # fmt: skip


def adapted(base, source):
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


def read_peft(folder: str, given: str):
    """The configuration and the weights of an adapter in PEFT's format. Raises UserError, about what was `given`."""
    import peft  # a second or two that runs without an adapter do not need

    try:
        return peft.PeftConfig.from_pretrained(folder), peft.load_peft_weights(folder, device="cpu")
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(f"{given}: not a readable adapter in PEFT's format ({brief(error)}).") from error


def read_lora(base, source) -> dict:
    """{path of a linear map: (A `[r, in]`, scale * B `[out, r]`)} of a LoRA checkpoint in PEFT's format.

    Raises:
        UserError: unreadable, another kind of adapter, or one of another model's shape.
    """
    from peft.tuners.tuners_utils import check_target_module_exists  # see `read_peft`

    given = f"--post {source.name}"
    config, weights = read_peft(source.adapter, given)
    plain = all(name.endswith((".lora_A.weight", ".lora_B.weight")) for name in weights)
    extra = [name for name in NOT_PLAIN if getattr(config, name, None)]
    if getattr(config, "init_lora_weights", True) not in LEAVES_BASE:
        extra.append(f"init_lora_weights={config.init_lora_weights}")
    if not weights or not plain or extra:
        what = f" ({', '.join(extra)})" if extra else ""
        raise UserError(f"{given}: holds more than plain LoRA weights of one rank{what}; merge it, and run it locally.")
    scale = config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r)
    modules = {path: module for path, module in base._module.named_modules() if hasattr(module, "weight")}
    adapted_paths = {name.rsplit(".lora_", 1)[0].removeprefix("base_model.model.") for name in weights}
    wanted = {path for path in modules if check_target_module_exists(config, path)}
    if adapted_paths != wanted or len(weights) != 2 * len(wanted):
        other = sorted(adapted_paths ^ wanted)
        raise UserError(
            f"{given}: its weights are of {len(adapted_paths)} maps, its configuration asks for {len(wanted)} of this "
            f"model's{f', such as {other[0]}' if other else ''}; it is another model's, or not whole."
        )
    lora = {}
    for path in sorted(wanted):
        down, up = (weights[f"base_model.model.{path}.lora_{part}.weight"] for part in "AB")
        shape, ours = tuple(modules[path].weight.shape), (up.shape[0], down.shape[1])
        if shape != (ours[::-1] if isinstance(modules[path], Conv1D) else ours):
            raise UserError(
                f"{given}: its {path} is of shape {list(ours)}, the model's {list(shape)}; it is another model's."
            )
        lora[path] = (down, scale * up)
    return lora
