"""The Hub path against a server on this machine: found, missing, gated, truncated, down; the cache works offline."""

import shutil

import pytest
from conftest import run, write_lines
from hub_server import COMMIT, hub

RESOLVE = (
    "import sys; from lib.models import load, resolve; s = resolve(sys.argv[1]); "
    "print(s.revision); print(load(s)._module.config.model_type)"
)


@pytest.fixture
def served(tmp_path, tiny):
    root = tmp_path / "hub"
    for name in ("tiny", "gated-tiny", "private-tiny", "truncated-tiny", "pickle-tiny"):
        shutil.copytree(tiny("llama"), root / "lab" / name)
    weights = root / "lab" / "pickle-tiny" / "model.safetensors"
    weights.rename(weights.with_name("pytorch_model.bin"))
    with hub(root) as address:
        yield root, address


def environment(address: str, tmp_path) -> dict:
    return {
        "HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "hf"), "DPO_NEURONS_CACHE": str(tmp_path / "cache"),
        "HF_HUB_DISABLE_XET": "1", "HF_HUB_DOWNLOAD_TIMEOUT": "3", "HF_HUB_ETAG_TIMEOUT": "3", "HF_TOKEN": "",
    }  # fmt: skip


def test_found_pinned_and_then_offline(served, tmp_path):
    _, address = served
    first = run("-c", RESOLVE, "lab/tiny", **environment(address, tmp_path))
    assert first.stdout.split() == [COMMIT, "llama"], first.stderr
    down = environment("http://127.0.0.1:9", tmp_path)
    again = run("-c", RESOLVE, "lab/tiny", **down)
    assert again.stdout.split() == [COMMIT, "llama"], "what is in the Hub cache needs no Hub: " + again.stderr


@pytest.mark.parametrize(
    "name, says",
    [
        ("lab/missing", "no such repository"),
        ("lab/gated-tiny", "accept its licence"),
        ("lab/private-tiny", "hf auth login"),
        ("lab/truncated-tiny", "broke off"),
        ("lab/pickle-tiny", "no safetensors"),
    ],
)
def test_faults_are_one_clear_line(served, tmp_path, name, says):
    _, address = served
    out = tmp_path / "out"
    done = run(
        "experiments/patch_four_groups.py", "--model", name, "--prompts", "embedded", "--passages", "embedded",
        "--scorer", "profanity-check", "--out", out, cwd=".", **environment(address, tmp_path),
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith("Error: ") and name in line and says in line, done.stderr
    assert "Traceback" not in done.stderr and not out.exists()


def test_a_dry_run_fetches_no_weights(served, tmp_path):
    """Neither of the base model nor of the one after DPO."""
    _, address = served
    models = ["--model", "lab/tiny", "--post", "lab/tiny", "--prompts", "embedded", "--passages", "embedded"]
    done = run(
        "experiments/patch_four_groups.py", *models, "--scorer", "probe:lab/tiny", "--limit", 3, "--dry-run",
        cwd=".", **environment(address, tmp_path),
    )  # fmt: skip
    assert done.returncode == 0 and "forward passes" in done.stdout, done.stderr[-2000:]
    assert not list((tmp_path / "hf").rglob("*.safetensors"))


def test_a_server_that_is_down(tmp_path):
    done = run("-m", "dpo", "--model", "lab/tiny", **environment("http://127.0.0.1:9", tmp_path))
    assert done.returncode == 2 and "cannot be reached" in done.stderr and "gemma-270m" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_unknown_revision(served, tmp_path):
    _, address = served
    done = run("-m", "dpo", "--model", "lab/tiny", "--revision", "v9", **environment(address, tmp_path))
    assert done.returncode == 2 and "no such revision" in done.stderr, done.stderr


def test_prompts_from_the_hub_are_the_challenging_ones(tmp_path):
    folder = tmp_path / "hub" / "datasets" / "allenai" / "real-toxicity-prompts"
    folder.mkdir(parents=True)
    write_lines(
        folder / "prompts.jsonl",
        [
            {"challenging": True, "prompt": {"text": "kept", "toxicity": 0.9}},
            {"challenging": False, "prompt": {"text": "left out", "toxicity": None}},
        ],
    )
    code = "from lib import data; d = data.prompts('hub'); print(d.items, d.source)"
    with hub(tmp_path / "hub") as address:
        done = run("-c", code, **environment(address, tmp_path))
        missing = run("-c", "from lib import data; data.passages('hub')", **environment(address, tmp_path))
    assert done.stdout.strip() == "['kept'] hub:allenai/real-toxicity-prompts/prompts.jsonl", done.stderr
    assert "no such repository" in missing.stderr


def test_passages_from_the_hub_are_parquet(tmp_path):
    import datasets

    folder = tmp_path / "hub" / "datasets" / "Salesforce" / "wikitext" / "wikitext-2-raw-v1"
    folder.mkdir(parents=True)
    rows = datasets.Dataset.from_dict({"text": ["", " = Title = \n", " A passage . \n"]})
    rows.to_parquet(str(folder / "test-00000-of-00001.parquet"))
    with hub(tmp_path / "hub") as address:
        done = run("-c", "from lib import data; print(data.passages('hub').items)", **environment(address, tmp_path))
    assert done.stdout.strip() == r"[' = Title = \n', ' A passage . \n']", done.stderr


def test_comments_from_the_hub(tmp_path):
    folder = tmp_path / "hub" / "datasets" / "thesofakillers" / "jigsaw-toxic-comment-classification-challenge"
    folder.mkdir(parents=True)
    (folder / "train.csv").write_text('id,comment_text,toxic\n1,a,0\n2,"b\nc",1\n3,d,0\n4,e,1\n')
    with hub(tmp_path / "hub") as address:
        code = "from lib import data; print(data.comments('hub').items)"
        done = run("-c", code, **environment(address, tmp_path))
    assert done.stdout.strip() == r"[('a', 0), ('b\nc', 1), ('d', 0), ('e', 1)]", done.stderr
