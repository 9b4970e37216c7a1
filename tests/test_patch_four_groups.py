"""The script as a whole, on tiny models: its record, and what a kill at any moment leaves of a run."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from conftest import ROOT, run
from safetensors.torch import load_file
from test_cli import PATCH, inputs  # noqa: F401  a fixture

from lib.protocol import FAITHFUL, SOUND

KEPT = {
    "script", "model", "params", "protocol", "rows", "groups", "group_shares", "reduction_shares", "percent_reducing",
    "percent_negative", "provenance",
}  # fmt: skip


def command(options: dict) -> list[str]:
    return [PATCH, *(str(part) for pair in options.items() for part in pair)]


def without_times(folder) -> dict:
    record = json.loads((folder / "run.json").read_text())
    del record["provenance"]["seconds"]
    argv = record["provenance"]["argv"]
    argv[argv.index("--out") + 1] = ""
    return record


def unedited(folder) -> list[str]:
    """The base model's continuations."""
    lines = [json.loads(line) for line in (folder / "generations.jsonl").read_text().splitlines()]
    return [line["continuation"] for line in lines if line["name"] == "none"]


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory):  # noqa: F811
    """An uninterrupted run: its options, its folder, its process, and the cache that it filled."""
    folder = tmp_path_factory.mktemp("whole")
    cache = str(folder / "cache")
    done = run(*command({**inputs, "--out": folder / "whole"}), cwd=ROOT, DPO_NEURONS_CACHE=cache)
    assert done.returncode == 0, done.stderr
    return inputs, folder / "whole", done, cache


def test_the_record(whole):
    _, folder, done, _ = whole
    record = json.loads((folder / "run.json").read_text())
    assert set(record) == KEPT and record["protocol"] == dataclasses.asdict(SOUND)
    conditions = [(row["condition"], row["kind"]) for row in record["rows"]]
    sets = ["top256", "TP", "TP+AN", "TP+AN+TN", "four_groups", "increasing"]
    shifted = ["all x0.5", "all", "largest5%", "largest10%", "dpo - four_groups"]
    assert conditions == [
        *(("none", "none"), ("dpo", "none")),
        *((name, kind) for name in sets for kind in ("clamp", "shift")),
        *((name, "shift") for name in shifted),
    ]
    rows = dict(zip(conditions, record["rows"], strict=True))
    assert rows["four_groups", "clamp"]["neurons"] == sum(record["groups"].values())
    assert rows["none", "none"]["log_ppl"] == rows["none", "none"]["log_ppl_first"]
    assert rows["dpo", "none"]["log_ppl"] != rows["none", "none"]["log_ppl"]
    assert rows["four_groups", "clamp"]["log_ppl"] != rows["four_groups", "clamp"]["log_ppl_first"]
    for row in record["rows"]:
        assert row["toxicity"]["low"] is row["toxicity"]["high"] is None, "an interval over four prompts"
        assert (row["kl"]["mean"] > 0) == (row["condition"] != "none")
        for name in ("log_ppl", *(["log_ppl_first"] if row["kind"] != "shift" else [])):
            assert row[f"{name}_change"]["mean"] == pytest.approx(row[name] - rows["none", "none"][name])
        assert row["of"] == "" and row["means"] is None and len(row["runs"]) == 1
        assert row["runs"][0]["toxicity"] == pytest.approx(row["toxicity"]["mean"])
    lines = [json.loads(line) for line in (folder / "generations.jsonl").read_text().splitlines()]
    assert len(lines) == len(conditions) * 4
    about = {"name", "kind", "of", "means", "seed", "draw"}
    assert set(lines[0]) == about | {"prompt", "continuation", "toxicity"}
    numbers = [json.loads(line) for line in (folder / "measurements.jsonl").read_text().splitlines()]
    assert [(line["name"], line["kind"]) for line in numbers] == conditions
    for line in numbers:  # position 0 alone: what the papers' perplexity of their edit, a clamp, is of
        first = set() if line["kind"] == "shift" else {"nll_first"}
        assert set(line) == about | {"toxicity", "repetition", "degenerate", "f1", "tokens", "nll", "kl"} | first
    assert [line["toxicity"] for line in lines[:4]] == pytest.approx(numbers[0]["toxicity"], abs=1e-5)
    tensors = load_file(folder / "activations.safetensors")
    assert {t.shape for t in tensors.values()} == {(3, 48)} and set(tensors) == {"pre", "post", "cosine", "delta"}
    assert [path.name for path in (folder / "figures").iterdir()] == ["toxicity_perplexity.png"]
    assert "four_groups" in done.stdout and "% of DPO's" in done.stdout
    provenance = record["provenance"]
    assert provenance["data"]["prompts"]["sha256"].startswith("sha256:") and provenance["settings"]["seed"] == 0
    assert provenance["argv"][:2] == ["python", PATCH] and provenance["versions"]["torch"]
    assert not (folder / "conditions").exists() and not folder.with_name("whole.partial").exists()


@pytest.mark.parametrize("conditions", [0, 1, 5], ids="before-the-first between middle".split())
def test_killed_and_run_again_gives_the_same_record(whole, tmp_path, conditions):
    """SIGKILL when so many conditions are done, a moment into the next one."""
    options, folder, _, cache = whole
    out = tmp_path / "broken"
    environment = {**os.environ, "DPO_NEURONS_CACHE": cache}
    arguments = [sys.executable, *command({**options, "--out": out})]
    process = subprocess.Popen(
        arguments, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    work = tmp_path / "broken.partial"
    deadline = time.monotonic() + 120

    def finished():
        return len(list((work / "conditions").glob("*.json"))) if work.exists() else -1

    while finished() < conditions and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists() and work.exists()
    kept = {p: p.stat().st_mtime_ns for p in (work / "conditions").glob("*.json")}
    assert len(kept) >= conditions
    again = run(*arguments[1:], cwd=ROOT, DPO_NEURONS_CACHE=cache)
    assert again.returncode == 0, again.stderr
    assert without_times(out) == without_times(folder)
    assert (out / "generations.jsonl").read_text() == (folder / "generations.jsonl").read_text()


def test_sigterm_ends_within_five_seconds(whole, tmp_path):
    """What was finished stays, and the next run goes on."""
    options, folder, _, cache = whole
    out = tmp_path / "ended"
    arguments = [sys.executable, *command({**options, "--out": out})]
    process = subprocess.Popen(
        arguments, cwd=ROOT, env={**os.environ, "DPO_NEURONS_CACHE": cache}, stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    until(lambda: list(tmp_path.glob("ended.partial/conditions/*.json")))
    process.terminate()
    process.wait(5)
    kept = {file: file.read_bytes() for file in tmp_path.glob("ended.partial/conditions/*.json")}
    assert process.returncode and kept and not out.exists()
    again = run(*arguments[1:], cwd=ROOT, DPO_NEURONS_CACHE=cache)
    assert again.returncode == 0 and without_times(out) == without_times(folder)


def test_sigterm_ends_the_training_that_it_waits_for(whole, tmp_path):
    options, _, _, _ = whole
    given = {name: value for name, value in options.items() if name != "--post"} | {"--out": tmp_path / "out"}
    process = subprocess.Popen(
        [sys.executable, *command(given)], cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        env={**os.environ, "DPO_NEURONS_CACHE": str(tmp_path / "cache")},
    )  # fmt: skip

    def training():
        found = []
        for one in psutil.Process(process.pid).children():
            try:
                found += [one] if "dpo" in one.cmdline() else []
            except psutil.NoSuchProcess:  # another child, which has just ended
                pass
        return found

    (child,) = until(training)
    process.terminate()
    process.wait(5)
    assert process.returncode and not child.is_running()


def test_a_clock_that_jumps(whole, tmp_path):
    """The time of day goes hours back and forth at every look: the record is the same."""
    options, folder, _, cache = whole
    (tmp_path / "sitecustomize.py").write_text(
        "import random, time\nreal = time.time\ntime.time = lambda: real() + random.uniform(-9e4, 9e4)\n"
    )
    out = tmp_path / "out"
    path = f"{tmp_path}{os.pathsep}{ROOT}"
    done = run(*command({**options, "--out": out}), cwd=ROOT, DPO_NEURONS_CACHE=cache, PYTHONPATH=path)
    assert done.returncode == 0, done.stderr
    assert without_times(out) == without_times(folder)


def test_a_disk_that_fills_up_during_the_table(whole, tmp_path):
    """The kernel refuses to write a file further, as a full disk does; with room again the run goes on to the end."""
    options, folder, _, cache = whole
    out = tmp_path / "out"
    arguments = command({**options, "--out": out})
    # The largest file of the record does not fit, the conditions do.
    limit = (folder / "generations.jsonl").stat().st_size // 2
    assert max(file.stat().st_size for file in folder.rglob("*")) > limit
    code = "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2); "
    code += "sys.argv = sys.argv[2:]; sys.path.insert(0, ''); runpy.run_path(sys.argv[0], run_name='__main__')"
    full = run("-c", code, limit, *arguments, cwd=ROOT, DPO_NEURONS_CACHE=cache)
    assert full.returncode == 2 and "Traceback" not in full.stderr, full.stderr[-2000:]
    assert "no space left on the disk; free some" in full.stderr.splitlines()[-1] and not out.exists()
    assert len(list(tmp_path.glob("out.partial/conditions/*.json"))) == 17, "what was measured stays"
    again = run(*arguments, cwd=ROOT, DPO_NEURONS_CACHE=cache)
    assert again.returncode == 0 and without_times(out) == without_times(folder)


def test_a_results_folder_that_is_read_only(whole, tmp_path):
    options, _, _, cache = whole
    folder = tmp_path / "results"
    if os.geteuid():
        folder.mkdir(mode=0o555)
    else:  # nothing is read-only for root but what the kernel keeps so
        folder = Path("/sys")
    done = run(*command({**options, "--out": folder / "table"}), cwd=ROOT, DPO_NEURONS_CACHE=cache)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr[-2000:]
    assert "cannot be written" in done.stderr.splitlines()[-1] and not (folder / "table").exists()


def until(ready):
    """What `ready()` returns, as soon as that is something."""
    end = time.monotonic() + 120
    while not (found := ready()) and time.monotonic() < end:
        time.sleep(0.005)
    return found


def test_faithful_differs_and_a_copied_script_runs(whole, tmp_path):
    """Out of the repository, in an empty folder, with another protocol: every choice as released."""
    options, folder, _, cache = whole
    (tmp_path / "elsewhere").mkdir()
    copied = tmp_path / "elsewhere" / "my_patch.py"
    copied.write_text((ROOT / PATCH).read_text())
    arguments = command({**options, "--out": "mine", "--protocol": "faithful"})[1:]
    done = run(copied, *arguments, cwd=tmp_path / "elsewhere", DPO_NEURONS_CACHE=cache)
    assert done.returncode == 0, done.stderr
    mine = tmp_path / "elsewhere" / "mine"
    faithful, sound = without_times(mine), without_times(folder)
    assert faithful["protocol"] == dataclasses.asdict(FAITHFUL)
    assert {row["positions"] for row in faithful["rows"]} == {None, "last"}
    assert {row["positions"] for row in sound["rows"]} == {None, "all"}
    rows = [{(row["condition"], row["kind"]): row for row in record["rows"]} for record in (faithful, sound)]
    assert rows[0].keys() == rows[1].keys()
    for key, row in rows[0].items():
        assert row["toxicity"] != rows[1][key]["toxicity"] or row["log_ppl"] != rows[1][key]["log_ppl"], key
    # The model that is not edited goes on as before; the released removal of the prompt leaves one that was cut.
    longer = 0
    for ours, theirs in zip(*(unedited(path) for path in (folder, mine)), strict=True):
        assert theirs.endswith(ours)
        longer += theirs != ours
    assert longer
