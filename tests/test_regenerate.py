"""results/regenerate.py: each record's own command, with another folder, and what is compared."""

import importlib.util
import json

from conftest import ROOT, run

spec = importlib.util.spec_from_file_location("regenerate", ROOT / "results" / "regenerate.py")
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)


def test_records_that_need_no_model(tmp_path):
    """The comparison of edits, made again from the committed records, comes out the same; a second time it is there."""
    for times in (1, 2):
        done = run(ROOT / "results/regenerate.py", "edits_against_dpo", "--out", tmp_path, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-2000:]
        said = done.stdout.splitlines()
        names = [f"edits_against_dpo/{name}" for name in ("all_prompts", "gemma-270m", "smollm2")]
        assert [line.split(":")[0] for line in said] == names
        assert all("toxicity within 0" in line and "log_ppl within 0" in line for line in said), said
        assert ("python experiments" in done.stderr) == (times == 1)


def test_every_record_has_a_command_that_can_be_given_again(tmp_path):
    left_out = []
    for path in sorted((ROOT / "results").rglob("run.json")):
        argv = json.loads(path.read_text())["provenance"]["argv"]
        command, missing = script.again(argv, tmp_path / "target", tmp_path)
        assert (ROOT / command[0]).is_file() and command[-2:] == ["--out", str(tmp_path / "target")]
        assert command.count("--out") == 1 and "--overwrite" not in command
        left_out += [path.parent.name] * bool(missing)
    assert set(left_out) <= {"rtp_1199", "moods", "compare_scorers"}, "their prompts were given from elsewhere"


def test_compared_by_hand():
    old = {"rows": [{"toxicity": {"mean": 0.5}, "log_ppl": 3.0}, {"toxicity": {"mean": 0.1}}]}
    new = {"rows": [{"toxicity": {"mean": 0.5}, "log_ppl": 3.25}, {"toxicity": {"mean": 0.3}}]}
    assert script.compared(old, new) == "toxicity within 0.2, log_ppl within 0.25"
    assert script.compared(old, {"rows": []}) == "0 rows instead of 2"


def test_an_unknown_name():
    done = run("results/regenerate.py", "nothing", cwd=ROOT)
    assert done.returncode == 2 and "no such record; known: audit/" in done.stderr
