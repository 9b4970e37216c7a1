"""robust_alignment.py: shares by hand, and the script with every kind of variant."""

import json
import math

import click
import pytest
import torch
from conftest import ROOT, load_script, run, write_lines
from test_cli import inputs  # noqa: F401  a fixture
from test_dpo_training import PAIRS

from dpo import variants
from lib.models import Source
from lib.statistics import Bootstrap
from lib.table import Condition

script = load_script("robust_alignment")


def test_the_share_that_comes_back_by_hand():
    """Plain DPO cuts 0.8 to 0.2 and half comes back; a variant cuts to 0.4 and a quarter does; one cuts nothing."""
    levels = {
        ("none", "none"): 0.8, ("dpo", "none"): 0.2, ("dpo un-aligned", "keys"): 0.5,
        ("late:1", "none"): 0.4, ("late:1 un-aligned", "keys"): 0.5,
        ("biases", "none"): 0.8, ("biases un-aligned", "keys"): 0.9,
    }  # fmt: skip
    conditions = {Condition(name, kind): level for (name, kind), level in levels.items()}
    conditions[Condition("control:random", "keys", "dpo un-aligned")] = 0.26
    measured = {condition: {"toxicity": [level] * 4, "continuations": []} for condition, level in conditions.items()}
    size = [{"changed": 4, "relative_change": 0.1}, {"changed": 6, "relative_change": 0.3}]
    resamples = Bootstrap(4, 0).rows
    plain, late, nothing = script.robustness(measured, {"dpo": size, "late:1": size, "biases": size}, resamples)
    assert plain["changed"] == 5 and plain["relative_change"] == pytest.approx(0.2)
    assert plain["percent_cut"] == pytest.approx(75) and late["percent_cut"] == pytest.approx(50)
    assert plain["percent_restored"]["mean"] == pytest.approx(50) == 50 + plain["restored_minus_dpo"]["mean"]
    assert plain["percent_restored_random"]["mean"] == pytest.approx(10)
    assert late["percent_restored"]["mean"] == pytest.approx(25)
    assert [late["restored_minus_dpo"][key] for key in ("mean", "low", "high")] == pytest.approx([-25] * 3)
    assert "percent_restored" not in nothing and nothing["percent_cut"] == 0


@pytest.mark.parametrize("best, visited", [(0, [0, 1, -1]), (2, [0, 1, 2, 3]), (-1, [0, 1, -1, -2])])
def test_the_search_for_a_learning_rate(tmp_path, monkeypatch, best, visited):
    """Threefold steps downhill from the table's rate; a neighbour that diverges counts as uphill."""
    first = 1e-5 * variants.LEARNING_RATES["biases"]  # of the preset for models other than the embedded ones

    def trained(options, seed, name, rate, cosine):
        steps = round(math.log(rate / first, 3))
        if steps > 2:
            raise click.exceptions.Exit(2)
        folder = tmp_path / str(steps)
        folder.mkdir()
        (folder / "training.json").write_text(json.dumps({"best_valid_loss": 1 + abs(steps - best)}))
        return Source(str(folder), str(folder), "")

    monkeypatch.setattr(variants, "trained", trained)
    asked = ({"model": "some/model", "preset": None}, 0, "biases", None)
    assert list(variants.losses_by_rate(*asked, search=False)) == [pytest.approx(first)]
    (tmp_path / "0" / "training.json").unlink()
    (tmp_path / "0").rmdir()
    tried = variants.losses_by_rate(*asked, search=True)
    assert list(tried) == pytest.approx([first * 3.0**steps for steps in visited], rel=1e-2)
    assert min(tried, key=tried.get) == pytest.approx(first * 3.0**best, rel=1e-2)


def test_the_arguments_of_a_variant():
    """The best aligned neurons by name; how many, while they are not known; what names its part itself as it is."""
    cosine = torch.tensor([[0.1, 0.9], [0.5, -1.0]], dtype=torch.float64)
    named = ["--trainable", "keys:L0.N1,L1.N0", "--learning-rate", "0.01"]
    assert variants.arguments("keys:2", 0.01, cosine) == named
    assert variants.arguments("values:2", 0.01, None)[1] == "values:<2 neurons>"
    for name in ("late:2", "biases", "values:L0.N1"):
        assert variants.arguments(name, 0.01, cosine)[1] == variants.arguments(name, 0.01, None)[1] == name


def test_the_script(inputs, tmp_path):  # noqa: F811
    rows = [{"prompt_text": p.prompt, "unpert_gen_text": p.chosen, "pert_gen_text": p.rejected} for p in PAIRS]
    given = {k: v for k, v in inputs.items() if k not in ("--post", "--limit")} | {
        "--pairs": write_lines(tmp_path / "pairs.jsonl", rows), "--scorer": f"probe:{inputs['--model']}",
        "--variants": "biases,late:1,values:4,keys:4,lora:2", "--controls": "quick", "--out": tmp_path / "out",
    }  # fmt: skip
    options = [str(part) for pair in given.items() for part in pair]
    done = run("experiments/robust_alignment.py", *options, cwd=ROOT, DPO_NEURONS_CACHE=str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr[-2000:]
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    variants = {row["variant"]: row for row in record["robustness"]}
    assert list(variants) == ["dpo", "biases", "late:1", "values:4", "keys:4", "lora:2"]
    assert variants["values:4"]["changed"] == variants["keys:4"]["changed"] == 4 * 32
    assert variants["biases"]["changed"] == 3 * 32 < variants["late:1"]["changed"] < variants["dpo"]["changed"]
    conditions = {row["condition"] for row in record["rows"] if not row["of"]}
    assert {f"{name}{more}" for name in variants for more in ("", " un-aligned")} | {"none"} == conditions
    assert (tmp_path / "out" / "figures" / "robustness.png").stat().st_size > 5000
    wrong = run("experiments/robust_alignment.py", *options[:-1], tmp_path / "wrong", "--variants", "late:9", cwd=ROOT,
                DPO_NEURONS_CACHE=str(tmp_path / "cache"))  # fmt: skip
    assert wrong.returncode == 2 and "3 layers" in wrong.stderr and not list(tmp_path.glob("wrong*"))


def test_an_adapter_of_another_model_is_refused(inputs, tiny, tmp_path):  # noqa: F811
    """Before anything is measured: it would load, and give the numbers of that model."""
    import peft
    from transformers import AutoModelForCausalLM

    other = AutoModelForCausalLM.from_pretrained(tiny("mistral"))
    peft.get_peft_model(other, peft.LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    given = {**inputs, "--variants": f"lora:{tmp_path / 'adapter'}", "--out": tmp_path / "out"}
    options = [str(part) for pair in given.items() for part in pair]
    done = run("experiments/robust_alignment.py", *options, cwd=ROOT, DPO_NEURONS_CACHE=str(tmp_path / "cache"))
    assert done.returncode == 2 and "it is another model" in done.stderr.splitlines()[-1], done.stderr[-2000:]
    assert not (tmp_path / "out").exists()
