"""opposing_effects.py: statistics against numpy, texts and means against raw hooks, the script as a whole."""

import json
import time

import numpy as np
import pytest
import torch
from conftest import FAMILIES, ROOT, load_script, run
from safetensors.torch import load_file
from scipy import stats
from test_cli import inputs  # noqa: F401  a fixture
from test_traces import PROMPTS, hooked

from lib import experiment, neurons, observation
from lib.correlation import correlation
from lib.dry_run import Workload
from lib.generation import NEW_TOKENS, batches, greedy
from lib.weights import lowest_value_cosine

SCRIPT = "experiments/opposing_effects.py"
script = load_script("opposing_effects")


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def begun(family, tiny, inputs, tmp_path, cache):  # noqa: F811
    """A run of a tiny model, as the script begins it."""
    given = {**inputs, "--model": tiny(family), "--post": tiny(family, 1), "--out": tmp_path / "out"}
    with experiment.begin("opposing_effects", options_of(script, given), Workload()) as found:
        yield found


def options_of(module, given: dict) -> dict:
    """What click makes of options; the shared `inputs` without those that these scripts have not."""
    return module.command.make_context("script", arguments(given)).params


def arguments(given: dict) -> list[str]:
    unknown = {"--passages", "--scorer"}
    return [str(part) for pair in given.items() if pair[0] not in unknown for part in pair]


def test_sums_by_hand():
    found = script.sums(torch.tensor([[3.0, -1.0], [-2.0, 0.5]]))
    assert found == {
        "percent_reducing": 50, "reduction": 3.5, "increase": -3, "net": 0.5, "balance": pytest.approx(0.5 / 6.5),
    }  # fmt: skip
    assert script.sums(torch.zeros(2, 2))["balance"] == 0


def test_distribution_by_hand():
    found = script.distribution(torch.tensor([[1.0, 1.0, 1.0, 5.0]], dtype=torch.float64))
    assert found["shift_mean"] == 2 and found["shift_sd"] == pytest.approx(3**0.5)
    assert found["percent_within_sd"] == 75 and found["shift_quantiles"]["0.5"] == 1


def test_correlation_equals_numpy_over_resampled_layers():
    """The interval against whole layers put together again and correlated one resample at a time."""
    generator = np.random.default_rng(0)
    x = generator.normal(5, 1, (6, 40)) * np.arange(1, 7)[:, None]
    y = 0.3 * x + generator.normal(0, 3, x.shape) * np.arange(6)[:, None]

    class Resamples:
        rows = generator.integers(0, 6, (200, 6))

    found = correlation(torch.tensor(x), torch.tensor(y), Resamples)
    expected = [np.corrcoef(x[rows].ravel(), y[rows].ravel())[0, 1] for rows in Resamples.rows]
    assert found["mean"] == pytest.approx(np.corrcoef(x.ravel(), y.ravel())[0, 1])
    assert [found["low"], found["high"]] == pytest.approx(list(np.percentile(expected, [2.5, 97.5])))
    own = np.array([np.corrcoef(*layer)[0, 1] for layer in zip(x, y, strict=True)])
    limits = np.percentile([own[rows].mean() for rows in Resamples.rows], [2.5, 97.5])
    assert list(found["within"].values()) == pytest.approx([own.mean(), *limits])
    ranks = [values.ravel().argsort().argsort() for values in (x, y)]
    assert found["rho"] == pytest.approx(np.corrcoef(*ranks)[0, 1])
    t = found["mean"] * ((x.size - 2) / (1 - found["mean"] ** 2)) ** 0.5
    assert found["p"] == pytest.approx(2 * stats.t.sf(abs(t), x.size - 2))


def test_a_layer_that_does_not_change_has_no_correlation():
    class Resamples:
        rows = np.array([[0, 1], [1, 1]])

    shift, before = torch.tensor([[0.0, 0, 0], [1, 2, 3]], dtype=torch.float64), torch.tensor([[1.0, 2, 4], [1, 2, 3]])
    found = correlation(shift, before.double(), Resamples)
    assert found["within"]["mean"] == pytest.approx(0.5) and np.isfinite([found["low"], found["high"]]).all()


def test_value_vectors_are_compared_with_themselves(family, tiny):
    from transformers import AutoModelForCausalLM

    from lib.families import FAMILIES as KINDS
    from lib.families import reach

    base, post = (AutoModelForCausalLM.from_pretrained(tiny(family)) for _ in range(2))
    assert lowest_value_cosine(post, base) == pytest.approx(1)
    weight = reach(reach(post, KINDS[family].layers)[2], KINDS[family].mlp_out).weight.data
    vector = weight[7] if family == "gpt2" else weight[:, 7]
    before = vector.clone()
    vector += 3 * torch.randn(len(vector), generator=torch.Generator().manual_seed(0))
    expected = float(before @ vector / before.norm() / vector.norm())
    assert expected < 0.9 and lowest_value_cosine(post, base) == pytest.approx(expected, abs=1e-6)


def test_continuations_can_be_shipped_and_equal_transformers(family, traced, tiny):
    from transformers import AutoModelForCausalLM

    model = traced(family)
    (batch,) = batches(model.tokenizer, PROMPTS, len(PROMPTS))
    (found,) = observation.continue_greedily(model, [batch])
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(tiny(family)).eval().generate(**batch, **greedy())
    assert torch.equal(found, expected[:, -NEW_TOKENS:])
    assert torch.equal(observation.continue_greedily(model, [batch], "local")[0], found)


@pytest.mark.parametrize("early", [False, True], ids=["whole", "ended"])
def test_the_base_model_s_own_text_gives_its_own_means(begun, early):
    """Teacher-forced and generated means agree; also where rows end early, at a frequent token made the end."""
    config = begun.base._module.generation_config
    before = config.eos_token_id
    config.eos_token_id = None
    if early:
        rows, _ = observation.own_text(begun)
        config.eos_token_id = rows[0][-NEW_TOKENS + 5]
    try:
        rows, counted = observation.own_text(begun)
        *_, generated = neurons.mean_activations(begun.base, begun.prompts.items, 4)
    finally:
        config.eos_token_id = before
    assert (min(map(len, counted)) < NEW_TOKENS) == early
    assert all(positions.stop == len(row) - 1 for row, positions in zip(rows, counted, strict=True))
    read = neurons.text_means(begun.base, rows, counted, 3)
    torch.testing.assert_close(read.activation, generated.activation, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(read.write, generated.write, rtol=1e-4, atol=1e-5)


def test_measure_by_raw_hooks_and_numpy(begun, family, tiny):
    """Shared text: raw hooks of the other model on the same ids. Halves: each pairs what it says it pairs."""
    from transformers import AutoModelForCausalLM

    text = observation.own_text(begun)
    (of_seed,) = begun.runs()
    row, tensors = script.measure(begun, of_seed, text)
    raw = AutoModelForCausalLM.from_pretrained(tiny(family, 1)).eval()
    seen = [[] for _ in range(3)]
    with torch.no_grad():
        for ids, positions in zip(*text, strict=True):
            with hooked(
                raw, family, lambda at, m, positions=positions: seen[at].append(m[0, list(positions)].double())
            ):
                raw(torch.tensor([ids]))
    expected = torch.stack([torch.cat(layer).mean(0) for layer in seen])
    torch.testing.assert_close(tensors["post_shared_text"], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(tensors["pre_shared_text"], tensors["pre"], rtol=1e-4, atol=1e-5)

    def r(first, second) -> float:
        return pytest.approx(np.corrcoef(first.numpy().ravel(), second.numpy().ravel())[0, 1], abs=1e-6)

    def half(model, which: int):
        *_, means = neurons.mean_activations(model, begun.prompts.items[which::2], 4)
        return means.activation

    pre, post, shared = tensors["pre"], tensors["post"], tensors["pre_shared_text"] - tensors["post_shared_text"]
    shift = half(begun.base, 0) - half(of_seed.post, 0)
    found = {name: value["mean"] for name, value in row["correlations"].items()}
    assert found["cosine"] == r(pre - post, tensors["cosine"]) and found["before"] == r(pre - post, pre)
    assert found["before_same_half"] == r(shift, half(begun.base, 0))
    assert found["before_other_half"] == r(shift, half(begun.base, 1))
    assert found["before_same_half"] != found["before_other_half"]
    assert found["before_plus_after"] == r(pre - post, pre + post)
    assert found["cosine_shared_text"] == r(shared, tensors["cosine"])
    assert found["before_shared_text"] == r(shared, tensors["pre_shared_text"])
    assert found["delta_shared_text"] == r(tensors["delta"], tensors["delta_shared_text"])
    same = ((tensors["delta"] > 0) == (tensors["delta_shared_text"] > 0)).double().mean()
    assert row["same_sign_shared_text"] == pytest.approx(100 * float(same))

    delta = tensors["delta"]
    for layer, values in zip(row["layers"], delta, strict=True):
        assert layer["reduction"] == pytest.approx(sum(x for x in values.tolist() if x > 0))
        assert layer["increase"] == pytest.approx(sum(x for x in values.tolist() if x < 0))
    assert row["net"] == pytest.approx(float(delta.sum())) and row["percent_reducing"] == script.percent(delta > 0)
    random = row["percent_reducing_random"]
    assert random["low"] < random["mean"] < random["high"] and 20 < random["mean"] < 80


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory):  # noqa: F811
    """A run of two seeds under the sound protocol, and its process."""
    folder = tmp_path_factory.mktemp("opposing")
    command = [SCRIPT, *arguments({**inputs, "--out": folder / "out", "--seeds": "0,1"})]
    return folder, command, run(*command, cwd=ROOT, DPO_NEURONS_CACHE=str(folder / "cache"))


def test_the_record(finished):
    folder, _, done = finished
    assert done.returncode == 0, done.stderr
    record = json.loads((folder / "out" / "run.json").read_text())
    assert record["script"] == "opposing_effects" and record["params"]["protocol"] == "sound"
    assert record["protocol"]["means_over"] == "generated" and [row["seed"] for row in record["rows"]] == [0, 1]
    assert set(script.NUMBERS) | {"layers", "correlations"} < set(record["rows"][0])
    assert set(record["rows"][0]["correlations"]) == set(script.CORRELATIONS)
    assert len(record["rows"][0]["layers"]) == 3
    assert record["rows"][0]["reduction"] == record["rows"][1]["reduction"], "one --probe and --post for both seeds"
    assert record["provenance"]["data"]["prompts"]["items"] == 4
    tensors = load_file(folder / "out" / "activations.safetensors")
    assert {tuple(tensor.shape) for tensor in tensors.values()} == {(3, 48)}
    assert (tensors["delta"] > 0).double().mean() * 100 == pytest.approx(record["rows"][0]["percent_reducing"])
    figures = sorted(path.name for path in (folder / "out" / "figures").iterdir())
    assert figures == ["opposing_by_layer.png", "shift_density.png"]
    for label in ("(table 18)", "mean (range)", "(table 17)", "Spearman's rho", "[95 % over resampled layers]"):
        assert label in done.stdout


def test_an_existing_folder_is_kept(finished):
    folder, command, _ = finished
    before = (folder / "out" / "run.json").read_bytes()
    again = run(*command, cwd=ROOT, DPO_NEURONS_CACHE=str(folder / "cache"))
    assert again.returncode == 2 and "--overwrite" in again.stderr and "Traceback" not in again.stderr
    assert (folder / "out" / "run.json").read_bytes() == before


def test_faithful_has_no_shared_text(finished, inputs):  # noqa: F811
    folder, *_ = finished
    given = {**inputs, "--out": folder / "faithful", "--protocol": "faithful"}
    done = run(SCRIPT, *arguments(given), cwd=ROOT, DPO_NEURONS_CACHE=str(folder / "cache"))
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((folder / "faithful" / "run.json").read_text())["rows"]
    assert "percent_reducing_shared_text" not in row and "delta_shared_text" not in row["correlations"]
    assert "before_other_half" in row["correlations"]


def test_one_prompt_has_no_halves(inputs, tmp_path):  # noqa: F811
    done = run(SCRIPT, *arguments({**inputs, "--limit": 1, "--out": tmp_path / "out"}), cwd=ROOT)
    assert done.returncode == 2 and "at least two" in done.stderr and not list(tmp_path.iterdir())


def test_help_answers_at_once():
    started = time.perf_counter()
    done = run(SCRIPT, "--help", cwd=ROOT)
    assert done.returncode == 0 and "--seeds" in done.stdout and "--scorer" not in done.stdout
    assert time.perf_counter() - started < 1
