"""Tiny models as folders and loaded, scripts as modules and as processes."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import (  # noqa: F401  tests take them from here
    FAMILIES,
    LAYERS,
    NEURONS,
    ROOT,
    WIDTH,
    build_model,
    build_tokenizer,
    texts,
)  # fmt: skip

torch.set_num_threads(1)  # tiny matrices: a second thread costs more than it gives
DEVICE = os.environ.get("TEST_DEVICE", "cpu")  # where `traced` models are: `make test-gpu` says cuda
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the same for the scripts: five times as fast beside another worker


def load_script(name: str):
    """An experiment as a module. Only tests do this: scripts are run, and copied, never imported."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "experiments" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """family -> folder of a tiny model; `tiny(family, seed)` gives another one of the same shape."""
    made = {}

    def folder(family: str, seed: int = 0) -> Path:
        if (family, seed) not in made:
            path = tmp_path_factory.mktemp(f"{family}-{seed}") / f"tiny-{family}"
            tokenizer = build_tokenizer(bos=family != "gpt2")
            build_model(family, len(tokenizer), seed).save_pretrained(path)
            tokenizer.save_pretrained(path)
            made[family, seed] = path
        return made[family, seed]

    return folder


@pytest.fixture(scope="session")
def traced(tiny):
    """family -> tiny model loaded for tracing."""
    from lib.models import load, resolve

    made = {}

    def model(family: str, seed: int = 0):
        if (family, seed) not in made:
            made[family, seed] = load(resolve(str(tiny(family, seed))), DEVICE, "float32")
        return made[family, seed]

    return model


class Run:
    """What functions of scripts look at of the `Inputs` of a run here."""

    remote = False

    def __init__(self, base, protocol):
        self.base, self.protocol = base, protocol

    def cosines(self, direction):
        from lib.experiment import Inputs

        return Inputs.cosines(self, direction)

    def at_weights(self, function, *arguments):
        return function(self.base, *arguments)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of one's own."""
    monkeypatch.setenv("DPO_NEURONS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def run(*command, cwd=None, timeout=300, **environment) -> subprocess.CompletedProcess:
    """Run `python ...` as a user would, from a folder that is not the project's."""
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd, env={**os.environ, "COLUMNS": "200", **environment}, capture_output=True, text=True, timeout=timeout,
    )  # fmt: skip


def assert_figure(path: Path) -> None:
    """A PNG that is there and not of one colour."""
    import matplotlib.image

    assert matplotlib.image.imread(path)[..., :3].std() > 0.02


def write_lines(path: Path, rows: list[dict]) -> Path:
    """A JSON-lines file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pytest_collection_modifyitems(items):
    """The longest test first, so that the other worker does the rest meanwhile."""
    items.sort(key=lambda item: item.get_closest_marker("embedded") is None)
