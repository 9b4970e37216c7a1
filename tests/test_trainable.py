"""--trainable: each choice moves its own entries alone, is resumed, and is found again in its checkpoint."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import FAMILIES, LAYERS, NEURONS, run, write_lines
from safetensors.torch import load_file
from test_dpo_training import PAIRS, QUICK, Stop, start
from transformers import AutoModelForCausalLM

from dpo import trainable
from dpo.train import train
from lib.errors import UserError
from lib.generation import batches
from lib.models import load, load_like, resolve

CONFIG = replace(QUICK, steps=4, valid_every=2, learning_rate=1e-2)
SOME = "L0.N5,L2.N40,L2.N7"


def trained(tiny, family, choice, out, **changes):
    """Weights before and after, by their names in the model."""
    model, tokenizer = start(tiny, family)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    summary = train(model, tokenizer, PAIRS, replace(CONFIG, trainable=choice, **changes), out, {})
    (weights,) = out.glob("model*.safetensors")
    return before, load_file(weights), summary


def moved(before: dict, after: dict) -> dict[str, torch.Tensor]:
    """Names of the parameters that are not bit for bit what they were, with where they moved."""
    return {name: after[name] != p for name, p in before.items() if name in after and not torch.equal(after[name], p)}


def key_and_value(family: str, layer: int) -> tuple[str, str]:
    if family == "gpt2":
        return f"transformer.h.{layer}.mlp.c_fc.weight", f"transformer.h.{layer}.mlp.c_proj.weight"
    return f"model.layers.{layer}.mlp.gate_proj.weight", f"model.layers.{layer}.mlp.down_proj.weight"


@pytest.mark.parametrize("optimizer", ["rmsprop", "adamw"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("part", ["values", "keys"])
def test_neurons_alone(tiny, tmp_path, family, part, optimizer):
    before, after, summary = trained(tiny, family, f"{part}:{SOME}", tmp_path / "out", optimizer=optimizer)
    changed = moved(before, after)
    names = {layer: key_and_value(family, layer)[part == "values"] for layer in (0, 2)}
    assert set(changed) == set(names.values())
    for layer, expected in ((0, [5]), (2, [7, 40])):
        where = changed[names[layer]]
        # A neuron's key is a column of GPT-2's c_fc and a row of the gate; its value a row of c_proj or a column.
        neurons = where.any(1) if where.shape[0] == NEURONS else where.any(0)
        assert neurons.nonzero()[:, 0].tolist() == expected
    assert summary["trained_entries"] == 3 * 32


@pytest.mark.parametrize("family", FAMILIES)
def test_late_layers_alone(tiny, tmp_path, family):
    before, after, _ = trained(tiny, family, "late:1", tmp_path / "out")
    last = f"transformer.h.{LAYERS - 1}." if family == "gpt2" else f"model.layers.{LAYERS - 1}."
    changed = set(moved(before, after))
    assert changed and all(name.startswith(last) for name in changed)
    assert len(changed) > 5, "attention, MLP and norms"


@pytest.mark.parametrize("family", FAMILIES)
def test_biases_alone(tiny, tmp_path, family):
    """GPT-2's and Qwen2's own; elsewhere one a down projection, zero at the start, that our loader finds again."""
    before, after, summary = trained(tiny, family, "biases", tmp_path / "out")
    if family not in ("gpt2", "qwen2", "llama"):  # no place for them: plain transformers must not take the base model
        with pytest.raises(OSError, match="no file named"):
            AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    changed = set(moved(before, after))
    if family in ("gpt2", "qwen2"):
        assert changed and all(name.endswith(".bias") for name in changed)
        assert summary["trained_entries"] == sum(p.numel() for name, p in before.items() if name.endswith(".bias"))
        return
    assert not changed and summary["trained_entries"] == LAYERS * 32
    added = {name: after[name] for name in after if name.endswith("down_proj.bias")}
    others = [name for name in after if name.endswith(("gate_proj.bias", "up_proj.bias"))]
    assert len(others) == (2 * LAYERS if family == "llama" else 0) and not any(after[name].any() for name in others)
    assert len(added) == LAYERS and all(bias.any() for bias in added.values())
    model = load(resolve(str(tmp_path / "out")))
    (batch,) = batches(model.tokenizer, ["The river and the"], 1)
    raw = AutoModelForCausalLM.from_pretrained(tiny(family)).eval()
    handles = [
        layer.mlp.down_proj.register_forward_hook(
            lambda m, a, out, at=at: out + added[f"model.layers.{at}.mlp.down_proj.bias"]
        )
        for at, layer in enumerate(raw.model.layers)
    ]
    try:
        with torch.no_grad():
            expected = raw(**batch).logits
    finally:
        for handle in handles:
            handle.remove()
    with model.trace(batch):
        found = model.output.logits.save()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, AutoModelForCausalLM.from_pretrained(tiny(family))(**batch).logits, atol=1e-3)
    if family == "llama":
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(**batch).logits
        torch.testing.assert_close(plain, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_in_peft_s_format(tiny, tmp_path, family):
    """PEFT's own loader gives our logits, and the base model is not touched."""
    import peft

    out = tmp_path / "out"
    model, tokenizer = start(tiny, family)
    model.name_or_path = str(tiny(family))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    summary = train(model, tokenizer, PAIRS, replace(CONFIG, trainable="lora:2"), out, {})
    assert not (out / "model.safetensors").exists() and (out / "adapter_model.safetensors").exists()
    stored = load_file(out / "adapter_model.safetensors")
    assert summary["trained_entries"] == sum(p.numel() for p in stored.values())
    raw = AutoModelForCausalLM.from_pretrained(tiny(family))
    assert all(torch.equal(p, before[name]) for name, p in raw.named_parameters())
    theirs = peft.PeftModel.from_pretrained(raw, out).eval()
    base = load(resolve(str(tiny(family))))
    ours = load_like(base, resolve(str(out), option="--post"))
    (batch,) = batches(ours.tokenizer, ["The river and the"], 1)
    with ours.trace(batch):
        found = ours.output.logits.save()
    with base.trace(batch):
        unadapted = base.output.logits.save()
    with torch.no_grad():
        torch.testing.assert_close(found, theirs(**batch).logits, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, unadapted, atol=1e-3)


def test_a_lora_checkpoint_names_its_base_and_is_trained_on(tiny, tmp_path, cache):
    """By the command: PEFT's own AutoPeftModel finds the base model; a second training starts from the merged one."""
    import peft

    rows = [{"prompt_text": p.prompt, "unpert_gen_text": p.chosen, "pert_gen_text": p.rejected} for p in PAIRS]
    pairs = write_lines(tmp_path / "pairs.jsonl", rows)
    options = ["--pairs", pairs, "--preset", "embedded", "--steps", 2, "--learning-rate", 0.01]
    first = run("-m", "dpo", "--model", tiny("llama"), *options, "--trainable", "lora:2", "--out", tmp_path / "lora")
    assert first.returncode == 0, first.stderr
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "lora").merge_and_unload()
    second = run(
        "-m", "dpo", "--model", tmp_path / "lora", *options, "--trainable", "late:1", "--out", tmp_path / "late"
    )
    assert second.returncode == 0, second.stderr
    stored = load_file(tmp_path / "late" / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"  # of a layer that the second training left alone
    torch.testing.assert_close(stored[name], theirs.state_dict()[name])
    assert not torch.equal(stored[name], load_file(tiny("llama") / "model.safetensors")[name])
    adapter = tmp_path / "lora" / "adapter_config.json"
    adapter.write_text(adapter.read_text().replace(str(tiny("llama")), str(tiny("gpt2"))))
    with pytest.raises(UserError, match="does not fit"):
        load(resolve(str(tmp_path / "lora")))


@pytest.mark.parametrize("choice", ["biases", "lora:2", f"keys:{SOME}"])
def test_resumed_equals_uninterrupted(tiny, tmp_path, choice):
    config = replace(QUICK, trainable=choice, steps=6)
    train(*start(tiny), PAIRS, config, tmp_path / "whole", {})

    def stop(done, total, record):
        if done == 5:  # after the state of update 4
            raise Stop

    with pytest.raises(Stop):
        train(*start(tiny), PAIRS, config, tmp_path / "broken", {}, stop)
    train(*start(tiny), PAIRS, config, tmp_path / "broken", {})
    whole, broken = (load_file(next((tmp_path / name).glob("*model*.safetensors"))) for name in ("whole", "broken"))
    assert whole.keys() == broken.keys() and all(torch.equal(whole[name], broken[name]) for name in whole)


def test_what_is_not_there_is_named(tiny, tmp_path):
    for choice, message in (
        ("some", "expected all, biases"),
        ("late:0", "expected all"),
        ("values:", "expected all"),
        ("lora:x", "expected all"),
    ):
        with pytest.raises(UserError, match=message):
            trainable.read(choice)
    empty = tmp_path / "empty.txt"
    empty.write_text("\n")
    with pytest.raises(UserError, match="holds no neuron"):
        trainable.read(f"keys:{empty}")
    (tmp_path / "neurons.txt").write_text("L0.N1\nL2.N3\n")
    assert trainable.read(f"values:{tmp_path / 'neurons.txt'}") == "values:L0.N1,L2.N3"
    many = ",".join(f"L0.N{index}" for index in range(1000))  # longer than a file's name may be
    assert trainable.read(f"keys:{many}") == f"keys:{many}"
    for choice, message in (
        ("late:9", "3 layers"),
        ("keys:L0.N48", "neurons 0 to 47"),
        ("values:L3.N0", "L19.N770|layers 0 to 2"),
    ):
        with pytest.raises(UserError, match=message):
            trainable.choose(start(tiny)[0], choice)


def test_the_command(tiny, tmp_path, cache):
    rows = [{"prompt_text": p.prompt, "unpert_gen_text": p.chosen, "pert_gen_text": p.rejected} for p in PAIRS]
    pairs = write_lines(tmp_path / "pairs.jsonl", rows)
    (tmp_path / "neurons.txt").write_text("L0.N1 L2.N3")
    options = ["-m", "dpo", "--model", tiny("llama"), "--pairs", pairs, "--preset", "embedded", "--steps", 2]
    done = run(*options, "--trainable", f"values:{tmp_path / 'neurons.txt'}", "--out", tmp_path / "out")
    assert done.returncode == 0 and "the warm-up is 0" in done.stderr, done.stderr
    slow = run(*options, "--warmup", 5, "--trainable", "late:1", "--out", tmp_path / "slow")
    assert "2 updates end within the warm-up of 5" in slow.stderr, "what was asked for is done, and said"
    summary = json.loads((tmp_path / "out" / "training.json").read_text())
    assert summary["config"]["trainable"] == "values:L0.N1,L2.N3" and summary["trained_entries"] == 64
    wrong = run(*options, "--trainable", "values:L9.N1", "--out", tmp_path / "wrong")
    assert wrong.returncode == 2 and "layers 0 to 2" in wrong.stderr and not (tmp_path / "wrong").exists()
    assert "Traceback" not in wrong.stderr
