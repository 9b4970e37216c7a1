"""Which neurons count as toxic, and the script as a whole."""

import json

import numpy as np
import pytest
import torch
from conftest import FAMILIES, LAYERS, NEURONS, ROOT, WIDTH, Run, load_script, run
from test_cli import inputs  # noqa: F401  a fixture

from lib import neurons, protocol
from lib.families import FAMILIES as KINDS
from lib.families import reach, value_vectors, write_gain
from lib.probes import Probe

script = load_script("toxic_neurons_not_enough")


@pytest.mark.parametrize("settings", [protocol.SOUND, protocol.FAITHFUL], ids=["sound", "faithful"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_neuron_is_toxic_by_the_tokens_nearest_to_its_value_vector(traced, family, settings):
    """Against products with the unembedding, written out; faithful reads them after the final norm alone."""
    model = traced(family)
    module, tokenizer = model._module, model.tokenizer
    probe = Probe(torch.randn(WIDTH, generator=torch.Generator().manual_seed(3)), 0.0)
    _, cosine = neurons.value_projections(module, probe.unit, through_norm=True)
    bad = {tokenizer.decode([i]) for i in range(40, 60)}
    judged = script.judge_tokens(
        Run(model, settings), cosine, lambda tokens: np.array([float(token in bad) for token in tokens])
    )
    assert [row["rank"] for row in judged] == list(range(1, LAYERS * NEURONS + 1))
    assert all(a["cosine"] >= b["cosine"] for a, b in zip(judged, judged[1:], strict=False))
    head, norm = module.get_output_embeddings().weight, reach(module, KINDS[family].final_norm)
    for row in judged[:10]:
        vector = value_vectors(module, row["layer"])[row["index"]]
        if settings.value_vectors == "written":
            vector = vector * write_gain(module, row["layer"])
        with torch.no_grad():
            lists = {"raw": head @ vector, "normed": head @ norm(vector[None])[0]}
        if settings.lens == "normed":
            del lists["raw"]
        nearest = {name: [tokenizer.decode([i]) for i in p.topk(10).indices] for name, p in lists.items()}
        assert row["tokens"] == nearest
        assert row["toxic_tokens"] == sorted(bad & {token for tokens in nearest.values() for token in tokens})
    assert 0 < sum(bool(row["toxic_tokens"]) for row in judged) < len(judged)


def attribution(cosine, pre, post):
    """Of what the script reads; it looks at no group."""
    return neurons.Attribution(pre=pre, post=post, cosine=cosine, delta=pre - post, groups={})


def test_sets_of_neurons():
    """top-N by cosine over all layers; the subset with a toxic token; clamp to post, shift by post - pre."""
    cosine = torch.tensor([[0.9, 0.1], [0.5, -0.7]])
    pre, post = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[0.0, 0.5], [5.0, 9.0]])
    judged = [
        {"layer": 0, "index": 0, "toxic_tokens": []},
        {"layer": 1, "index": 0, "toxic_tokens": ["x"]},
    ]
    plans = script.make_plans(attribution(cosine, pre, post), judged, [1, 2])
    assert plans["top1", "clamp"].mask.tolist() == [[True, False], [False, False]]
    assert plans["top2", "shift"].mask.tolist() == [[True, False], [True, False]]
    assert plans["toxic_tokens", "clamp"].mask.tolist() == [[False, False], [True, False]]
    assert [layer.value.tolist() for layer in plans["top2", "clamp"].edit()] == [[0.0], [5.0]]
    assert [layer.value.tolist() for layer in plans["top2", "shift"].edit()] == [[-1.0], [2.0]]


def test_shares_of_negative_neurons():
    """Of all 200 neurons, every second before DPO; of the 100 best aligned ones, the first 30 before and none after."""
    cosine = torch.arange(200, 0, -1.0).reshape(2, 100)
    best, others = torch.ones(100), torch.ones(100)
    best[:30], others[:70] = -1, -1
    shares = script.negative(attribution(cosine, torch.stack([best, others]), torch.ones(2, 100)))
    assert shares == {"all": 50, "top100": 30, "top100_after": 0}


def test_the_script(inputs, tmp_path):  # noqa: F811
    out = tmp_path / "out"
    changed = {**inputs, "--limit": 2, "--top": "5,9", "--remote": "local", "--out": out}
    parts = [str(part) for pair in changed.items() for part in pair]
    done = run("experiments/toxic_neurons_not_enough.py", *parts, cwd=ROOT, DPO_NEURONS_CACHE=str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr[-2000:]
    record = json.loads((out / "run.json").read_text())
    assert [(row["condition"], row["kind"], row["neurons"]) for row in record["rows"]][2:6] == [
        ("top5", "clamp", 5), ("top5", "shift", 5), ("top9", "clamp", 9), ("top9", "shift", 9)
    ]  # fmt: skip
    judged = [json.loads(line) for line in (out / "judged_tokens.jsonl").read_text().splitlines()]
    assert record["judged_neurons"] == len(judged) == LAYERS * NEURONS
    (one,) = record["seeds"]
    assert one["toxic_token_neurons"] == sum(bool(row["toxic_tokens"]) for row in judged)
    assert {path.name for path in (out / "figures").iterdir()} == {"top_activations.png", "share_of_dpo.png"}
