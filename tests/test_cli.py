"""Bad input through the command line: one clear line, exit code 2, no traceback, nothing written."""

import json
import time

import pytest
import torch
from conftest import LAYERS, NEURONS, ROOT, WIDTH, run, texts, write_lines
from safetensors.torch import load_file, save_file

PATCH = "experiments/patch_four_groups.py"
COMMANDS = [*([f"experiments/{path.name}"] for path in sorted((ROOT / "experiments").glob("*.py"))), ["-m", "dpo"]]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: c[-1])
def test_help_answers_at_once(command):
    times = []
    for _ in range(3):
        started = time.perf_counter()
        done = run(*command, "--help", cwd=ROOT)
        times.append(time.perf_counter() - started)
        assert done.returncode == 0 and "--out" in done.stdout
    assert min(times) < 1, times


@pytest.fixture(scope="module")
def inputs(tiny, tmp_path_factory):
    """Options for patch_four_groups.py: a tiny base model, one `after DPO`, a probe, and short files."""
    folder = tmp_path_factory.mktemp("inputs")
    save_file(
        {"direction": torch.randn(WIDTH, generator=torch.Generator().manual_seed(0))}, folder / "probe.safetensors"
    )
    write_lines(folder / "prompts.jsonl", [{"prompt": p} for p in texts("prompts", "prompt")[:4]])
    return {
        "--model": tiny("llama"), "--post": tiny("llama", 1), "--probe": folder / "probe.safetensors",
        "--prompts": folder / "prompts.jsonl", "--passages": "embedded", "--scorer": "profanity-check", "--limit": 4,
    }  # fmt: skip


def fails(command, says: str, cwd, *, changed: dict, cache=None):
    """Run with the changed options and check the message; `cwd` must hold the same files afterwards."""
    if command == [PATCH]:
        changed = {"--out": cwd / "out", **changed}
    before = sorted(p for p in cwd.rglob("*") if p.is_file() and "cache" not in p.parts)
    given = (part for pair in changed.items() for part in pair if part is not None)  # None: a flag
    done = run(*command, *given, cwd=ROOT, DPO_NEURONS_CACHE=str(cwd / "cache"))
    assert done.returncode == 2, (done.returncode, done.stderr[-2000:])
    assert "Traceback" not in done.stderr and says in done.stderr.splitlines()[-1], done.stderr[-2000:]
    assert sorted(p for p in cwd.rglob("*") if p.is_file() and "cache" not in p.parts) == before
    return done


@pytest.mark.parametrize(
    "changed, says",
    [
        ({"--model": "gemma-9000"}, "known names: gemma-270m"),
        ({"--model": "./no/such/folder"}, "no such folder"),
        ({"--limit": 0}, "0 given, expected at least 1"),
        ({"--batch-size": 0}, "0 given, expected at least 1, or auto"),
        ({"--batch-size": "many"}, "many given, expected at least 1, or auto"),
        ({"--seeds": "0,0"}, "0,0 given, expected different whole numbers"),
        ({"--seeds": "one"}, "one given, expected different whole numbers"),
        ({"--strengths": "1,nan"}, "1,nan given, expected finite numbers"),
        ({"--order": "TP,TN"}, "TP,TN given, expected TP, AN, TN, AP in some order"),
        ({"--sets": "fifth_group"}, "--sets fifth_group: unknown; known: top256"),
        ({"--controls": "some"}, "'none', 'quick', 'full'"),
        ({"--released": "luck"}, "luck given, expected some of edit_positions"),
        ({"--released": "padding", "--protocol": "faithful"}, "leave one of them out"),
        ({"--holdout": None, "--limit": 1}, "--holdout: needs at least two prompts"),
        ({"--second-scorer": "words:missing.txt"}, "missing.txt: not a readable list of words"),
        ({"--prompts": "missing.jsonl"}, "--prompts missing.jsonl: No such file"),
        ({"--probe": "missing.safetensors"}, "no such file"),
        ({"--scorer": "perspective"}, "known: profanity-check"),
        ({"--post": "./missing"}, "--post ./missing: no such folder"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_options(inputs, tmp_path, changed, says):
    fails([PATCH], says, tmp_path, changed={**inputs, **changed})


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU, so asking for one is no error")
def test_a_device_that_is_not_there(inputs, tmp_path):
    fails([PATCH], "--device cuda: this machine has none", tmp_path, changed={**inputs, "--device": "cuda"})


def test_an_output_folder_that_exists(inputs, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious.txt").write_text("mine")
    fails([PATCH], "add --overwrite", tmp_path, changed=inputs)
    assert (tmp_path / "out" / "precious.txt").read_text() == "mine"


@pytest.mark.parametrize("value", ["nan", "inf"])
@pytest.mark.parametrize(
    "command, option",
    [(["-m", "dpo"], "--learning-rate"), (["experiments/make_pairs.py"], "--step-size")],
)
def test_numbers_that_are_none(tmp_path, command, option, value):
    """NaN passes every bound of a range by comparison, and infinity those that are open."""
    fails(command, f"{value} given, expected a finite number", tmp_path, changed={option: value})


@pytest.mark.parametrize(
    "kind, content, says",
    [
        ("prompts", "", "holds no prompts"),
        ("prompts", '{"prompt": "x"}\n{oops\n', "line 2: not a JSON object"),
        ("comments", '{"text": "x", "label": 1}\n{"text": "y", "label": 0}\n', "a probe needs two of each"),
        ("pairs", '{"prompt_text": "x", "unpert_gen_text": "", "pert_gen_text": "y"}\n', "line 1: 'unpert_gen_text'"),
    ],
)
def test_bad_data_files(inputs, tmp_path, kind, content, says):
    (tmp_path / "bad.jsonl").write_text(content)
    changed = {key: value for key, value in inputs.items() if key not in {"--probe", "--post"}}
    fails([PATCH], says, tmp_path, changed={**changed, f"--{kind}": tmp_path / "bad.jsonl"})


def test_an_unsupported_family(inputs, tmp_path, tiny):
    import shutil

    folder = tmp_path / "other"
    shutil.copytree(tiny("llama"), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "bloom"}))
    fails([PATCH], "supported: gpt2, llama, mistral", tmp_path, changed={**inputs, "--model": folder})
    (folder / "config.json").write_text("{")
    fails([PATCH], "config.json cannot be read", tmp_path, changed={**inputs, "--model": folder})


@pytest.mark.parametrize(
    "tensors, says",
    [
        ({"direction": torch.ones(WIDTH + 1)}, f"needs [{WIDTH}]; the probe belongs to another model"),
        ({"weights": torch.ones(WIDTH)}, "holds no tensor `direction`"),
        ({"direction": torch.full((WIDTH,), torch.nan)}, "NaN"),
    ],
)
def test_bad_probes(inputs, tmp_path, tensors, says):
    save_file(tensors, tmp_path / "bad.safetensors")
    fails([PATCH], says, tmp_path, changed={**inputs, "--probe": tmp_path / "bad.safetensors"})


def test_a_probe_that_is_no_safetensors_file(inputs, tmp_path):
    (tmp_path / "bad.safetensors").write_bytes(b"not a tensor in sight")
    fails(
        [PATCH],
        "not a readable safetensors file",
        tmp_path,
        changed={**inputs, "--probe": tmp_path / "bad.safetensors"},
    )


def test_a_checkpoint_with_nan_and_one_of_another_shape(inputs, tmp_path, tiny):
    import shutil

    folder = tmp_path / "broken"
    shutil.copytree(tiny("llama", 1), folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][3, 3] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    fails([PATCH], "down_proj.weight holds NaN", tmp_path, changed={**inputs, "--post": folder})
    fails([PATCH], "model_type is gpt2", tmp_path, changed={**inputs, "--post": tiny("gpt2")})
    (folder / "model.safetensors").write_bytes((tiny("llama") / "model.safetensors").read_bytes()[:5000])
    fails([PATCH], "cannot be read", tmp_path, changed={**inputs, "--post": folder})


def test_activations_of_another_model_s_shape(tmp_path):
    from lib.errors import UserError
    from lib.neurons import load_activations

    save_file({"activation": torch.ones(LAYERS, NEURONS + 1)}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="belongs to another model"):
        load_activations(tmp_path / "a.safetensors", (LAYERS, NEURONS))
    save_file({"activation": torch.full((LAYERS, NEURONS), torch.inf)}, tmp_path / "b.safetensors")
    with pytest.raises(UserError, match="NaN or infinity"):
        load_activations(tmp_path / "b.safetensors", (LAYERS, NEURONS))


def test_a_scorer_whose_weights_cannot_be_fetched(inputs, tmp_path, monkeypatch):
    """Detoxify fetches from GitHub: a proxy that refuses every connection stands for a machine without a network."""
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    fails([PATCH], "use --scorer profanity-check", tmp_path, changed={**inputs, "--scorer": "detoxify"})


def test_dpo_and_probe_refuse_bad_input(tmp_path, tiny):
    (tmp_path / "bad.jsonl").write_text('{"prompt_text": "x", "unpert_gen_text": "y"}\n')
    fails(
        ["-m", "dpo"],
        "known are prompt_text, unpert_gen_text, pert_gen_text",
        tmp_path,
        changed={"--pairs": tmp_path / "bad.jsonl"},
    )
    changed = {"--comments": tmp_path / "bad.jsonl", "--model": tiny("llama")}
    fails(["experiments/train_probe.py"], "line 1: 'comment_text' is missing", tmp_path, changed=changed)
    for script in ("experiments/train_probe.py", "experiments/make_pairs.py"):
        fails([script], "'auto' is not a valid integer", tmp_path, changed={"--batch-size": "auto"})


@pytest.mark.parametrize(
    "changed, says",
    [
        ({"--seed": -1}, "-1 is not in the range"),
        ({"--seed": 2**32}, "is not in the range"),
        ({"--seeds": "0,-1"}, "expected different whole numbers"),
        ({"--seeds": "0,²"}, "expected different whole numbers"),
        ({"--revision": "main"}, "is a folder"),
    ],
)
def test_what_is_known_before_anything_is_made(inputs, tmp_path, changed, says):
    fails([PATCH], says, tmp_path, changed={**inputs, **changed})


@pytest.mark.parametrize("fault", ["post", "passages", "scorer", "out"])
def test_nothing_is_made_before_what_was_given_is_checked(inputs, tmp_path, tiny, fault):
    """Without a probe one would be trained first; the cache stays without one."""
    import shutil

    given = {key: value for key, value in inputs.items() if key != "--probe"}
    if fault == "post":
        given["--post"] = shutil.copytree(tiny("llama", 1), tmp_path / "post")
        weights = load_file(given["--post"] / "model.safetensors")
        del weights["model.layers.1.mlp.up_proj.weight"]
        save_file(weights, given["--post"] / "model.safetensors", metadata={"format": "pt"})
    if fault == "passages":
        given["--passages"] = write_lines(tmp_path / "short.jsonl", [{"text": "too short"}])
    if fault == "scorer":
        given["--scorer"] = "hf:/no/such/folder"
    if fault == "out":
        (tmp_path / "file").write_text("")
        given["--out"] = tmp_path / "file" / "out"
    says = {"post": "1 of the model's weights", "passages": "no passage has", "scorer": "--scorer", "out": "written"}
    fails([PATCH], says[fault], tmp_path, changed=given)
    assert not (tmp_path / "cache" / "probe").exists() and not (tmp_path / "cache" / "dpo").exists()


def test_places_that_can_hold_nothing(tmp_path, tiny):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "file").write_text("")
    for command in (["-m", "dpo"], ["experiments/train_probe.py"], [PATCH], ["experiments/make_pairs.py"]):
        for out in ("/", tmp_path / "loop", tmp_path / "file" / "out", "/proc/zz/out"):
            given = ["--model", tiny("llama"), "--out", out, "--overwrite"]
            given += [] if command[-1].endswith(("dpo", "probe.py")) else ["--prompts", "embedded", "--scorer", "words"]
            done = run(*command, *given, cwd=ROOT, DPO_NEURONS_CACHE=str(tmp_path / "cache"))
            assert done.returncode == 2 and "Traceback" not in done.stderr, (command, out, done.stderr[-800:])
            assert not (tmp_path / "cache" / "probe").exists()


@pytest.mark.parametrize("cache", ["/dev/null/cache", "/proc/cache"])
def test_a_cache_that_cannot_be_written(inputs, tmp_path, cache):
    given = [str(part) for pair in {**inputs, "--out": tmp_path / "out"}.items() for part in pair]
    done = run(PATCH, *given, cwd=ROOT, DPO_NEURONS_CACHE=cache)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr[-1500:]
    assert "written" in done.stderr.splitlines()[-1] and not list(tmp_path.iterdir())


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_a_screen_that_is_not_utf_8(inputs, tmp_path, encoding):
    given = [str(part) for pair in {**inputs, "--sets": "top256", "--out": tmp_path / "out"}.items() for part in pair]
    done = run(PATCH, *given, cwd=ROOT, PYTHONIOENCODING=encoding, PYTHONUTF8="0")
    assert done.returncode == 0 and "top256" in done.stdout, done.stderr[-1500:]


@pytest.mark.parametrize("key", ["secret-0123\n", "  secret-0123 ", "secret\r\n0123", "sécret-0123", "secret 0123"])
def test_a_key_is_never_shown(inputs, tmp_path, key):
    """Line ends around it are no part of it; what no header can hold is refused, and not shown."""
    done = run(
        PATCH, "--model", "lab/tiny", "--prompts", inputs["--prompts"], "--passages", "embedded", "--scorer", "words",
        "--remote", "--remote-timeout", "1", "--post", "lora:/no/such", "--out", tmp_path / "out", cwd=ROOT,
        NDIF_API_KEY=key, NDIF_HOST="http://127.0.0.1:9", DPO_NEURONS_CACHE=str(tmp_path / "cache"),
        HF_ENDPOINT="http://127.0.0.1:9", HF_HOME=str(tmp_path / "hf"),
    )  # fmt: skip
    assert done.returncode == 2 and "Traceback" not in done.stderr
    for part in (key.strip(), repr(key.strip())[1:-1], "0123"):
        assert part not in done.stderr + done.stdout
