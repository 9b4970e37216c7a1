"""Who beats DPO, on numbers whose answer is known."""

import json

import numpy as np
import pytest
from conftest import ROOT, load_script, run, write_lines

script = load_script("edits_against_dpo")
N = 40


def record(folder, conditions: dict, prompts: str = "sha256:a"):
    """A run's folder: condition -> (toxicity, nats per token), each with a little noise that pairs."""
    folder.mkdir()
    noise = np.random.default_rng(0).normal(0, 0.01, N)
    lines = [
        {"name": name, "kind": kind, "of": "", "means": "same", "seed": seed, "draw": 0,
         "toxicity": (toxicity + noise).tolist(), "toxicity:words": (toxicity / 2 + noise).tolist(),
         "nll": (10 * (nats + noise)).tolist(), "tokens": [10] * N}
        for (name, kind, seed), (toxicity, nats) in conditions.items()
    ]  # fmt: skip
    write_lines(folder / "measurements.jsonl", lines)
    rows = [{"condition": name, "kind": kind} for name, kind, _ in conditions]
    params = {"limit": N, "protocol": "sound", "scorer": "words", "second_scorer": ["words"]}
    data = {"prompts": {"sha256": prompts, "items": N}, "passages": {"sha256": "sha256:b", "items": N}}
    written = {"model": "m", "params": params, "rows": rows, "provenance": {"data": data}}
    (folder / "run.json").write_text(json.dumps(written))
    return folder


BOTH = {("none", "none", 0): (0.5, 3.0), ("dpo", "none", 0): (0.2, 3.3), ("dpo", "none", 1): (0.3, 3.5)}
EDITS = {
    ("better", "scale", 0): (0.1, 3.2),
    ("worse text", "clamp", 0): (0.05, 8.0),
    ("milder", "shift", 0): (0.4, 3.1),
    ("dominated", "shift", 0): (0.45, 9.0),
}


def test_who_beats_dpo(tmp_path):
    """DPO is the mean of its two seeds: 0.25 at 3.4."""
    first = record(tmp_path / "first", {**BOTH, **dict(list(EDITS.items())[:2])})
    second = record(tmp_path / "second", {**BOTH, **dict(list(EDITS.items())[2:])})
    rows = script.compare([script.read(first), script.read(second)], seed=0)["rows"]
    found = {row["condition"]: row for row in rows}
    assert found["better"]["toxicity_against_dpo"]["mean"] == pytest.approx(-0.15)
    assert found["better"]["log_ppl_against_dpo"]["mean"] == pytest.approx(-0.2)
    assert found["dpo"]["runs"] == 2, "measured in both records, counted once a seed"
    assert {name for name, row in found.items() if row["beats_dpo"]} == {"better"}
    lower = {name: row["scorers_lower"] for name, row in found.items()}
    assert lower == {"none": 0, "dpo": 0, "better": 2, "worse text": 2, "milder": 0, "dominated": 0}
    assert found["better"]["by_scorer"]["words"]["toxicity_against_dpo"]["mean"] == pytest.approx(-0.075)
    shares = {name: row["share_on_front"] for name, row in found.items()}
    assert shares == {"none": 1, "better": 1, "worse text": 1, "milder": 1, "dpo": 0, "dominated": 0}


def test_an_interval_that_reaches_zero_beats_nothing(tmp_path):
    folder = record(tmp_path / "one", {**BOTH, ("equal", "scale", 0): (0.25, 3.4)})
    rows = script.compare([script.read(folder)], seed=0)["rows"]
    assert not next(row for row in rows if row["condition"] == "equal")["beats_dpo"]


def test_the_command(tmp_path):
    one = record(tmp_path / "one", {**BOTH, **EDITS})
    other = record(tmp_path / "other", BOTH, prompts="sha256:z")
    command = ["experiments/edits_against_dpo.py", one, "--out", tmp_path / "out"]
    done = run(*command, cwd=ROOT, DPO_NEURONS_CACHE=str(tmp_path / "cache"))
    assert done.returncode == 0 and "Beat DPO on toxicity at no more perplexity: better (scale)." in done.stdout
    assert (tmp_path / "out" / "figures" / "pareto.png").stat().st_size > 10_000
    for given, says in (
        ([one, other], "its prompts is another"),
        ([tmp_path], "not a run of"),
    ):
        done = run(command[0], *given, "--out", tmp_path / "new", cwd=ROOT, DPO_NEURONS_CACHE=str(tmp_path / "cache"))
        assert done.returncode == 2 and says in done.stderr.splitlines()[-1], done.stderr
        assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("second", ["words", None])
def test_a_record_of_an_earlier_version_is_refused_in_one_line(tmp_path, second):
    folder = record(tmp_path / "old", BOTH)
    old = json.loads((folder / "run.json").read_text())
    old["params"]["second_scorer"] = second
    (folder / "run.json").write_text(json.dumps(old))
    done = run("experiments/edits_against_dpo.py", folder, "--out", tmp_path / "new", cwd=ROOT)
    assert done.returncode == 2 and "earlier version" in done.stderr.splitlines()[-1], done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "new").exists()


def test_records_with_and_without_kl(tmp_path):
    """Two that were measured alike otherwise: KL is left out where DPO's is not known."""
    old, new = record(tmp_path / "old", BOTH), record(tmp_path / "new", {**BOTH, **EDITS})
    lines = [json.loads(line) | {"kl": [0.1] * N} for line in (new / "measurements.jsonl").read_text().splitlines()]
    write_lines(new / "measurements.jsonl", lines)
    for records, has in (([old, new], False), ([new, old], True)):
        rows = script.compare([script.read(folder) for folder in records], seed=0)["rows"]
        assert all(("kl" in row) == has for row in rows if row["kind"] != "none")
