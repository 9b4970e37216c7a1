"""Run every committed record's own command again, and compare: `make results`.

The commands are those in the records (`provenance.argv`), so this list cannot differ from what was run. What is
finished is not run again, and a killed run goes on where it was: hours on two cores, in as many sittings as you like.
New records go to runs/results/; --replace puts them in the place of the committed ones.

    python results/regenerate.py                       # all: about half a day on two CPU cores
    python results/regenerate.py steer toxic_subspace  # these alone
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import click

HERE = Path(__file__).parent
ROOT = HERE.parent
MEASURES = ("toxicity", "log_ppl", "f1", "percent_reducing", "auroc", "alignment")


@click.command(help=__doc__.split("\n")[0])
@click.argument("names", nargs=-1)
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default=ROOT / "runs" / "results")
@click.option("--replace", is_flag=True, help="Put new records in the place of the committed ones.")
def main(names, out, replace):
    records = {path.parent.relative_to(HERE).as_posix(): path for path in sorted(HERE.rglob("run.json"))}
    chosen = [name for name in records if not names or any(name.startswith(prefix) for prefix in names)]
    if not chosen:
        raise click.UsageError(f"{' '.join(names)}: no such record; known: {', '.join(records)}.")
    # Records that compare others come last.
    for name in sorted(chosen, key=lambda name: name.startswith("edits_against_dpo")):
        old = json.loads(records[name].read_text(encoding="utf-8"))
        command, missing = again(old["provenance"]["argv"], out / name, out)
        if missing:
            click.echo(f"{name}: left out, {missing} is not part of the repository")
            continue
        if not (out / name / "run.json").exists():
            click.echo(f"{name}: python {' '.join(command)}", err=True)
            if subprocess.run([sys.executable, *command], cwd=ROOT, stdout=sys.stderr).returncode:
                raise click.ClickException(f"{name} failed; run this command again to go on with it.")
        new = json.loads((out / name / "run.json").read_text(encoding="utf-8"))
        click.echo(f"{name}: {compared(old, new)}")
        if replace:
            shutil.copytree(out / name, HERE / name, dirs_exist_ok=True)


def again(argv: list[str], target: Path, out: Path) -> tuple[list[str], str]:
    """A record's command with another --out, and the first file that it needs and is not there (or nothing)."""
    command, rest = [], iter(argv[1:])
    for part in rest:
        if part == "--out":
            next(rest)
        elif part.startswith("results/") and (out / part.removeprefix("results/")).exists():
            command.append(str(out / part.removeprefix("results/")))
        elif part != "--overwrite":
            command.append(part)
    if command[0].endswith("edits_against_dpo.py") and len(command) == 1:
        command += [str(path.parent) for path in sorted((out / "section6").glob("*/run.json"))]  # none: as committed
    files = [part.removeprefix("words:") for part in command if part.endswith((".jsonl", ".txt", ".csv"))]
    missing = next((file for file in files if not (ROOT / file).exists()), "")
    return [*command, "--out", str(target)], missing


def compared(old: dict, new: dict) -> str:
    """The largest differences of two records' rows."""
    if len(old["rows"]) != len(new["rows"]):
        return f"{len(new['rows'])} rows instead of {len(old['rows'])}"
    largest = {}
    for before, after in zip(old["rows"], new["rows"], strict=True):
        for key in MEASURES:
            values = [row[key]["mean"] if isinstance(row.get(key), dict) else row.get(key) for row in (before, after)]
            if None not in values:
                largest[key] = max(largest.get(key, 0.0), abs(values[1] - values[0]))
    return ", ".join(f"{key} within {value:.2g}" for key, value in largest.items()) or "no number to compare"


if __name__ == "__main__":
    main()
