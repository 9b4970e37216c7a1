"""Compute the intervals of every committed record of a causal table again, from its measurements.jsonl.

What was measured stays; means, intervals and ranks become those of the present lib/statistics.py. Nothing changes where
they are already (a test says so).

    python results/recompute.py                    # all
    python results/recompute.py steer/gemma-270m   # these alone
"""

import json
from pathlib import Path

import click

from lib.evaluation import row_entries
from lib.results import write_json

HERE = Path(__file__).parent
NAME = ("name", "kind", "of", "means", "seed", "draw")
OLD = ("percent_of_draws_above_real",)  # what rank_p has replaced


@click.command(help=__doc__.split("\n")[0])
@click.argument("names", nargs=-1)
def main(names):
    for path in sorted(HERE.rglob("measurements.jsonl")):
        name = path.parent.relative_to(HERE).as_posix()
        if not names or name in names:
            write_json(path.with_name("run.json"), recomputed(path.parent))
            click.echo(name)


def recomputed(folder: Path) -> dict:
    """The record of a folder, with its rows' statistics computed from its measurements."""
    record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    measured: dict[tuple, list] = {}
    for line in map(json.loads, (folder / "measurements.jsonl").read_text(encoding="utf-8").splitlines()):
        *key, seed, draw = (line.pop(part) for part in NAME)
        measured.setdefault(tuple(key), []).append((seed, draw, line | {"continuations": []}))
    params = record["params"]
    entries = row_entries(measured, params["seeds"], params["seed"], params["controls"] == "full")
    for row in record["rows"]:
        means = row["means"] or "same"
        row |= entries[row["condition"], row["kind"], row["of"], means]
        for key in OLD:
            row.pop(key, None)
    return record


if __name__ == "__main__":
    main()
