"""Make once, reuse: a folder per artifact, named by a hash of all that determines it.

The cache lies in $DPO_NEURONS_CACHE or ~/.cache/dpo-neurons and can be deleted at any time.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from lib.errors import UserError

MANIFEST = "artifact.json"


def cache_root() -> Path:
    """The cache folder."""
    return Path(os.environ.get("DPO_NEURONS_CACHE") or Path.home() / ".cache" / "dpo-neurons")


def code_version(*files: str) -> str:
    """Hash of source files: an artifact is made anew when the code of its step changes."""
    return hashlib.sha256(b"".join(Path(f).read_bytes() for f in files)).hexdigest()[:16]


def file_sha256(path: Path) -> str:
    """Hex sha256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_of(kind: str, fields: dict) -> Path:
    """Where the artifact with these determining fields lies, made or not."""
    key = hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]
    return cache_root() / kind / key


def make(kind: str, fields: dict, build: Callable[[Path], None], needs_bytes: int = 0, resumable: bool = False) -> Path:
    """Return the artifact's folder, calling `build(folder)` when it is missing or damaged.

    Two processes that want one artifact wait for each other. What a build that fails or is killed leaves is never
    taken for the artifact; a `resumable` build finds it again in its folder, any other starts in an empty one.

    Args:
        kind: subfolder of the cache.
        fields: JSON values that determine the artifact; all of them go into its key and its manifest.
        needs_bytes: free disk space that the build needs.

    Raises:
        UserError: not enough space, or a folder that cannot be written.
    """
    from filelock import FileLock

    folder = folder_of(kind, fields)
    if is_whole(folder):
        return folder
    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if is_whole(folder):
                return folder
            if folder.exists():
                click.echo(f"Warning: the cached {kind} in {folder} is damaged and is made again.", err=True)
                shutil.rmtree(folder)
            free = shutil.disk_usage(folder.parent).free
            if free < needs_bytes:
                raise UserError(
                    f"the cache {cache_root()} has {free / 1e9:.1f} GB free and making {kind} needs "
                    f"{needs_bytes / 1e9:.1f} GB; free some or set DPO_NEURONS_CACHE to a larger disk."
                )
            work = folder.with_name(folder.name + ".partial")
            if not resumable:
                shutil.rmtree(work, ignore_errors=True)
            work.mkdir(exist_ok=True)
            try:
                build(work)
            except BaseException:
                if not resumable:
                    shutil.rmtree(work, ignore_errors=True)
                raise
            sizes = {str(p.relative_to(work)): p.stat().st_size for p in sorted(work.rglob("*")) if p.is_file()}
            (work / MANIFEST).write_text(json.dumps({"fields": fields, "sizes": sizes}, indent=1, sort_keys=True))
            work.rename(folder)
    return folder


def refuse_existing(folder: Path, overwrite: bool) -> None:
    """Raise UserError when the output folder exists and --overwrite was not given."""
    if folder.exists() and not overwrite:
        raise UserError(f"--out {folder}: exists; choose another folder or add --overwrite.")


@contextmanager
def output(folder: Path, settings: dict, overwrite: bool) -> Iterator[Path]:
    """Context that gives a work folder beside `folder` and puts it in its place when the block succeeds.

    A block that fails or is killed leaves the work folder, and the next run with the same settings goes on in it; a
    UserError before anything was finished leaves nothing.

    Raises:
        UserError: `folder` exists, holds another run's unfinished work, or is being written by another process
            (nothing is changed then).
    """
    from filelock import FileLock, Timeout

    refuse_existing(folder, overwrite)
    work = folder.with_name(folder.name + ".partial")
    locks = cache_root() / "locks"
    wanted = json.dumps(settings, indent=1, sort_keys=True)
    with writing(folder):
        locks.mkdir(parents=True, exist_ok=True)
        lock = FileLock(locks / hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16])
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise UserError(f"--out {folder}: another run is writing it; wait for it, or choose another.") from None
        with lock:
            plan = work / "settings.json"
            if work.exists() and (not plan.exists() or plan.read_text() != wanted):
                if not overwrite:
                    raise UserError(
                        f"--out {folder}: {work} holds an unfinished run with other settings; "
                        "repeat that run's command, choose another --out, or add --overwrite to drop it."
                    )
                shutil.rmtree(work)
            new = [parent for parent in work.parents if not parent.exists()]
            work.mkdir(parents=True, exist_ok=True)
            plan.write_text(wanted)
            try:
                yield work
            except (UserError, click.exceptions.Exit):  # Exit: a command that this one runs has reported it
                if [path for path in work.rglob("*") if path.is_file()] == [plan]:  # bad input leaves nothing behind
                    shutil.rmtree(work)
                    for parent in new:
                        parent.rmdir()
                raise
            plan.unlink()
            if folder.exists():
                shutil.rmtree(folder)
            work.rename(folder)


def is_whole(folder: Path) -> bool:
    """True when every file that the manifest names is there with its size."""
    try:
        sizes = json.loads((folder / MANIFEST).read_text())["sizes"]
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError):
        return False


class writing:
    """Context: a full disk or an unwritable folder becomes a UserError that names the place."""

    FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}

    def __init__(self, place: Path):
        self.place = place

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        # safetensors reports a failed write as its own exception, with the system's words in it
        text = str(error)
        if isinstance(error, OSError) and error.errno in self.FULL or "No space left" in text:
            raise UserError(f"{self.place}: no space left on the disk; free some, or choose another place.") from error
        if isinstance(error, PermissionError) or isinstance(error, OSError) and error.errno == errno.EROFS:
            raise UserError(f"{self.place}: cannot be written ({error.strerror}); choose another place.") from error
        return False
