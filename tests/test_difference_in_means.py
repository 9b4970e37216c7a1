"""The difference of means against a plain forward pass, and its subtraction against raw hooks, on every family."""

import json

import pytest
import torch
from conftest import FAMILIES, LAYERS, ROOT, WIDTH, load_script, run, texts
from safetensors.torch import load_file
from test_cli import inputs  # noqa: F401  a fixture
from test_traces import left_batch, raw_generate, raw_nll

from lib.differences import differences
from lib.families import FAMILIES as KINDS
from lib.families import reach
from lib.generation import right_padded, windows
from lib.interventions import NO_EDIT
from lib.probes import TEXT_LENGTH
from lib.remote import at_weights
from lib.tokens import encode

script = load_script("difference_in_means")
ALL = slice(None)


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def raw(family, tiny):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny(family)).eval()


def first_of(output):
    return output[0] if isinstance(output, tuple) else output


def outputs_of(raw, family, ids) -> list:
    """Every layer's output `[1, positions, d_model]`."""
    outputs = []
    handles = [
        layer.register_forward_hook(lambda module, args, output: outputs.append(first_of(output)))
        for layer in reach(raw, KINDS[family].layers)
    ]
    with torch.no_grad():
        raw(ids)
    for handle in handles:
        handle.remove()
    return outputs


def test_the_difference_of_means_one_text_at_a_time(family, traced, raw):
    """Every text alone, without padding; the mean over its tokens but the BOS, then over texts of a label."""
    model, written = traced(family), texts("passages", "text")[:7]
    labels = torch.tensor([[1, 0, 1, 0, 0, 1, 0], [0, 0, 0, 1, 1, 1, 1]]).bool()
    features = torch.zeros(7, LAYERS, WIDTH, dtype=torch.float64)
    for at, text in enumerate(written):
        (ids,) = encode(model.tokenizer, [text], TEXT_LENGTH)
        bos = 0 if family == "gpt2" else 1
        for layer, output in enumerate(outputs_of(raw, family, torch.tensor([ids]))):
            features[at, layer] = output[0, bos:].double().mean(0)
    for batch_size, remote in ((3, False), (7, False), (3, "local")):
        found = differences(model, written, labels, batch_size, remote)
        for one, label in zip(found, labels, strict=True):
            torch.testing.assert_close(one, features[label].mean(0) - features[~label].mean(0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("chosen", [[1], list(range(LAYERS))])
def test_subtracting_equals_raw_hooks(family, traced, raw, chosen):
    model = traced(family)
    difference = torch.randn(LAYERS, WIDTH, generator=torch.Generator().manual_seed(0))
    edit = script.subtraction(difference, chosen, 2.0)
    (right,) = right_padded(windows(model.tokenizer, texts("passages", "text")[:3], 40, 20), 3)
    batch, plain = left_batch(model), raw_nll(raw, right)

    def hook(vector):
        def subtract(module, args, output):
            first = first_of(output) - vector
            return (first, *output[1:]) if isinstance(output, tuple) else first

        return subtract

    handles = [
        reach(raw, KINDS[family].layers)[layer].register_forward_hook(hook(2 / len(chosen) * difference[layer]))
        for layer in chosen
    ]
    expected, nll = raw_generate(raw, batch), raw_nll(raw, right)
    for handle in handles:
        handle.remove()
    assert torch.equal(script.generate(model, batch, edit, ALL), expected)
    torch.testing.assert_close(script.likelihood(model, right, edit, ALL)[0], nll, rtol=1e-5, atol=1e-5)
    assert (nll - plain).abs().max() > 1e-3
    assert torch.equal(at_weights(script.generate, model, batch, edit, ALL, remote="local"), expected)
    torch.testing.assert_close(script.likelihood(model, right, NO_EDIT, ALL)[0], plain, rtol=1e-5, atol=1e-5)


def test_controls_are_as_long_in_each_layer():
    generator = torch.Generator().manual_seed(0)
    difference, other = torch.randn(2, LAYERS, WIDTH, generator=generator, dtype=torch.float64)
    found = {
        (control.name, control.draw): vectors
        for control, vectors in script.controls_of({"controls": "quick", "seed": 0}, difference, {0: other, 1: -other})
    }
    assert len(found) == 2 + 2 * 3
    for vectors in found.values():
        torch.testing.assert_close(vectors.norm(dim=-1), difference.norm(dim=-1))
    assert torch.equal(found["flipped", 0], -difference)
    torch.testing.assert_close(found["permuted_labels", 0], -found["permuted_labels", 1])
    torch.testing.assert_close(found["permuted", 0].sort(-1).values, difference.sort(-1).values)
    assert not torch.equal(found["permuted", 0], found["permuted", 1])


def test_the_command(inputs, tmp_path):  # noqa: F811
    """The searched strength keeps the factor, by the record's own rows; controls stand below it."""
    given = {key: value for key, value in inputs.items() if key != "--probe"}
    given |= {"--controls": "quick", "--seeds": "0,1", "--layers": "1,0-1", "--out": tmp_path / "out"}
    parts = [str(part) for pair in given.items() for part in pair]
    cache = str(tmp_path / "cache")
    done = run("experiments/difference_in_means.py", *parts, cwd=ROOT, DPO_NEURONS_CACHE=cache)
    assert done.returncode == 0, done.stderr[-2000:]
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    rows = {row["condition"]: row for row in record["rows"] if not row["of"]}
    assert list(rows) == ["none", "dpo", "1 x*", "1 x*/2", "0-1 x*", "0-1 x*/2"]
    for name in ("1 x*", "0-1 x*"):
        assert rows[name]["log_ppl_change"]["mean"] <= 0.1824, "log 1.2"
        assert record["searched_strength"][name.split()[0]] > 0
        drawn = [(row["condition"], len(row["runs"])) for row in record["rows"] if row["of"] == name]
        assert drawn == [("control:zero", 1), ("control:flipped", 1)] + [
            (f"control:{control}", 3) for control in script.DRAWN
        ]
    assert load_file(tmp_path / "out" / "difference.safetensors")["difference"].shape == (LAYERS, WIDTH)
    for wrong, says in (("9-3", "--layers 9-3"), ("half", "expected middle"), ("99", "has the layers 0 to")):
        refused = run("experiments/difference_in_means.py", *parts[:-4], "--layers", wrong, "--out", tmp_path / "new",
                      cwd=ROOT, DPO_NEURONS_CACHE=cache)  # fmt: skip
        assert refused.returncode == 2 and says in refused.stderr and "Traceback" not in refused.stderr
        assert not (tmp_path / "new").exists()
