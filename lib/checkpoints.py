"""Model folders as torch modules with every weight accounted for: whole ones, with adapters, with added biases."""

import warnings
from pathlib import Path

from lib.errors import UserError, brief
from lib.families import FAMILIES, Family
from lib.tokens import special_ids

# What `--trainable biases` adds where an architecture has no place for it stands in files of this variant's name:
# plain transformers finds no weights then, where it would load the base model under the name `model.safetensors`.
ADDED_BIASES = "added-biases"
OLD_BUFFERS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")  # what older versions of transformers wrote
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
WRAPPERS = {
    "_orig_mod.": "torch.compile (save its _orig_mod)",
    "module.": "DataParallel or DDP (save its module)",
    "pretrained_model.": "TRL's value-head wrapper (save its pretrained_model)",
    "base_model.model.": "PEFT (save merge_and_unload(), or the adapter)",
}


def read_module(source, dtype: str, device: str):
    """A folder's causal language model, adapters merged, in evaluation mode.

    Args:
        source: `lib.models.Source`.
        dtype: of the weights, `float32` or `bfloat16`. device: where they are; `meta` reads no numbers.

    Raises:
        UserError: unreadable, quantised, or not all weights are there and finite.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # of single weights: the scripts show their own steps
    folder = Path(source.path)
    check_files(folder, source.name)
    variant = {"variant": ADDED_BIASES} if any(folder.glob(f"*.{ADDED_BIASES}*.safetensors")) else {}
    place = {} if device == "cpu" else {"device_map": device}
    # Merged in float32: what an adapter adds is smaller than bfloat16 can hold.
    first = torch.float32 if source.adapter else getattr(torch, dtype)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # transformers reports weights that do not match as a table; here that is an error
    try:
        module, found = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=first,
            use_safetensors=True,
            output_loading_info=True,
            local_files_only=True,
            **place,
            **variant,
        )
    except (SafetensorError, OSError, ValueError, RuntimeError, ImportError, KeyError, TypeError) as error:
        raise UserError(f"{source.name}: the model cannot be read from {folder} ({brief(error)}).") from error
    finally:
        logging.set_verbosity(verbosity)
    complete(module, folder, found, source.name)
    if source.adapter:
        module = merged(module, source)
    if device != "meta":
        check_finite(module, source.name)
    for weight in module.parameters():  # not the buffers: rotary frequencies stay in float32, as transformers has them
        weight.data = weight.data.to(getattr(torch, dtype))
    return module.eval()


def check(source) -> None:
    """Raise UserError when `read_module` would, but for numbers that are not finite; reads headers alone."""
    read_module(source, "float32", "meta")


def check_files(folder: Path, name: str) -> None:
    """Raise UserError when a folder holds no safetensors, or quantised weights."""
    import json

    if not any(folder.glob("*.safetensors")):
        found = ", ".join(sorted(p.name for p in folder.iterdir() if p.suffix in {".bin", ".pt", ".pth", ".h5"})[:3])
        raise UserError(
            f"{name}: the folder holds no safetensors weights{f' (but {found})' if found else ''}; load it with "
            "transformers and write it with save_pretrained."
        )
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if quantised := config.get("quantization_config"):
        method = quantised.get("quant_method", "?") if isinstance(quantised, dict) else "?"
        raise UserError(
            f"{name}: its weights are quantised ({method}); value vectors are read from the weights, so give the "
            "checkpoint before quantisation, or a de-quantised copy."
        )


def complete(module, folder: Path, found: dict, name: str) -> None:
    """Check what from_pretrained reported, and add the biases that `python -m dpo` added, in place.

    found: its loading info. Raises UserError: weights are missing, or there are layers that the model has not.
    """
    kind = FAMILIES[module.config.model_type]
    if missing := sorted(found["missing_keys"]):
        raise UserError(
            f"{name}: {len(missing)} of the model's weights are not in its files, such as {missing[0]}; "
            f"{likely_cause(missing, found['unexpected_keys'])}"
        )
    ending = f"{kind.mlp_out}.bias"
    added = {key for key in found["unexpected_keys"] if key.endswith(ending)}
    layer = "." + kind.layers.split(".")[-1] + "."
    others = {key for key in found["unexpected_keys"] if not key.endswith(OLD_BUFFERS)} - added
    if beyond := sorted(key for key in others if layer in f".{key}"):
        raise UserError(
            f"{name}: its files hold {len(beyond)} weights that a model of its config.json has no place for, such as "
            f"{beyond[0]}; do config.json and weights belong together?"
        )
    if added:
        add_biases(module, folder, kind, ending)


def likely_cause(missing: list[str], unexpected) -> str:
    """A clause that says why names do not match."""
    if not unexpected:
        return "the file is not whole: copy it anew."
    for key in sorted(unexpected):
        for wanted in missing:
            if key.endswith(f".{wanted}"):
                prefix = key.removesuffix(wanted)
                wrapper = next((said for start, said in WRAPPERS.items() if prefix.startswith(start)), "another module")
                return f"they are named {prefix}...: saved from inside {wrapper}."
    return f"they hold {sorted(unexpected)[0]} instead: of another architecture than config.json says?"


def add_biases(module, folder: Path, kind: Family, ending: str) -> None:
    """Give MLPs' last maps the biases that the folder's files hold, in place."""
    import torch
    from safetensors import safe_open

    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            for key in tensors.keys():
                if key.endswith(ending):
                    path = key.removesuffix(".bias")
                    within = path.startswith(f"{module.base_model_prefix}.")
                    linear = module.get_submodule(path if within else f"{module.base_model_prefix}.{path}")
                    linear.bias = torch.nn.Parameter(tensors.get_tensor(key).to(linear.weight))


def check_finite(module, name: str) -> None:
    """Raise UserError when a weight holds NaN or infinity."""
    for key, weight in module.named_parameters():
        # A finite sum has finite terms, and is quicker to take; it can overflow where no term does.
        if not weight.sum().isfinite() and not weight.isfinite().all():
            raise UserError(f"{name}: weight {key} holds NaN or infinity; the checkpoint is broken.")


def merged(module, source):
    """The module with an adapter in PEFT's format merged into its weights.

    An adapter of a head that shares its weight with the embedding gives the head a weight of its own first: PEFT too
    adds it to the head alone.

    Raises:
        UserError: unreadable, of a kind that is no change of weights, or not every weight of it fits.
    """
    import peft
    import torch
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
    from safetensors import SafetensorError

    adapter = Path(source.adapter)
    try:
        config = peft.PeftConfig.from_pretrained(adapter)
        weights = peft.load_peft_weights(str(adapter), device="cpu")
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(f"{source.name}: not a readable adapter in PEFT's format ({brief(error)}).") from error
    if not weights:
        raise UserError(f"{source.name}: adapter_model.safetensors holds no weight; train or copy the adapter anew.")
    device = next(module.parameters()).device
    untie(module, config, weights)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT warns of what is an error or wanted here
            config.inference_mode = True
            adapted = peft.get_peft_model(module, config, low_cpu_mem_usage=device.type == "meta")
            found = peft.set_peft_model_state_dict(adapted, weights, low_cpu_mem_usage=device.type == "meta")
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, NotImplementedError) as error:
        raise UserError(f"{source.name}: the adapter does not fit {source.path} ({brief(error)}).") from error
    parts = (
        PEFT_TYPE_TO_PREFIX_MAPPING.get(config.peft_type) or "prompt_encoder",
        ".modules_to_save.",
        ".token_adapter.",
    )
    missing = sorted(key for key in found.missing_keys if any(part in key for part in parts))
    wrong = missing or sorted(found.unexpected_keys)
    if wrong:
        which = "are not in the file" if missing else "have no place in the model"
        raise UserError(
            f"{source.name}: {len(wrong)} of the adapter's weights {which}, such as {wrong[0]}; "
            "it was trained on a model with other names or layers."
        )
    if not hasattr(adapted, "merge_and_unload") or not hasattr(adapted.base_model, "merge_and_unload"):
        raise UserError(f"{source.name}: a {config.peft_type} adapter is no change of weights; give one such as LoRA.")
    if device.type == "meta":
        return adapted.base_model.unload()
    try:
        with torch.no_grad():
            return adapted.merge_and_unload()
    except (RuntimeError, ValueError, NotImplementedError) as error:
        raise UserError(f"{source.name}: the adapter cannot be merged ({brief(error)}).") from error


def untie(module, config, weights: dict) -> None:
    """Give the head a weight of its own where an adapter changes it or the embedding that it shares, in place."""
    import torch

    head, embedding = module.get_output_embeddings(), module.get_input_embeddings()
    if head.weight is not embedding.weight:
        return
    shared = {name.split(".")[-1] for name, part in module.named_modules() if part in (head, embedding)}
    if any(part in name.split(".") for name in weights for part in shared):
        head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)
        module.config.tie_word_embeddings = False


def read_tokenizer(source):
    """A folder's fast tokenizer. Raises UserError: there is none, or it cannot be read."""
    from transformers import AutoTokenizer

    # Without files transformers makes up an empty tokenizer of the model's family.
    if not any((Path(source.path) / name).is_file() for name in TOKENIZER_FILES):
        raise UserError(
            f"{source.name}: the folder holds no tokenizer; copy the base model's tokenizer files (tokenizer.json, "
            "tokenizer_config.json) into it."
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.path, local_files_only=True)
    except Exception as error:  # the tokenizers library raises plain Exceptions
        raise UserError(
            f"{source.name}: its tokenizer cannot be read ({brief(error)}); copy the base model's tokenizer files "
            "(tokenizer.json, tokenizer_config.json) into the folder."
        ) from error
    if not tokenizer.is_fast:
        raise UserError(f"{source.name}: its tokenizer is of the slow kind; save it with tokenizer.json.")
    return tokenizer


def check_same_vocabulary(tokenizer, post, given: str) -> None:
    """Raise UserError when the model after DPO was trained with other tokens than the base model's.

    One without a tokenizer of its own is taken to have the base model's; special tokens beyond the other's, such as one
    for padding, stand in no text.
    """
    if not any((Path(post.path) / name).exists() for name in TOKENIZER_FILES):
        return
    own, same = (Path(folder) / "tokenizer.json" for folder in (post.path, tokenizer.name_or_path))
    if own.exists() and same.exists() and own.read_bytes() == same.read_bytes():  # to read one takes seconds
        return
    ours, theirs = (
        {token: i for token, i in one.get_vocab().items() if i not in special}
        for one, special in ((one, special_ids(one)) for one in (tokenizer, read_tokenizer(post)))
    )
    if other := sorted(token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token)):
        token = other[0]
        raise UserError(
            f"{given}: its tokenizer is not the base model's ({len(other)} tokens differ: {token!r} is "
            f"{theirs.get(token, 'none')} there, {ours.get(token, 'none')} here); compare models of one vocabulary."
        )
