"""The probe: what the fit recovers, what its command writes, and that it is reused."""

import json

import numpy as np
import pytest
import torch
from conftest import ROOT, WIDTH, assert_figure, build_tokenizer, load_script, run, write_lines
from passes import Passes
from safetensors.torch import load_file

from lib import probes


def planted(n=2000, width=20, seed=0):
    """Two classes that differ along one known direction, beside a constant of 35,000 as in Gemma's residual stream."""
    random = np.random.default_rng(seed)
    truth = random.normal(size=width)
    truth[0] = 0
    truth /= np.linalg.norm(truth)
    labels = np.arange(n) % 2
    features = random.normal(size=(n, width)) + 4 * np.outer(labels - 0.5, truth)
    features[:, 0] = 35_000 + random.normal(size=n)
    return features.astype(np.float32), labels, truth


def test_the_fit_recovers_a_planted_direction():
    features, labels, truth = planted()
    probe = probes.fit(features[:1500], labels[:1500], seed=0)
    assert float(probe.unit @ torch.tensor(truth)) > 0.95
    assert probe.unit.norm().item() == pytest.approx(1)
    correct = (probes.scores(probe, features[1500:]) > 0) == labels[1500:]
    assert correct.mean() > 0.93, "the bias belongs to unshifted features"


def test_the_size_of_the_features_turns_nothing():
    features, labels, _ = planted()
    small, large = probes.fit(features, labels, 0), probes.fit(1000 * features, labels, 0)
    assert float(small.unit @ large.unit) == pytest.approx(1, abs=1e-4)


def test_permuted_labels_give_another_direction():
    features, labels, truth = planted()
    probe = probes.fit(features, np.random.default_rng(1).permutation(labels), 0)
    assert abs(float(probe.unit @ torch.tensor(truth))) < 0.7


def test_saved_and_loaded(tmp_path):
    probe = probes.Probe(torch.arange(5.0), -2.5)
    probe.save(tmp_path / "p.safetensors")
    again = probes.load_probe(tmp_path / "p.safetensors", 5)
    assert torch.equal(again.direction, probe.direction) and again.bias == -2.5


@pytest.mark.parametrize("protocol", ["sound", "faithful"])
def test_the_command(tiny, tmp_path, protocol):
    command = ["experiments/train_probe.py", "--model", tiny("gemma2"), "--protocol", protocol]
    cache = {"DPO_NEURONS_CACHE": str(tmp_path / "cache")}
    done = run(*command, "--out", tmp_path / "probe", cwd=ROOT, **cache)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "probe" / "run.json").read_text())
    row = record["rows"][0]
    assert (row["train"], row["test"]) == (900, 100) and 0.4 < row["auroc"] <= 1
    assert row["majority_rate"] == 0.5 and len(record["top_tokens"]) == 10
    assert record["provenance"]["data"]["comments"]["items"] == 1000
    assert_figure(tmp_path / "probe" / "figures" / "probe_scores.png")
    features = load_file(tmp_path / "probe" / "features.safetensors")
    assert features["features"].shape == (1000, WIDTH) and features["held_out"].shape == (100,)
    probes.load_probe(tmp_path / "probe" / "probe.safetensors", WIDTH)
    if protocol == "faithful":
        return
    again = run(*command, "--out", tmp_path / "probe", "--dry-run", cwd=ROOT, **cache)
    assert again.returncode == 2 and "exists" in again.stderr
    cached = [run(*command, cwd=ROOT, **cache) for _ in range(2)]
    assert "Probe features" in cached[0].stderr and "Probe features" not in cached[1].stderr, "made once, then found"
    assert cached[0].stdout == cached[1].stdout and str(tmp_path / "cache") in cached[1].stdout
    dry = run(*command, "--dry-run", cwd=ROOT, **cache)
    assert dry.returncode == 0 and dry.stdout == "The cache holds this probe already; nothing would be run.\n"


@pytest.mark.parametrize("protocol", ["sound", "faithful"])
def test_a_dry_run_counts_the_passes_of_the_real_run(tiny, tmp_path, protocol):
    rows = [{"text": f"{'so ' * (at % 40)}{'awful' if at % 2 else 'kind'}", "label": at % 2} for at in range(100)]
    comments = write_lines(tmp_path / "comments.jsonl", [*rows, {"text": "long " * 300, "label": 0}])
    given = ["--model", str(tiny("gemma2")), "--comments", str(comments), "--batch-size", "7", "--protocol", protocol]
    given += ["--out", str(tmp_path / "out")]
    dry = run("experiments/train_probe.py", *given, "--dry-run", cwd=ROOT)
    assert dry.returncode == 0 and not (tmp_path / "out").exists(), dry.stderr[-2000:]
    real = Passes()
    with real.counted(len(build_tokenizer(bos=True))):
        load_script("train_probe").command(given, standalone_mode=False)
    tokens = sum(through_layers for through_layers, _ in real.every)
    assert f"{len(real.every):,} forward passes, {tokens:,} tokens" in dry.stdout and len(real.every) == 15
