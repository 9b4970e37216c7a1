"""A shift is a bias: on every family, by hand, and as a run's record has it."""

import json

import pytest
import torch
from conftest import DEVICE, FAMILIES, ROOT, load_script, run, texts
from safetensors.torch import load_file
from test_cli import inputs  # noqa: F401  a fixture
from test_traces import ALL, example_edit, left_batch, modules, raw_generate, raw_nll

from lib.generation import right_padded, windows
from lib.offsets import against, offsets

script = load_script("patch_four_groups")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_traced_shift_equals_constants_added_to_the_mlps_output(family, traced, tiny):
    """The constants by raw hooks on the last maps' outputs, before the norm that Gemma has there."""
    from transformers import AutoModelForCausalLM

    model, raw = traced(family), AutoModelForCausalLM.from_pretrained(tiny(family)).eval().to(DEVICE)
    edit, _ = example_edit("shift")
    (added,) = offsets(model, [edit])
    assert added.shape == (model.config.num_hidden_layers, model.config.hidden_size) and added.dtype == torch.float64
    batch = left_batch(model)
    (read,) = right_padded(windows(model.tokenizer, texts("passages", "text")[:5], 40, 20), 5, DEVICE)
    unedited = raw_generate(raw, batch)
    handles = [
        module.register_forward_hook(lambda module, given, out, constant=constant: out + constant.to(out))
        for module, constant in zip(modules(raw, family), added, strict=True)
    ]
    try:
        ids, losses = raw_generate(raw, batch), raw_nll(raw, read)
    finally:
        for handle in handles:
            handle.remove()
    assert torch.equal(script.generate(model, batch, edit, ALL), ids) and not torch.equal(ids, unedited)
    found = script.likelihood(model, read, edit, ALL)[0]
    torch.testing.assert_close(found, losses, rtol=1e-5, atol=1e-4)


def test_cosine_and_projection_by_hand():
    own = torch.tensor([[3.0, 4.0], [0.0, 0.0], [-2.0, 0.0]], dtype=torch.float64)
    full = torch.tensor([[10.0, 0.0], [1.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    assert against(own, full) == {"cosine": [0.6, 0, -1], "projection": [0.3, 0, -2]}
    assert against(full, full)["projection"] == [1, 1, 1] and against(full, 0 * full)["cosine"] == [0, 0, 0]


def test_every_shift_of_a_run_carries_its_offset(inputs, tmp_path):  # noqa: F811
    """Computed anew from the run's own tensors and the model's weights."""
    options = {**inputs, "--controls": "quick", "--sets": "four_groups,increasing", "--out": tmp_path / "out"}
    given = [str(part) for pair in options.items() for part in pair]
    done = run("experiments/patch_four_groups.py", *given, cwd=ROOT, DPO_NEURONS_CACHE=str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads((tmp_path / "out" / "run.json").read_text())["rows"]
    assert {row["kind"] for row in rows if "offset" in row} == {"shift"}
    assert all("offset" in row for row in rows if row["kind"] == "shift")
    tensors = load_file(tmp_path / "out" / "activations.safetensors")
    weights = load_file(inputs["--model"] / "model.safetensors")
    shifts, increasing = tensors["post"] - tensors["pre"], tensors["delta"] < 0
    maps = [weights[f"model.layers.{layer}.mlp.down_proj.weight"] for layer in range(len(shifts))]
    full = [shift @ weight.T for shift, weight in zip(shifts, maps, strict=True)]
    own = [shift @ weight.T for shift, weight in zip(shifts * increasing, maps, strict=True)]
    cosines = [float(torch.cosine_similarity(a, b, dim=0)) for a, b in zip(own, full, strict=True)]
    (row,) = [row for row in rows if (row["condition"], row["kind"]) == ("increasing", "shift")]
    assert row["offset"]["cosine_by_layer"] == pytest.approx(cosines, abs=1e-4)
    assert row["offset"]["cosine"] == pytest.approx(sum(cosines) / len(cosines), abs=1e-4)
    projections = [float(a @ b / (b @ b)) for a, b in zip(own, full, strict=True)]
    assert row["offset"]["projection_by_layer"] == pytest.approx(projections, abs=1e-3)
    by_name = {row["condition"]: row["offset"] for row in rows if row["kind"] == "shift"}
    flipped, real = by_name["control:flipped"], by_name["four_groups"]
    assert flipped["projection"] == pytest.approx(-real["projection"], abs=1e-5)
    assert by_name["control:zero"]["cosine"] == 0
