"""A table that is killed at random moments, 20 times, and 1,000 batches of patched generation.

Each time the script is started anew, killed by SIGKILL after a random part of a whole run's time, and run to its end:
the rows must be those of a run that nothing disturbed. Tiny random models; about ten minutes on two CPU cores.

    python tests/bench/soak.py
"""

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click

ROOT = Path(__file__).parents[2]
RECORD = ROOT / "results" / "bench" / "soak.json"


@click.command(help=__doc__.split("\n")[0])
@click.option("--kills", type=click.IntRange(1), default=20, show_default=True)
@click.option("--batches", type=click.IntRange(100), default=1000, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), default=RECORD, help="The record.")
def main(kills, batches, seed, out):
    from bench_generation import grown, patch_script

    from lib import results

    moments = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        common = make_inputs(folder)
        started = time.monotonic()
        rows = table(common, folder / "whole", folder)
        seconds = time.monotonic() - started
        same, finished = 0, []
        for kill in range(kills):
            place = folder / f"run{kill}"
            process = start(common, place, folder)
            try:
                process.wait(moments.uniform(0.2, 1.0) * seconds)
            except subprocess.TimeoutExpired:
                pass
            process.kill()
            process.wait()
            finished.append(len(list(place.with_name(place.name + ".partial").glob("conditions/*.json"))))
            if not place.exists():
                same += table(common, place, folder) == rows
            else:  # it was faster than the kill
                same += json.loads((place / "run.json").read_text())["rows"] == rows
            click.echo(f"kill {kill + 1}, {finished[-1]} conditions finished: {same} alike", err=True)
    record = {
        "kills": kills, "same_rows": same, "conditions_finished_when_killed": finished,
        "seconds_of_a_whole_run": round(seconds, 1), "batches": batches,
        "megabytes_grown": round(grown(patch_script(), batches), 2),
        "provenance": results.provenance(),
    }  # fmt: skip
    results.write_json(out, record)
    click.echo(json.dumps(record, indent=1))
    if same < kills:
        raise SystemExit("not all runs ended with the same rows")


def make_inputs(folder: Path) -> list[str]:
    """Tiny models before and after DPO, and a probe; returns the script's options."""
    import torch

    from lib.probes import Probe

    sys.path.insert(0, str(ROOT / "tests"))
    from tiny_models import WIDTH, build_model, build_tokenizer

    tokenizer = build_tokenizer(bos=True)
    for name, seed in (("base", 0), ("post", 1)):
        build_model("llama", len(tokenizer), seed).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    direction = torch.randn(WIDTH, generator=torch.Generator().manual_seed(0))
    Probe(direction, 0.0).save(folder / "probe.safetensors")
    return [
        "--model", str(folder / "base"), "--post", str(folder / "post"), "--probe", str(folder / "probe.safetensors"),
        "--prompts", "embedded", "--passages", "embedded", "--scorer", "profanity-check", "--limit", "24",
    ]  # fmt: skip


def start(common: list[str], out: Path, folder: Path) -> subprocess.Popen:
    script = ROOT / "experiments" / "patch_four_groups.py"
    return subprocess.Popen(
        [sys.executable, str(script), *common, "--out", str(out)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env={**os.environ, "DPO_NEURONS_CACHE": str(folder / "cache")},
    )  # fmt: skip


def table(common: list[str], out: Path, folder: Path) -> list[dict]:
    """The rows of a run to its end."""
    if start(common, out, folder).wait():
        raise SystemExit("the script failed")
    return json.loads((out / "run.json").read_text())["rows"]


if __name__ == "__main__":
    main()
