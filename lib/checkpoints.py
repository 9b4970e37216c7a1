"""Model folders as torch modules with every weight accounted for: whole ones, with adapters, with added biases."""

import json
import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from lib import adapters, families, tokens, weights
from lib.adapters import read_peft
from lib.errors import UserError, brief
from lib.families import family_of
from lib.tokens import text_vocabulary
from lib.weights import plain_names, rounded_update, stored_weights

# Files whose code decides what a model folder is in memory, and which ids a text has: part of every cached key.
CODE = (__file__, *(module.__file__ for module in (adapters, families, tokens, weights)))
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
    logging.disable_progress_bar()  # of single weights: the scripts show their own steps
    folder = Path(source.path)
    check_files(folder, source.name)
    options = {"use_safetensors": True, "output_loading_info": True, "local_files_only": True}
    # Merged in float32: what an adapter adds is smaller than bfloat16 can hold.
    options["dtype"] = torch.float32 if source.adapter else getattr(torch, dtype)
    if any(folder.glob(f"*.{ADDED_BIASES}*.safetensors")):
        options["variant"] = ADDED_BIASES
    if device != "cpu":
        options["device_map"] = device
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # transformers reports weights that do not match as a table; here that is an error
    try:
        module, loading = AutoModelForCausalLM.from_pretrained(folder, **options)
    except (SafetensorError, OSError, ValueError, RuntimeError, ImportError, KeyError, TypeError) as error:
        raise UserError(f"{source.name}: the model cannot be read from {folder} ({brief(error)}).") from error
    finally:
        logging.set_verbosity(verbosity)
    complete(module, folder, loading, source.name)
    if source.adapter:
        module = merged(module, source)
    for name, weight in module.named_parameters():  # not the buffers: rotary frequencies stay in float32
        # A finite sum has finite terms, and is quicker to take; it can overflow where no term does.
        if device != "meta" and not weight.sum().isfinite() and not weight.isfinite().all():
            raise UserError(f"{source.name}: weight {name} holds NaN or infinity; the checkpoint is broken.")
        weight.data = weight.data.to(getattr(torch, dtype))
    return module.eval()


def check(source) -> None:
    """Raise UserError when `read_module` would, but for numbers that are not finite; reads headers alone."""
    read_module(source, "float32", "meta")


def check_files(folder: Path, name: str) -> None:
    """Raise UserError when a folder holds no safetensors, or quantised weights."""
    if not any(folder.glob("*.safetensors")):
        other = ", ".join(sorted(p.name for p in folder.iterdir() if p.suffix in {".bin", ".pt", ".pth", ".h5"})[:3])
        raise UserError(
            f"{name}: the folder holds no safetensors weights{f' (but {other})' if other else ''}; load it with "
            "transformers and write it with save_pretrained."
        )
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if quantised := config.get("quantization_config"):
        method = quantised.get("quant_method", "?") if isinstance(quantised, dict) else "?"
        raise UserError(
            f"{name}: its weights are quantised ({method}); value vectors are read from the weights, so give the "
            "checkpoint before quantisation, or a de-quantised copy."
        )


def complete(module, folder: Path, loading: dict, name: str) -> None:
    """Check what from_pretrained reported, and add the biases that `python -m dpo` added, in place.

    loading: its loading info. Raises UserError: weights are missing, or there are layers that the model has not.
    """
    family, unexpected = family_of(module), sorted(loading["unexpected_keys"])
    if missing := sorted(loading["missing_keys"]):
        raise UserError(
            f"{name}: {len(missing)} of the model's weights are not in its files, such as {missing[0]}; "
            f"{likely_cause(missing, unexpected)}"
        )
    ending = f"{family.mlp_out}.bias"
    layer = "." + family.layers.split(".")[-1] + "."
    if beyond := [key for key in unexpected if layer in f".{key}" and not key.endswith((ending, *OLD_BUFFERS))]:
        raise UserError(
            f"{name}: its files hold {len(beyond)} weights that a model of its config.json has no place for, such as "
            f"{beyond[0]}; do config.json and weights belong together?"
        )
    if any(key.endswith(ending) for key in unexpected):
        add_biases(module, folder, ending)


def likely_cause(missing: list[str], unexpected: list[str]) -> str:
    """A clause that says why names do not match."""
    if not unexpected:
        return "the file is not whole: copy it anew."
    prefixes = (key.removesuffix(name) for key in unexpected for name in missing if key.endswith(f".{name}"))
    if prefix := next(prefixes, None):
        wrapper = next((said for start, said in WRAPPERS.items() if prefix.startswith(start)), "another module")
        return f"they are named {prefix}...: saved from inside {wrapper}."
    return f"they hold {unexpected[0]} instead: of another architecture than config.json says?"


def add_biases(module, folder: Path, ending: str) -> None:
    """Give MLPs' last maps the biases that the folder's files hold, in place."""
    for name, read in stored_weights(folder).items():
        if name.endswith(ending):
            linear = module.base_model.get_submodule(name.removesuffix(".bias"))
            linear.bias = torch.nn.Parameter(read().to(linear.weight))


def merged(module, source):
    """The module with an adapter in PEFT's format merged into its weights.

    An adapter of a head that shares its weight with the embedding gives the head a weight of its own first: PEFT too
    adds it to the head alone.

    Raises:
        UserError: unreadable, of a kind that is no change of weights, or not every weight of it fits.
    """
    import peft  # a second or two that runs without an adapter do not need
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

    config, weights = read_peft(source.adapter, source.name)
    if not weights:
        raise UserError(f"{source.name}: adapter_model.safetensors holds no weight; train or copy the adapter anew.")
    on_meta = module.device.type == "meta"
    untie(module, weights)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT warns of what is an error or wanted here
            config.inference_mode = True
            adapted = peft.get_peft_model(module, config, low_cpu_mem_usage=on_meta)
            loading = peft.set_peft_model_state_dict(adapted, weights, low_cpu_mem_usage=on_meta)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, NotImplementedError) as error:
        raise UserError(f"{source.name}: the adapter does not fit {source.path} ({brief(error)}).") from error
    own = PEFT_TYPE_TO_PREFIX_MAPPING.get(config.peft_type) or "prompt_encoder"
    parts = (own, ".modules_to_save.", ".token_adapter.")
    missing = sorted(key for key in loading.missing_keys if any(part in key for part in parts))
    if wrong := missing or sorted(loading.unexpected_keys):
        which = "are not in the file" if missing else "have no place in the model"
        raise UserError(
            f"{source.name}: {len(wrong)} of the adapter's weights {which}, such as {wrong[0]}; "
            "it was trained on a model with other names or layers."
        )
    if not hasattr(adapted, "merge_and_unload") or not hasattr(adapted.base_model, "merge_and_unload"):
        raise UserError(f"{source.name}: a {config.peft_type} adapter is no change of weights; give one such as LoRA.")
    try:
        with torch.no_grad():
            return adapted.base_model.unload() if on_meta else adapted.merge_and_unload()
    except (RuntimeError, ValueError, NotImplementedError) as error:
        raise UserError(f"{source.name}: the adapter cannot be merged ({brief(error)}).") from error


def untie(module, weights: dict) -> None:
    """Give the head a weight of its own where an adapter changes it or the embedding that it shares, in place."""
    head, embedding = module.get_output_embeddings(), module.get_input_embeddings()
    if head.weight is not embedding.weight:
        return
    shared = {name.split(".")[-1] for name, part in module.named_modules() if part in (head, embedding)}
    if any(part in name.split(".") for name in weights for part in shared):
        head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)
        module.config.tie_word_embeddings = False


def update_left(source, post, dtype: str) -> dict[str, float] | None:
    """What rounding to a dtype leaves of training's update; see `lib.weights.rounded_update`. Both are `Source`s."""
    if dtype == "float32":
        return None
    after = stored_weights(Path(post.path))
    if post.adapter:  # merged once more, in float32: the loaded one is rounded
        after = plain_names(dict(read_module(post, "float32", "cpu").named_parameters()))
    return rounded_update(stored_weights(Path(source.path)), after, dtype)


def read_tokenizer(source):
    """A folder's fast tokenizer. Raises UserError: there is none, or it cannot be read."""
    copy = "copy the base model's tokenizer files (tokenizer.json, tokenizer_config.json) into"
    # Without files transformers makes up an empty tokenizer of the model's family.
    if not any((Path(source.path) / name).is_file() for name in TOKENIZER_FILES):
        raise UserError(f"{source.name}: the folder holds no tokenizer; {copy} it.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.path, local_files_only=True)
    except Exception as error:  # the tokenizers library raises plain Exceptions
        raise UserError(f"{source.name}: its tokenizer cannot be read ({brief(error)}); {copy} the folder.") from error
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
    ours, theirs = text_vocabulary(tokenizer), text_vocabulary(read_tokenizer(post))
    if other := sorted(token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token)):
        token = other[0]
        raise UserError(
            f"{given}: its tokenizer is not the base model's ({len(other)} tokens differ: {token!r} is "
            f"{theirs.get(token, 'none')} there, {ours.get(token, 'none')} here); compare models of one vocabulary."
        )
