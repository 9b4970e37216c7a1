"""Seconds from a script's start to its first trace on a cached model, against imports and transformers' own loading.

python tests/bench/bench_start.py                 # a minute
"""

import subprocess
import sys
from pathlib import Path

import click

from lib.cli import options

ROOT = Path(__file__).parents[2]
IMPORTS = "import torch, transformers, nnsight; from nnsight import TransformersModel"
LOADS = """
import torch, nnsight
from nnsight import TransformersModel
from transformers import AutoModelForCausalLM, AutoTokenizer
AutoModelForCausalLM.from_pretrained("{folder}", dtype=torch.float32), AutoTokenizer.from_pretrained("{folder}")
"""
# The script as it is, ended where it opens its first trace.
UNTIL_TRACE = """
import os, runpy, sys
import nnsight.tracing.tracer as tracer
def opened(*given, **named): os._exit(17)
tracer.Tracer.__enter__ = opened
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@click.command(help=__doc__.split("\n")[0])
@options("model")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True)
def main(model, rounds):
    import tempfile

    from timing import in_turn, medians, paired, row, say

    from lib.models import resolve

    resolve(model)  # unpacked once, as before any later start

    def imports():
        subprocess.run([sys.executable, "-c", IMPORTS], check=True)

    def loads():
        subprocess.run(
            [sys.executable, "-c", LOADS.format(folder=resolve(model).path)], check=True, capture_output=True
        )

    with tempfile.TemporaryDirectory() as folder:

        def script():
            command = [sys.executable, "-c", UNTIL_TRACE, ROOT / "experiments" / "train_probe.py", "--model", model]
            done = subprocess.run([*map(str, command), "--out", f"{folder}/out"], capture_output=True, text=True)
            if done.returncode != 17:
                raise SystemExit(f"no trace was opened: {done.stderr[-2000:]}")

        seconds = in_turn({"imports": imports, "transformers": loads, "ours": script}, rounds)
    say(
        row(
            "start of a script, to its first trace",
            "import torch, transformers, nnsight",
            1 / paired(seconds, "imports"),
            "<= 1.3",
            unit="times as long",
            seconds=medians(seconds),
        ),
        row(
            "  the same",
            "these and AutoModelForCausalLM, AutoTokenizer",
            1 / paired(seconds, "transformers"),
            "<= 1.3",
            unit="times as long",
        ),
        model=model,
    )


if __name__ == "__main__":
    main()
