"""Model folders as people have them, generated: the right numbers, or one line and nothing written.

Each case takes a tiny model, changes its folder in one way or two, and runs a script or the trainer on it. What must
come out is computed here with plain PyTorch from the weights that were written, one prompt at a time, without a cache.
"""

import importlib
import json
import random
import shutil

import pytest
import torch
from click.testing import CliRunner
from conftest import FAMILIES, LAYERS, WIDTH, build_tokenizer, load_script, texts, write_lines
from safetensors.torch import load_file, save_file
from tokenizers import processors
from transformers import AutoModelForCausalLM, AutoTokenizer

# Each with options that keep it short. The causal ones write what the base model and the one after DPO continued.
CAUSAL = {
    "patch_four_groups": ["--sets", "top256"], "steer": ["--alpha", "1"], "unalign": ["--top", "2"],
    "probe_free_editing": ["--representation", "probe", "--alpha", "0.1", "--beta", "0.5"],
    "robust_alignment": ["--variants", "all"],
}  # fmt: skip
LOOKING = {
    "opposing_effects": [], "toxic_subspace": ["--top", "6"], "residual_shift": [], "neuron_card": [], "logit_lens": [],
    "toxic_vectors": [], "train_probe": [], "make_pairs": ["--method", "best-of-n", "--samples", "2"],
}  # fmt: skip
CASES, STEPS = 130, 20
PROMPTS = texts("prompts", "prompt")[:2]
PENALTIES = [
    {"repetition_penalty": 1.5}, {"no_repeat_ngram_size": 2}, {"suppress_tokens": list(range(20, 200))},
    {"begin_suppress_tokens": list(range(5, 300))}, {"min_new_tokens": 20}, {"min_length": 60},
    {"forced_eos_token_id": 1}, {"num_beams": 3}, {"do_sample": True, "temperature": 2.0, "top_k": 5},
    {"bad_words_ids": [[i] for i in range(30, 90)]}, {"exponential_decay_length_penalty": [2, 1.5]},
    {"sequence_bias": [[[40], 9.0]]}, {"guidance_scale": 2.0}, {"max_new_tokens": 3}, {"max_length": 5},
    {"num_return_sequences": 2, "do_sample": True}, {"renormalize_logits": True}, {"use_cache": False},
    {"prompt_lookup_num_tokens": 2}, {"num_beams": 2, "num_return_sequences": 2}, {"stop_strings": ["e"]},
    {"return_dict_in_generate": True}, {"output_scores": True, "return_dict_in_generate": True},
    {"encoder_repetition_penalty": 2.0}, {"cache_implementation": "static"}, {"typical_p": 0.3}, {"max_time": 0.0001},
    {"eos_token_id": [1, 40, 41, 42]}, {"eos_token_id": None}, {"pad_token_id": None},
]  # fmt: skip


def rewritten(folder, change) -> None:
    """The folder's weights with `change(name, tensor)` applied: (name, tensor), or None to leave one out."""
    weights = [change(name, tensor) for name, tensor in load_file(folder / "model.safetensors").items()]
    save_file(dict(entry for entry in weights if entry), folder / "model.safetensors", {"format": "pt"})


def edited(folder, file: str, **entries) -> None:
    path = folder / file
    held = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**held, **entries}))


# ---- changes after which the numbers must be right


def no_change(folder, family, draw):
    pass


def other_dtype(folder, family, draw):
    dtype = draw.choice([torch.bfloat16, torch.float16])
    rewritten(folder, lambda name, tensor: (name, tensor.to(dtype)))


def base_class_names(folder, family, draw):
    if "lm_head.weight" in load_file(folder / "model.safetensors"):
        return
    prefix = "transformer." if family == "gpt2" else "model."
    rewritten(folder, lambda name, tensor: (name.removeprefix(prefix), tensor))


def shards(folder, family, draw):
    model = AutoModelForCausalLM.from_pretrained(folder)
    for file in folder.glob("model*.safetensors*"):
        file.unlink()
    model.save_pretrained(folder, max_shard_size="40KB")


def asks_for_another_decoding(folder, family, draw):
    edited(folder, "generation_config.json", **draw.choice(PENALTIES))


def tokenizer_appends_an_end(folder, family, draw):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    single = "$A <eos>" if family == "gpt2" else "<bos> $A <eos>"
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[("<bos>", 2), ("<eos>", 1)]
    )
    tokenizer.save_pretrained(folder)


def pad_outside_the_vocabulary(folder, family, draw):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(folder)


def no_padding_token(folder, family, draw):
    edited(folder, "tokenizer_config.json", pad_token=None, eos_token=None if draw.random() < 0.5 else "<eos>")


def truncation_on_the_left(folder, family, draw):
    edited(folder, "tokenizer_config.json", truncation_side="left", padding_side="right", model_max_length=4)


def unused_tensor_beside(folder, family, draw):
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, "v_head.summary.weight": torch.ones(1, WIDTH)}, folder / "model.safetensors")


# ---- changes that must be refused


def wrapped_names(folder, family, draw):
    prefix = draw.choice(["_orig_mod.", "module.", "pretrained_model.", "policy.", "base_model.model."])
    rewritten(folder, lambda name, tensor: (prefix + name, tensor))


def some_names_differ(folder, family, draw):
    rewritten(folder, lambda name, tensor: (name.replace("mlp", "ffn"), tensor))


def a_tensor_is_missing(folder, family, draw):
    names = sorted(load_file(folder / "model.safetensors"))
    gone = draw.choice([name for name in names if name != "lm_head.weight"])
    rewritten(folder, lambda name, tensor: None if name == gone else (name, tensor))


def a_tensor_has_another_shape(folder, family, draw):
    names = sorted(load_file(folder / "model.safetensors"))
    wrong = draw.choice(names)
    rewritten(folder, lambda name, tensor: (name, tensor[:-1].clone() if name == wrong else tensor))


def fewer_layers_than_weights(folder, family, draw):
    name = "n_layer" if family == "gpt2" else "num_hidden_layers"
    more = {} if "layer_types" not in (config := json.loads((folder / "config.json").read_text())) else {
        "layer_types": (config["layer_types"] or [])[: LAYERS - 1] or None
    }  # fmt: skip
    edited(folder, "config.json", **{name: LAYERS - 1}, **more)


def not_finite(folder, family, draw):
    value, names = draw.choice([float("nan"), float("inf")]), sorted(load_file(folder / "model.safetensors"))
    wrong = draw.choice(names)

    def change(name, tensor):
        if name == wrong:
            tensor.view(-1)[draw.randrange(tensor.numel())] = value
        return name, tensor

    rewritten(folder, change)


def truncated(folder, family, draw):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: draw.choice([0, 4, 100, file.stat().st_size // 2, file.stat().st_size - 1])])


def quantised(folder, family, draw):
    method, more = draw.choice([("bitsandbytes", {"load_in_4bit": True}), ("gptq", {"bits": 4}), ("fp8", {})])
    edited(folder, "config.json", quantization_config={"quant_method": method, **more})


def no_tokenizer(folder, family, draw):
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).unlink(missing_ok=True)


def broken_tokenizer(folder, family, draw):
    (folder / "tokenizer.json").write_text(draw.choice(["", "{}", '{"model": 3}', "[1"]))


def broken_configuration(folder, family, draw):
    (folder / "config.json").write_text(
        draw.choice(["", "[]", "{", '{"model_type": 3}', '{"model_type": "bert"}', "null"])
    )


def pickles_alone(folder, family, draw):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def tokens_beyond_the_vocabulary(folder, family, draw):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["The", "river"])
    tokenizer.save_pretrained(folder)


RIGHT = [
    no_change, other_dtype, base_class_names, shards, asks_for_another_decoding, tokenizer_appends_an_end,
    pad_outside_the_vocabulary, no_padding_token, truncation_on_the_left, unused_tensor_beside,
]  # fmt: skip
REFUSED = [
    wrapped_names, some_names_differ, a_tensor_is_missing, a_tensor_has_another_shape, fewer_layers_than_weights,
    not_finite, truncated, quantised, no_tokenizer, broken_tokenizer, broken_configuration, pickles_alone,
    tokens_beyond_the_vocabulary,
]  # fmt: skip
AS_POST_RIGHT = {no_tokenizer}  # the base model's own tokenizer is taken


def greedy(model, tokenizer, prompt: str, bos: bool, ends: set[int]) -> str:
    """The likeliest tokens, one after the other."""
    ids = ([2] if bos else []) + tokenizer.convert_tokens_to_ids(tokenizer.tokenize(prompt))
    ids = ids[:32]
    new = []
    with torch.no_grad():
        for _ in range(STEPS):
            token = int(model(torch.tensor([ids + new])).logits[0, -1].argmax())
            if token in ends:
                break
            new.append(token)
    return tokenizer.decode(new, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def end_ids(folder) -> set[int]:
    file = folder / "generation_config.json"
    ends = json.loads(file.read_text()).get("eos_token_id") if file.exists() else 1
    return set(ends) if isinstance(ends, list) else set() if ends is None else {ends}


def weights_of(folder, original):
    """A plain module with the folder's numbers, whatever they are named in it."""
    model = AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32)
    held = {}
    for file in folder.glob("*.safetensors"):
        held |= load_file(file)
    names = dict(model.named_parameters())
    with torch.no_grad():
        for name, weight in names.items():
            found = next((held[key] for key in held if name == key or name.endswith(f".{key}")), None)
            weight.copy_(found.float())
    return model.eval()


@pytest.fixture(scope="module")
def common(tmp_path_factory):
    """Prompts, a probe, and one cache."""
    folder = tmp_path_factory.mktemp("common")
    write_lines(folder / "prompts.jsonl", [{"prompt": prompt} for prompt in PROMPTS])
    direction = torch.randn(WIDTH, generator=torch.Generator().manual_seed(0))
    save_file({"direction": direction}, folder / "probe.safetensors")
    return folder


def run(common, base, post, out, monkeypatch, name="patch_four_groups"):
    """A script, or the trainer, through its command line, in this process."""
    monkeypatch.setenv("DPO_NEURONS_CACHE", str(common / "cache"))
    command = load_script(name).command if name != "dpo" else importlib.import_module("dpo.__main__").command
    given = {
        "--model": base, "--post": post, "--probe": common / "probe.safetensors", "--scorer": "words",
        "--prompts": common / "prompts.jsonl", "--passages": "embedded", "--limit": 2, "--out": out,
    }  # fmt: skip
    known = {option for parameter in command.params for option in parameter.opts}
    words = [str(part) for option, value in given.items() if option in known for part in (option, value)]
    return CliRunner().invoke(command, [*words, *{**CAUSAL, **LOOKING}.get(name, [])])


def check_refused(done, out, tmp_path, before) -> None:
    """Exit code 2, one line that is short, no traceback, nothing written."""
    assert done.exit_code == 2, (done.exit_code, done.exception, done.output[-500:])
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith("Error: ") and len(line) < 400 and "Traceback" not in done.output, line
    assert not out.exists() and sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("case", range(CASES))
def test_right_or_refused(case, tiny, common, tmp_path, monkeypatch):
    draw = random.Random(case)
    family, as_post = draw.choice(FAMILIES), draw.random() < 0.5
    changes = [draw.choice(RIGHT), draw.choice(RIGHT)] if case % 2 else [draw.choice(REFUSED)]
    original, folder, out = tiny(family, int(as_post)), tmp_path / f"tiny-{family}", tmp_path / "out"
    shutil.copytree(original, folder)
    for change in sorted(changes, key=lambda change: change is shards):  # the others look for one file
        change(folder, family, draw)
    base, post = (tiny(family), folder) if as_post else (folder, tiny(family, 1))
    refused = changes[0] in REFUSED and not (as_post and changes[0] in AS_POST_RIGHT)
    # Those that read the base model alone, or train, cannot refuse a model after DPO.
    alone = {"toxic_vectors", "train_probe", "make_pairs", "dpo"}
    names = [*CAUSAL, *(LOOKING if refused else ()), *(["dpo"] if refused else ())]
    name = draw.choice([name for name in names if not (as_post and name in alone)])
    before = sorted(tmp_path.iterdir())
    done = run(common, base, post, out, monkeypatch, name)
    if refused:
        check_refused(done, out, tmp_path, before)
        return
    assert done.exit_code == 0, (changes, done.exception, done.output[-800:])
    lines = [json.loads(line) for line in (out / "generations.jsonl").read_text().splitlines()]
    tokenizer = build_tokenizer(bos=family != "gpt2")
    for which, where, seed in (("none", base, 0), ("dpo", post, 1)):
        model = weights_of(where, tiny(family, seed))
        # Where text ends follows from the model that writes it; a model without an end goes on.
        expected = [greedy(model, tokenizer, prompt, family != "gpt2", end_ids(where)) for prompt in PROMPTS]
        assert [line["continuation"] for line in lines if line["name"] == which] == expected, (name, which, changes)
