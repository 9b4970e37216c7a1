"""Options that every script spells alike. Light: torch is imported after the command line has been read (`check`)."""

import io
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path

import click

from lib.embedded import EMBEDDED
from lib.protocol import differences

LARGEST_SEED = 2**32 - 1  # NumPy's and scikit-learn's

for stream in (sys.stdout, sys.stderr):
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="replace")  # a table on a screen that knows no arrows is better than none


def _positive(context, parameter, value):
    if value is not None and value < 1:
        raise click.BadParameter(f"{value} given, expected at least 1.")
    return value


def _batch_size(context, parameter, value):
    if value == "auto":
        return value
    if not value.isdecimal() or int(value) < 1:
        raise click.BadParameter(f"{value} given, expected at least 1, or auto.")
    return int(value)


def _seeds(context, parameter, value):
    if value is None:
        return None
    parts = value.split(",")
    numbers_given = [int(part) if re.fullmatch(r"\s*[0-9]{1,10}\s*", part) else -1 for part in parts]
    if min(numbers_given) < 0 or max(numbers_given) > LARGEST_SEED or len(set(numbers_given)) < len(parts):
        raise click.BadParameter(f"{value} given, expected different whole numbers such as 0,1,2.")
    return numbers_given


class Finite(click.FloatRange):
    """click.FloatRange, which lets NaN pass every bound, and infinity those that there are not."""

    def convert(self, value, param, ctx):
        """The number. Raises click.BadParameter."""
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} given, expected a finite number.", param, ctx)
        return number


def numbers(context, parameter, value):
    """Callback of options that take a grid: `0.1,0.3` becomes a list of floats."""
    try:
        grid = [float(part) for part in value.split(",")]
    except ValueError:
        raise click.BadParameter(f"{value} given, expected numbers such as 0.1,0.3.") from None
    if not all(-1e12 < number < 1e12 for number in grid):  # NaN is not
        raise click.BadParameter(f"{value} given, expected finite numbers.")
    return list(dict.fromkeys(grid))


def counts(context, parameter, value):
    """Callback of options that take sizes: `128,256` becomes a list of integers, 1 at least."""
    sizes = numbers(context, parameter, value)
    if not all(size >= 1 and size == int(size) for size in sizes):
        raise click.BadParameter(f"{value} given, expected numbers of neurons such as 7,64.")
    return [int(size) for size in sizes]


def factor(context, parameter, value):
    """Callback of --factor: a number above 1, or `dpo`."""
    (limit, *more) = ["dpo"] if value == "dpo" else numbers(context, parameter, value)
    if more or limit != "dpo" and limit <= 1:
        raise click.BadParameter(f"{value} given, expected a number above 1, or dpo.")
    return limit


def names_of(known: tuple[str, ...], every: bool = False) -> Callable:
    """Callback of options that take some of the known names, separated by commas; or every one, in some order."""

    def read(context, parameter, value):
        names = [name.strip() for name in value.split(",")] if value else None
        if every and sorted(names or []) != sorted(known):
            raise click.BadParameter(f"{value} given, expected {', '.join(known)} in some order.")
        if wrong := [name for name in names or [] if name not in known]:
            raise click.BadParameter(f"{wrong[0]} given, expected some of {', '.join(known)}, separated by commas.")
        return names

    return read


def _released(context, parameter, value):
    fields = [field.strip() for field in value.split(",")] if value else []
    for field in fields:
        if field not in differences():
            raise click.BadParameter(f"{field} given, expected some of {', '.join(differences())}.")
    return fields


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
        help="auto: float32, but bfloat16 on CUDA where all files hold that or float32 does not fit.",
    ),
    "seed": click.option("--seed", type=click.IntRange(0, LARGEST_SEED), default=0, show_default=True),
    "seeds": click.option(
        "--seeds",
        callback=_seeds,
        help="Train a probe and a DPO model with each of these seeds, such as 0,1,2.  [default: --seed]",
    ),
    "batch-size": click.option(
        "--batch-size", type=int, default=48, show_default=True, callback=_positive, help="Prompts at once."
    ),
    "batch-size-or-auto": click.option(
        "--batch-size",
        default="64",
        show_default=True,
        callback=_batch_size,
        help="Texts at once; auto: as many as fit into memory.",
    ),
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
    "preset": click.option(
        "--preset",
        type=click.Choice(["lee2024", "yang2025", "embedded", "strong"]),
        help="Hyperparameters of DPO. embedded halves toxicity, as the papers' DPO does; strong goes on.  [default: "
        "embedded for the models from PyPI, else yang2025]",
    ),
    "updates": click.option(
        "--updates", type=click.IntRange(1), help="Updates of DPO, where no --post is given.  [default: by --preset]"
    ),
    "scorer": click.option(
        "--scorer",
        help="profanity-check, words, words:<file>, probe:<model>, hatesonar, detoxify, detoxify:unbiased or "
        "hf:<repo>.  [default: profanity-check for the models from PyPI, else detoxify]",
    ),
    "second-scorer": click.option(
        "--second-scorer",
        multiple=True,
        help="Another opinion, from another family, such as words, probe:smollm2, hatesonar or detoxify:unbiased; "
        "may be given several times.",
    ),
    "controls": click.option(
        "--controls",
        type=click.Choice(["none", "quick", "full"]),
        default="none",
        show_default=True,
        help="Compare the main edits with controls; quick: 3 draws of each random one, full: 20.",
    ),
    "holdout": click.option(
        "--holdout",
        is_flag=True,
        help="Measure effects on half of the prompts, with means and groups from the other half, and from the same.",
    ),
    "out": click.option(
        "--out", type=click.Path(file_okay=False), help="Folder to write.  [default: runs/<script>/<model>]"
    ),
    "export": click.option(
        "--export",
        help="Write the edit of --export-condition into weights: a folder, for an ordinary checkpoint; FILE.gguf or "
        "FILE.safetensors, for one vector a layer.",
    ),
    "export-condition": click.option(
        "--export-condition", help='Name and kind of a condition, such as "four_groups, shift".'
    ),
    "protocol": click.option(
        "--protocol",
        type=click.Choice(["sound", "faithful"]),
        default="sound",
        show_default=True,
        help="faithful: as the papers' released code computed its numbers.",
    ),
    "released": click.option(
        "--released",
        callback=_released,
        help="Take only these choices as the released code did, the others soundly, such as means_over,padding: the "
        "fields of lib/protocol.py. To measure what one choice changes.",
    ),
    "probe": click.option("--probe", help="A probe's safetensors file.  [default: train_probe.py makes it]"),
    "post": click.option(
        "--post",
        help="The model after DPO: a folder, a Hub id, lora:FOLDER (an adapter, added inside the traces with --remote) "
        "or means:FILE (its mean activations alone).  [default: `python -m dpo` makes it]",
    ),
    "remote": click.option(
        "--remote",
        type=click.Choice(["ndif", "local"]),
        is_flag=False,
        flag_value="ndif",
        help="Run the traces on NDIF, without the model's weights here; local: on nnsight's simulation of it.",
    ),
    "remote-timeout": click.option(
        "--remote-timeout",
        type=Finite(0, min_open=True),
        default=1800,
        show_default=True,
        help="Seconds without news of a request, or of the service, after which it is given up.",
    ),
    "verbose": click.option("-v", "--verbose", is_flag=True, help="Print every request's status and size."),
    "overwrite": click.option("--overwrite", is_flag=True, help="Replace an output folder that exists."),
    "dry-run": click.option(
        "--dry-run", is_flag=True, help="Print the plan: conditions, forward passes, time and memory. Runs nothing."
    ),
    "raw-text": click.option("--raw-text", is_flag=True, help="Do not mask profane words on the screen."),
}


def options(*names: str) -> Callable:
    """Decorator: the named shared options, in this order."""

    def decorate(command):
        for name in reversed(names):
            command = OPTIONS[name](command)
        return command

    return decorate


REMOTE = ("remote", "remote-timeout", "verbose")
INPUTS = ("model", "revision", "device", "dtype", "seed", "seeds", "batch-size-or-auto", "limit", "prompts", "passages")
ARTIFACTS = ("comments", "pairs", "preset", "updates", "probe", "post")
MEASURES = ("scorer", "second-scorer", "controls", "holdout", "protocol", "released", "remote", *REMOTE[1:])
OUTPUTS = ("out", "overwrite", "dry-run", "raw-text")
EXPORT = ("export", "export-condition")  # of scripts whose edits are changes of weights
CAUSAL = (*INPUTS, *ARTIFACTS, *MEASURES, *OUTPUTS)  # of every script that makes a causal claim
EFFECTS = {"passages", "scorer", "second-scorer", "controls", "holdout", "raw-text"}
LOOKING = tuple(name for name in CAUSAL if name not in EFFECTS)  # of every script that edits nothing


def check(command: click.Command, module: str, prog_name: str | None = None) -> None:
    """Read the command line of a script that is run, before it imports torch: help and wrong options end here.

    module: the script's `__name__`; nothing happens where it is imported.
    """
    if module == "__main__":
        try:
            command.make_context(prog_name or Path(sys.argv[0]).name, sys.argv[1:])
        except click.exceptions.Exit as done:
            sys.exit(done.exit_code)
        except click.ClickException as error:
            error.show()
            sys.exit(error.exit_code)


def default_data(model: str, given: str | None) -> str:
    """What --prompts or --passages mean when they are not given."""
    return given or ("embedded" if model in EMBEDDED else "hub")


def default_scorer(model: str, given: str | None) -> str:
    """What --scorer means when it is not given."""
    return given or ("profanity-check" if model in EMBEDDED else "detoxify")


def default_limit(model: str, given: int | None) -> int | None:
    """What --limit means when it is not given: 48 prompts keep a demonstration on two cores within minutes."""
    return given or (48 if model in EMBEDDED else None)
