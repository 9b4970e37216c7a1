"""Every benchmark, each in a process of its own, one after the other: `make bench`.

Prints the table with pass or fail, and writes results/bench/bench.json.

    python tests/bench/run.py                         # about 17 minutes on two CPU cores
    python tests/bench/run.py generation grouping --out my.json
"""

import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import click

HERE = Path(__file__).parent
RECORD = HERE.parents[1] / "results" / "bench" / "bench.json"
BENCHES = {
    "generation": ["bench_generation.py", "--rounds", "3"],
    "table": ["bench_table.py", "--model", "smollm2", "--prompts", "20", "--passages", "7"],
    "probe": ["bench_probe_features.py"],
    "means": ["bench_mean_activations.py", "--rounds", "1"],
    "grouping": ["bench_grouping.py"],
    "dpo": ["bench_dpo.py"],
    "dpo-smollm2": ["bench_dpo.py", "--model", "smollm2"],
    "start": ["bench_start.py", "--rounds", "3"],
}


@click.command(help=__doc__.split("\n")[0])
@click.argument("names", nargs=-1, type=click.Choice(list(BENCHES)))
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), default=RECORD, help="The record.")
def main(names, out):
    from rich.console import Console
    from rich.table import Table

    from lib import results

    started, rows = time.monotonic(), []
    console = Console(stderr=True)
    for name in names or BENCHES:
        console.print(f"{name} ...")
        begun = time.monotonic()
        done = subprocess.run(
            [sys.executable, HERE / BENCHES[name][0], *BENCHES[name][1:]], capture_output=True, text=True
        )
        if done.returncode:
            raise SystemExit(f"{name}: {done.stderr[-3000:]}")
        found = json.loads(done.stdout.splitlines()[-1])
        command = "python tests/bench/" + " ".join(BENCHES[name])
        rows += [one | {"command": command, "threads": found["threads"]} for one in found["rows"]]
        console.print(f"  {time.monotonic() - begun:.0f} s")
    table = Table("work", "against", "measured", "bar", "")
    for one in rows:
        table.add_row(
            one["work"], one["rival"], f"{one['value']:.3g} {one['unit']}", one["bar"], "pass" if one["met"] else "FAIL"
        )
    Console(width=150).print(table)
    about = results.provenance(
        machine={"processor": platform.machine(), "cpus": os.cpu_count()},
        seconds=round(time.monotonic() - started),
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    results.write_json(out, {"rows": rows, "provenance": about})


if __name__ == "__main__":
    main()
