"""Preference pairs on tiny models: PPLM's gradient by finite differences, its step, both methods by command."""

import json

import pytest
import torch
from conftest import FAMILIES, ROOT, WIDTH, assert_figure, build_tokenizer, load_script, run, texts, write_lines
from passes import Passes
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode

from lib import pplm
from lib.dry_run import sizes
from lib.generation import batches, gumbel, prompt_ids
from lib.probes import Probe

FIELDS = {"prompt_text", "unpert_gen_text", "pert_gen_text", "unpert_gen_toxicity", "pert_gen_toxicity"}
PROMPTS = ["The river", "I was so angry that the man over there"]
TABLE_6 = pplm.PPLM(0.4, 3, kl_scale=0.1, gm_scale=0.95, gamma=1.0, window=0, top_k=10, temperature=1.0)
script = load_script("make_pairs")


def probe() -> Probe:
    return Probe(torch.randn(WIDTH, generator=torch.Generator().manual_seed(1)), 0.2)


def begin(model, prompts=PROMPTS) -> tuple[list, pplm.Seen, dict]:
    """The cache before the last token, what the unmoved model made of all, and the batch."""
    (batch,) = batches(model.tokenizer, prompts, len(prompts))
    ids, attention = batch["input_ids"], batch["attention_mask"]
    with torch.no_grad():
        residual, _, cache = pplm.forward(model, [], attention[:, :-1], input_ids=ids[:, :-1])
        _, logits, whole = pplm.forward(model, cache, attention, input_ids=ids[:, -1:])
    counted = attention[:, :-1, None]
    total, count = (residual * counted).sum(1), counted.sum(1)
    return cache, pplm.Seen(whole, attention, ids[:, -1:], logits.log_softmax(-1), total, count), batch


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cached_pass_equals_a_whole_one(family, traced):
    """Cache, positions and mask: the logits of the last token are those of plain PyTorch on each prompt alone."""
    model = traced(family)
    _, seen, _ = begin(model)
    for row, prompt in enumerate(PROMPTS):
        ids = model.tokenizer(prompt, return_tensors="pt")["input_ids"]
        expected = model._module(ids).logits[0, -1].log_softmax(-1)
        torch.testing.assert_close(seen.log_probs[row], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_objective_from_plain_pytorch(family, traced):
    """One row, nothing moved: KL is 0, and the expected token's residual stream is read in one uncached pass."""
    model = traced(family)
    cache, seen, batch = begin(model, PROMPTS[1:])
    with torch.no_grad():
        found = pplm.objective(model, probe(), cache, seen, TABLE_6)
        raw, ids = model._module, batch["input_ids"]
        table = raw.get_input_embeddings()(torch.arange(seen.log_probs.shape[-1]))  # as the model's layers get them
        embedded = torch.cat([table[ids], (seen.log_probs.exp() @ table)[:, None]], 1)
        streams = []
        last = raw.transformer.h[-1] if family == "gpt2" else raw.model.layers[-1]
        handle = last.register_forward_hook(
            lambda module, args, output: streams.append(output[0] if isinstance(output, tuple) else output)
        )
        try:
            raw(inputs_embeds=embedded)
        finally:
            handle.remove()
        mean = streams[0].reshape(-1, WIDTH).mean(0)
    expected = torch.nn.functional.softplus(-(mean @ probe().direction + probe().bias))
    torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_gradient_by_finite_differences(family, tiny, monkeypatch):
    """In float64, along random directions of the cache: (f(c + h d) - f(c - h d)) / 2h."""
    from lib.models import load, resolve

    model = load(resolve(str(tiny(family))), "cpu")
    model._module.double()
    _, seen, _ = begin(model, PROMPTS[1:])
    cache = [tuple(part[:, :, :-1].clone() for part in layer) for layer in seen.cache]
    # Away from the unmoved cache, where the KL term has its minimum and no slope.
    generator = torch.Generator().manual_seed(0)
    cache = [tuple(part + 0.1 * torch.randn(part.shape, generator=generator).double() for part in c) for c in cache]
    strong = pplm.PPLM(**{**vars(TABLE_6), "kl_scale": 2.0})
    forward, own = pplm.forward, []

    def given(*args, head=True, **inputs):
        """The last token's own residual stream is no variable of the objective: every call gets the first one's."""
        residual, logits, grown = forward(*args, head=head, **inputs)
        if head:
            own.append(residual.detach())
        return own[0] if head else residual, logits, grown

    monkeypatch.setattr(pplm, "forward", given)
    leaves = [tuple(part.detach().requires_grad_() for part in layer) for layer in cache]
    pplm.objective(model, probe(), leaves, seen, strong).sum().backward()
    for layer, keys_or_values in ((0, 0), (1, 1), (2, 0)):
        leaf = leaves[layer][keys_or_values]
        direction = torch.randn(leaf.shape, generator=generator).double()
        found = []
        for sign in (1, -1):
            moved = [list(pair) for pair in cache]
            moved[layer][keys_or_values] = moved[layer][keys_or_values] + sign * 1e-3 * direction
            with torch.no_grad():
                found.append(float(pplm.objective(model, probe(), moved, seen, strong).sum()))
        slope = float((leaf.grad * direction).sum())
        assert abs(slope) > 1e-3
        # Most families' norms and softmax are in float32 whatever the model's dtype is: noise of about 1e-7 / h.
        assert (found[0] - found[1]) / 2e-3 == pytest.approx(slope, rel=0.02, abs=1e-3)


def test_a_step_has_its_length_in_every_layer_and_row_and_lowers_the_objective(traced):
    model = traced("gemma3_text")
    cache, seen, batch = begin(model)
    small = pplm.PPLM(**{**vars(TABLE_6), "step_size": 0.01})
    moved = pplm.stepped(model, probe(), cache, seen, small)
    for before, after in zip(cache, moved, strict=True):
        squares = sum((b - a).square().sum((1, 2, 3)) for b, a in zip(before, after, strict=True))
        torch.testing.assert_close(squares.sqrt(), torch.full((2,), 0.01), rtol=1e-3, atol=1e-6)
        padding = batch["attention_mask"][0, :-1] == 0
        assert padding.any() and (after[0][0][:, padding] == before[0][0][:, padding]).all(), "nobody sees padding"
    with torch.no_grad():
        lower = pplm.objective(model, probe(), moved, seen, small) - pplm.objective(model, probe(), cache, seen, small)
    assert (lower < 0).all()
    windowed = pplm.stepped(model, probe(), cache, seen, pplm.PPLM(**{**vars(small), "window": 2}))
    changed = (windowed[1][1] != cache[1][1]).any(-1).any(1)  # [rows, positions]
    assert changed[:, -2:].all() and not changed[:, :-2].any()


def test_a_row_s_step_does_not_depend_on_its_batch(traced):
    model = traced("llama")
    cache, seen, _ = begin(model)
    both = pplm.stepped(model, probe(), cache, seen, TABLE_6)
    cache, seen, _ = begin(model, PROMPTS[:1])
    for (keys, _), (expected, _) in zip(both, pplm.stepped(model, probe(), cache, seen, TABLE_6), strict=True):
        torch.testing.assert_close(keys[:1, :, -expected.shape[2] :], expected, rtol=1e-4, atol=1e-4)


def test_a_row_does_not_depend_on_its_batch_and_steering_raises_p_toxic(traced):
    model = traced("llama")
    noise = gumbel(3, 2, script.NEW_TOKENS, 10)[:, :6]

    def generate(prompts, noise, **changes):
        (batch,) = batches(model.tokenizer, prompts, len(prompts))
        return pplm.generate(model, probe(), batch, pplm.PPLM(**{**vars(TABLE_6), **changes}), noise)

    both = generate(PROMPTS, noise)
    alone = generate(PROMPTS[:1], noise[:1])
    # Later tokens of a random model hang on the last bits of the cache.
    assert torch.equal(both[:1, :3], alone[:, :3]), "padding and the other row change nothing"
    with_none = generate(PROMPTS, noise, gm_scale=0.0)
    assert not torch.equal(both, with_none)
    unmoved = generate(PROMPTS, noise, step_size=1e-12)
    assert torch.equal(unmoved, with_none), "gm_scale 0 samples from the unmoved model"


def make(tiny, tmp_path, out: str, *more):
    prompts = write_lines(tmp_path / "prompts.jsonl", [{"prompt": p} for p in texts("pair_prompts", "prompt")[:6]])
    save_file({"direction": probe().direction}, tmp_path / "probe.safetensors")
    command = ["experiments/make_pairs.py", "--model", tiny("llama"), "--prompts", prompts, "--samples", 3]
    command += ["--probe", tmp_path / "probe.safetensors", "--batch-size", 3]
    command += ["--scorer", "profanity-check", "--out", tmp_path / out, *more]
    return run(*command, cwd=ROOT)


@pytest.mark.parametrize("method", ["pplm", "best-of-n"])
def test_pairs_and_a_broken_off_run(tiny, tmp_path, method):
    more = ["--method", method, "--min-gap", -1]
    done = make(tiny, tmp_path, "whole.jsonl", *more)
    assert done.returncode == 0, done.stderr
    assert "6 pairs of 6 prompts (0 dropped" in done.stdout and "s a prompt" in done.stdout
    pairs = [json.loads(line) for line in (tmp_path / "whole.jsonl").read_text().splitlines()]
    assert len(pairs) == 6 and all(set(pair) == FIELDS for pair in pairs)
    assert any(pair["unpert_gen_text"] != pair["pert_gen_text"] for pair in pairs)
    if method == "best-of-n":
        assert all(pair["unpert_gen_toxicity"] <= pair["pert_gen_toxicity"] for pair in pairs)
    about = json.loads((tmp_path / "whole.about.json").read_text())
    assert about["kept"] == 6 and about["data"]["prompts"]["items"] == 6
    assert_figure(tmp_path / "whole.png")

    # What a kill leaves: the settings, a finished batch, and another that broke off.
    own = {
        "model",
        "prompts",
        "method",
        "scored_by",
        "seed",
        "batch_size",
        "dtype",
        "device",
        "limit",
        "probe",
        "samples",
    }
    settings = {key: about[key] for key in about if key in own | set(pplm.PPLM.__dataclass_fields__)}
    marked = [{**pair, "prompt_text": "from the file"} for pair in pairs]
    per_batch = 3 if method == "pplm" else 1
    lines = [settings, *({"number": number, "pair": marked[number]} for number in range(4 if method == "pplm" else 1))]
    partial = tmp_path / "again.jsonl.partial"
    partial.write_text("\n".join(map(json.dumps, lines)) + '\n{"number": 4, "pa')
    again = make(tiny, tmp_path, "again.jsonl", *more)
    assert again.returncode == 0, again.stderr
    found = [json.loads(line) for line in (tmp_path / "again.jsonl").read_text().splitlines()]
    assert found == marked[:per_batch] + pairs[per_batch:] and not partial.exists()


def test_a_run_killed_before_its_first_line_goes_on(tiny, tmp_path):
    (tmp_path / "whole.jsonl.partial").write_text("")
    done = make(tiny, tmp_path, "whole.jsonl", "--method", "best-of-n", "--min-gap", -1)
    assert done.returncode == 0, done.stderr


def test_a_pair_holds_the_prompt_that_was_continued(traced):
    tokenizer = traced("llama").tokenizer
    long = "Rivers carry stones and mud to the sea, and " * 8
    cut = script.continued(tokenizer, long)
    assert long.startswith(cut) and len(tokenizer(cut)["input_ids"]) <= 32 < len(tokenizer(long)["input_ids"])
    assert script.continued(tokenizer, "The river") == "The river"
    same = {"unpert_gen_text": "a", "pert_gen_text": "a", "unpert_gen_toxicity": 0.1, "pert_gen_toxicity": 0.1}
    assert not script.differs(same, -1) and script.differs({**same, "pert_gen_text": "b"}, 0)
    assert not script.differs({**same, "pert_gen_text": "b"}, 0.1)


def test_bad_input_is_one_line(tiny, tmp_path):
    write_lines(tmp_path / "there.jsonl", [{"a": 1}])
    again = make(tiny, tmp_path, "there.jsonl")
    assert again.returncode == 2 and "exists" in again.stderr, "an existing file is not overwritten"
    none = make(tiny, tmp_path, "none.jsonl", "--method", "best-of-n", "--min-gap", 1.1)
    assert none.returncode == 2 and "lower --min-gap" in none.stderr and not (tmp_path / "none.jsonl").exists()
    save_file({"direction": torch.ones(7)}, tmp_path / "small.safetensors")
    small = make(tiny, tmp_path, "none.jsonl", "--probe", tmp_path / "small.safetensors")
    assert small.returncode == 2 and "another model" in small.stderr


def test_the_trace_can_be_shipped(traced):
    """nnsight's simulated server draws the same samples."""
    from lib.metrics import scorer

    score, asked = scorer("profanity-check"), dict(enumerate(["The river", "Music is"]))
    here = script.least_and_most_toxic(traced("llama"), 3, score, 5, asked)
    assert script.least_and_most_toxic(traced("llama"), 3, score, 5, asked, remote="local") == here
    assert script.least_and_most_toxic(traced("llama"), 3, score, 6, asked) != here


def test_pplm_can_be_shipped(traced):
    """Its gradient steps too run inside one session."""
    model, asked = traced("gemma3_text"), dict(enumerate(["The river", "Music is loud"]))
    settings = pplm.PPLM(**{**vars(TABLE_6), "iterations": 2})
    here = script.greedy_and_toxic(model, probe(), settings, 5, asked)
    assert script.greedy_and_toxic(model, probe(), settings, 5, asked, remote="local") == here


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_what_a_dry_run_counts_are_the_products_of_the_real_run(family, tiny, traced):
    """Passes over ids as a hook counts them; with what comes beside them torch's count of operations, gradients too."""
    model, real = traced(family), Passes()
    (batch,) = batches(model.tokenizer, PROMPTS, len(PROMPTS))
    with real.counted(model._module.config.vocab_size), FlopCounterMode(display=False) as operations:
        pplm.generate(model, probe(), batch, TABLE_6, gumbel(0, len(PROMPTS), script.NEW_TOKENS, TABLE_6.top_k))
    over_ids, beside = pplm.passes(TABLE_6, prompt_ids(model.tokenizer, PROMPTS), len(PROMPTS), script.NEW_TOKENS)
    assert sorted(over_ids) == sorted(real.every)
    body, head = sizes(str(tiny(family)))
    counted = sum(2 * (layers * body + heads * head) for layers, heads in over_ids + beside)
    assert counted == pytest.approx(operations.get_total_flops(), rel=0.1)


@pytest.mark.parametrize("method", ["pplm", "best-of-n"])
def test_a_dry_run_counts_the_passes_of_the_real_run(tiny, tmp_path, method):
    """Prompts of one token alone too: without a BOS there is no cache to move before their first new token."""
    prompts = write_lines(tmp_path / "prompts.jsonl", [{"prompt": p} for p in ("Rivers of the world", "The", "a", "e")])
    save_file({"direction": probe().direction}, tmp_path / "probe.safetensors")
    given = ["--model", str(tiny("gpt2")), "--prompts", str(prompts), "--probe", str(tmp_path / "probe.safetensors")]
    given += ["--method", method, "--scorer", "profanity-check", "--batch-size", "2", "--samples", "2"]
    given += ["--min-gap", "-1", "--out", str(tmp_path / "out" / "pairs.jsonl")]
    dry = run("experiments/make_pairs.py", *given, "--dry-run", cwd=ROOT)
    assert dry.returncode == 0 and not (tmp_path / "out").exists(), dry.stderr[-2000:]
    real = Passes()
    with real.counted(len(build_tokenizer(bos=False))):
        script.command(given, standalone_mode=False)
    tokens = sum(through_layers for through_layers, _ in real.every)
    assert f"{len(real.every):,} forward passes, {tokens:,} tokens" in dry.stdout
