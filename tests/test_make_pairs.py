"""Best-of-n pairs on a tiny model: schema, sides, seeds, and going on after a kill."""

import json

from conftest import ROOT, load_script, run, texts, write_lines

FIELDS = {"prompt_text", "unpert_gen_text", "pert_gen_text", "unpert_gen_toxicity", "pert_gen_toxicity"}


def make(tiny, tmp_path, out: str, *more):
    prompts = write_lines(tmp_path / "prompts.jsonl", [{"prompt": p} for p in texts("pair_prompts", "prompt")[:6]])
    command = ["experiments/make_pairs.py", "--model", tiny("llama"), "--prompts", prompts, "--samples", 3]
    command += ["--batch-size", 6, "--scorer", "profanity-check", "--out", tmp_path / out, *more]
    return run(*command, cwd=ROOT)


def test_pairs_and_a_broken_off_run(tiny, tmp_path):
    done = make(tiny, tmp_path, "whole.jsonl", "--min-gap", 0)
    assert done.returncode == 0, done.stderr
    pairs = [json.loads(line) for line in (tmp_path / "whole.jsonl").read_text().splitlines()]
    assert len(pairs) == 6 and all(set(pair) == FIELDS for pair in pairs)
    assert all(pair["unpert_gen_toxicity"] <= pair["pert_gen_toxicity"] for pair in pairs)
    assert any(pair["unpert_gen_text"] != pair["pert_gen_text"] for pair in pairs), "the samples differ"

    # What a kill leaves: the settings, one finished batch, and half a line.
    settings = {"model": str(tiny("llama")), "samples": 3, "min_gap": 0.0, "seed": 0, "batch_size": 6}
    marked = [{**pair, "prompt_text": "from the file"} for pair in pairs[:2]]
    partial = tmp_path / "again.jsonl.partial"
    partial.write_text(json.dumps(settings) + "\n" + json.dumps({"start": 0, "pairs": marked}) + '\n{"start": 2, "pa')
    assert make(tiny, tmp_path, "again.jsonl", "--min-gap", 0).returncode == 0
    again = [json.loads(line) for line in (tmp_path / "again.jsonl").read_text().splitlines()]
    assert again == marked + pairs[2:] and not partial.exists()

    assert make(tiny, tmp_path, "again.jsonl", "--min-gap", 0).returncode == 2, "an existing file is not overwritten"
    none = make(tiny, tmp_path, "none.jsonl", "--min-gap", 1.1)
    assert none.returncode == 2 and "lower --min-gap" in none.stderr and not (tmp_path / "none.jsonl").exists()


def test_the_trace_can_be_shipped(traced):
    """nnsight's simulated server draws the same samples."""
    from lib.metrics import scorer

    best_of_n, score = load_script("make_pairs").best_of_n, scorer("profanity-check")
    prompts = ["The river", "Music is"]
    here = best_of_n(traced("llama"), prompts, 3, 0, score, seed=5)
    assert best_of_n(traced("llama"), prompts, 3, 0, score, seed=5, remote="local") == here
    assert best_of_n(traced("llama"), prompts, 3, 0, score, seed=6) != here
