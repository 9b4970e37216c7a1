"""Who the groups are: the record's numbers from its own tensors, the anti-toxic vectors, the figures."""

import json

import numpy as np
import pytest
from conftest import ROOT, assert_figure, run
from safetensors.numpy import load_file
from test_cli import inputs  # noqa: F401  a fixture
from test_opposing_effects import arguments


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory):  # noqa: F811
    folder = tmp_path_factory.mktemp("four_groups") / "out"
    done = run("experiments/four_groups.py", *arguments(inputs), "--out", folder, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, done


def test_the_groups_are_those_of_the_tensors(finished):
    folder, done = finished
    (row,) = json.loads((folder / "run.json").read_text())["rows"]
    tensors = load_file(folder / "activations.safetensors")
    assert {t.shape for t in tensors.values()} == {(3, 48)} and set(tensors) == {"pre", "post", "cosine", "delta"}
    reduces, toxic, positive = tensors["delta"] > 0, tensors["cosine"] > 0, tensors["pre"] > 0
    masks = {
        "TP": reduces & toxic & positive, "TN": reduces & toxic & ~positive,
        "AP": reduces & ~toxic & positive, "AN": reduces & ~toxic & ~positive,
    }  # fmt: skip
    assert row["groups"] == {name: int(mask.sum()) for name, mask in masks.items()}
    assert row["percent_reducing"] == pytest.approx(100 * reduces.mean())
    assert row["percent_negative"] == pytest.approx(100 * (tensors["pre"] < 0).mean())
    falls = tensors["post"] < tensors["pre"]
    for name, mask in masks.items():
        assert row["percent_falling"][name] == pytest.approx(100 * falls[mask].mean())
        part = tensors["delta"][mask].astype(np.float64).sum() / tensors["delta"][reduces].astype(np.float64).sum()
        assert row["reduction_shares"][name] == pytest.approx(100 * part, rel=1e-4)
    assert "Groups: TP↓" in done.stdout and "most opposed to the probe" in done.stdout


def test_anti_toxic_vectors_are_the_lowest_cosines(finished):
    folder, _ = finished
    vectors = json.loads((folder / "run.json").read_text())["rows"][0]["anti_toxic_vectors"]
    lowest = np.sort(load_file(folder / "activations.safetensors")["cosine"].ravel())[:128]
    assert [vector["rank"] for vector in vectors] == list(range(1, 129))
    assert [vector["cosine"] for vector in vectors] == pytest.approx(lowest.tolist(), rel=1e-5)
    assert {len(tokens) for vector in vectors for tokens in vector["tokens"].values()} == {10}
    assert set(vectors[0]["tokens"]) == {"raw", "normed"}


def test_figures(finished):
    folder, _ = finished
    ranks = [f"activation_shifts_{first}" for first in (0, 2000, 5000)]
    names = ["groups", "cumulative_reduction", "reduction_by_layer", *ranks]
    assert sorted(path.stem for path in (folder / "figures").iterdir()) == sorted(names)
    for name in ("groups", "cumulative_reduction", "reduction_by_layer", "activation_shifts_0"):
        assert_figure(folder / "figures" / f"{name}.png")
