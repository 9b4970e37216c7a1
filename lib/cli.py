"""Options that every script spells alike. Light: torch is imported after the command line has been read."""

from collections.abc import Callable

import click

from lib.embedded import EMBEDDED


def _positive(context, parameter, value):
    if value is not None and value < 1:
        raise click.BadParameter(f"{value} given, expected at least 1.")
    return value


OPTIONS = {
    "model": click.option(
        "--model",
        default="gemma-270m",
        show_default=True,
        help="gemma-270m, smollm2 (from PyPI), gpt2, llama, gemma, mistral (the papers'), a Hub id or a folder.",
    ),
    "revision": click.option("--revision", help="Branch, tag or commit of a Hub model."),
    "device": click.option(
        "--device", type=click.Choice(["auto", "cpu", "cuda", "mps"]), default="auto", show_default=True
    ),
    "dtype": click.option(
        "--dtype",
        type=click.Choice(["auto", "float32", "bfloat16"]),
        default="auto",
        show_default=True,
        help="auto: bfloat16 on CUDA, float32 elsewhere.",
    ),
    "seed": click.option("--seed", type=int, default=0, show_default=True),
    "batch-size": click.option("--batch-size", type=int, default=48, show_default=True, callback=_positive),
    "limit": click.option(
        "--limit",
        type=int,
        callback=_positive,
        help="Use the first LIMIT prompts, a third as many passages.  [default: 48 for the models from PyPI, else all]",
    ),
    "prompts": click.option(
        "--prompts",
        help="embedded, hub (RealToxicityPrompts, challenging) or a file.  [default: embedded for the models from "
        "PyPI, else hub]",
    ),
    "passages": click.option(
        "--passages", help="Text for perplexity and F1: embedded, hub (WikiText-2) or a file.  [default: as --prompts]"
    ),
    "comments": click.option(
        "--comments",
        default="embedded",
        show_default=True,
        help="Labelled comments for the probe: embedded, hub (Jigsaw) or a file (Jigsaw's train.csv).",
    ),
    "pairs": click.option(
        "--pairs", default="embedded", show_default=True, help="Preference pairs: embedded, or a JSON-lines file."
    ),
    "scorer": click.option(
        "--scorer",
        help="profanity-check, detoxify, detoxify:unbiased or hf:<repo>.  [default: profanity-check for the models "
        "from PyPI, else detoxify]",
    ),
    "protocol": click.option(
        "--protocol",
        type=click.Choice(["sound", "faithful"]),
        default="sound",
        show_default=True,
        help="faithful: as the papers' released code computed its numbers.",
    ),
    "probe": click.option("--probe", help="A probe's safetensors file.  [default: train_probe.py makes it]"),
    "post": click.option(
        "--post", help="The model after DPO: a folder or a Hub id.  [default: `python -m dpo` makes it]"
    ),
    "remote": click.option(
        "--remote", type=click.Choice(["local"]), help="local: ship every trace to nnsight's simulated server."
    ),
    "overwrite": click.option("--overwrite", is_flag=True, help="Replace an output folder that exists."),
    "raw-text": click.option("--raw-text", is_flag=True, help="Do not mask profane words on the screen."),
}


def options(*names: str) -> Callable:
    """Decorator: the named shared options, in this order."""

    def decorate(command):
        for name in reversed(names):
            command = OPTIONS[name](command)
        return command

    return decorate


def default_data(model: str, given: str | None) -> str:
    """What --prompts or --passages mean when they are not given."""
    return given or ("embedded" if model in EMBEDDED else "hub")


def default_scorer(model: str, given: str | None) -> str:
    """What --scorer means when it is not given."""
    return given or ("profanity-check" if model in EMBEDDED else "detoxify")


def default_limit(model: str, given: int | None) -> int | None:
    """What --limit means when it is not given: 48 prompts keep a demonstration on two cores within minutes."""
    return given or (48 if model in EMBEDDED else None)
