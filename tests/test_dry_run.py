"""--dry-run: its counts are those of the real run, it writes nothing, and it says what comes first."""

import re

import pytest
import torch
from conftest import ROOT, load_script, run
from passes import Passes
from test_cli import inputs  # noqa: F401  a fixture
from test_opposing_effects import arguments

from lib.dry_run import seconds, sizes

CAUSAL = {
    "patch_four_groups": ["--controls", "quick"],
    "toxic_neurons_not_enough": [],
    "probe_free_editing": ["--controls", "quick", "--representation", "tokens,probe", "--kinds", "clamp,scale,shift"],
    "steer": ["--alpha", "3", "--controls", "quick"],
    "unalign": ["--controls", "quick"],
    "difference_in_means": ["--strength", "1", "--controls", "quick"],
}
LOOKING = {
    "four_groups": [],
    "opposing_effects": [],
    "toxic_subspace": ["--top", "8"],
    "residual_shift": [],
    "neuron_card": [],
}


@pytest.mark.parametrize("name", [*CAUSAL, *LOOKING])
def test_as_many_passes_as_the_real_run(name, inputs, tiny, tmp_path, cache, traced):  # noqa: F811
    """Counted in the real run by the same hook, from an empty cache, with a tiny model of another width."""
    script, more = load_script(name), (CAUSAL | LOOKING)[name]
    every = {key: value for key, value in inputs.items() if (name, key) != ("difference_in_means", "--probe")}
    given = arguments(inputs) if name in LOOKING else [str(part) for pair in every.items() for part in pair]
    dry = run(f"experiments/{name}.py", *given, *more, "--out", tmp_path / "out", "--dry-run", cwd=ROOT)
    assert dry.returncode == 0, dry.stderr[-2000:]
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob("*.partial"))
    real = Passes()
    with real.counted(traced("llama")._module.config.vocab_size):
        script.command([*given, *more, "--out", str(tmp_path / "out")], standalone_mode=False)
    counted, tokens = re.search(r"([\d,]+) forward passes, ([\d,]+) tokens", dry.stdout).groups()
    assert int(counted.replace(",", "")) == len(real.every)
    assert int(tokens.replace(",", "")) == sum(tokens for tokens, _ in real.every)


def test_conditions_of_several_seeds(inputs, tmp_path):  # noqa: F811
    given = [str(part) for pair in inputs.items() for part in pair]
    sets = ["--sets", "four_groups", "--seeds", "0,1,2", "--out", tmp_path / "out", "--dry-run"]
    dry = run("experiments/patch_four_groups.py", *given, *sets, cwd=ROOT)
    assert "13 conditions" in dry.stdout  # the base model; for each seed DPO, clamp, shift, and the shift undone


def test_variants_are_models_of_their_own(inputs, tmp_path):  # noqa: F811
    given = [str(part) for pair in inputs.items() for part in pair if pair[0] != "--post"]
    dry = run(
        "experiments/robust_alignment.py", *given, "--variants", "biases,values:64", "--out", tmp_path / "out",
        "--dry-run", cwd=ROOT,
    )  # fmt: skip
    assert "7 conditions" in dry.stdout  # the base model; plain DPO and two variants, each also with scaled keys
    assert "--trainable biases" in dry.stdout and "--trainable values:<64 neurons>" in dry.stdout


def test_weights_alone(inputs, tmp_path):  # noqa: F811
    dry = run("experiments/toxic_vectors.py", "--model", inputs["--model"], "--dry-run", cwd=ROOT)
    assert dry.returncode == 0 and "0 forward passes" in dry.stdout, dry.stderr[-2000:]


def test_what_comes_first_is_named(inputs, tmp_path):  # noqa: F811
    given = [str(part) for name, part in inputs.items() if name not in ("--probe", "--post") for part in (name, part)]
    dry = run(ROOT / "experiments/patch_four_groups.py", *given, "--seeds", "0,1", "--dry-run", cwd=tmp_path)
    for command in ("experiments/train_probe.py", "-m dpo"):
        for seed in (0, 1):
            assert f"python {command} --model {inputs['--model']} --seed {seed}" in dry.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_given_model_is_counted_once_for_all_seeds(inputs, tmp_path, cache, traced):  # noqa: F811
    """Its means and its row are in the cache for the second seed; each seed's edits are measured anew."""
    given = [str(part) for pair in inputs.items() for part in pair]
    sets = ["--sets", "four_groups", "--seeds", "0,1", "--out", str(tmp_path / "out")]
    dry = run("experiments/patch_four_groups.py", *given, *sets, "--dry-run", cwd=ROOT)
    real = Passes()
    with real.counted(traced("llama")._module.config.vocab_size):
        load_script("patch_four_groups").command([*given, *sets], standalone_mode=False)
    counted = re.search(r"([\d,]+) forward passes", dry.stdout)[1]
    assert int(counted.replace(",", "")) == len(real.every), dry.stderr[-2000:]


def test_bad_input_is_told_by_a_dry_run_too(inputs, tmp_path):  # noqa: F811
    given = [str(part) for pair in {**inputs, "--prompts": "missing.jsonl"}.items() for part in pair]
    dry = run("experiments/patch_four_groups.py", *given, "--dry-run", cwd=ROOT)
    assert dry.returncode == 2 and "missing.jsonl" in dry.stderr.splitlines()[-1]
    (tmp_path / "there").mkdir()
    given = [str(part) for pair in inputs.items() for part in pair]
    dry = run("experiments/patch_four_groups.py", *given, "--dry-run", "--out", tmp_path / "there", cwd=ROOT)
    assert dry.returncode == 2 and "exists" in dry.stderr.splitlines()[-1]


def test_probe_training_and_pairs(tiny, tmp_path):
    environment = {"DPO_NEURONS_CACHE": str(tmp_path / "cache")}
    model = ["--model", str(tiny("llama"))]
    dry = run("experiments/train_probe.py", *model, "--dry-run", cwd=ROOT, **environment)
    assert dry.returncode == 0 and "forward passes" in dry.stdout, dry.stderr[-2000:]
    dry = run("-m", "dpo", *model, "--preset", "embedded", "--dry-run", cwd=ROOT, **environment)
    assert dry.returncode == 0 and "25 updates of 4 of 230 pairs, 26 held out" in dry.stdout, dry.stderr[-2000:]
    assert "warm-up" not in dry.stdout
    dry = run("-m", "dpo", *model, "--preset", "yang2025", "--dry-run", cwd=ROOT, **environment)
    assert "72 updates of 16" in dry.stdout and "the warm-up is 7" in dry.stderr, dry.stderr[-2000:]
    pairs = ["--limit", "4", "--method", "best-of-n", "--scorer", "words", "--probe", "none"]
    dry = run(ROOT / "experiments/make_pairs.py", *model, *pairs, "--dry-run", cwd=tmp_path, **environment)
    assert dry.returncode == 0 and "24 forward passes" in dry.stdout, dry.stderr[-2000:]
    assert not (tmp_path / "cache").exists() and not (tmp_path / "runs").exists()


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3_text"])
def test_sizes_by_hand(family, tiny, traced):
    body, head = sizes(str(tiny(family)))
    module = traced(family)._module
    assert head == module.get_output_embeddings().weight.numel()
    inputs_table = module.get_input_embeddings().weight
    tied = inputs_table is module.get_output_embeddings().weight
    rest = sum(weight.numel() for weight in module.parameters()) - inputs_table.numel()
    assert body == rest - (0 if tied else head)


def test_seconds_by_hand(monkeypatch):
    """Operations where many tokens share the weights, bytes where few do."""
    from lib import dry_run

    monkeypatch.setattr(dry_run, "rates", lambda device, width: (1e9, 1e6))
    assert seconds([(1000, 500)], body=10_000, head=2_000, width=4, device="cpu") == pytest.approx(
        2 * max(2 * (1000 * 10_000 + 500 * 2_000) / 1e9, 12_000 * 4 / 1e6)
    )
    assert seconds([(1, 1)], 10_000, 2_000, 4, "cpu") == pytest.approx(2 * 0.048)


def test_the_counter_counts_passes_and_tokens(traced):
    model, passes = traced("llama"), Passes()
    ids = torch.ones(2, 5, dtype=torch.long)
    with passes.counted(model._module.config.vocab_size):
        model._module(ids)
        model._module(ids, logits_to_keep=1)
    model._module(ids)
    assert passes.every == [(10, 10), (10, 2)]
