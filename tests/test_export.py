"""Exported edits: plain transformers gives what the trace gave, and what cannot be exported is refused."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import FAMILIES, LAYERS, NEURONS, ROOT, WIDTH, load_script, run, texts, write_lines
from transformers import AutoModelForCausalLM, AutoTokenizer

from lib import export, interventions
from lib.generation import batches, prompt_ids, right_padded
from lib.interventions import scaled_by
from lib.probes import Probe
from lib.protocol import SOUND

PATCH, UNALIGN, STEER = map(load_script, ("patch_four_groups", "unalign", "steer"))
EVERYWHERE = slice(None)
BIASED = ("gpt2", "llama")  # families whose MLP's last map can have a bias
OTHER = [family for family in FAMILIES if family not in BIASED]


def edits(seed: int = 0) -> dict:
    """(script, edit) of every kind, of random neurons and values."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(LAYERS, NEURONS, generator=generator) < 0.5
    pre, post = torch.randn(2, LAYERS, NEURONS, generator=generator, dtype=torch.float64)
    vector = torch.randn(WIDTH, generator=generator)
    return {
        "scale": (PATCH, interventions.scale(mask, post).edit()),
        "shift": (PATCH, interventions.shift(mask, pre, post).edit()),
        "clamp": (PATCH, interventions.clamp(mask, pre, post).edit()),
        "keys": (UNALIGN, scaled_by("keys", mask, 3.0)),
        "keys and bias": (UNALIGN, scaled_by("keys and bias", mask, 3.0)),
        "values": (UNALIGN, scaled_by("values", mask, 3.0)),
        "steer": (STEER, STEER.Steering(vector, "residual")),
    }


def possible(family: str) -> list[str]:
    kinds = [kind for kind in edits() if family in BIASED or kind not in export.WITH_BIAS]
    return [kind for kind in kinds if kind != "keys and bias" or family == "gpt2"]


@pytest.mark.parametrize("family, kind", [(family, kind) for family in FAMILIES for kind in possible(family)])
def test_plain_transformers_computes_what_the_trace_computed(traced, tmp_path, family, kind):
    model, (script, edit) = traced(family), edits()[kind]
    (batch,) = batches(model.tokenizer, texts("prompts", "prompt")[:6], 6)
    before = {name: weight.clone() for name, weight in model._module.state_dict().items()}
    export.save_checkpoint(model, edit, tmp_path / "exported")
    plain, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "exported", output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    (read,) = right_padded(prompt_ids(model.tokenizer, texts("prompts", "prompt")[:6]), 6)
    with model.trace(read):
        script.intervene(model, edit, EVERYWHERE)
        expected = model.output.logits.save()
    with torch.no_grad():
        logits = plain(**read).logits
        ids = plain.generate(**batch, max_new_tokens=20, do_sample=False, eos_token_id=None)
    real = read["attention_mask"].bool()
    torch.testing.assert_close(logits[real], expected[real], rtol=1e-4, atol=1e-4)
    assert torch.equal(ids[:, batch["input_ids"].shape[1] :], script.generate(model, batch, edit, EVERYWHERE))
    for name, weight in model._module.state_dict().items():
        assert torch.equal(weight, before[name]), "the model in memory is as it was"


@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral"])
@pytest.mark.parametrize("kind", ["shift", "steer"])
def test_a_control_vector_in_the_hands_of_repeng(traced, tiny, tmp_path, monkeypatch, family, kind):
    """Its library reads the file, and its own model writes what the trace writes."""
    monkeypatch.setattr(np, "float_", np.float64, raising=False)  # repeng 0.4 names a type that NumPy 2 dropped
    import repeng

    model, (script, edit) = traced(family), edits()[kind]
    export.save_vectors(model, edit, tmp_path / "vector.gguf", model.config.model_type)
    vector = repeng.ControlVector.import_gguf(tmp_path / "vector.gguf")
    assert vector.model_type == family
    layers = sorted(vector.directions)
    assert layers == (list(range(LAYERS)) if kind == "shift" else [LAYERS - 1])
    controlled = repeng.ControlModel(AutoModelForCausalLM.from_pretrained(tiny(family)).eval(), layers)
    controlled.set_control(vector)
    (batch,) = batches(model.tokenizer, texts("prompts", "prompt")[:6], 6)
    with torch.no_grad():
        ids = controlled.generate(**batch, max_new_tokens=20, do_sample=False, eos_token_id=None)
    assert torch.equal(ids[:, batch["input_ids"].shape[1] :], script.generate(model, batch, edit, EVERYWHERE))


WITHOUT_THIS_PROJECT = """
import json, sys
class Nowhere:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("lib", "dpo", "report"):
            raise ImportError(name)
sys.meta_path.insert(0, Nowhere())
from transformers import pipeline
write = pipeline("text-generation", model=sys.argv[1], device="cpu")
asked = json.load(sys.stdin)
given = dict(max_new_tokens=20, do_sample=False, return_full_text=False)
print(json.dumps([write(text, **given)[0]["generated_text"] for text in asked]))
"""


@pytest.fixture
def given(tiny, tmp_path):
    """Options of a script on a tiny model, and where it is."""

    def options(family: str) -> list:
        base, post = tiny(family), tiny(family, 1)
        short = [{"prompt": text[:20].strip()} for text in texts("prompts", "prompt")[:6]]  # no token is cut off
        prompts = write_lines(tmp_path / "prompts.jsonl", short)
        passages = texts("passages", "text")[:3]
        Probe(torch.randn(WIDTH, generator=torch.Generator().manual_seed(1)), 0.2).save(tmp_path / "p.safetensors")
        return [
            "--model", base, "--post", post, "--probe", tmp_path / "p.safetensors", "--prompts", prompts, "--passages",
            write_lines(tmp_path / "passages.jsonl", [{"text": text} for text in passages]), "--scorer", "words",
        ]  # fmt: skip

    return options


def test_the_command_and_a_process_without_this_project(given, tmp_path):
    """The receipt, the folder in a pipeline, and the folder as the model after DPO."""
    options, folder = given("llama"), tmp_path / "exported"
    asked = ("--sets", "four_groups", "--export", folder, "--export-condition", "four_groups, clamp")
    done = run("experiments/patch_four_groups.py", *options, *asked, "--out", tmp_path / "out", cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    assert str(folder) in done.stdout.replace("\n", "") and not list(tmp_path.glob(".exported.*"))
    card = (folder / "README.md").read_text()
    assert "wrote the trace's text for 6 of 6 prompts" in card and "No controls were run" in card
    assert str(tmp_path) not in card and str(options[1]) not in card, "no one's home folder"
    lines = [json.loads(line) for line in (tmp_path / "out" / "generations.jsonl").read_text().splitlines()]
    wanted = [line for line in lines if (line["name"], line["kind"]) == ("four_groups", "clamp")]
    (tmp_path / "load.py").write_text(WITHOUT_THIS_PROJECT)
    prompts = json.dumps([line["prompt"] for line in wanted])
    alone = subprocess.run(
        [sys.executable, str(tmp_path / "load.py"), str(folder)], input=prompts, capture_output=True, text=True,
        cwd=tmp_path,
    )  # fmt: skip
    assert alone.returncode == 0, alone.stderr[-3000:]
    written = json.loads(alone.stdout.splitlines()[-1])
    assert written == [line["continuation"] for line in wanted]

    options[options.index("--post") + 1] = folder  # the round trip: the edit as a model after
    again = run(
        "experiments/patch_four_groups.py", *options, "--sets", "four_groups", "--out", tmp_path / "2", cwd=ROOT
    )
    assert again.returncode == 0, again.stderr[-3000:]
    rows = json.loads((tmp_path / "2" / "run.json").read_text())["rows"]
    first = json.loads((tmp_path / "out" / "run.json").read_text())["rows"]
    (dpo,) = [row for row in rows if row["condition"] == "dpo"]
    (edited,) = [row for row in first if (row["condition"], row["kind"]) == ("four_groups", "clamp")]
    assert dpo["toxicity"] == edited["toxicity"] and dpo["log_ppl"] == pytest.approx(edited["log_ppl"], abs=1e-5)


REFUSED = {
    "no such condition": ("llama", "patch_four_groups", ["--export-condition", "nothing, shift"], "give one of"),
    "no condition": ("llama", "patch_four_groups", [], "give one of"),
    "no place": ("mistral", "patch_four_groups", ["--export-condition", "four_groups, shift"], "FILE.gguf"),
    "no place at all": ("gemma2", "patch_four_groups", ["--export-condition", "four_groups, shift"], "scale"),
    "the last position": (
        "llama", "patch_four_groups", ["--export-condition", "four_groups, clamp", "--protocol", "faithful"],
        "last position",
    ),
    "on a server": (
        "llama", "patch_four_groups", ["--export-condition", "four_groups, shift", "--remote", "local"], "--remote"
    ),
    "a bias that is not there": ("llama", "unalign", ["--export-condition", "unalign k=7 x10, keys and bias"], "give"),
}  # fmt: skip


@pytest.mark.parametrize(
    "case",
    [
        *REFUSED,
        "taken",
        "in the run's folder",
        "added biases",
        "a vector of a clamp",
        "a vector before a norm",
        "no --export",
    ],
)
def test_refused_in_one_line_with_nothing_written(given, tmp_path, case):
    family, script, more, says = REFUSED.get(
        case, ("llama", "patch_four_groups", ["--export-condition", "four_groups, shift"], "")
    )
    place = tmp_path / "exported"
    if case == "taken":
        place.mkdir()
        says = "exists"
    if case.startswith("a vector"):
        place, says = tmp_path / "vector.gguf", "constant"
        family = "gemma2" if "norm" in case else "llama"
        more = ["--export-condition", "four_groups, shift" if "norm" in case else "four_groups, clamp"]
    if case == "in the run's folder":  # which takes the place of what is there when it is finished
        place, says = tmp_path / "out" / "exported", "own folder"
    if case == "added biases":
        family, script, more = "mistral", "unalign", ["--export-condition", "unalign k=7 x10, keys"]
        says = "added"
    if case == "no --export":
        says = "--export FOLDER"
    before = sorted(tmp_path.rglob("*"))
    options = given(family)
    if case == "added biases":
        shutil.copytree(options[options.index("--post") + 1], post := tmp_path / "post")
        (post / "model.safetensors").rename(post / "model.added-biases.safetensors")
        options[options.index("--post") + 1] = post
        before = sorted(tmp_path.rglob("*"))
    asked = [] if case == "no --export" else ["--export", place]
    done = run(f"experiments/{script}.py", *options, *asked, *more, "--out", tmp_path / "out", cwd=ROOT)
    (said,) = done.stderr.strip().splitlines()[-1:]
    assert done.returncode == 2 and says in said and len(said) < 400, done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "out").exists()
    made = set(tmp_path.rglob("*")) - set(before)
    assert {path.name for path in made} <= {"prompts.jsonl", "passages.jsonl", "p.safetensors"}


def test_a_full_disk_leaves_nothing(traced, tmp_path):
    """Nor does an interruption: neither the export nor what was being written beside it."""
    wanted = export.Export(tmp_path / "new" / "folders" / "exported", ("x", "scale"))
    for error in (OSError(28, "No space left on device"), KeyboardInterrupt()):
        with pytest.raises((export.UserError, KeyboardInterrupt)):
            with export.placed(wanted) as place:
                export.save_checkpoint(traced("gpt2"), edits()["scale"][1], place)
                raise error
        assert list(tmp_path.iterdir()) == []


def test_vectors_as_safetensors(traced, tmp_path):
    """`[n_layers, d_model]`, the sum of values times value vectors."""
    from safetensors.numpy import load_file

    model, (_, edit) = traced("gpt2"), edits()["shift"]
    export.save_vectors(model, edit, tmp_path / "v.safetensors", "gpt2")
    vectors = load_file(tmp_path / "v.safetensors")["vectors"]
    assert vectors.shape == (LAYERS, WIDTH) and vectors.dtype == np.float32
    for layer, index, value in edit:
        weight = model._module.transformer.h[layer].mlp.c_proj.weight.double()
        np.testing.assert_allclose(vectors[layer], (value.double() @ weight[index]).detach(), rtol=1e-5, atol=1e-6)


def test_bfloat16_within_its_rounding(tiny, tmp_path):
    """The bias is one bfloat16 number: a step of 2^-8 of the logits' size, not more."""
    from lib.models import load, resolve

    model, (script, edit) = load(resolve(str(tiny("llama"))), "cpu", "bfloat16"), edits()["shift"]
    export.save_checkpoint(model, edit, tmp_path / "exported")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "exported", dtype="auto")
    assert plain.dtype == torch.bfloat16
    (batch,) = batches(AutoTokenizer.from_pretrained(tiny("llama")), texts("prompts", "prompt")[:1], 1)
    with model.trace(batch):
        script.intervene(model, edit, EVERYWHERE)
        expected = model.output.logits.save()
    with torch.no_grad():
        difference = (plain(**batch).logits - expected).float().abs().max()
    assert difference < 2**-4 * expected.float().abs().max()


@pytest.mark.parametrize("family", ["gpt2", "mistral"])
def test_an_edit_of_the_model_after_dpo(given, tiny, tmp_path, family):
    """unalign's keys, written into the model after DPO, not the base model."""
    folder = tmp_path / "exported"
    asked = ("--export", folder, "--export-condition", "unalign k=7 x10, keys", "--out", tmp_path / "out")
    done = run("experiments/unalign.py", *given(family), *asked, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    post, exported = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (tiny(family, 1), folder))
    key = {"gpt2": "mlp.c_fc.weight", "mistral": "mlp.gate_proj.weight"}[family]
    changed = {name for name in post if not torch.equal(post[name], exported[name])}
    assert changed and all(name.endswith(key) for name in changed)
    assert "wrote the trace's text for 6 of 6 prompts" in (folder / "README.md").read_text()


def test_a_gguf_without_its_library(traced, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
    wanted = export.Export(tmp_path / "v.gguf", ("x", "shift"))
    with pytest.raises(export.UserError, match="pip install gguf"):
        export.check_possible(wanted, "shift", tiny("llama"), "tiny", SOUND)
