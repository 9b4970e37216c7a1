"""Every script through its command on CUDA, on a tiny model, with the probe and the DPO model that it makes itself."""

import json
import os

import pytest
import torch
from conftest import ROOT, run, texts, write_lines

DEVICE = os.environ.get("TEST_DEVICE", "cuda")
pytestmark = pytest.mark.skipif(
    DEVICE == "cuda" and not torch.cuda.is_available(), reason="this machine has no CUDA GPU"
)
SCRIPTS = {
    "patch_four_groups": ["--controls", "quick"],
    "toxic_neurons_not_enough": [],
    "probe_free_editing": ["--representation", "tokens,probe"],
    "steer": ["--alpha", "3", "--controls", "quick"],
    "unalign": ["--controls", "quick"],
    "robust_alignment": ["--variants", "biases,values:64,lora:2"],
    "opposing_effects": [],
    "toxic_subspace": ["--top", "8"],
    "residual_shift": [],
    "neuron_card": [],
    "logit_lens": ["--tokens", "{token}"],
    "toxic_vectors": [],
}  # fmt: skip
WEIGHTS_ALONE = {"toxic_vectors"}
OBSERVING = {"opposing_effects", "toxic_subspace", "residual_shift", "neuron_card", "logit_lens"}


@pytest.fixture(scope="module")
def made(tiny, tmp_path_factory):
    """Short files, and one cache for all scripts."""
    folder = tmp_path_factory.mktemp("gpu")
    words = "river stone cloud engine violin harbour copper winter".split()
    comments = [{"text": f"the {a} and the {b}", "label": at % 2} for at, a in enumerate(words) for b in words]
    pairs = [
        {"prompt_text": f"The {a} and", "unpert_gen_text": f" the {b} slept.", "pert_gen_text": f" {a} {a} hated {b}"}
        for a in words
        for b in words[:3]
    ]
    write_lines(folder / "prompts.jsonl", [{"prompt": prompt} for prompt in texts("prompts", "prompt")[:6]])
    write_lines(folder / "comments.jsonl", comments)
    write_lines(folder / "pairs.jsonl", pairs)
    return folder


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script(made, tiny, name, family, tmp_path):
    given = ["--model", tiny(family), "--device", DEVICE]
    given += [] if name == "logit_lens" else ["--comments", made / "comments.jsonl"]
    if name not in WEIGHTS_ALONE:
        given += ["--prompts", made / "prompts.jsonl", "--pairs", made / "pairs.jsonl"]
    if name not in WEIGHTS_ALONE | OBSERVING:
        given += ["--passages", "embedded", "--scorer", "words"]
    more = [part.format(token=next_token(tiny(family), made)) for part in SCRIPTS[name]]
    done = run(
        f"experiments/{name}.py", *given, *more, "--out", tmp_path / "out", cwd=ROOT, timeout=600,
        DPO_NEURONS_CACHE=str(made / "cache"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    about = json.loads((tmp_path / "out" / "run.json").read_text())["provenance"]
    assert about["device"] == DEVICE and about["dtype"] == "float32"


def next_token(folder, made) -> str:
    """A prompt's most likely next token that is one token when written, for the logit lens to look at."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    for line in (made / "prompts.jsonl").read_text().splitlines():
        ids = tokenizer(json.loads(line)["prompt"], return_tensors="pt", truncation=True, max_length=32)["input_ids"]
        best = int(model(ids).logits[0, -1].argmax())
        if tokenizer(text := tokenizer.decode([best]), add_special_tokens=False)["input_ids"] == [best]:
            return text
    raise AssertionError("no prompt has such a token")
