"""DPO at several doses: each is patch_four_groups.py's own record after so many updates of one run."""

import json

import pytest
from conftest import ROOT, run, texts, write_lines
from test_cli import inputs  # noqa: F401  a fixture


def test_doses_of_a_tiny_model(inputs, tmp_path):  # noqa: F811
    pairs = [
        {"prompt_text": prompt, "unpert_gen_text": " the garden is quiet today.", "pert_gen_text": " the the hated the"}
        for prompt in texts("prompts", "prompt")[:8]
    ]
    given = {key: value for key, value in inputs.items() if key != "--post"}
    given |= {"--pairs": write_lines(tmp_path / "pairs.jsonl", pairs), "--updates": "3,1", "--preset": "embedded",
              "--sets": "four_groups,all", "--second-scorer": "words", "--out": tmp_path / "out"}  # fmt: skip
    parts = [str(part) for pair in given.items() for part in pair]
    cache = str(tmp_path / "cache")
    done = run("experiments/dose.py", *parts, cwd=ROOT, DPO_NEURONS_CACHE=cache)
    assert done.returncode == 0, done.stderr[-2000:]
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert [row["updates"] for row in record["rows"]] == [1, 3]
    trained = {}
    for row in record["rows"]:
        folder = tmp_path / "out" / f"updates-{row['updates']}"
        rows = {
            (each["condition"], each["kind"]): each for each in json.loads((folder / "run.json").read_text())["rows"]
        }
        base, dpo = (rows[name, "none"]["toxicity"]["mean"] for name in ("none", "dpo"))
        assert row["percent_reduced"] == pytest.approx(100 * (base - dpo) / base)
        assert row["shifts"]["four_groups"]["kl"] == rows["four_groups", "shift"]["kl"]
        assert set(row["shifts"]) == {"four_groups", "all x0.5", "all", "dpo - four_groups"}
        trained[row["updates"]] = rows["dpo", "none"]["log_ppl"]
    assert trained[1] != trained[3]
    made = [json.loads(file.read_text())["fields"] for file in (tmp_path / "cache" / "dpo").glob("*/artifact.json")]
    assert sorted(fields["config"]["steps"] for fields in made) == [1, 3]
    assert (tmp_path / "out" / "figures" / "share_by_dose.png").stat().st_size > 5_000


@pytest.mark.parametrize("wrong", ["0", "two", "1.5"])
def test_updates_are_numbers(tmp_path, wrong):
    refused = run("experiments/dose.py", "--updates", wrong, "--out", tmp_path / "out", cwd=ROOT)
    assert refused.returncode == 2 and "Traceback" not in refused.stderr and not (tmp_path / "out").exists()
