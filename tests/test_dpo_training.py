"""Tokenisation, batches, and training: resumed like uninterrupted, 4 x 1 like 1 x 4, better than at the start."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from conftest import FAMILIES, assert_figure, build_tokenizer, run, write_lines
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo.config import PRESETS, Config, make_config
from dpo.data import collate, order_of, response_logits, split, tokenize
from dpo.loss import dpo_loss, response_log_probs
from dpo.train import objective, prepare, train
from lib.data import Pair
from lib.errors import UserError

WORDS = "river stone cloud engine violin harbour copper winter garden letter".split()
PAIRS = [Pair(f"The {a} and the {b}", f" were {b} and calm.", f" hated {a} {b} {a}") for a in WORDS for b in WORDS[:4]]
QUICK = Config(
    learning_rate=1e-3, warmup=2, batch_size=2, steps=9, valid_every=3, save_every=2, patience=50, max_prompt=16,
    max_response=8,
)  # fmt: skip


def start(tiny, family="llama"):
    folder = tiny(family)
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(a: dict, b: dict, **tolerance) -> bool:
    return a.keys() == b.keys() and all(torch.allclose(a[k], b[k], **tolerance) for k in a)


@pytest.mark.parametrize("family", FAMILIES)
def test_batched_log_probs_equal_one_text_at_a_time(tiny, family):
    """Padding on both sides, masks from lengths and the kept logits change nothing."""
    model, tokenizer = start(tiny, family)
    pairs = [
        Pair("One", " is short.", " is quite a bit longer than that"),
        Pair("The longer prompt of two", " a", " b c d e f"),
    ]
    tokens = tokenize(tokenizer, pairs, 64, 64, append_eos=False)
    batch = collate(tokens)
    with torch.no_grad():
        found = response_log_probs(response_logits(model, batch), batch.targets, batch.mask)
        rows = [(p.chosen, p.chosen_start) for p in tokens] + [(p.rejected, p.rejected_start) for p in tokens]
        for row, (ids, begin) in enumerate(rows):
            log_probs = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
            expected = sum(log_probs[at - 1, ids[at]] for at in range(begin, len(ids)))
            assert found[row].item() == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "llama"])
def test_gradients_equal_those_of_the_plain_computation(tiny, family):
    """All logits, dense gradients: what `prepare` and the kept logits save changes no gradient (gpt2, gemma2: tied)."""
    model, tokenizer = start(tiny, family)
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert tied == (family != "llama")
    tokens = tokenize(tokenizer, PAIRS[:3], 64, 64, append_eos=False)
    log_probs = []
    for ids, begin in [(p.chosen, p.chosen_start) for p in tokens] + [(p.rejected, p.rejected_start) for p in tokens]:
        found = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        log_probs.append(sum(found[at - 1, ids[at]] for at in range(begin, len(ids))))
    chosen, rejected = torch.stack(log_probs).chunk(2)
    dpo_loss(chosen, rejected, torch.zeros(3), torch.ones(3), 0.1)[0].mean().backward()
    expected = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    model.zero_grad()
    prepare(model)
    objective(model, None, tokens, [(0.0, 1.0)] * 3, [[0, 1, 2]], QUICK, torch.device("cpu"))
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight.grad, expected[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("bos", [True, False])
def test_exactly_one_bos_and_the_whole_text(bos):
    tokenizer = build_tokenizer(bos)
    (pair,) = tokenize(tokenizer, [Pair("The river", " runs", " stands still")], 64, 64, append_eos=False)
    assert pair.chosen.count(tokenizer.convert_tokens_to_ids("<bos>")) == int(bos)
    assert tokenizer.decode(pair.chosen[: pair.chosen_start], skip_special_tokens=True) == "The river"
    assert tokenizer.decode(pair.chosen[pair.chosen_start :]) == " runs"
    assert tokenizer.decode(pair.rejected[pair.rejected_start :]) == " stands still"


def test_cutting_keeps_the_bos_and_the_prompt_s_end():
    tokenizer = build_tokenizer(True)
    (pair,) = tokenize(tokenizer, [Pair("a b c d e f g h", " one two three four", " x")], 4, 2, append_eos=False)
    assert pair.chosen[0] == tokenizer.bos_token_id and pair.chosen_start == 4
    assert tokenizer.decode(pair.chosen[:4], skip_special_tokens=True).endswith("h")
    assert len(pair.chosen) == 6


def test_end_of_sequence_only_after_whole_responses():
    tokenizer = build_tokenizer(True)
    pairs = [Pair("The river", " runs", " and this one is cut because it is long")]
    (without,) = tokenize(tokenizer, pairs, 64, 5, append_eos=False)
    (pair,) = tokenize(tokenizer, pairs, 64, 5, append_eos=True)
    assert tokenizer.eos_token_id not in without.chosen
    assert pair.chosen[-1] == tokenizer.eos_token_id
    assert tokenizer.eos_token_id not in pair.rejected
    # The end token is scored although it may be the pad token too: masks come from lengths.
    assert collate([pair]).mask[0].sum() == len(pair.chosen) - pair.chosen_start


def test_a_tokenizer_s_own_end_token_is_not_scored(tiny):
    """Qwen-like and T5-like tokenizers append an end token by themselves."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = build_tokenizer(True)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", tokenizer.bos_token_id), ("<eos>", tokenizer.eos_token_id)]
    )
    assert tokenizer("x")["input_ids"][-1] == tokenizer.eos_token_id
    (pair,) = tokenize(tokenizer, [Pair("The river", " runs", " stops")], 64, 64, append_eos=False)
    assert tokenizer.eos_token_id not in pair.chosen


def test_a_response_without_tokens_is_named():
    with pytest.raises(UserError, match="pair 2"):
        tokenize(build_tokenizer(True), [Pair("a", " b", " c"), Pair("a", "", " c")], 64, 64, append_eos=False)


def test_training_prefers_the_chosen_side(tiny, tmp_path):
    model, tokenizer = start(tiny)
    summary = train(model, tokenizer, PAIRS, replace(QUICK, steps=30), tmp_path / "out", {})
    log = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert log[0]["loss"] == pytest.approx(0.6931, abs=1e-3), "the policy starts as the reference"
    assert log[-1]["valid_loss"] < 0.5 and log[-1]["valid_accuracy"] > 0.9 and log[-1]["valid_margin"] > 0.3
    assert summary["best_step"] in {r["step"] for r in log if "valid_loss" in r}
    assert sorted(p.name for p in (tmp_path / "out").iterdir() if p.is_dir()) == []
    assert not same(weights(tmp_path / "out"), weights(tiny("llama")))


@pytest.mark.parametrize("kl_weight", [0.0, 0.3])
@pytest.mark.parametrize("optimizer", ["rmsprop", "adamw"])
def test_four_times_one_equals_one_times_four(tiny, tmp_path, kl_weight, optimizer):
    # Pairs of different length: a mean of means would not be the mean.
    uneven = [Pair(p.prompt, p.chosen * (1 + n % 3), p.rejected) for n, p in enumerate(PAIRS)]
    for name, shape in {"a": (4, 1), "b": (1, 4)}.items():
        model, tokenizer = start(tiny)
        config = replace(
            QUICK, batch_size=shape[0], accumulate=shape[1], kl_weight=kl_weight, optimizer=optimizer, steps=3
        )
        train(model, tokenizer, uneven, config, tmp_path / name, {})
    logs = [[json.loads(x)["loss"] for x in (tmp_path / n / "log.jsonl").read_text().splitlines()] for n in "ab"]
    assert logs[0] == pytest.approx(logs[1], rel=1e-4)
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"), atol=2e-4)


class Stop(Exception):
    pass


@pytest.mark.parametrize("kl_weight", [0.0, 0.3])
@pytest.mark.parametrize("optimizer", ["rmsprop", "adamw"])
def test_resumed_equals_uninterrupted(tiny, tmp_path, optimizer, kl_weight):
    config = replace(QUICK, optimizer=optimizer, kl_weight=kl_weight)
    train(*start(tiny), PAIRS, config, tmp_path / "whole", {})

    def stop_at(step):
        def progress(done, total, record):
            if done == step:
                raise Stop

        return progress

    for step in (5, 7):  # after the state of update 4, and again after the state of update 6
        with pytest.raises(Stop):
            train(*start(tiny), PAIRS, config, tmp_path / "broken", {}, stop_at(step))
    steps = []
    train(*start(tiny), PAIRS, config, tmp_path / "broken", {}, lambda done, total, record: steps.append(done))
    assert steps == [7, 8, 9], "it goes on from its last state and does not start again"
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "broken"), rtol=0, atol=0)

    def log(name):
        records = [json.loads(x) for x in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        return [{k: v for k, v in r.items() if k != "seconds"} for r in records]

    assert log("whole") == log("broken")


def test_a_killed_process_resumes(tiny, tmp_path, cache):
    pairs = write_lines(
        tmp_path / "pairs.jsonl",
        [{"prompt_text": p.prompt, "unpert_gen_text": p.chosen, "pert_gen_text": p.rejected} for p in PAIRS],
    )
    options = ["-m", "dpo", "--model", tiny("llama"), "--pairs", pairs, "--steps", 60, "--save-every", 2]
    options += ["--valid-every", 20, "--learning-rate", 1e-3, "--preset", "embedded"]
    whole = run(*options, "--out", tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    assert_figure(tmp_path / "whole" / "figures" / "training.png")
    broken = tmp_path / "broken"
    command = [sys.executable, *map(str, options), "--out", str(broken)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env={**os.environ})
    state = tmp_path / "broken.partial" / "state" / "progress.json"
    deadline = time.monotonic() + 120
    while not state.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not broken.exists() and state.parent.parent.exists()
    again = run(*options, "--out", broken)
    assert again.returncode == 0, again.stderr
    assert same(weights(tmp_path / "whole"), weights(broken), rtol=0, atol=0)
    assert run(*options, "--out", broken).returncode == 2, "a finished checkpoint is not overwritten"


def test_patience_stops_training(tiny, tmp_path):
    config = replace(QUICK, learning_rate=1e-12, steps=40, valid_every=1, patience=2)
    summary = train(*start(tiny), PAIRS, replace(config, learning_rate=0.3), tmp_path / "out", {})
    assert summary["stopped_by"] == "patience"
    assert len((tmp_path / "out" / "log.jsonl").read_text().splitlines()) < 40


def test_a_loss_that_is_not_finite_is_an_error(tiny, tmp_path):
    model, tokenizer = start(tiny)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(UserError, match="diverged at update 1"):
        train(model, tokenizer, PAIRS, QUICK, tmp_path / "out", {})


def test_epochs_see_every_pair_once():
    assert sorted(order_of(0, 7, 0)) == list(range(7)) and order_of(0, 7, 0) != order_of(1, 7, 0) != order_of(1, 7, 1)
    train_part, valid_part = split(list(range(20)), 0.1, 0)
    assert sorted(train_part + valid_part) == list(range(20)) and len(valid_part) == 2


def test_presets_hold_the_published_hyperparameters():
    lee, yang = make_config("lee2024", "gpt2"), make_config("yang2025", "gemma")
    assert (lee.learning_rate, lee.batch_size, lee.accumulate, lee.beta, lee.optimizer) == (1e-6, 4, 1, 0.1, "rmsprop")
    assert (lee.max_grad_norm, lee.patience) == (10, 10)
    assert (yang.learning_rate, yang.batch_size, yang.accumulate, yang.warmup) == (1e-5, 4, 4, 150)
    assert (yang.max_prompt, yang.max_response, yang.epochs, yang.patience, yang.beta) == (64, 64, 5, 30, 0.1)
    weights_by_model = [make_config("yang2025", m).kl_weight for m in ("gpt2", "llama", "gemma", "mistral")]
    assert weights_by_model == [0.02, 0.1, 0.05, 0.05]
    assert make_config("embedded", "gemma-270m", steps=3).steps == 3 and PRESETS["embedded"].kl_weight == 0
    for model in ("gemma-270m", "smollm2"):
        halved, strong = (make_config(name, model) for name in ("embedded", "strong"))
        assert halved.steps < strong.steps and halved.learning_rate <= strong.learning_rate


def test_bfloat16_keeps_what_it_trains_in_float32(tiny, tmp_path):
    """Steps are smaller than bfloat16 can hold: weights that are trained must not be in it, and move as in float32."""
    found = {}
    for dtype in ("float32", "bfloat16"):
        config = replace(QUICK, learning_rate=1e-6, warmup=0, steps=3, dtype=dtype)
        train(*start(tiny), PAIRS, config, tmp_path / dtype, {})
        found[dtype] = weights(tmp_path / dtype)
    before = weights(tiny("llama"))
    moved = {dtype: sum(int((w != before[name]).sum()) for name, w in held.items()) for dtype, held in found.items()}
    assert {w.dtype for w in found["bfloat16"].values()} == {torch.float32}
    assert moved["bfloat16"] > 0.9 * moved["float32"] > 0
    model, tokenizer = start(tiny)
    with pytest.raises(UserError, match="round most steps away"):
        train(model.bfloat16(), tokenizer, PAIRS, QUICK, tmp_path / "narrow", {})


def test_a_token_that_spans_prompt_and_response():
    """Both sides answer one prompt: they begin where the first of them does."""
    tokenizer = build_tokenizer(True)
    assert " the" in tokenizer.decode([tokenizer(" the")["input_ids"][1]]), "one token, or this shows nothing"
    pairs = [Pair("The bank of t", "he river", "zz"), Pair("The river", " runs", " sleeps")]
    spanning, plain = tokenize(tokenizer, pairs, 64, 64, append_eos=False)
    assert plain.spanning is False and plain.chosen_start == plain.rejected_start
    assert spanning.spanning is True and spanning.chosen_start == spanning.rejected_start
    assert spanning.chosen[: spanning.chosen_start] == spanning.rejected[: spanning.rejected_start]
    for ids, response in ((spanning.chosen, "he river"), (spanning.rejected, "zz")):
        assert tokenizer.decode(ids, skip_special_tokens=True) == "The bank of t" + response


@pytest.mark.parametrize("text", ["<bos>The river", "The <eos> river", "<pad>", "a<bos>b"])
def test_no_text_makes_a_special_token(text):
    tokenizer = build_tokenizer(True)
    (pair,) = tokenize(tokenizer, [Pair(text, f" {text} x", f" y {text}")], 64, 64, append_eos=False)
    for ids in (pair.chosen, pair.rejected):
        assert ids[0] == tokenizer.bos_token_id and not set(ids[1:]) & set(tokenizer.all_special_ids)
