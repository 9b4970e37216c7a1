"""What a machine with a GPU has to show first, each step a command of its own: `make test-gpu`.

The device tests and the trace tests on CUDA, every script on a tiny model, the main script and DPO on the embedded
model, the benchmarks. Prints a line a step, and writes results/gpu/gpu.json, bench.json and the main script's record.

    python tests/gpu/run.py                            # skips, saying so, where there is no CUDA GPU
    python tests/gpu/run.py device traces main         # these steps alone
"""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import click

ROOT = Path(__file__).parents[2]
PYTEST = ["-m", "pytest", "-q", "-p", "no:cacheprovider"]
STEPS = {
    "device": [*PYTEST, "-n", "4", "tests/gpu/test_device.py"],
    "traces": [*PYTEST, "-n", "4", "tests/test_traces.py"],
    "scripts": [*PYTEST, "-n", "6", "tests/gpu/test_scripts.py"],
    "dpo": ["-m", "dpo", "--device", "cuda", "--out", "{made}/dpo"],
    "dpo-bfloat16": ["-m", "dpo", "--device", "cuda", "--dtype", "bfloat16", "--out", "{made}/dpo-bfloat16"],
    "main": [
        *("experiments/patch_four_groups.py", "--device", "cuda", "--limit", "256", "--second-scorer", "words"),
        *("--batch-size", "auto", "--out", "{out}/patch_four_groups/gemma-270m", "--overwrite"),
    ],
    "bench": [
        *("tests/bench/run.py"),
        *("--out", "{out}/bench.json"),
    ],
}  # fmt: skip


@click.command(help=__doc__.split("\n")[0])
@click.argument("names", nargs=-1, type=click.Choice(list(STEPS)))
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default=ROOT / "results" / "gpu")
def main(names, out):
    import tempfile

    import torch

    from lib import results

    if not torch.cuda.is_available():
        click.echo("This machine has no CUDA GPU: skipped, nothing was tested.")
        return
    out = out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    places = [str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "TEST_DEVICE": "cuda", "PYTHONPATH": os.pathsep.join(places)}
    steps, record = [], out / "gpu.json"
    with tempfile.TemporaryDirectory() as made:
        for name in names or STEPS:
            command = [part.format(made=made, out=out) for part in STEPS[name]]
            started = time.monotonic()
            done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
            seconds = round(time.monotonic() - started, 1)
            lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
            said = next((line for line in reversed(done.stdout.splitlines()) if line.strip()), "")
            steps.append(
                {"step": name, "command": " ".join(["python", *STEPS[name]]), "exit": done.returncode,
                 "seconds": seconds, "said": said if name in ("device", "traces", "scripts") else ""}
            )  # fmt: skip
            click.echo(f"{name}: {'ok' if not done.returncode else 'FAILED'} in {seconds} s   {said[:160]}")
            if done.returncode:
                click.echo("\n".join(lines[-40:]), err=True)
            if name.startswith("dpo") and not done.returncode:
                shutil.copyfile(Path(made) / name / "log.jsonl", out / f"{name}.log.jsonl")
            about = results.provenance(gpu=torch.cuda.get_device_name(), cuda=torch.version.cuda)
            results.write_json(record, {"steps": steps, "provenance": about})
    if any(step["exit"] for step in steps):
        sys.exit(1)


if __name__ == "__main__":
    main()
