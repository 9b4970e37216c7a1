"""Every script on a real NDIF service gives what it gives here: ids exactly, numbers to 1e-5."""

import pytest
import torch
from records import PASSAGES, TEXT, compare, lines, record
from server import MODEL
from transformers import AutoTokenizer

from lib.embedded import unpack
from lib.probes import Probe

SCRIPTS = {
    "patch_four_groups": (*TEXT, *PASSAGES, "--controls", "quick"),
    "toxic_neurons_not_enough": (*TEXT, *PASSAGES, "--top", "8"),
    "probe_free_editing": (*TEXT, *PASSAGES),
    "steer": (*TEXT, *PASSAGES, "--vector", "probe,value:L1.N7,svd:0"),
    "unalign": (*TEXT, *PASSAGES),
    "robust_alignment": (*TEXT, *PASSAGES),
    "opposing_effects": TEXT,
    "residual_shift": TEXT,
    "logit_lens": TEXT,
    "toxic_subspace": (*TEXT, "--top", 16),
    "neuron_card": TEXT,
    "toxic_vectors": ("--top", 16),
}


def single_tokens(hub_root) -> list[str]:
    """Texts that the tiny model's tokenizer makes one token of: some of them are what it says next."""
    tokenizer = AutoTokenizer.from_pretrained(hub_root / MODEL)
    every = sorted({tokenizer.decode([i]) for i in range(3, len(tokenizer))} - {","})
    printed = [text for text in every if text.isprintable()]
    return [text for text in printed if len(tokenizer(text, add_special_tokens=False)["input_ids"]) == 1]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script(twice, hub_root, adapter, probe, out, script):
    options = list(SCRIPTS[script])
    options += ["--probe", probe] if script != "logit_lens" else ["--tokens", ",".join(single_tokens(hub_root))]
    options += ["--post", f"lora:{adapter}"] if script != "toxic_vectors" else []
    options += ["--variants", f"lora:{adapter}"] if script == "robust_alignment" else []
    # Here the adapter is merged, which rounds otherwise than adding it: too much for shares and sums of small rises.
    added = ("--remote", "local") if script in ("logit_lens", "opposing_effects") else ()
    said = twice(script, out, *options, here=added)
    here, there = record(out / "here"), record(out / "remote")
    compare(here, there)
    for name in ("generations.jsonl", "measurements.jsonl", "vectors.jsonl", "lens.jsonl"):
        assert (out / "here" / name).exists() == (out / "remote" / name).exists()
        if (out / "here" / name).exists():
            compare(lines(out / "here" / name), lines(out / "remote" / name), name)
    sent = there["provenance"]["remote"]["requests"]
    assert f"{sent[0]['sent_bytes']:,} bytes sent" in said and f"{MODEL} is" in said
    assert max(one["sent_bytes"] for one in sent) < 100_000 and max(one["returned_bytes"] for one in sent) < 100_000
    assert "each one request" in said or "runs" not in here["rows"][0]


@pytest.mark.parametrize("method", ["best-of-n", "pplm"])
def test_make_pairs(twice, probe, out, method):
    options = ("--method", method, "--limit", 4, "--min-gap", -2, "--probe", probe, "--scorer", "profanity-check")
    twice("make_pairs", out, *options, "--iterations", 2, file="pairs.jsonl")
    compare(lines(out / "here" / "pairs.jsonl"), lines(out / "remote" / "pairs.jsonl"))


@pytest.mark.parametrize("script", ["patch_four_groups", "toxic_neurons_not_enough"])
def test_means_alone_stand_for_a_model_that_nobody_hosts(client, twice, hub_root, adapter, probe, out, script):
    common = ("--probe", probe, *TEXT, *PASSAGES)
    whole = client(
        "patch_four_groups", "--model", hub_root / MODEL, "--post", f"lora:{adapter}", *common, "--sets", "increasing",
        "--out", out / "whole", cache="here",
    )  # fmt: skip
    assert whole.returncode == 0, whole.stderr[-3000:]
    twice(script, out, "--post", f"means:{out / 'whole' / 'means_after_dpo.safetensors'}", *common)
    here, there = record(out / "here"), record(out / "remote")
    compare(here, there)
    conditions = {(row["condition"], row["kind"]) for row in there["rows"]}
    assert ("dpo", "none") not in conditions and ("none", "none") in conditions and len(conditions) > 2


def test_a_real_language_model(client, twice, hub_root, out):
    """SmolLM2-135M writes the same text on the service as here, under an edit of 256 of its neurons."""
    folder = unpack("smollm2")
    out.mkdir()
    Probe(torch.randn(576, generator=torch.Generator().manual_seed(0)), 0.0).save(out / "probe.safetensors")
    one = (*TEXT, *PASSAGES, "--sets", "top256", "--probe", out / "probe.safetensors")
    made = client(
        "patch_four_groups", "--model", folder, "--post", folder, *one, "--out", out / "made", cache="here", timeout=600
    )
    assert made.returncode == 0, made.stderr[-3000:]
    twice(
        "patch_four_groups", out, *one, "--post", f"means:{out / 'made' / 'means_after_dpo.safetensors'}",
        model="tests/smollm2",
    )  # fmt: skip
    compare(lines(out / "here" / "generations.jsonl"), lines(out / "remote" / "generations.jsonl"))
