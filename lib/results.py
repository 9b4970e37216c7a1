"""The record of a run: what was measured, with what, and the finished conditions of a run that was killed."""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ["torch", "nnsight", "transformers", "numpy", "scikit-learn", "alt-profanity-check", "detoxify", "datasets"]


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that can change a number."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


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


def once(file: Path, measure: Callable[[], dict]) -> dict:
    """What `file` holds, or what `measure()` returns, kept there: a killed run repeats only what was in flight."""
    if (found := read_whole_json(file)) is None:
        found = measure()
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, found)
    return found
