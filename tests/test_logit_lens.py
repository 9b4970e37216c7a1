"""The logit lens against raw hooks and the model's own probabilities, its summary by hand, and the script."""

import json

import numpy as np
import pytest
import torch
from conftest import FAMILIES, LAYERS, ROOT, load_script, run, texts, write_lines
from passes import Passes
from test_cli import inputs  # noqa: F401  a fixture
from test_opposing_effects import arguments
from test_traces import PROMPTS

from lib.errors import UserError
from lib.families import FAMILIES as KINDS
from lib.families import reach
from lib.generation import batches

script = load_script("logit_lens")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_half_layer_against_raw_hooks(family, traced, tiny):
    """Streams caught by hooks, through the raw model's own norm and head; the last one is the model's own output."""
    from transformers import AutoModelForCausalLM

    model = traced(family)
    (batch,) = batches(model.tokenizer, PROMPTS, len(PROMPTS))
    raw = AutoModelForCausalLM.from_pretrained(tiny(family)).eval()
    kind, caught = KINDS[family], {}
    handles = []
    for at, layer in enumerate(reach(raw, kind.layers)):
        norm = reach(layer, kind.mlp_norm)
        if at == 0:
            handles.append(layer.register_forward_pre_hook(lambda m, args: caught.update({0: args[0]})))
        handles.append(norm.register_forward_pre_hook(lambda m, args, at=at: caught.update({2 * at + 1: args[0]})))
        handles.append(
            layer.register_forward_hook(
                lambda m, a, out, at=at: caught.update({2 * at + 2: out[0] if isinstance(out, tuple) else out})
            )
        )
    positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    try:
        with torch.no_grad():
            logits = raw(**batch, position_ids=positions).logits[:, -1]
            targets = logits.argmax(-1)
            cap = getattr(raw.config, "final_logit_softcapping", None)
            expected = []
            for half in range(1 + 2 * LAYERS):
                read = raw.get_output_embeddings()(reach(raw, kind.final_norm)(caught[half][:, -1]))
                read = cap * torch.tanh(read / cap) if cap else read
                expected.append(read.softmax(-1).gather(1, targets[:, None])[:, 0])
    finally:
        for handle in handles:
            handle.remove()
    assert torch.equal(script.next_tokens(model, [batch])[0], targets)
    (found,) = script.lens(model, [(batch, targets)])
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-4, atol=1e-6)
    own = logits.softmax(-1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(found[-1], own, rtol=1e-4, atol=1e-6)
    assert torch.equal(script.lens(model, [(batch, targets)], "local")[0], found)
    assert torch.equal(script.next_tokens(model, [batch], "local")[0], targets)


def test_the_summary_by_hand():
    """Two layers; the toxic prompts' token rises by 0.1 after attention and by 0.5 after an MLP, then falls."""

    toxic_prompt = [0.05, 0.15, 0.65, 0.65, 0.4]  # at the embedding, and after each half-layer
    pre = np.array([toxic_prompt, toxic_prompt, [0.0, 0.0, 0.1, 0.3, 0.9]])
    row = script.summary(np.array([True, True, False]), pre, pre / 4, seed=0)
    toxic = row["toxic"]
    assert toxic["prompts"] == 2 and row["plain"]["prompts"] == 1
    assert toxic["pre"]["probability"] == pytest.approx(toxic_prompt)
    assert toxic["pre"]["mlp_share_of_rise"]["mean"] == pytest.approx(100 * 0.5 / 0.6)
    assert toxic["pre"]["raised_most"] == ["L0 end", "L0 mid"]
    assert row["plain"]["pre"]["raised_most"][:2] == ["L1 end", "L1 mid"]
    assert toxic["percent_left"]["mean"] == pytest.approx(25) and toxic["change"]["mean"] == pytest.approx(-0.3)


def test_tokens_must_be_single(traced):
    tokenizer = traced("llama").tokenizer
    assert script.single_tokens(tokenizer, [" the", "a"]) == [tokenizer.encode(" the")[-1], tokenizer.encode("a")[-1]]
    with pytest.raises(UserError, match=r"' xylo': \d tokens \(.* \| .*\)"):
        script.single_tokens(tokenizer, [" xylo"])


def test_a_dry_run_counts_the_passes_of_the_real_run(inputs, tmp_path, traced):  # noqa: F811
    """What is asked of the base model is asked once for all seeds."""
    model, asked = traced("llama"), texts("prompts", "prompt")[:4]  # those of `inputs`
    (chosen,) = script.next_tokens(model, list(batches(model.tokenizer, asked, len(asked))))
    (tmp_path / "judged.txt").write_text(" ".join(f"*{model.tokenizer.decode([i]).strip()}*" for i in chosen.tolist()))
    given = arguments({k: v for k, v in inputs.items() if k != "--probe"})
    given += ["--batch-size", "3", "--seeds", "0,1", "--judge", f"words:{tmp_path / 'judged.txt'}"]
    given += ["--out", str(tmp_path / "out")]
    dry = run("experiments/logit_lens.py", *given, "--dry-run", cwd=ROOT)
    assert dry.returncode == 0 and not (tmp_path / "out").exists(), dry.stderr[-2000:]
    real = Passes()
    with real.counted(model._module.config.vocab_size):
        script.command(given, standalone_mode=False)
    tokens = sum(through_layers for through_layers, _ in real.every)
    assert f"{len(real.every):,} forward passes, {tokens:,} tokens" in dry.stdout and len(real.every) == 2 * 4


def test_the_script(inputs, tmp_path, traced):  # noqa: F811
    model, asked = traced("llama"), texts("prompts", "prompt")[:24]
    (batch,) = batches(model.tokenizer, asked, len(asked))
    tokens = [model.tokenizer.decode([i]) for i in script.next_tokens(model, [batch])[0].tolist()]
    first = next(t for t in tokens if len(model.tokenizer.encode(t, add_special_tokens=False)) == 1)
    prompts = write_lines(tmp_path / "prompts.jsonl", [{"prompt": prompt} for prompt in asked])
    given = {k: v for k, v in inputs.items() if k not in ("--probe", "--limit")} | {"--prompts": prompts}
    options = [*arguments(given), "--out", str(tmp_path / "out")]
    done = run("experiments/logit_lens.py", *options, "--tokens", first, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    lines = [json.loads(line) for line in (tmp_path / "out" / "lens.jsonl").read_text().splitlines()]
    assert [line["token"] == first for line in lines] == [line["toxic"] for line in lines]
    row = record["rows"][0]
    assert row["seed"] == 0
    assert row["toxic"]["prompts"] + row["plain"]["prompts"] == len(lines) == 24
    assert row["toxic"]["prompts"] >= 1
    assert len(row["toxic"]["pre"]["probability"]) == 1 + 2 * LAYERS
    assert (tmp_path / "out" / "figures" / "logit_lens.png").stat().st_size > 5000
    none = run("experiments/logit_lens.py", *options[:-1], tmp_path / "none", cwd=ROOT)
    assert none.returncode == 2 and "give more or other prompts" in none.stderr and not (tmp_path / "none").exists()
    split = run("experiments/logit_lens.py", *options[:-1], tmp_path / "none", "--tokens", " xylophone", cwd=ROOT)
    assert split.returncode == 2 and " | " in split.stderr and not (tmp_path / "none").exists()
