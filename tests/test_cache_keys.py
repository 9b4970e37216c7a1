"""What determines an artifact is in its key: one determinant changed at a time, and the artifact is made anew."""

import json
import shutil

import pytest
import torch
from conftest import ROOT, run, texts, write_lines
from safetensors.torch import load_file, save_file

from lib import artifacts, data, models, neurons
from lib.metrics import scorer
from lib.protocol import FAITHFUL, SOUND

PATCH = "experiments/patch_four_groups.py"


@pytest.fixture
def folder(tiny, tmp_path):
    return shutil.copytree(tiny("llama"), tmp_path / "model")


def changed_weight(folder):
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def changed_json(name, **entries):
    def change(folder):
        path = folder / name
        held = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**held, **entries}))

    return change


CHANGES = {
    "weights": changed_weight,
    "configuration": changed_json("config.json", rms_norm_eps=0.1),
    "generation configuration": changed_json("generation_config.json", eos_token_id=7),
    "tokenizer": changed_json("tokenizer.json", version="1.1"),
    "tokenizer configuration": changed_json("tokenizer_config.json", extra=1),
    "chat template": lambda folder: (folder / "chat_template.jinja").write_text("{{ messages }}"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_folder_s_revision_holds_all_that_it_is(folder, name):
    before = models.resolve(str(folder)).revision
    (folder / "README.md").write_text("about")
    (folder / "training.json").write_text('{"seconds": 3}')
    assert models.resolve(str(folder)).revision == before, "what is no part of a model"
    CHANGES[name](folder)
    assert models.resolve(str(folder)).revision != before


def test_an_adapter_s_revision_holds_its_base(folder, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_file({"a": torch.ones(1)}, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(folder)}))
    before = models.resolve(str(adapter), option="--post").revision
    changed_weight(folder)
    assert models.resolve(str(adapter), option="--post").revision != before


MEANS = {
    "prompts": {"prompts": data.Dataset(["Another text", "and one"], "here", "sha256:2")},
    "batch size": {"batch_size": 1},
    "protocol": {"protocol": FAITHFUL},
    "remote": {"remote": "local"},
    "revision": {"source": models.Source("m", "", "other")},
    "versions": {},
    "code": {},
    "device": {},
    "dtype": {},
}


@pytest.mark.parametrize("name", MEANS)
def test_means(name, traced, tiny, cache, monkeypatch):
    from lib.models import load, resolve

    made = []
    monkeypatch.setattr(artifacts, "make", lambda kind, fields, build, **more: made.append(fields) or 1 / 0)
    prompts = data.Dataset(["The river", "A stone"], "here", "sha256:1")
    given = {"source": models.Source("m", "", "one"), "prompts": prompts, "batch_size": 2, "protocol": SOUND}

    def fields(model, **changes):
        with pytest.raises(ZeroDivisionError):
            neurons.cached_means(model, **{**given, **changes})
        return made[-1]

    model = traced("llama")
    before = fields(model)
    assert fields(model) == before
    if name == "versions":
        monkeypatch.setattr(artifacts, "version", lambda package: "0")
    if name == "code":
        monkeypatch.setattr(artifacts, "code_version", lambda *files: "0")
    if name == "dtype":
        model = load(resolve(str(tiny("llama"))), "cpu", "bfloat16")
    if name == "device":
        model = type("Elsewhere", (), {"device": torch.device("cuda"), "dtype": torch.float32})()
    assert fields(model, **MEANS[name]) != before


def test_a_scorer_s_identity_holds_its_files(tmp_path, tiny, cache, monkeypatch):
    words = tmp_path / "words.txt"
    words.write_text("sad")
    before = scorer(f"words:{words}").identity
    words.write_text("sad awful")
    assert scorer(f"words:{words}").identity != before
    first = scorer("profanity-check").identity
    monkeypatch.setattr("lib.metrics.versions", lambda *names: dict.fromkeys(names, "0"))
    assert scorer("profanity-check").identity != first


def test_the_same_weights_with_another_tokenizer_are_measured_anew(tiny, tmp_path):
    """The base model once, then a folder with its weights and a tokenizer that cuts texts elsewhere: by the command."""
    other = shutil.copytree(tiny("llama"), tmp_path / "other")
    held = json.loads((other / "tokenizer.json").read_text())
    held["model"]["merges"] = held["model"]["merges"][:20]
    (other / "tokenizer.json").write_text(json.dumps(held))
    prompts = write_lines(tmp_path / "p.jsonl", [{"prompt": prompt} for prompt in texts("prompts", "prompt")[:3]])
    save_file({"direction": torch.ones(32)}, tmp_path / "probe.safetensors")
    records = []
    for at, (model, cache) in enumerate([(tiny("llama"), "one"), (other, "one"), (other, "two")]):
        post = tiny("llama", 1) if model == tiny("llama") else model
        done = run(
            PATCH, "--model", model, "--post", post, "--probe", tmp_path / "probe.safetensors", "--prompts", prompts,
            "--passages", "embedded", "--scorer", "words", "--sets", "top256", "--out", tmp_path / str(at), cwd=ROOT,
            DPO_NEURONS_CACHE=str(tmp_path / cache),
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-800:]
        records.append(load_file(tmp_path / str(at) / "activations.safetensors")["pre"])
    assert torch.equal(records[1], records[2]) and not torch.equal(records[0], records[1])


def test_an_unfinished_run_goes_on_under_the_same_code_alone(cache, tmp_path, monkeypatch):
    from lib.errors import UserError

    out = tmp_path / "out"
    with pytest.raises(RuntimeError), artifacts.output(out, {"x": 1}, False) as work:
        (work / "row").write_text("1")
        raise RuntimeError("killed")
    monkeypatch.setattr(artifacts, "running_code", lambda: "changed")
    with pytest.raises(UserError, match="unfinished run"), artifacts.output(out, {"x": 1}, False):
        pass
