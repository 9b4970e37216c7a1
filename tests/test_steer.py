"""Steering against raw hooks on every family, and the search for alpha."""

import json
import math

import pytest
import torch
from conftest import FAMILIES, ROOT, WIDTH, load_script, run, texts
from test_cli import inputs  # noqa: F401  a fixture
from test_traces import left_batch, raw_generate, raw_nll

from lib.families import FAMILIES as KINDS
from lib.families import reach
from lib.generation import right_padded, windows
from lib.interventions import NO_EDIT
from lib.remote import at_weights

script = load_script("steer")
ALL, LAST = slice(None), slice(-1, None)


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def raw(family, tiny):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny(family)).eval()


def subtracted(raw, family, vector, at, where):
    """A raw hook that subtracts the vector from the last layer's output, or from its MLP's."""
    last = reach(raw, KINDS[family].layers)[-1]

    def hook(module, args, output):
        first = (output[0] if isinstance(output, tuple) else output).clone()
        first[:, where] -= vector
        return (first, *output[1:]) if isinstance(output, tuple) else first

    return (last if at == "residual" else last.mlp).register_forward_hook(hook)


@pytest.mark.parametrize("at", ["residual", "mlp"])
def test_steering_equals_raw_hooks(family, traced, raw, at):
    model = traced(family)
    vector = 3 * torch.randn(WIDTH, generator=torch.Generator().manual_seed(0))
    edit = script.Steering(vector, at)
    (right,) = right_padded(windows(model.tokenizer, texts("passages", "text")[:3], 40, 20), 3)
    batch = left_batch(model)
    plain = raw_nll(raw, right)
    for where in (ALL, LAST):
        handle = subtracted(raw, family, vector, at, where)
        try:
            expected, nll = raw_generate(raw, batch), raw_nll(raw, right)
        finally:
            handle.remove()
        assert torch.equal(script.generate(model, batch, edit, where), expected)
        found = script.likelihood(model, right, edit, where)[0]
        torch.testing.assert_close(found, nll, rtol=1e-5, atol=1e-5)
    assert (nll - plain).abs().max() > 1e-3 or where == LAST
    shipped = at_weights(script.generate, model, batch, edit, ALL, remote="local")
    assert torch.equal(shipped, script.generate(model, batch, edit, ALL))
    shipped = at_weights(script.likelihood, model, right, edit, ALL, remote="local")
    torch.testing.assert_close(shipped, script.likelihood(model, right, edit, ALL))
    torch.testing.assert_close(script.likelihood(model, right, NO_EDIT, ALL)[0], plain, rtol=1e-5, atol=1e-5)


def test_the_search_keeps_perplexity_within_its_factor(inputs, tmp_path, tiny):  # noqa: F811
    """The alpha found keeps the factor, measured again by raw hooks; a tenth more does not."""
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lib import data

    raw = AutoModelForCausalLM.from_pretrained(tiny("llama")).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny("llama"))
    direction = load_file(inputs["--probe"])["direction"]
    rows = windows(tokenizer, data.passages("embedded").items[:1], 64, 52)

    def log_perplexity(vector) -> float:
        handle = subtracted(raw, "llama", vector, "residual", ALL)
        try:
            (batch,) = right_padded(rows, len(rows))
            return float(raw_nll(raw, batch).sum()) / sum(len(ids) - 1 for ids in rows)
        finally:
            handle.remove()

    # The final norm keeps a large alpha from growing stronger, so the sign that costs perplexity is taken.
    direction = max(direction, -direction, key=lambda vector: log_perplexity(1e4 * vector))
    factor = math.exp((log_perplexity(1e4 * direction) - log_perplexity(0 * direction)) / 3)
    assert factor > 1.01
    save_file({"direction": direction.contiguous()}, tmp_path / "probe.safetensors")
    out = tmp_path / "out"
    changed = {**inputs, "--probe": tmp_path / "probe.safetensors", "--limit": 2, "--factor": factor,
               "--controls": "quick", "--remote": "local", "--out": out}  # fmt: skip
    parts = [str(part) for pair in changed.items() for part in pair]
    done = run("experiments/steer.py", *parts, cwd=ROOT, DPO_NEURONS_CACHE=str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr[-2000:]
    record = json.loads((out / "run.json").read_text())
    alpha = record["searched_alpha"]["probe"]["0"]
    found = {row["condition"]: row for row in record["rows"]}
    assert {"control:flipped", "control:zero", "control:gaussian"} < set(found)
    assert len(found["control:gaussian"]["runs"]) == 3
    limit = log_perplexity(0 * direction) + math.log(factor)
    assert found["steer alpha*"]["log_ppl"] <= limit + 1e-5
    assert log_perplexity(alpha * direction) <= limit + 1e-5 < log_perplexity(1.1 * alpha * direction)


def test_the_next_tokens(family, traced, raw):
    model = traced(family)
    batch = left_batch(model)
    positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        expected = raw(**batch, position_ids=positions).logits[:, -1].topk(5).indices
    assert torch.equal(script.next_tokens(model, batch, NO_EDIT, ALL), expected)
    edit = script.Steering(3 * torch.randn(WIDTH, generator=torch.Generator().manual_seed(0)), "residual")
    steered = script.next_tokens(model, batch, edit, ALL)
    assert torch.equal(steered[:, 0], script.generate(model, batch, edit, ALL)[:, 0])
    assert not torch.equal(steered, expected)
    assert torch.equal(at_weights(script.next_tokens, model, batch, edit, ALL, remote="local"), steered)


def test_several_vectors_matched_to_dpo(inputs, tmp_path, tiny):  # noqa: F811
    """--factor dpo stops at the DPO model's perplexity; examples hold every model; without room it says so."""
    # The tiny `DPO` model with the higher perplexity of the two is taken as the one after DPO.
    rows = {}
    for base, post, out in ((0, 1, "a"), (1, 0, "b")):
        changed = {**inputs, "--model": tiny("llama", base), "--post": tiny("llama", post), "--factor": "dpo",
                   "--vector": "probe,value,svd:0", "--out": tmp_path / out}  # fmt: skip
        done = run("experiments/steer.py", *(str(part) for pair in changed.items() for part in pair), cwd=ROOT,
                   DPO_NEURONS_CACHE=str(tmp_path / "cache"))  # fmt: skip
        rows[out] = done
    codes = sorted(done.returncode for done in rows.values())
    assert codes == [0, 2], [done.stderr[-500:] for done in rows.values()]
    (failed,) = (done for done in rows.values() if done.returncode)
    assert "did not raise perplexity" in failed.stderr and "Traceback" not in failed.stderr
    (out,) = (tmp_path / name for name, done in rows.items() if not done.returncode)
    record = json.loads((out / "run.json").read_text())
    found = {row["condition"]: row for row in record["rows"]}
    for name in ("steer alpha*", "steer value alpha*", "steer svd:0 alpha*"):
        assert found[name]["log_ppl"] <= found["dpo"]["log_ppl"] + 1e-5
        assert {f"{name}/2", f"{name}x2"} <= set(found)
    shown = {line["condition"] for line in record["examples"]}
    assert shown == {"none", "dpo", "steer alpha*", "steer value alpha*", "steer svd:0 alpha*"}
    assert all(len(line["top_tokens"]) == 5 for line in record["examples"]) and len(record["examples"]) == 15
