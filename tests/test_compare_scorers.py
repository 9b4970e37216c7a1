"""How scorers behave, on texts whose scores are known: a list of two words scores 1 or 0."""

import json

import pytest
from conftest import ROOT, run, write_lines

COMMAND = "experiments/compare_scorers.py"


def compared(tmp_path, **options) -> tuple:
    (tmp_path / "own.txt").write_text("fuck shit")
    comments = [("oh fuck off", 1), ("what a moron", 1), ("holy shit, lovely", 0), ("a fine day", 0)]
    files = {
        "comments": [{"text": text, "label": label} for text, label in comments],
        "labels": [
            {"condition": "none", "continuation": "fuck", "label": "toxic"},
            {"condition": "none", "continuation": "fine", "label": "not toxic"},
            {"condition": "dpo", "continuation": "you moron", "label": "toxic"},
            {"condition": "dpo", "continuation": "shit shit shit", "label": "no text"},
        ],
        "perspective": [
            {"continuation": {"text": text, "toxicity": toxicity}}
            for text, toxicity in (("shit", 0.9), ("moron", 0.8), ("fine", 0.1), ("fuck yes", None), ("good", 0.2))
        ],
    }
    given = {"scorers": f"words:{tmp_path / 'own.txt'},words", "out": tmp_path / "out"}
    given |= {name: write_lines(tmp_path / f"{name}.jsonl", rows) for name, rows in files.items()} | options
    words = [str(part) for name, value in given.items() for part in (f"--{name}", value)]
    return run(COMMAND, *words, cwd=ROOT, DPO_NEURONS_CACHE=str(tmp_path / "cache")), given["out"]


def test_a_scorer_by_hand(tmp_path):
    done, out = compared(tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (out / "figures" / "scorers.png").stat().st_size > 5_000
    record = json.loads((out / "run.json").read_text())
    own = record["rows"][0]
    assert own["floor"] == {"empty": 0, "one word": 0, "plain": 0}
    assert own["spelling"]["n"] == 1 and own["spelling"]["as it is"] == 1
    assert own["spelling"]["masked"] == own["spelling"]["spaced out"] == own["spelling"]["alone, without spaces"] == 0
    # Pairs of a toxic and another comment: (fuck, shit) tie, (fuck, day) right, (moron, shit) wrong, (moron, day) tie.
    assert own["comments"]["auroc"] == pytest.approx((0.5 + 1 + 0 + 0.5) / 4)
    # Rated: shit 1, moron 0, against fine and good 0: two right, two ties; the one without a rating is left out.
    assert own["perspective"]["n"] == 4 and own["perspective"]["auroc"] == pytest.approx(0.75)
    assert own["labels"]["n"] == 3 and own["labels"]["auroc"] == pytest.approx(0.75)
    assert own["labels"]["by_condition"] == {"none": 0.5, "dpo": 0.5}
    assert own["labels"]["by_label"] == {"toxic": 0.5, "not toxic": 0, "no text": 1}
    # Of three texts two are judged alike: observed 2/3, by chance (2/3 * 1/3 + 1/3 * 2/3), so kappa is 0.4.
    assert own["labels"]["kappa"] == pytest.approx((2 / 3 - 4 / 9) / (1 - 4 / 9))
    assert record["labels"] == {"none": {"toxic": 1, "not toxic": 1}, "dpo": {"toxic": 1, "no text": 1}}


WRONG = (
    *(
        ("labels", line)
        for line in ({"text": "x"}, {"condition": "none", "continuation": "x", "label": "maybe"}, [1], 3)
    ),
    ("labels", {"condition": "none", "continuation": None, "label": "toxic"}),
    *(("perspective", line) for line in ({"text": "x"}, {"continuation": "x"}, {"continuation": {"toxicity": 0.4}}, 3)),
    *(("perspective", {"continuation": {"text": "x", "toxicity": wrong}}) for wrong in ("high", [], None)),
)


@pytest.mark.parametrize("name, line", WRONG)
def test_a_file_of_another_kind(tmp_path, name, line):
    """Refused in one line, before a scorer is loaded."""
    done, out = compared(tmp_path, **{name: write_lines(tmp_path / "other.jsonl", [line])}, scorers="no such scorer")
    (said,) = done.stderr.splitlines()[-1:]
    assert done.returncode == 2 and f"--{name}" in said and "other.jsonl" in said and len(said) < 400, done.stderr
    assert "Traceback" not in done.stderr and not out.exists()


def test_labels_that_are_all_alike(tmp_path):
    """No AUROC and no other failure; neither where no comment holds a listed word."""
    lines = [{"condition": "none", "continuation": text, "label": "not toxic"} for text in ("fine", "good")]
    comments = [{"text": f"plain words {at}", "label": at % 2} for at in range(4)]
    files = {"labels": lines, "comments": comments}
    done, out = compared(
        tmp_path, **{name: write_lines(tmp_path / f"own_{name}.jsonl", rows) for name, rows in files.items()}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    row = json.loads((out / "run.json").read_text())["rows"][0]
    assert row["labels"]["auroc"] is None and row["spelling"]["as it is"] is None
