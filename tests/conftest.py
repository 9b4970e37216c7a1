"""Tiny random models of every family, saved as folders, with a tokenizer built here."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # tiny matrices: a second thread costs more than it gives
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the same for the scripts: five times as fast beside another worker
ROOT = Path(__file__).parents[1]
FAMILIES = ["gpt2", "llama", "mistral", "gemma2", "gemma3_text"]
LAYERS, WIDTH, NEURONS = 3, 32, 48


def load_script(name: str):
    """An experiment as a module. Only tests do this: scripts are run, and copied, never imported."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "experiments" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def texts(name: str, field: str) -> list[str]:
    """A field of an embedded file."""
    lines = (ROOT / "lib" / "assets" / f"{name}.jsonl").read_text().splitlines()
    return [json.loads(line)[field] for line in lines]


def build_tokenizer(bos: bool):
    """A byte-level BPE of 500 tokens that adds one BOS, or none as GPT-2's does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<eos>", "<bos>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts("passages", "text")[:100], trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", tokenizer.token_to_id("<bos>"))]
        )
    names = {"bos_token": "<bos>"} if bos else {}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", **names)


def build_model(family: str, vocab: int, seed: int = 0):
    """A random model whose weights are large enough that every neuron matters and texts differ."""
    from transformers import AutoConfig, AutoModelForCausalLM

    common = {"vocab_size": vocab, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2, "initializer_range": 0.25}
    if family == "gpt2":
        shape = {"n_layer": LAYERS, "n_embd": WIDTH, "n_head": 4, "n_inner": NEURONS, "n_positions": 256}
    else:
        shape = {
            "num_hidden_layers": LAYERS,
            "hidden_size": WIDTH,
            "intermediate_size": NEURONS,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "max_position_embeddings": 256,
        }
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **common, **shape))
    for name, weight in model.named_parameters():
        if "norm" in name or "ln_" in name:  # norms at their start would hide a mistake in how they are read
            weight.data += 0.3 * torch.randn_like(weight)
    return model.float().eval()


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
            made[family, seed] = load(resolve(str(tiny(family, seed))), "cpu")
        return made[family, seed]

    return model


class Run:
    """What functions of scripts look at of an experiment that runs here."""

    remote = False

    def __init__(self, base, protocol):
        self.base, self.protocol = base, protocol

    def cosines(self, direction):
        from lib.experiment import Experiment

        return Experiment.cosines(self, direction)

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


def write_lines(path: Path, rows: list[dict]) -> Path:
    """A JSON-lines file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pytest_collection_modifyitems(items):
    """The longest test first, so that the other worker does the rest meanwhile."""
    items.sort(key=lambda item: item.get_closest_marker("embedded") is None)
