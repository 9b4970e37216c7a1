"""The report: numbers against the records that they come from, rules by hand, and records that are not there."""

import importlib.util
import json
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
import scipy.stats
from conftest import ROOT, run

from lib.metrics import profane_pattern
from report.__main__ import build, table_of_marks
from report.compare import accuracy, bounds, fixed, overlaps, spread, wilson
from report.records import Records
from report.yang2025 import percent_cut

RESULTS = ROOT / "results"


class Page(HTMLParser):
    """Ids, links to them, and the text that is shown."""

    def __init__(self, page: str):
        super().__init__()
        self.ids, self.links, self.shown, self.hidden = [], [], [], 0
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.hidden += tag in ("script", "style")
        if "id" in given:
            self.ids.append(given["id"])
        if tag == "a":
            self.links.append(given["href"])
        assert not given.get("src", "data:").startswith("http"), "the page needs no network"

    def handle_endtag(self, tag):
        self.hidden -= tag in ("script", "style")

    def handle_data(self, data):
        if not self.hidden:
            self.shown.append(data)


@pytest.fixture(scope="module")
def page():
    return build(Records(RESULTS))


def test_every_link_resolves_and_no_id_twice(page):
    found = Page(page)
    assert len(found.ids) == len(set(found.ids))
    assert len(found.links) > 200 and {link[1:] for link in found.links} <= set(found.ids)


def test_the_page_shows_no_listed_word(page):
    shown = " ".join(Page(page).shown)
    assert "Content warning" in shown and not profane_pattern().search(shown)


def test_numbers_are_the_records(page):
    """Cells of table 2 as they stand in the record, each a link to it, and a published number beside them."""
    record = json.loads((RESULTS / "patch_four_groups" / "gemma-270m" / "run.json").read_text())
    (row,) = [r for r in record["rows"] if (r["condition"], r["kind"]) == ("TP+AN", "shift")]
    table = page[page.index("Tables 2, 19: toxicity</h3>") :]
    cells = re.findall(r"<td.*?</td>", table[table.index("<td>TP+AN</td>") : table.index("<td>TP+AN+TN</td>")])
    texts = [re.sub("<.*?>", "", cell) for cell in cells]
    assert texts[:5] == ["TP+AN", "0.216", "0.465", "0.337", "0.307"]
    assert bounds(row["toxicity"]) in texts
    assert 'href="#record-patch_four_groups-gemma-270m"' in cells[texts.index(bounds(row["toxicity"]))]


def test_every_record_s_provenance_stands_on_the_page(page):
    for name, record in Records(RESULTS).every.items():
        assert f'id="{record.anchor}"' in page and f"<code>results/{name}</code>" in page
        assert record.provenance["commit"] in page


def test_a_record_changes_its_mark(tmp_path):
    """The marks follow the records: with the increasing neurons' change turned round table 19 agrees."""
    target = tmp_path / "patch_four_groups" / "gemma-270m"
    shutil.copytree(RESULTS / "patch_four_groups" / "gemma-270m", target)
    before = table_19(build(Records(tmp_path)))
    record = json.loads((target / "run.json").read_text())
    for row in record["rows"]:
        if row["condition"] == "increasing":
            row["toxicity_change"] = {"mean": 0.2, "low": 0.1, "high": 0.3}
    (target / "run.json").write_text(json.dumps(record))
    after = table_19(build(Records(tmp_path)))
    assert "disagrees" in before and "✓" not in before
    assert "✓ agrees" in after and "✗" not in after


def table_19(page: str) -> str:
    return marks(page, "Table 19: the increasing neurons")


def marks(page: str, heading: str) -> str:
    """The list of marks below the first heading that begins so."""
    part = page[page.index(f"<h3>{heading}") :]
    return part[: part.index("</ul>")]


def interval(low: float, high: float) -> dict:
    return {"mean": (low + high) / 2, "low": low, "high": high}


ALL, FEW, TOKENS = "Tables 2, 19: % of DPO", "Tables 2, 3: the 256 best aligned neurons", "Table 3: neurons with toxic"
SHARES = [  # a record, its rows' condition, their share of DPO's cut, a heading's beginning, its only mark then
    ("patch_four_groups", "four_groups", interval(90, 94), ALL, "✓"),
    ("patch_four_groups", "four_groups", interval(29, 80), ALL, "✗"),
    ("patch_four_groups", "four_groups", interval(29, 93), ALL, "?"),
    ("patch_four_groups", "top256", interval(-30, -2), FEW, "✓"),
    ("patch_four_groups", "top256", interval(5, 30), FEW, "?"),
    ("patch_four_groups", "top256", interval(40, 60), FEW, "✗"),
    ("toxic_neurons_not_enough", "toxic_tokens", interval(-9, 0), TOKENS, "✓"),
]


@pytest.mark.parametrize("script, condition, value, heading, mark", SHARES)
def test_marks_turn_with_the_record(tmp_path, script, condition, value, heading, mark):
    target = tmp_path / script / "gemma-270m"
    shutil.copytree(RESULTS / script / "gemma-270m", target)
    record = json.loads((target / "run.json").read_text())
    for row in record["rows"]:
        if row["condition"] == condition:
            row["percent_of_dpo"] = value
    (target / "run.json").write_text(json.dumps(record))
    found = marks(build(Records(tmp_path)), heading)
    assert [other for other in "✓✗?" if other in found] == [mark]


@pytest.mark.parametrize("restored, mark", [(interval(-1, 2), "· no mark"), (interval(20, 40), "✓ agrees")])
def test_what_cannot_be_harder_to_undo_has_no_mark(tmp_path, restored, mark):
    target = tmp_path / "robust_alignment" / "gemma-270m"
    shutil.copytree(RESULTS / "robust_alignment" / "gemma-270m", target)
    record = json.loads((target / "run.json").read_text())
    for one in record["robustness"]:
        if one["variant"] == "dpo":
            one["percent_restored"] = restored
        else:
            one["restored_minus_dpo"] = interval(-30, -5)
    (target / "run.json").write_text(json.dumps(record))
    found = marks(build(Records(tmp_path)), "6.1: DPO on a part of the parameters (an open question there)")
    assert mark in found and "✗" not in found


def test_steering_without_controls_has_no_mark(tmp_path):
    """The claim's second half compares with other directions."""
    target = tmp_path / "steer" / "gemma-270m"
    shutil.copytree(RESULTS / "steer" / "gemma-270m", target)
    heading = "Tables 2, 11, 12: steering with the probe"
    assert "agrees" in marks(build(Records(tmp_path)), heading)
    record = json.loads((target / "run.json").read_text())
    record["rows"] = [row for row in record["rows"] if not row["of"]]
    (target / "run.json").write_text(json.dumps(record))
    assert "agrees" not in marks(build(Records(tmp_path)), heading)


def flat(value: dict) -> list[float | None]:
    """A mean with its intervals."""
    return [value["mean"], value["low"], value["high"], *value.get("these_runs", ())]


def test_a_paired_difference_is_the_record_s():
    """The differences that run.json holds: against the base model, and of a control of three draws."""
    record = Records(RESULTS).get("patch_four_groups/gemma-270m")
    row = record.row("TP+AN", "shift")
    found = record.paired(("TP+AN", "shift", ""), ("none", "none", ""))
    assert flat(found) == pytest.approx(flat(row["toxicity_change"]), abs=1e-6)  # measurements are rounded
    control = ("control:gaussian", "shift", "four_groups")
    found = record.paired(control, ("four_groups", "shift", ""))
    assert flat(found) == pytest.approx(flat(record.row(*control)["difference_from_real"]), abs=1e-6)
    assert record.paired(("TP+AN", "shift", ""), ("no such", "none", "")) is None


def test_rows_of_a_run_with_other_sets(tmp_path):
    """Sets that another run measured under the same settings stand in the same column; under others they do not."""
    target = tmp_path / "patch_four_groups"
    for name in ("smollm2_256", "smollm2_sets"):
        shutil.copytree(RESULTS / "patch_four_groups" / name, target / name)
    records = Records(tmp_path)
    main, sets = (records.get(f"patch_four_groups/{name}") for name in ("smollm2_256", "smollm2_sets"))
    assert records.row(main, "four_groups", "shift") == (main, main.row("four_groups", "shift"))
    assert records.row(main, "TP", "shift") == (sets, sets.row("TP", "shift"))
    other = json.loads((target / "smollm2_sets" / "run.json").read_text())
    other["provenance"]["settings"]["n_prompts"] = 255
    (target / "smollm2_sets" / "run.json").write_text(json.dumps(other))
    records = Records(tmp_path)
    assert records.row(records.get("patch_four_groups/smollm2_256"), "TP", "shift")[1] is None


def test_what_was_not_run_is_said(tmp_path):
    shutil.copytree(RESULTS / "train_probe", tmp_path / "train_probe")
    page = build(Records(tmp_path))
    assert page.count("– not yet run") > 30 and "AUROC" in page and "gpt2, llama, gemma, mistral" in page


def test_runs_of_one_s_own(tmp_path):
    """`make report RECORDS=runs` after `make demo`: a record in any folder takes its script's place."""
    shutil.copytree(RESULTS / "patch_four_groups" / "gemma-270m", tmp_path / "runs" / "demo")
    page = build(Records(tmp_path / "runs"))
    assert "from 1 record of the runs in <code>runs/</code>" in page and "<code>runs/demo</code>" in page
    assert "disagrees" in table_19(page) and 'href="#record-demo"' in page
    assert [one.name for one in Records(RESULTS).of("patch_four_groups")] == [
        "patch_four_groups/gemma-270m", "patch_four_groups/smollm2"
    ]  # fmt: skip


@pytest.mark.parametrize("name", Records(RESULTS).every)
def test_any_record_alone(name, tmp_path):
    """Whatever a run was asked for, the page is built, and says what is missing."""
    record = Records(RESULTS).get(name)
    (tmp_path / name).mkdir(parents=True)
    for file in record.folder.iterdir():
        if file.is_file():
            shutil.copy(file, tmp_path / name)
    page = build(Records(tmp_path))
    assert f'id="{record.anchor}"' in page and "– not yet run" in page


def test_rules_by_hand():
    assert wilson(0.5, 100)["low"] == pytest.approx(0.4038, abs=1e-4)
    assert wilson(0.5, 100)["high"] == pytest.approx(0.5962, abs=1e-4)
    assert overlaps({"low": 1, "high": 2}, [2, 5]) and overlaps({"low": 3, "high": 4}, [2, 5])
    assert not overlaps({"low": 1, "high": 1.9}, [2, 5]) and not overlaps({"low": 6, "high": 7}, [2, 5])
    assert percent_cut("four_groups", "gpt2") == pytest.approx(100 * (0.545 - 0.139) / (0.545 - 0.21))
    assert percent_cut("dpo", "llama") == 100 and percent_cut("none", "llama") == 0
    assert fixed(-0.0004, 2) == "0.00" and spread([0.1, 0.2], 1) == "0.1 to 0.2" and spread([1, 1], 0) == "1"


@pytest.mark.parametrize(
    "files, says",
    [
        ({}, "holds no record"),
        ({"a/run.json": "{"}, "run.json: not a record"),
        ({"a/run.json": "[]"}, "run.json: not a record"),
        ({"a/run.json": "{}"}, "no record of a script"),
    ],
)
def test_bad_records(tmp_path, files, says):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(text)
    done = run("-m", "report", "--results", tmp_path, cwd=ROOT)
    assert done.returncode == 2 and "Traceback" not in done.stderr and says in done.stderr.splitlines()[-1]
    assert not (tmp_path / "report.html").exists()


def test_the_command(tmp_path):
    done = run("-m", "report", "--out", tmp_path / "deep" / "page.html", cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == str(tmp_path / "deep" / "page.html")
    assert (tmp_path / "deep" / "page.html").read_text().startswith("<!doctype html>")


def test_a_comment_that_several_probes_held_out_counts_once():
    """By scipy's interval over the comments; the splits of three seeds overlap."""
    of_model = Records(RESULTS).probes()["gemma-270m"]
    assert [one.data["params"]["seed"] for one in of_model] == [0, 1, 2]
    every = [line for one in of_model for line in one.data["held_out"]]
    comments = {line["comment"] for line in every}
    assert 100 < len(comments) < len(every) == 300
    shares = [np.mean([(x["logit"] > 0) == x["label"] for x in every if x["comment"] == at]) for at in comments]
    expected = scipy.stats.binomtest(round(sum(shares)), len(shares)).proportion_ci(method="wilson")
    found = accuracy(of_model)
    assert found["mean"] == pytest.approx(np.mean(shares))
    assert [found["low"], found["high"]] == pytest.approx([expected.low, expected.high], abs=5e-3)


def test_a_page_of_others_is_left_alone(tmp_path):
    """A report is replaced by the next one, and nothing else is."""
    (tmp_path / "page.html").write_text("<html>theirs</html>")
    refused = run("-m", "report", "--out", tmp_path / "page.html", cwd=ROOT)
    assert (
        refused.returncode == 2 and "no report of this project" in refused.stderr and "Traceback" not in refused.stderr
    )
    assert (tmp_path / "page.html").read_text() == "<html>theirs</html>"
    for _ in range(2):
        assert run("-m", "report", "--out", tmp_path / "own.html", cwd=ROOT).returncode == 0


def test_results_readme_says_what_the_marks_say():
    page = (RESULTS / "README.md").read_text(encoding="utf-8")
    section = page[page.index("## Marks") :].split("\n## ")[0]
    assert [line for line in section.splitlines() if line.startswith("|")] == table_of_marks(Records(RESULTS))


@pytest.mark.parametrize("name", ["patch_four_groups/smollm2_256", "patch_four_groups/smollm2", "unalign/smollm2"])
def test_committed_statistics_are_those_of_the_measurements(name):
    spec = importlib.util.spec_from_file_location("recompute", RESULTS / "recompute.py")
    recompute = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recompute)
    committed = json.loads((RESULTS / name / "run.json").read_text(encoding="utf-8"))
    for row, again in zip(committed["rows"], recompute.recomputed(RESULTS / name)["rows"], strict=True):
        for key, value in again.items():
            if isinstance(value, dict) and "mean" in value:
                assert flat(row[key]) == pytest.approx(flat(value), abs=1e-4), (row["condition"], key)


def test_a_probe_s_record_of_an_earlier_version_is_refused_in_one_line(tmp_path):
    shutil.copytree(RESULTS / "train_probe", tmp_path / "runs" / "train_probe")
    file = tmp_path / "runs" / "train_probe" / "smollm2" / "run.json"
    old = json.loads(file.read_text(encoding="utf-8"))
    del old["held_out"]
    file.write_text(json.dumps(old))
    done = run("-m", "report", "--results", tmp_path / "runs", cwd=ROOT)
    assert done.returncode == 2 and "run train_probe.py again" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "runs" / "report.html").exists()
