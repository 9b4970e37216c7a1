"""residual_shift.py: streams and activations against raw hooks, the exact split of the offset, and the script."""

import json

import pytest
import torch
from conftest import FAMILIES, LAYERS, ROOT, load_script, run
from safetensors.torch import load_file
from test_cli import inputs  # noqa: F401  a fixture
from test_opposing_effects import arguments, options_of

from lib import experiment, observation
from lib.dry_run import Workload
from lib.families import FAMILIES as KINDS
from lib.families import reach
from lib.generation import prompt_ids
from lib.remote import at_weights
from lib.streams import reduced

script = load_script("residual_shift")
CHOSEN = [(0, 5), (2, 7), (2, 40)]


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def begun(family, tiny, inputs, tmp_path, cache):  # noqa: F811
    """A run of a tiny model, as the script begins it."""
    given = {**inputs, "--model": tiny(family), "--post": tiny(family, 1), "--out": tmp_path / "out"}
    with experiment.begin("residual_shift", options_of(script, given), Workload()) as found:
        yield found


def observed(folder, prompts: list[list[int]], family: str) -> dict:
    """By raw hooks, one prompt at a time, at its end: streams before each MLP, what MLPs write, activations."""
    from transformers import AutoModelForCausalLM

    raw, kind = AutoModelForCausalLM.from_pretrained(folder).eval(), KINDS[family]
    found = {"stream": [], "write": [], "activation": []}
    caught, handles = {}, []
    for at, layer in enumerate(reach(raw, kind.layers)):
        writer = reach(layer, kind.post_norm) if kind.post_norm else layer.mlp

        def before(module, args, key):
            caught[key] = args[0][0, -1]

        def after(module, args, output, key):
            caught[key] = output[0, -1]

        for module, hook, name in (
            (reach(layer, kind.mlp_norm), before, "stream"),
            (reach(layer, kind.mlp_out), before, "activation"),
        ):
            handles.append(module.register_forward_pre_hook(lambda m, a, h=hook, k=(name, at): h(m, a, k)))
        handles.append(writer.register_forward_hook(lambda m, a, o, h=after, k=("write", at): h(m, a, o, k)))
    try:
        for ids in prompts:
            with torch.no_grad():
                raw(torch.tensor([ids]))
            for name, rows in found.items():
                rows.append(torch.stack([caught[name, at] for at in range(LAYERS)]))
    finally:
        for handle in handles:
            handle.remove()
    return {name: torch.stack(rows, 1).double() for name, rows in found.items()}  # [LAYERS, n_prompts, ...]


def test_streams_and_the_split_against_raw_hooks(begun, family, tiny):
    """What MLPs write along the offset, by hooks on their outputs, is what the two MLP parts add up to."""
    (of_seed,) = begun.runs()
    row, seen = script.measure(begun, of_seed, CHOSEN, observation.own_text(begun))
    prompts = prompt_ids(begun.base.tokenizer, begun.prompts.items)
    pre, post = (observed(tiny(family, seed), prompts, family) for seed in (0, 1))
    for found, expected in zip(seen["activations"], (pre, post), strict=True):
        activations = torch.stack([expected["activation"][layer, :, index] for layer, index in CHOSEN], 1)
        torch.testing.assert_close(found, activations, rtol=1e-4, atol=1e-4)
    assert row["neurons"][0]["change_at_last"]["mean"] == pytest.approx(
        float((post["activation"][0, :, 5] - pre["activation"][0, :, 5]).mean()), abs=1e-5
    )
    for layer in (0, 2):
        mean = (post["stream"][layer] - pre["stream"][layer]).mean(0)
        torch.testing.assert_close(seen["streams"][layer]["offset"], mean, rtol=1e-4, atol=1e-4)
        entry = row["layers"][str(layer)]
        assert entry["length"] == pytest.approx(float(mean.norm()), rel=1e-4)
        by_mlps = (post["write"][:layer] - pre["write"][:layer]).mean(1).sum(0) @ mean / mean.norm() ** 2
        parts = entry["contributions"]
        found = parts["moved value vectors"] + parts["changed activations"]
        assert found == pytest.approx(100 * float(by_mlps), rel=1e-3, abs=1e-2)
        assert sum(parts.values()) == pytest.approx(100)
        own = post["stream"][layer] - pre["stream"][layer]
        along = [float(own[at] @ (own.sum(0) - own[at])) > 0 for at in range(len(own))]
        assert entry["percent_along"] == pytest.approx(100 * sum(along) / len(along))
    assert "against" not in row["layers"]["0"] and len(row["layers"]["2"]["against"]) == 2


def test_what_is_kept_of_the_streams():
    """The figure's points: every second prompt on the others' shift, and on what varies most beside it."""
    generator = torch.Generator().manual_seed(0)
    before = 0.01 * torch.randn(7, 3, generator=generator, dtype=torch.float64)
    before[:, 1] += torch.tensor([0, 1, 0, 2, 0, 3, 0])  # the first component of what is left
    after = before + torch.tensor([0.0, 0.0, 2.0])
    found = reduced(before, after)
    torch.testing.assert_close(found["offset"], torch.tensor([0.0, 0.0, 2.0], dtype=torch.float64))
    assert found["length"] == pytest.approx(float(before.norm(dim=1).mean()))
    torch.testing.assert_close(found["along"], torch.full((7,), 24.0, dtype=torch.float64))  # 2 times 6 others' 2
    assert found["points"].shape == (2, 2, 3)
    for points, streams in zip(found["points"], (before, after), strict=True):
        torch.testing.assert_close(points[0], streams[1::2, 2])
        torch.testing.assert_close(points[1], streams[1::2, 1], rtol=0, atol=0.1)


def test_the_trace_can_be_shipped(begun):
    (batch,) = observation.prompts_of(begun)
    given = (begun.base, begun.base, [batch], [0, 2], CHOSEN)  # a second model has no weights of its own there
    here, there = script.observe(*given), at_weights(script.observe, *given, remote="local")
    assert torch.equal(here[0], there[0])
    assert list(here[1]) == list(there[1]) == [0, 2]
    for layer, expected in here[1].items():
        found = there[1][layer]
        assert all(torch.equal(torch.as_tensor(found[name]), torch.as_tensor(expected[name])) for name in expected)


def test_the_script(inputs, tmp_path):  # noqa: F811
    options = [*arguments({**inputs, "--out": tmp_path / "out"}), "--neurons", "L2.N7,L1.N3"]
    done = run("experiments/residual_shift.py", *options, cwd=ROOT, DPO_NEURONS_CACHE=str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr[-2000:]
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert [one["neuron"] for one in record["rows"][0]["neurons"]] == ["L2.N7", "L1.N3"]
    tensors = load_file(tmp_path / "out" / "shifts.safetensors")
    assert set(tensors) == {"activations", "offset.L1", "offset.L2", "points.L1", "points.L2"}
    figures = {path.name for path in (tmp_path / "out" / "figures").iterdir()}
    assert figures == {
        "toxic_activations.png", "offset_L2.N7.png", "offset_L1.N3.png", "cosines_L1.png", "cosines_L2.png",
    }  # fmt: skip
    for neurons, says in (("L3.N0", "layers 0 to 2"), ("L0.N48", "neurons 0 to 47"), ("19,770", "no neuron")):
        given = [*options[:-1], neurons, "--out", tmp_path / "new" / "out"]
        wrong = run("experiments/residual_shift.py", *given, cwd=ROOT,
                    DPO_NEURONS_CACHE=str(tmp_path / "cache"))  # fmt: skip
        assert wrong.returncode == 2 and says in wrong.stderr, wrong.stderr
        assert "Traceback" not in wrong.stderr and not (tmp_path / "new").exists()
