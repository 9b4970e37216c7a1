"""toxic_subspace.py: its geometry against numpy and by hand, its shares from raw weights, and the script as a whole."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import FAMILIES, LAYERS, NEURONS, ROOT, WIDTH, load_script, run
from safetensors.torch import load_file
from test_cli import inputs  # noqa: F401  a fixture
from test_opposing_effects import arguments, options_of

from lib import experiment, observation, vectors
from lib.dry_run import Workload
from lib.families import FAMILIES as KINDS
from lib.families import reach

SCRIPT = "experiments/toxic_subspace.py"
script = load_script("toxic_subspace")


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def begun(tiny, inputs, tmp_path, cache):  # noqa: F811
    """(family, model after DPO, more options) -> a run of a tiny model, as the script begins it."""
    contexts = []

    def begin(family: str, post, **more):
        given = {**inputs, "--model": tiny(family), "--post": post, "--out": tmp_path / "out", **more}
        contexts.append(experiment.begin("toxic_subspace", options_of(script, given), Workload()))
        return contexts[-1].__enter__()

    yield begin
    for context in contexts:
        context.__exit__(None, None, None)


def seen_rows(folder, family: str, written: bool) -> np.ndarray:
    """Value vectors `[LAYERS, NEURONS, WIDTH]` from the checkpoint's own tensors, through Gemma's norm if `written`."""
    weights, vectors = load_file(folder / "model.safetensors"), []
    for at in range(LAYERS):
        if family == "gpt2":
            rows = weights[f"transformer.h.{at}.mlp.c_proj.weight"]
        else:
            rows = weights[f"model.layers.{at}.mlp.down_proj.weight"].T
        if written and family.startswith("gemma"):
            rows = rows.double() * (1 + weights[f"model.layers.{at}.post_feedforward_layernorm.weight"]).double()
        vectors.append(rows.double().numpy())
    return np.stack(vectors)


@pytest.mark.parametrize("written", [True, False])
def test_unit_vectors_and_projections_from_the_weights(family, traced, tiny, written):
    module, expected = traced(family)._module, seen_rows(tiny(family), family, written)
    flat = torch.tensor([0, NEURONS + 7, 2 * NEURONS + 1, 2 * NEURONS - 1])
    rows = expected.reshape(-1, WIDTH)[flat.numpy()]
    found = vectors.unit_vectors(module, flat, written).numpy()
    np.testing.assert_allclose(found, rows / np.linalg.norm(rows, axis=1, keepdims=True), rtol=1e-6)
    triples = torch.randn(2, 3, WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    products = np.einsum("lnd,tkd->tkln", expected, triples.numpy())
    np.testing.assert_allclose(script.projections(module, triples, written).numpy(), products, rtol=1e-5, atol=1e-9)


def test_subspace_equals_numpy_up_to_sign():
    rows = torch.randn(20, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    directions, shares = vectors.subspace(rows, 3)
    _, values, expected = np.linalg.svd(rows.numpy())
    np.testing.assert_allclose(np.abs(np.sum(directions.numpy() * expected[:3], 1)), 1)
    np.testing.assert_allclose(shares.numpy(), values[:3] ** 2 / np.sum(rows.numpy() ** 2))
    assert (directions @ rows.T).mean(1).gt(0).all(), "every direction points to where the vectors do"


def test_subspace_in_closed_form():
    """Nine vectors along three axes, four, three and two of them, one axis' vectors pointing down."""
    rows = torch.eye(3, 5, dtype=torch.float64)[[0] * 4 + [1] * 3 + [2] * 2] * torch.tensor([[1.0]] * 4 + [[-1.0]] * 5)
    directions, shares = vectors.subspace(rows, 3)
    expected = torch.diag(torch.tensor([1.0, -1, -1], dtype=torch.float64))
    torch.testing.assert_close(directions[:, :3], expected)
    torch.testing.assert_close(shares, torch.tensor([4, 3, 2], dtype=torch.float64) / 9)


def test_angles_in_closed_form():
    axes = torch.eye(5, dtype=torch.float64)
    turned = torch.stack([axes[1], axes[0], math.cos(0.3) * axes[2] + math.sin(0.3) * axes[3]])
    assert script.angles(axes[:3], turned) == pytest.approx([0, 0, math.degrees(0.3)], abs=1e-5)


def test_conflicting_by_hand():
    values = torch.tensor([[1.0, 1, -1, 0, 0], [2, -1, -1, 1, 0], [3, 1, -1, -1, -5]])[:, None]
    assert script.conflicting(values).tolist() == [[False, True, False, True, False]]


def test_three_quarters_whatever_the_directions():
    """Over the four relative choices of signs the share is 75 % on average, even of three equal directions."""
    values = torch.randn(1, 2, 30, generator=torch.Generator().manual_seed(0)).expand(3, 2, 30)
    shares = [
        observation.percent(script.conflicting(values * torch.tensor([1.0, a, b]).view(3, 1, 1)))
        for a in (1, -1)
        for b in (1, -1)
    ]
    assert shares == [0, 100, 100, 100] and sum(shares) / 4 == script.INDEPENDENT


@pytest.mark.parametrize("protocol", ["sound", "faithful"])
def test_measure_from_raw_weights(begun, family, tiny, protocol):
    """Everything again in numpy, from the checkpoints' tensors and the means."""
    opened = begun(family, tiny(family, 1), **{"--protocol": protocol})
    (of_seed,) = opened.runs()
    row, ours = script.measure(opened, of_seed, 16)
    written = protocol == "sound"
    before, after = (seen_rows(tiny(family, seed), family, written) for seed in (0, 1))
    unit = before / np.linalg.norm(before, axis=-1, keepdims=True)
    probe = of_seed.probe.unit.numpy()
    best = np.argsort(-(unit @ probe).ravel())
    _, values, rows = np.linalg.svd(unit.reshape(-1, WIDTH)[best[:16]])
    directions = rows[:3] * np.sign(rows[:3] @ unit.reshape(-1, WIDTH)[best[:16]].mean(0))[:, None]
    np.testing.assert_allclose(ours.numpy(), directions, atol=1e-5)
    assert [d["share"] for d in row["directions"]] == pytest.approx(list(values[:3] ** 2 / 16), rel=1e-5)
    assert [d["cosine_with_probe"] for d in row["directions"]] == pytest.approx(list(directions @ probe), abs=1e-5)

    def conflict(found) -> np.ndarray:
        return (found > 0).any(-1) & (found < 0).any(-1)

    name = "write" if written else "activation"
    m_pre, m_post = (getattr(means, name).numpy()[..., None] for means in (of_seed.pre_means, of_seed.post_means))
    alignment = conflict(before @ directions.T)
    change = conflict(m_pre * (before @ directions.T) - m_post * (after @ directions.T))
    assert row["alignment"] == pytest.approx(100 * alignment.mean())
    assert row["change"] == pytest.approx(100 * change.mean())
    assert row["both_alike"] == pytest.approx(100 * (alignment == change).mean())
    for name in ("alignment", "change"):
        choices, random = row[f"{name}_sign_choices"], row[f"{name}_random"]
        assert choices["mean"] == pytest.approx(75) and choices["low"] <= row[name] <= choices["high"]
        assert random["low"] < random["high"] and 65 < random["mean"] < 85
    other = np.linalg.svd(unit.reshape(-1, WIDTH)[best[:32]])[2][:3]
    expected = np.degrees(np.arccos(np.linalg.svd(directions @ other.T)[1].clip(max=1)))
    assert row["stability"][1]["vectors"] == [16, 32]
    assert row["stability"][1]["angles"] == pytest.approx(list(expected), abs=1e-3)
    for direction in row["directions"]:
        assert 0 < direction["in_random"]["low"] < direction["in_random"]["high"] < 1
    assert set(row["tokens"]) == ({"raw", "normed"} if written else {"normed"})


def test_frozen_value_vectors_give_one_share_twice(begun, family, tiny, tmp_path):
    """When only what leads to the activations changes, a neuron conflicts in change where it does in alignment."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    post = AutoModelForCausalLM.from_pretrained(tiny(family))
    for layer in reach(post, KINDS[family].layers):
        up = layer.mlp.c_fc if family == "gpt2" else layer.mlp.up_proj
        up.weight.data += 0.1 * torch.randn(up.weight.shape, generator=torch.Generator().manual_seed(1))
    post.save_pretrained(tmp_path / "post")
    AutoTokenizer.from_pretrained(tiny(family)).save_pretrained(tmp_path / "post")
    opened = begun(family, tmp_path / "post")
    (of_seed,) = opened.runs()
    assert not torch.equal(of_seed.pre_means.activation, of_seed.post_means.activation)
    row, _ = script.measure(opened, of_seed, 16)
    assert row["both_alike"] == 100 and row["alignment"] == row["change"] > 0


def test_faithful_takes_the_best_of_each_layer(begun, tiny, monkeypatch):
    """With two a layer there are six: more are not taken, and the sizes in the record say so."""
    monkeypatch.setitem(vectors.SPANNED, "faithful", (512, 2))
    opened = begun("llama", tiny("llama", 1), **{"--protocol": "faithful"})
    (of_seed,) = opened.runs()
    row, ours = script.measure(opened, of_seed, 512)
    unit = seen_rows(tiny("llama"), "llama", False)
    unit = unit / np.linalg.norm(unit, axis=-1, keepdims=True)
    cosine = unit @ of_seed.probe.unit.numpy()
    best = np.concatenate([unit[at][np.argsort(-cosine[at])[:2]] for at in range(LAYERS)])
    overlap = np.abs(np.linalg.svd(best)[2][:3] @ ours.numpy().T)
    np.testing.assert_allclose(overlap, np.eye(3), atol=1e-4)
    assert row["top"] == 6 and [step["vectors"] for step in row["stability"]] == [[3, 6]]


def test_all_neurons_are_their_own_random_set(begun, tiny):
    """With every neuron taken there is one set, whatever its order: the random sets are the toxic one."""
    opened = begun("gemma2", tiny("gemma2", 1))
    (of_seed,) = opened.runs()
    row, _ = script.measure(opened, of_seed, LAYERS * NEURONS)
    assert [one["vectors"] for one in row["explained"]] == [LAYERS * NEURONS // 2, LAYERS * NEURONS]
    for name in ("mean", "low"):
        assert row["explained"][1]["random"][name] == pytest.approx(row["explained"][1]["share"])
        assert [one["in_random"][name] for one in row["directions"]] == pytest.approx([1, 1, 1])
    assert row["explained"][0]["random"]["mean"] != pytest.approx(row["explained"][0]["share"], rel=1e-3)


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory):  # noqa: F811
    """A run of the command, and its process."""
    folder = tmp_path_factory.mktemp("subspace")
    given = {**inputs, "--out": folder / "out", "--top": 16, "--remote": "local"}
    done = run(SCRIPT, *arguments(given), cwd=ROOT, DPO_NEURONS_CACHE=str(folder / "cache"))
    return folder, done


def test_the_record(finished):
    folder, done = finished
    assert done.returncode == 0, done.stderr
    record = json.loads((folder / "out" / "run.json").read_text())
    assert record["script"] == "toxic_subspace" and record["params"]["top"] == 16
    assert record["published"] == {"model": "gpt2", "alignment": 74.7, "change": 74.3}
    (row,) = record["rows"]
    assert [step["vectors"] for step in row["stability"]] == [[8, 16], [16, 32]]
    assert [one["vectors"] for one in row["explained"]] == [8, 16, 32]
    assert len(row["tokens"]["raw"]) == 3 and len(row["tokens"]["raw"][0]) == 10
    directions = load_file(folder / "out" / "subspace.safetensors")["directions"]
    torch.testing.assert_close(directions @ directions.T, torch.eye(3), atol=1e-5, rtol=0)
    assert (folder / "out" / "figures" / "subspace.png").stat().st_size > 10_000
    for text in ("SVD[2], normed:", "74.7", "independent signs", "largest angle, 16 to 32 vectors"):
        assert text in done.stdout


def test_too_few_vectors(inputs, tmp_path):  # noqa: F811
    done = run(SCRIPT, *arguments({**inputs, "--top": 5, "--out": tmp_path / "out"}), cwd=ROOT)
    assert done.returncode == 2 and "--top" in done.stderr and not list(tmp_path.iterdir())


def test_help_and_masked_tokens(monkeypatch, capsys):
    assert run(SCRIPT, "--help", cwd=ROOT).returncode == 0
    value = {"mean": 75.0, "low": 70.0, "high": 80.0}
    row = {f"{name}{end}": value for name in ("alignment", "change") for end in ("_random", "_sign_choices")}
    row |= {"alignment": 74.0, "change": 73.0, "both_alike": 90.0, "stability": [], "tokens": {"raw": [[" shit"]] * 3}}
    row |= {"directions": [{"share": 0.1, "cosine_with_probe": 0.2, "in_random": value}] * 3}
    record = {"model": "m", "params": {"seeds": [0], "limit": 1, "protocol": "sound", "released": []}, "rows": [row]}
    record["published"] = {"model": "gpt2", "alignment": 74.7, "change": 74.3}

    class Run:
        options, out = {"raw_text": False}, "out"

    script.report(Run, record)
    masked = capsys.readouterr().out
    Run.options = {"raw_text": True}
    script.report(Run, record)
    assert "sh*t" in masked and "shit" not in masked and "shit" in capsys.readouterr().out
