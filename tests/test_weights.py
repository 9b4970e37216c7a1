"""How far training moved the weights, by hand."""

import json

import peft
import pytest
import torch
from conftest import ROOT, run
from safetensors.torch import load_file, save_file
from test_cli import PATCH, inputs  # noqa: F401  a fixture
from transformers import AutoModelForCausalLM

from lib import models
from lib.errors import UserError
from lib.weights import changes, rounded_update, stored_weights


def test_changes_by_hand():
    def model(bias: bool):
        parts = {"mlp": torch.nn.Linear(2, 1, bias=bias), "embed": torch.nn.Linear(1, 1, bias=False)}
        return torch.nn.ModuleDict(parts)

    base, post = model(bias=False), model(bias=True)
    with torch.no_grad():
        base["mlp"].weight[:] = torch.tensor([[3.0, 4.0]])
        post["mlp"].weight[:] = torch.tensor([[3.0, 4.5]])
        post["mlp"].bias[:] = 0.5  # an added bias starts at 0
        base["embed"].weight[:] = post["embed"].weight[:] = 12.0
    found = changes(post, base)
    cosine = (9 + 18) / (5 * (9 + 4.5**2) ** 0.5)
    assert found["MLP"] == {
        "entries": 3, "changed": 2, "lowest_cosine": pytest.approx(cosine), "mean_change": pytest.approx(1 / 3),
        "relative_change": pytest.approx(0.5**0.5 / 5),
    }  # fmt: skip
    assert found["embedding"] == {
        "entries": 1, "changed": 0, "lowest_cosine": 1, "mean_change": 0, "relative_change": 0,
    }  # fmt: skip
    assert found["all"]["entries"] == 4 and found["all"]["changed"] == 2
    assert found["all"]["relative_change"] == pytest.approx(0.5**0.5 / 13)


def folders(tmp_path, before: dict, after: dict):
    for name, weights in (("base", before), ("post", after)):
        (tmp_path / name).mkdir()
        save_file(weights, tmp_path / name / "model.safetensors")
    return tmp_path / "base", tmp_path / "post"


def test_what_rounding_leaves_of_an_update_by_hand(tmp_path):
    """bfloat16 has 8 bits: above 1 its steps are 1/128. A change of half of that and less is lost, or doubled."""
    before = {"model.a": torch.tensor([1.0, 1.0, 1.0, 1.0])}
    after = {"a": torch.tensor([1.0 + 1 / 128, 1.0 + 1 / 1024, 1.0 + 3 / 512, 1.0])}  # named by the base class
    base, post = map(stored_weights, folders(tmp_path, before, after))
    found = rounded_update(base, post, "bfloat16")
    true, rounded = torch.tensor([8.0, 1.0, 6.0]) / 1024, torch.tensor([8.0, 0.0, 8.0]) / 1024
    cosine = float(true @ rounded / (true.norm() * rounded.norm()))
    assert found == {"cosine": pytest.approx(cosine), "entries": pytest.approx(2 / 3)}
    assert rounded_update(base, post, "float32") is None


def test_a_run_says_how_much_rounding_leaves(inputs, tiny, tmp_path):  # noqa: F811
    post = tmp_path / "post"
    post.mkdir()
    for file in tiny("llama").iterdir():
        (post / file.name).write_bytes(file.read_bytes())
    moved = {name: w + 1e-4 * torch.randn_like(w) for name, w in load_file(post / "model.safetensors").items()}
    save_file(moved, post / "model.safetensors", {"format": "pt"})
    given = [str(part) for pair in {**inputs, "--post": post, "--sets": "top256"}.items() for part in pair]
    adapter = tmp_path / "adapter"
    config = peft.LoraConfig(r=2, lora_alpha=1, target_modules=["down_proj"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tiny("llama")), config)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            weight.data += 1e-3
    adapted.save_pretrained(adapter)
    described = json.loads((adapter / "adapter_config.json").read_text())
    described["base_model_name_or_path"] = str(tiny("llama"))
    (adapter / "adapter_config.json").write_text(json.dumps(described))
    again = [str(part) for pair in {**inputs, "--post": adapter, "--sets": "top256"}.items() for part in pair]
    done = run(PATCH, *again, "--dtype", "bfloat16", "--out", tmp_path / "adapted", cwd=ROOT)
    assert done.returncode == 0 and "still differ" in done.stderr, done.stderr[-800:]
    for dtype, said in (("bfloat16", True), ("auto", False)):
        done = run(PATCH, *given, "--dtype", dtype, "--out", tmp_path / dtype, cwd=ROOT)
        assert done.returncode == 0 and ("still differ" in done.stderr) == said, done.stderr[-800:]


def test_auto_is_the_dtype_that_something_was_trained_in(tmp_path, monkeypatch):
    """On a GPU: float32 where one of the two is, bfloat16 where both are or where float32 does not fit."""
    weight = torch.ones(64, 64)
    wide, narrow = folders(tmp_path, {"a": weight}, {"a": weight.bfloat16()})
    wide, narrow = (models.Source(str(path), str(path), "") for path in (wide, narrow))
    adapted = models.Source("a", narrow.path, "", adapter=narrow.path)
    free = 10**9
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (free, free))
    for compared, trained, expected in (
        ([wide, wide], False, "float32"), ([narrow, wide], False, "float32"), ([narrow, narrow], False, "bfloat16"),
        ([narrow], True, "float32"), ([narrow, adapted], False, "float32"),
    ):  # fmt: skip
        assert models.pick_dtype("auto", "cuda", compared, trained) == expected, (compared, trained)
    free = 4 * weight.numel()
    assert models.pick_dtype("auto", "cuda", [wide, wide]) == "bfloat16"
    broken = tmp_path / "post" / "model.safetensors"
    assert models.pick_dtype("auto", "cpu", [narrow, narrow]) == models.pick_dtype("float32", "cuda", []) == "float32"
    broken.write_bytes(broken.read_bytes()[:30])
    with pytest.raises(UserError, match="copy the file anew"):
        models.pick_dtype("auto", "cuda", [narrow])
