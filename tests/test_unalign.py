"""Un-aligning against changed weights and raw hooks on every family, and the script with its controls."""

import json

import pytest
import torch
from conftest import FAMILIES, LAYERS, NEURONS, ROOT, load_script, run, texts
from safetensors.torch import save_file
from test_cli import inputs  # noqa: F401  a fixture
from test_traces import left_batch, raw_generate, raw_nll

from lib.families import FAMILIES as KINDS
from lib.families import reach
from lib.generation import right_padded, windows
from lib.interventions import NO_EDIT, scaled_by
from lib.remote import at_weights

script = load_script("unalign")
ALL, LAST = slice(None), slice(-1, None)


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def biased(family, tiny, tmp_path):
    """A tiny model whose biases, where it has some, are not 0: (nnsight model, a copy without nnsight)."""
    import shutil

    from transformers import AutoModelForCausalLM

    from lib.models import load, resolve

    folder = shutil.copytree(tiny(family), tmp_path / "biased")
    raw = AutoModelForCausalLM.from_pretrained(folder).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in raw.named_parameters():
            if name.endswith(".bias"):
                parameter += torch.randn(parameter.shape, generator=generator)
    raw.save_pretrained(folder)
    return load(resolve(str(folder))), AutoModelForCausalLM.from_pretrained(folder).eval()


def mask() -> torch.Tensor:
    chosen = torch.zeros(LAYERS, NEURONS, dtype=torch.bool)
    chosen[0, [3, 7]] = chosen[2, 40] = True
    return chosen


def scale_weights(raw, family: str, kind: str, factor: float) -> None:
    """The claim's own operation, on the weights of a model of its own."""
    with torch.no_grad():
        for layer, index in mask().nonzero().tolist():
            module = reach(reach(raw, KINDS[family].layers)[layer], KINDS[family].key)
            if kind == "values":
                module = reach(reach(raw, KINDS[family].layers)[layer], KINDS[family].mlp_out)
            by_row = KINDS[family].transposed == (kind == "values")
            module.weight[index if by_row else (slice(None), index)] *= factor
            if kind == "keys and bias":
                module.bias[index] *= factor


@pytest.mark.parametrize("kind", script.KINDS)
def test_the_trace_equals_scaled_weights(family, biased, kind):
    model, raw = biased
    if kind not in script.kinds_of(raw):
        assert kind == "keys and bias" and family != "gpt2"
        return
    (right,) = right_padded(windows(model.tokenizer, texts("passages", "text")[:3], 40, 20), 3)
    batch = left_batch(model)
    plain = raw_nll(raw, right)
    scale_weights(raw, family, kind, 10)
    edit = scaled_by(kind, mask(), 10.0)
    assert torch.equal(script.generate(model, batch, edit, ALL), raw_generate(raw, batch))
    found = script.likelihood(model, right, edit, ALL)[0]
    torch.testing.assert_close(found, raw_nll(raw, right), rtol=1e-5, atol=1e-4)
    assert not torch.allclose(found, plain, atol=1e-2)
    untouched = script.likelihood(model, right, scaled_by(kind, mask(), 1.0), ALL)[0]
    torch.testing.assert_close(untouched, plain, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(script.likelihood(model, right, NO_EDIT, ALL)[0], plain, rtol=1e-5, atol=1e-5)
    shipped = at_weights(script.generate, model, batch, edit, ALL, remote="local")
    assert torch.equal(shipped, script.generate(model, batch, edit, ALL))
    losses = at_weights(script.likelihood, model, right, edit, ALL, remote="local")
    torch.testing.assert_close(losses[0], found)


def test_key_and_bias_differ(biased, family):
    """The bias stays where the released code leaves it: 10 k . x + b is not 10 (k . x + b)."""
    h, factor, bias = torch.tensor([[[2.0]]]), torch.tensor([10.0]), torch.tensor([0.5])
    assert script.scaled("keys", h, factor, bias).item() == 15.5
    assert script.scaled("keys and bias", h, factor, bias).item() == 20
    assert script.scaled("keys", h, factor, None).item() == script.scaled("values", h, factor, None).item() == 20


def test_what_comes_back():
    row = {"condition": "unalign k=7 x10", "kind": "keys", "percent_of_dpo": {"mean": 30.0, "low": 10.0, "high": 45.0}}
    assert script.restored(row) == {"mean": 70, "low": 55, "high": 90}
    assert script.restored({**row, "kind": "none"}) is None
    assert script.restored({**row, "condition": "control:in_base_model"}) is None


def test_the_script(inputs, tmp_path):  # noqa: F811
    changed = {
        **inputs,
        "--top": "3,5",
        "--factor": "10,2",
        "--controls": "quick",
        "--scorer": "probe:" + str(inputs["--model"]),
    }
    options = [str(part) for pair in changed.items() for part in pair]
    done = run("experiments/unalign.py", *options, "--out", tmp_path / "out", cwd=ROOT,
               DPO_NEURONS_CACHE=str(tmp_path / "cache"))  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    rows = {(row["condition"], row["kind"], row["of"]): row for row in record["rows"]}
    main = {(f"unalign k={k} x{x}", kind, "") for k in (3, 5) for x in (10, 2) for kind in ("keys", "values")}
    controls = {"factor_1", "in_base_model", "random", "random_in_layer", "matched", "gaussian"}
    expected = {(f"control:{name}", "keys", "unalign k=3 x10") for name in controls}
    assert set(rows) == {("none", "none", ""), ("dpo", "none", "")} | main | expected
    assert rows["unalign k=5 x2", "keys", ""]["neurons"] == 5
    factor_1, dpo = rows["control:factor_1", "keys", "unalign k=3 x10"], rows["dpo", "none", ""]
    assert factor_1["toxicity"]["mean"] == pytest.approx(dpo["toxicity"]["mean"], abs=1e-6)
    assert factor_1["log_ppl"] == pytest.approx(dpo["log_ppl"], abs=1e-6)
    in_base, none = rows["control:in_base_model", "keys", "unalign k=3 x10"], rows["none", "none", ""]
    assert abs(in_base["log_ppl"] - none["log_ppl"]) < abs(in_base["log_ppl"] - dpo["log_ppl"])
    assert len(rows["control:random", "keys", "unalign k=3 x10"]["runs"]) == 3
    assert (tmp_path / "out" / "figures" / "restored.png").stat().st_size > 5000


@pytest.mark.parametrize(
    "option, says", [(("--top", "0"), "numbers of neurons"), (("--factor", "x"), "expected numbers")]
)
def test_bad_input(inputs, tmp_path, option, says):  # noqa: F811
    save_file({"direction": torch.ones(3)}, tmp_path / "probe.safetensors")
    options = [str(part) for pair in inputs.items() for part in pair]
    done = run("experiments/unalign.py", *options, *option, "--out", tmp_path / "out", cwd=ROOT)
    assert done.returncode == 2 and says in done.stderr and not (tmp_path / "out").exists()
