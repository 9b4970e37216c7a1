"""LoRA inside traces against PEFT on every family; what a server's faults come to is in tests/ndif."""

import json

import peft
import pytest
import torch
from conftest import FAMILIES, LAYERS, NEURONS
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lib import neurons, weights
from lib.adapters import adapted
from lib.errors import UserError
from lib.families import key, layers, mlp_out, value_vectors
from lib.generation import batches, greedy
from lib.models import Source, load, load_like, resolve
from lib.probes import Probe
from lib.remote import at_weights, session

PROMPTS = ["The river", "Music is far too loud tonight"]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def adapter(family, tiny, tmp_path_factory):
    """A folder of random LoRA weights on every linear map of a tiny model, written by PEFT."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp(f"lora-{family}")
    config = peft.LoraConfig(
        r=2, lora_alpha=3, target_modules="all-linear", init_lora_weights=False, fan_in_fan_out=family == "gpt2"
    )
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tiny(family)), config)
    model.save_pretrained(folder)
    described = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(described | {"base_model_name_or_path": str(tiny(family))}))
    return folder


@pytest.fixture
def both(adapter, traced, family):
    """The adapter added inside traces, and merged by PEFT."""
    source = resolve(str(adapter), option="--post")
    return load_like(traced(family), source, traced=True), load(source)


def positioned(batch: dict) -> dict:
    """With the position ids that left padding needs in a plain forward pass."""
    return {**batch, "position_ids": (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)}


@pytest.mark.parametrize("remote", [False, "local"])
def test_an_adapter_in_the_trace_is_peft_s(both, adapter, tiny, family, remote):
    model, _ = both
    raw = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny(family)), adapter).eval()
    (batch,) = batches(model.tokenizer, PROMPTS, 2)
    with session(model, remote):
        with model.trace(batch):
            logits = model.output.logits.save()
        with model.generate(batch, **greedy()) as tracer:
            ids = tracer.result.save()
    torch.testing.assert_close(logits, raw(**positioned(batch)).logits, rtol=1e-4, atol=1e-4)
    assert torch.equal(ids, raw.generate(**batch, **greedy()))


def test_the_base_model_stays_as_it_is(both, traced, tiny, family):
    model, base = both[0], traced(family)
    (batch,) = batches(base.tokenizer, PROMPTS, 2)
    with model.trace(batch):
        adapted_logits = model.output.logits.save()
    with base.trace(batch):
        logits = base.output.logits.save()
    raw = AutoModelForCausalLM.from_pretrained(tiny(family)).eval()
    torch.testing.assert_close(logits, raw(**positioned(batch)).logits)
    assert not torch.allclose(logits, adapted_logits, atol=0.1)


@pytest.mark.parametrize("where", ["activation", "key"])
def test_edits_act_on_the_adapted_model_as_on_the_merged_one(both, where):
    """An edit of a neuron's activation is an edit of what the adapter of the next map reads."""
    (batch,) = batches(both[0].tokenizer, PROMPTS, 2)
    found = []
    for model in both:
        with model.generate(batch, **greedy()) as tracer:
            for _ in tracer.iter[:20]:
                for layer in range(LAYERS):
                    if where == "activation":
                        m = mlp_out(model, layer).input
                        m[..., [1, 5]] = 3 * m[..., [1, 5]] + 1
                    else:
                        h = key(model, layer).output
                        h[..., [1, 5]] = 10 * h[..., [1, 5]]
                last = layers(model)[-1].output.save()
            ids = tracer.result.save()
        found.append((ids, last))
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("remote", [False, "local"])
def test_weights_are_seen_with_the_adapter(both, traced, family, remote):
    model, merged = both
    for layer in range(LAYERS):
        found = at_weights(value_vectors, model, layer, remote=remote)
        torch.testing.assert_close(found, value_vectors(merged, layer), rtol=1e-4, atol=1e-4)
    unit = Probe(torch.randn(merged.config.hidden_size), 0.0).unit
    for one, other in zip(
        at_weights(neurons.value_projections, model, unit, True, remote=remote),
        neurons.value_projections(merged, unit, True),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    found = at_weights(weights.changes, model, traced(family), remote=remote)
    expected = weights.changes(merged, traced(family))
    assert found.keys() == expected.keys()
    for kind in found:
        assert found[kind] == pytest.approx(expected[kind], rel=1e-3, abs=1e-6), kind


def test_mean_activations_with_an_adapter(both):
    *_, found = neurons.mean_activations(both[0], PROMPTS, 2)
    *_, expected = neurons.mean_activations(both[1], PROMPTS, 2)
    assert found.activation.shape == (LAYERS, NEURONS)
    torch.testing.assert_close(found.activation, expected.activation, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found.write, expected.write, rtol=1e-3, atol=1e-4)


def test_what_is_no_plain_adapter_is_refused(traced, adapter, family, tmp_path):
    base = traced(family)

    def refused(change_config=None, change_weights=None, match=""):
        described = json.loads((adapter / "adapter_config.json").read_text()) | (change_config or {})
        (tmp_path / "adapter_config.json").write_text(json.dumps(described))
        tensors = load_file(adapter / "adapter_model.safetensors")
        save_file(change_weights(tensors) if change_weights else tensors, tmp_path / "adapter_model.safetensors")
        with pytest.raises(UserError, match=match):
            adapted(base, Source("here", "", "", str(tmp_path)))

    refused({"use_dora": True}, match="plain LoRA")
    refused({"init_lora_weights": "pissa"}, match="init_lora_weights=pissa")  # changes the base model's weights
    refused(change_weights=lambda t: {n: x[..., :-1].contiguous() for n, x in t.items()}, match="another model's")
    refused(change_weights=lambda t: {n.replace("mlp", "other"): x for n, x in t.items()}, match="another model's")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match="not a readable adapter"):
        adapted(base, Source("here", "", "", str(tmp_path)))


def test_two_models_with_weights_of_their_own_are_not_taken_for_one(traced):
    """A simulated server knows one model by its modules' paths."""
    base, post = traced("llama"), traced("llama", 1)
    here = weights.changes(post, base)
    assert here["all"]["changed"] > 0 and at_weights(weights.changes, post, base, remote="local") == here
