"""toxic_vectors.py: the tokens of each kind of vector from raw weights, the published ranks, and the script."""

import json

import pytest
import torch
from conftest import FAMILIES, LAYERS, NEURONS, ROOT, WIDTH, assert_figure, load_script, run
from safetensors.torch import load_file
from test_cli import inputs  # noqa: F401  a fixture
from test_opposing_effects import arguments

from lib import paper, vectors
from lib.families import value_vectors, write_gain

script = load_script("toxic_vectors")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_script_on_every_family(family, inputs, tiny, traced, tmp_path):  # noqa: F811
    out = tmp_path / "out"
    given = {"--model": tiny(family), "--probe": inputs["--probe"], "--top": 9, "--out": out}
    done = run("experiments/toxic_vectors.py", *arguments(given), cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    module, tokenizer = traced(family)._module, traced(family).tokenizer
    direction = load_file(inputs["--probe"])["direction"].double()
    rows = torch.cat([value_vectors(module, at).double() * write_gain(module, at).double() for at in range(LAYERS)])
    cosine = torch.nn.functional.cosine_similarity(rows, direction[None])
    order = cosine.argsort(descending=True)
    assert_figure(out / "figures" / "listed_vectors.png")
    lines = [json.loads(line) for line in (out / "vectors.jsonl").read_text().splitlines()]
    best = [line for line in lines if line["kind"] == "best"]
    assert [line["neuron"] for line in best] == [f"L{i // NEURONS}.N{i % NEURONS}" for i in order[:9].tolist()]
    assert (out / "neurons.txt").read_text().split() == [line["neuron"] for line in best]
    head = module.get_output_embeddings().weight.detach().double()
    nearest = [tokenizer.decode([i]) for i in (head @ rows[order[0]]).topk(10).indices]
    assert best[0]["tokens"]["raw"] == nearest and best[0]["cosine"] == pytest.approx(float(cosine[order[0]]))
    worst = [line for line in lines if line["kind"] == "worst, reversed"]
    assert worst[0]["tokens"]["raw"] == [tokenizer.decode([i]) for i in (head @ -rows[order[-1]]).topk(10).indices]
    assert worst[0]["cosine"] == pytest.approx(float(cosine[order[-1]]))
    unit = rows[order[:9]] / rows[order[:9]].norm(dim=1, keepdim=True)
    found = load_file(out / "directions.safetensors")["svd"].double()
    expected = torch.linalg.svd(unit).Vh[:3]
    torch.testing.assert_close((found * expected).sum(1).abs(), torch.ones(3).double(), rtol=1e-5, atol=1e-5)
    counts = json.loads((out / "run.json").read_text())["rows"][0]["counts"]
    assert counts["random"]["vectors"] == counts["random directions"]["vectors"] == 27


def test_a_concept_takes_the_probe_s_place(inputs, tmp_path):  # noqa: F811
    """No probe is made or needed, and the judge is any scorer."""
    (tmp_path / "words.txt").write_text("river mountains")
    (tmp_path / "judged.txt").write_text("*e*")
    given = {"--model": inputs["--model"], "--top": 5, "--out": tmp_path / "out"}
    options = [
        *arguments(given),
        "--concept-words",
        str(tmp_path / "words.txt"),
        "--judge",
        f"words:{tmp_path / 'judged.txt'}",
    ]
    done = run("experiments/toxic_vectors.py", *options, cwd=ROOT, DPO_NEURONS_CACHE=str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr[-2000:]
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["params"]["concept_words"] == ["river", "mountains"]
    assert sum(count["listed"] for count in record["rows"][0]["counts"].values()) > 0


def test_ranks_of_published():
    best = [19 * 4096 + 770, 0, 1, 2, 12 * 4096 + 771]
    found = script.ranks_of_published("gpt2", best, 4096)
    assert list(found) == [f"L{layer}.N{index}" for layer, index in paper.LEE_TOXIC_VECTORS]
    assert found["L19.N770"] == 1 and found["L12.N771"] == 5 and found["L18.N2669"] is None
    assert script.ranks_of_published("gemma-270m", best, 4096) == {}


def test_directions_have_the_model_s_width(traced):
    assert vectors.concept(traced("gpt2"), ["river"]).direction.shape == (WIDTH,)
