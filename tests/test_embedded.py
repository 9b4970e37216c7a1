"""The whole chain on the real 270M-parameter model: unpack, probe, DPO, activations, table, figures."""

import json
import os

import pytest
from conftest import ROOT, run, texts, write_lines

ENOUGH = {
    "comments": 200,
    "pairs": 8,
}  # of the embedded ones: the chain stays within minutes, and only a strong dose shows


@pytest.mark.embedded
def test_the_whole_chain(tmp_path):
    lines = {name: (ROOT / "lib" / "assets" / f"{name}.jsonl").read_text().splitlines() for name in ENOUGH}
    files = []
    for name, count in ENOUGH.items():
        file = write_lines(tmp_path / f"{name}.jsonl", [json.loads(line) for line in lines[name][:count]])
        files += [f"--{name}", file]
    cache = os.environ.get("DPO_NEURONS_CACHE", str(tmp_path / "cache"))
    arguments = [
        "experiments/patch_four_groups.py",
        "--preset",
        "strong",
        "--limit",
        8,
        *files,
        "--out",
        tmp_path / "out",
    ]
    threads = str(os.cpu_count())  # a real model has use for them
    done = run(*arguments, cwd=ROOT, timeout=1500, DPO_NEURONS_CACHE=cache, OMP_NUM_THREADS=threads)
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    rows = {(row["condition"], row["kind"]): row for row in record["rows"]}
    assert len(rows) == 19
    assert 2.5 < rows["none", "none"]["log_ppl"] < 4.5, "a real language model reads encyclopedic text"
    assert rows["dpo", "none"]["toxicity"]["mean"] < rows["none", "none"]["toxicity"]["mean"]
    assert rows["none", "none"]["published"]["toxicity"] == 0.488, "Gemma-2-2B stands beside it"
    assert 45 < record["percent_reducing"] < 55 and 45 < record["percent_negative"] < 55
    assert rows["four_groups", "clamp"]["neurons"] == sum(record["groups"].values()) > 10_000
    assert rows["four_groups", "shift"]["log_ppl"] < rows["four_groups", "clamp"]["log_ppl"]
    assert record["provenance"]["data"]["prompts"]["items"] == 8
    assert rows["none", "none"]["log_ppl"] == rows["none", "none"]["log_ppl_first"]
    assert rows["increasing", "clamp"]["log_ppl"] > rows["increasing", "clamp"]["log_ppl_first"]
    first = json.loads((tmp_path / "out" / "generations.jsonl").read_text().splitlines()[0])
    assert first["prompt"] == texts("prompts", "prompt")[0]
