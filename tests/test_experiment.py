"""What stands around every causal script, through its command: seeds, controls, held-out means, memory, scorers."""

import json
import re

import pytest
import torch
from conftest import ROOT, run, texts, write_lines
from safetensors.torch import load_file
from test_cli import PATCH, inputs  # noqa: F401  a fixture

from lib import controls, data, generation
from lib.metrics import scorer
from lib.models import resolve

WORDS = "river stone cloud engine violin harbour copper winter".split()
ONCE = {"own_means", "zero", "flipped", "probe_direction"}
SHIFT_ALONE = {"zero", "permuted", "matched_push", "probe_direction"} | {
    *(f"{name}_at_norm" for name in controls.DOSED),
    *(f"{name}_at_projection" for name in ("random", "matched")),
}
GROUP = ("condition", "kind", "of", "means")
NAME = ("name", "kind", "of", "means")


def arguments(options: dict) -> list[str]:
    """Options as words; a value of None is a flag."""
    return [str(part) for pair in options.items() for part in pair if part is not None]


def lines(file) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def seeded(tiny, tmp_path_factory):
    """One run of everything at once: two seeds with a probe and a DPO model each, controls, halves, two scorers."""
    folder = tmp_path_factory.mktemp("seeded")
    comments = [{"text": f"the {a} and the {b}", "label": at % 2} for at, a in enumerate(WORDS) for b in WORDS]
    pairs = [
        {"prompt_text": f"The {a} and", "unpert_gen_text": f" the {b} slept.", "pert_gen_text": f" {a} {a} hated {b}"}
        for a in WORDS
        for b in WORDS[:3]
    ]
    options = {
        "--model": tiny("llama"),
        "--prompts": write_lines(folder / "p.jsonl", [{"prompt": p} for p in texts("prompts", "prompt")[:7]]),
        "--comments": write_lines(folder / "c.jsonl", comments),
        "--pairs": write_lines(folder / "d.jsonl", pairs),
        "--passages": "embedded", "--limit": 6, "--sets": "top256,four_groups", "--seeds": "0,1",
        "--controls": "quick", "--holdout": None, "--scorer": "profanity-check", "--second-scorer": "words",
        "--out": folder / "out",
    }  # fmt: skip
    done = run(PATCH, *arguments(options), cwd=ROOT, timeout=3600, DPO_NEURONS_CACHE=str(folder / "cache"))
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, json.loads((folder / "out" / "run.json").read_text()), lines(folder / "out" / "measurements.jsonl")


def test_each_seed_has_its_probe_and_its_dpo_model(seeded):
    folder, record, _ = seeded
    runs = record["provenance"]["settings"]["runs"]
    assert set(runs) == {"0", "1"} and record["params"]["seeds"] == [0, 1]
    assert runs["0"]["probe"] != runs["1"]["probe"] and runs["0"]["post"] != runs["1"]["post"]
    for kind in ("probe", "dpo"):
        made = [json.loads(file.read_text())["fields"] for file in (folder / "cache" / kind).glob("*/artifact.json")]
        assert sorted(fields.get("seed", fields.get("config", {}).get("seed")) for fields in made) == [0, 1]


def test_rows_average_over_seeds_and_draws(seeded):
    """Toxicity is the mean over lines of the mean over prompts; log-perplexity the summed means over all tokens."""
    _, record, measured = seeded
    together = {}
    for line in measured:
        together.setdefault(tuple(line[key] for key in NAME), []).append(line)
    assert len(record["rows"]) == len(together)
    for row in record["rows"]:
        held = row["means"] or "same"
        runs = together[row["condition"], row["kind"], row["of"], held]
        for key, scores in (("toxicity", row), ("toxicity:words", row["by_scorer"]["words"])):
            expected = sum(sum(line[key]) / 3 for line in runs) / len(runs)
            assert scores["toxicity"]["mean"] == pytest.approx(expected, abs=2e-5), row["condition"]
        texts_of = [[1 - x for x in line["degenerate"]] for line in runs]
        assert row["degenerate"]["mean"] == pytest.approx(1 - sum(map(sum, texts_of)) / 3 / len(runs))
        if "log_ppl" in row:
            tokens = sum(runs[0]["tokens"])
            expected = sum(sum(line["nll"]) for line in runs) / len(runs) / tokens
            assert row["log_ppl"] == pytest.approx(expected, abs=2e-5)
        assert [(one["seed"], one["draw"]) for one in row["runs"]] == [(line["seed"], line["draw"]) for line in runs]
        for one, line in zip(row["runs"], runs, strict=True):
            assert one["toxicity"] == pytest.approx(sum(line["toxicity"]) / 3, abs=2e-5)
        seeds = [line["seed"] for line in runs]
        if row["condition"] == "none":
            assert seeds == [0]
        elif not row["of"]:
            assert seeds == [0, 1], "one run for each seed"
            assert runs[0]["toxicity"] != runs[1]["toxicity"] or runs[0]["nll"] != runs[1]["nll"]


def test_controls_quick_gives_every_control_in_three_draws(seeded):
    """Those of the table in lib/controls.py, at each kind and choice of means; random draws spread over the seeds."""
    _, record, _ = seeded
    table = set(re.findall(r"^\| `(\w+)` \|", controls.__doc__, flags=re.M))
    for means in ("held_out", "same"):
        for kind in ("clamp", "shift"):
            rows = [row for row in record["rows"] if row["of"] and (row["kind"], row["means"]) == (kind, means)]
            rows = [row for row in rows if row["of"] == "four_groups"]
            names = {row["condition"].removeprefix("control:") for row in rows}
            assert names == table - (SHIFT_ALONE if kind == "clamp" else {"own_means"})
            for row in rows:
                draws = [(run["seed"], run["draw"]) for run in row["runs"]]
                once = row["condition"].removeprefix("control:") in ONCE
                assert sorted(draws) == ([(0, 0), (1, 0)] if once else [(0, 0), (0, 2), (1, 1), (1, 3)])
                unedited = row["condition"] == "control:zero"
                assert ("f1" in row) == unedited, "F1 is measured of what is not a control"


def test_controls_stand_below_what_they_belong_to_and_are_compared_with_it(seeded):
    _, record, _ = seeded
    real = None
    for row in record["rows"]:
        if not row["of"]:
            real = row
            assert "difference_from_real" not in row
            continue
        assert (row["of"], row["kind"], row["means"]) == (real["condition"], real["kind"], real["means"])
        difference = row["toxicity"]["mean"] - real["toxicity"]["mean"]
        assert row["difference_from_real"]["mean"] == pytest.approx(difference, abs=1e-9)
    by_name = {(row["condition"], row["kind"], row["means"]): row for row in record["rows"]}
    for means in ("held_out", "same"):
        zero = by_name["control:zero", "shift", means]
        assert zero["toxicity"] == by_name["none", "none", None]["toxicity"], "strength 0 of a shift: no edit"
        assert zero["neurons"] == 0
        for kind in ("clamp", "shift"):
            neurons = by_name["four_groups", kind, means]["neurons"]
            for control in ("random", "random_in_layer", "matched", "flipped"):
                assert by_name[f"control:{control}", kind, means]["neurons"] == neurons > 0


def test_held_out_means_come_from_the_other_prompts(seeded):
    """Effects are measured on the odd prompts; means and groups come from them, or from the even ones."""
    folder, record, measured = seeded
    prompts = data.prompts(str(folder / "p.jsonl")).items[:6]
    shown = {line["prompt"] for line in lines(folder / "out" / "generations.jsonl")}
    assert shown == set(prompts[1::2]) and record["params"]["limit"] == 3 and record["params"]["holdout"]
    for name in ("top256", "four_groups"):
        for kind in ("clamp", "shift"):
            rows = [row for row in record["rows"] if (row["condition"], row["kind"]) == (name, kind)]
            assert [row["means"] for row in rows] == ["held_out", "same"]
            assert rows[0]["log_ppl"] != rows[1]["log_ppl"], "other means, another edit"
    found = {}
    for file in (folder / "cache" / "activations").glob("*/artifact.json"):
        fields = json.loads(file.read_text())["fields"]
        half = fields["prompts"][-6:]
        found.setdefault(half, {})[fields["model"]] = load_file(file.with_name("means.safetensors"))["activation"]
        assert fields["n_prompts"] == 3
    assert set(found) == {"[0::2]", "[1::2]"} and all(len(models) == 3 for models in found.values())
    base = resolve(str(record["model"])).revision
    own, other = found["[1::2]"][base], found["[0::2]"][base]
    assert not torch.allclose(own, other)
    kept = load_file(folder / "out" / "activations.safetensors")["pre"]
    torch.testing.assert_close(kept.double(), own, rtol=1e-6, atol=1e-6)
    assert sum(line["name"] == "dpo" for line in measured) == 2, "not measured again for each choice of means"


def test_the_second_scorer_scores_the_same_texts(seeded):
    folder, record, measured = seeded
    second = scorer("words")
    texts_of = {}
    for line in lines(folder / "out" / "generations.jsonl"):
        key = tuple(line[key] for key in (*NAME, "seed", "draw"))
        texts_of.setdefault(key, []).append(line["continuation"])
    checked = 0
    for line in measured:
        if (own := texts_of.get(tuple(line[key] for key in (*NAME, "seed", "draw")))) is not None:
            assert line["toxicity:words"] == second(own).tolist()
            checked += 1
    assert checked > 10 and record["params"]["second_scorer"] == ["words"]
    none = next(row for row in record["rows"] if row["condition"] == "none")
    assert none["by_scorer"]["words"]["toxicity_change"]["mean"] == 0


def test_faithful_with_controls(inputs, tmp_path):  # noqa: F811
    """A control's perplexity is the protocol's own, with position 0 edited alone; a probe given has no labels."""
    options = {**inputs, "--limit": 2, "--sets": "top256", "--controls": "quick", "--protocol": "faithful"}
    options["--out"] = tmp_path / "out"
    done = run(PATCH, *arguments(options), cwd=ROOT, DPO_NEURONS_CACHE=str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr[-2000:]
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    rows = {(row["condition"], row["kind"]): row for row in record["rows"]}
    assert {name for name, kind in rows if kind == "shift"} == {
        "top256",
        "dpo - top256",
        *(f"control:{name}" for name in ("zero", "flipped", "permuted", "permuted_at_norm", "gaussian")),
        *("control:reselected", "control:probe_direction"),
    }, "top256 is all of these 144 neurons: there are no others to take"
    flipped, zero = rows["control:flipped", "clamp"], rows["control:zero", "shift"]
    assert "log_ppl" not in flipped and "log_ppl_first" in flipped
    assert zero["log_ppl_first"] == rows["none", "none"]["log_ppl_first"]


# ---- batch size and memory

SMALL = """
import resource, runpy, sys
import matplotlib.pyplot, nnsight, profanity_check, scipy.stats, sklearn.linear_model, torch, transformers
from lib import experiment, metrics, plots
metrics.scorer("profanity-check")(["warm up"])
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
limit = size + int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
MEMORY = 400 * 2**20  # for what the run itself needs


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Options for a model whose MLP is so wide that 48 prompts at once need a gigabyte."""
    from conftest import build_tokenizer
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("wide")
    tokenizer = build_tokenizer(True)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32_768, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, pad_token_id=0, bos_token_id=2,
        eos_token_id=1,
    )  # fmt: skip
    for seed in (0, 1):
        torch.manual_seed(seed)
        LlamaForCausalLM(config).save_pretrained(folder / f"wide-{seed}")
        tokenizer.save_pretrained(folder / f"wide-{seed}")
    save_file({"direction": torch.randn(32)}, folder / "probe.safetensors")
    prompts = [{"prompt": prompt} for prompt in texts("prompts", "prompt")[:48]]
    return {
        "--model": folder / "wide-0", "--post": folder / "wide-1", "--probe": folder / "probe.safetensors",
        "--prompts": write_lines(folder / "p.jsonl", prompts), "--passages": "embedded", "--limit": 48,
        "--scorer": "words", "--sets": "top256",
    }  # fmt: skip


def within(memory: int, options: dict, cache):
    """Run the script in a process that may take so many bytes more than its libraries do."""
    return run("-c", SMALL, memory, PATCH, *arguments(options), cwd=ROOT, timeout=3600, DPO_NEURONS_CACHE=str(cache),
               MALLOC_ARENA_MAX="1", OPENBLAS_NUM_THREADS="1")  # fmt: skip


def test_a_batch_that_does_not_fit_is_one_clear_line(wide, tmp_path):
    done = within(MEMORY, {**wide, "--batch-size": 48, "--out": tmp_path / "out"}, tmp_path / "cache")
    assert done.returncode == 2, done.stderr[-3000:]
    last = done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr and "--batch-size 48: does not fit into this machine's memory" in last
    assert not (tmp_path / "out").exists()


def test_auto_halves_the_batch_until_it_fits(wide, tmp_path):
    """The kernel refuses what `auto` took for free memory; the run goes on with fewer prompts at once."""
    done = within(MEMORY, {**wide, "--batch-size": "auto", "--out": tmp_path / "out"}, tmp_path / "cache")
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert "Out of memory: going on with --batch-size 24" in done.stderr
    assert record["params"]["batch_size"] <= 24 and record["params"]["limit"] == 48


def test_auto_gives_the_same_numbers(inputs, tmp_path):  # noqa: F811
    """Where memory suffices `auto` takes all prompts at once; a prompt's numbers do not depend on that."""
    rows = []
    for size in ("auto", 1):
        out = tmp_path / f"out-{size}"
        options = {**inputs, "--sets": "four_groups", "--batch-size": size, "--out": out}
        done = run(PATCH, *arguments(options), cwd=ROOT, DPO_NEURONS_CACHE=str(tmp_path / "cache"))
        assert done.returncode == 0, done.stderr[-2000:]
        record = json.loads((out / "run.json").read_text())
        assert record["params"]["batch_size"] == (4 if size == "auto" else 1)
        rows.append([(row["toxicity"]["mean"], row["f1"], row["log_ppl"], row["neurons"]) for row in record["rows"]])
    assert len(rows[0]) == 5
    for auto, one in zip(*rows, strict=True):
        assert auto == pytest.approx(one, rel=1e-4)


def test_running_out_of_memory_is_told_from_other_errors():
    """A real refusal of the CPU's allocator, and an error that is none."""
    with pytest.raises(RuntimeError) as refused:
        torch.empty(2**60, dtype=torch.uint8)
    assert generation.out_of_memory(refused.value)
    with pytest.raises(RuntimeError) as other:
        torch.ones(2) @ torch.ones(3)
    assert not generation.out_of_memory(other.value)
    assert generation.out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))


def test_the_batch_size_that_fits(traced):
    """At least 1; a batch of that size keeps its key-value cache and logits within half of what is free."""
    import psutil

    model = traced("llama")
    rows, config = generation.fitting_batch_size(model), model._module.config
    positions = generation.MAX_PROMPT_TOKENS + generation.NEW_TOKENS
    cache = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * positions * 4
    assert 1 <= rows * (cache + 4 * config.vocab_size) <= psutil.virtual_memory().total / 2
