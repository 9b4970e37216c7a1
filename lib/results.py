"""The record of a run: what was measured, with what, and the finished conditions of a run that was killed."""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from lib.errors import UserError

PACKAGES = ["torch", "nnsight", "transformers", "numpy", "scikit-learn", "alt-profanity-check", "detoxify", "datasets"]


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that can change a number."""
    known = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            known[name] = version(name)
        except PackageNotFoundError:
            continue
    return known


def provenance(**more) -> dict:
    """Command line, commit and versions, with `more` beside them."""
    given = [Path(part).name if Path(part).is_absolute() else part for part in sys.argv[1:]]  # no one's home folder
    return {"argv": ["python", _relative(sys.argv[0]), *given], **commit(), "versions": versions(), **more}


def commit() -> dict:
    """The commit of the project's checkout and whether files differ from it; empty outside a checkout."""
    root = Path(__file__).parents[1]
    try:
        git = ["git", "-C", str(root), "-c", "safe.directory=*"]
        name = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run(
            [*git, "status", "--porcelain", "--", "lib", "dpo", "experiments"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return {"commit": "", "dirty": None}
    return {"commit": name, "dirty": bool(changed.strip())}


def _relative(path: str) -> str:
    root = Path(__file__).parents[1]
    here = Path(path).resolve()
    return str(here.relative_to(root)) if here.is_relative_to(root) else here.name


def write_json(path: Path, value) -> None:
    """Write JSON whole or not at all."""
    ready = path.with_name(path.name + ".new")
    ready.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(ready, path)


def write_lines(path: Path, rows: Iterable[dict]) -> None:
    """Write JSON lines whole or not at all."""
    ready = path.with_name(path.name + ".new")
    ready.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    os.replace(ready, path)


def read_whole_json(path: Path):
    """What `write_json` wrote, or None when it is not there."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


class Unfinished:
    """JSON lines that a run keeps until it has ended: one that was killed finds those that it had finished."""

    def __init__(self, path: Path, settings: dict, overwrite: bool, mark: str):
        """Read the `rows` that a run with the same settings left.

        mark: a key of the settings, by which the file of a run with others is known. Raises UserError: it is such a
        file and `overwrite` is not given, or a file of something else.
        """
        self.path, self.head, self.rows = path, json.dumps(settings), []
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
        if lines and lines[0] != self.head:
            if not overwrite:
                raise UserError(
                    f"{path} holds an unfinished run with other settings; repeat that run, or add --overwrite."
                )
            if f'"{mark}"' not in lines[0]:
                raise UserError(f"{path} was not written by this script; choose another --out.")
            path.unlink()
            lines = []
        for line in lines[1:]:
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):  # the kill cut it off
                continue
            self.rows += [row] if isinstance(row, dict) else []

    def add(self, rows: list[dict]) -> None:
        """Write further rows into the file, below its settings."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write("" if file.tell() else self.head)
            file.writelines("\n" + json.dumps(row) for row in rows)  # what was cut off ends here


def once(file: Path, measure: Callable[[], dict]) -> dict:
    """What `file` holds, or what `measure()` returns, kept there: a killed run repeats only what was in flight."""
    if (measured := read_whole_json(file)) is None:
        measured = measure()
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, measured)
    return measured
