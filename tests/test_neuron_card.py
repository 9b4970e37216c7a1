"""neuron_card.py against raw weights and hooks, on every family."""

import json

import pytest
import torch
from conftest import FAMILIES, LAYERS, NEURONS, ROOT, run
from safetensors.torch import load_file
from test_cli import inputs  # noqa: F401  a fixture
from test_opposing_effects import arguments

from lib.families import mlp_out, value_vectors, write_gain
from lib.generation import prompt_ids

SCRIPT = "experiments/neuron_card.py"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_card(family, inputs, tiny, traced, tmp_path):  # noqa: F811
    out = tmp_path / "out"
    given = {**inputs, "--model": tiny(family), "--post": tiny(family, 1), "--out": out}
    done = run(SCRIPT, "L1.N7", f"L2.N{NEURONS - 1}", *arguments(given), cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    cards = json.loads((out / "run.json").read_text())["rows"]
    assert [card["neuron"] for card in cards] == ["L1.N7", f"L2.N{NEURONS - 1}"] and "L1.N7" in done.stdout
    model = traced(family)
    module, tokenizer = model._module, model.tokenizer
    direction = load_file(inputs["--probe"])["direction"].double()
    rows = torch.cat([value_vectors(module, at).double() * write_gain(module, at).double() for at in range(LAYERS)])
    cosine = torch.nn.functional.cosine_similarity(rows, direction[None])
    head = module.get_output_embeddings().weight.detach().double()
    prompts = [json.loads(line)["prompt"] for line in open(inputs["--prompts"], encoding="utf-8")]
    for card, (layer, index) in zip(cards, ((1, 7), (2, NEURONS - 1)), strict=True):
        place = layer * NEURONS + index
        assert card["cosine"] == pytest.approx(float(cosine[place])) and card["of"] == LAYERS * NEURONS
        assert card["rank"] == 1 + int((cosine > cosine[place]).sum())
        nearest = (head @ (rows[place] / rows[place].norm())).topk(10).indices
        assert card["tokens"]["raw"] == [tokenizer.decode([i]) for i in nearest]
        assert card["group"][0] == ("T" if card["cosine"] > 0 else "A")
        assert card["group"][1] == ("P" if card["pre"] > 0 else "N")
        assert card["group"][2] == ("↓" if card["delta"] > 0 else "↑")
        expected = sorted((hooked(model, prompt, layer, index) for prompt in prompts), reverse=True)
        for one, (activation, token, prompt) in zip(card["prompts"], expected, strict=True):
            assert one["activation"] == pytest.approx(activation, abs=1e-5)
            assert (one["token"], one["prompt"]) == (token, prompt)


def hooked(model, prompt: str, layer: int, index: int) -> tuple[float, str, str]:
    """The largest activation over a prompt's tokens but BOS by a raw hook, the token, the prompt."""
    seen = []
    place = mlp_out(model, layer)._module
    handle = place.register_forward_pre_hook(lambda module, given: seen.append(given[0][0, :, index]))
    ids = torch.tensor(prompt_ids(model.tokenizer, [prompt]))  # its first 32 tokens
    with torch.no_grad():
        model._module(ids)
    handle.remove()
    values = seen[0].clone()
    values[ids[0] == (-1 if model.tokenizer.bos_token_id is None else model.tokenizer.bos_token_id)] = -torch.inf
    at = int(values.argmax())
    return float(values[at]), model.tokenizer.decode([int(ids[0, at])]), prompt


def test_without_names_the_best_of_both_orders(inputs, tmp_path):  # noqa: F811
    done = run(SCRIPT, *arguments({**inputs, "--out": tmp_path / "out"}), "--remote", "local", cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    cards = json.loads((tmp_path / "out" / "run.json").read_text())["rows"]
    assert [card["rank"] for card in cards[:3]] == [1, 2, 3]
    assert [card["delta_rank"] for card in cards[3:]] == [1, 2, 3]


def test_an_unknown_neuron(inputs, tmp_path):  # noqa: F811
    done = run(SCRIPT, "L99.N0", *arguments({**inputs, "--out": tmp_path / "out"}), cwd=ROOT)
    assert done.returncode == 2 and "L99.N0" in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
