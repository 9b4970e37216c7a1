"""Make once, reuse: a folder per artifact, named by a hash of all that determines it.

The cache lies in $DPO_NEURONS_CACHE or ~/.cache/dpo-neurons and can be deleted at any time.
"""

import errno
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import click
from filelock import FileLock, Timeout

from lib.errors import UserError, brief

MANIFEST = "artifact.json"
WRITTEN = ".written.json"  # which files `output` put into a folder
DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
NOT_WRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG}
# A finished or unfinished folder's record, and entries that it has: of a script, of `python -m dpo`, of either.
RECORDS = {"run.json": {"script", "provenance"}, "training.json": {"config", "best_step"}, "settings.json": {"code"}}
OWN_KINDS = {".json", ".jsonl", ".safetensors", ".png", ".jinja", ".model", ".request", ".new"}
OWN_NAMES = {"conditions", "figures", "best", "best.new", "state", "state.new", "state.old", "neurons.txt", "README.md"}


def cache_root() -> Path:
    """The cache folder."""
    if given := os.environ.get("DPO_NEURONS_CACHE"):
        return Path(given)
    try:
        return Path.home() / ".cache" / "dpo-neurons"
    except RuntimeError as error:
        raise UserError("there is no home folder for the cache; set DPO_NEURONS_CACHE to a folder.") from error


def in_cache(name: str) -> Path:
    """A subfolder of the cache, made where it is missing. Raises UserError: it cannot be written."""
    folder = cache_root() / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise UserError(
            f"the cache {cache_root()} cannot be written ({error.strerror}); set DPO_NEURONS_CACHE to another folder."
        ) from error
    return folder


def versions(*packages: str) -> dict[str, str]:
    """Versions of packages whose numbers an artifact is made of: part of its key."""
    return {name: version(name) for name in packages}


def code_version(*files: str) -> str:
    """Hash of source files: an artifact is made anew when the code of its step changes."""
    return hashlib.sha256(b"".join(Path(f).read_bytes() for f in files)).hexdigest()[:16]


def running_code() -> str:
    """Hash of the script that runs and of lib and dpo: an unfinished run goes on under the same code alone."""
    root, main = Path(__file__).parents[1], getattr(sys.modules["__main__"], "__file__", None)
    files = [*sorted(map(str, [*root.glob("lib/*.py"), *root.glob("dpo/*.py")])), *([main] if main else [])]
    return code_version(*files)


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
    folder = folder_of(kind, fields)
    if is_whole(folder):
        return folder
    in_cache(kind)
    with writing(folder), FileLock(f"{folder}.lock"):
        if is_whole(folder):
            return folder
        if folder.exists():
            click.echo(f"Warning: the cached {kind} in {folder} is damaged and is made again.", err=True)
            shutil.rmtree(folder)
        larger = "set DPO_NEURONS_CACHE to a larger disk"
        check_free(folder.parent, needs_bytes, f"the cache {cache_root()}", kind, larger)
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


def check_free(place: Path, needs_bytes: int, name: str, what: str, instead: str) -> None:
    """Raise UserError where a disk has less free than is needed."""
    free = shutil.disk_usage(place).free
    if free < needs_bytes:
        raise UserError(
            f"{name} has {free / 1e9:.1f} GB free and making {what} needs {needs_bytes / 1e9:.1f} GB; "
            f"free some, or {instead}."
        )


def check_output(folder: Path, overwrite: bool) -> None:
    """Raise UserError when the output folder cannot be written.

    It exists and --overwrite was not given, or it holds something that this project did not write, which is never
    replaced; or there is no place for it.
    """
    folder = resolved(folder)
    if folder.exists() and not overwrite:
        raise UserError(f"--out {folder}: exists; choose another folder or add --overwrite.")
    for place in (folder, folder.with_name(folder.name + ".partial")):
        if place.exists() and overwrite and not is_ours(place):
            raise UserError(f"--out {folder}: {place} holds files that no script here wrote; choose another folder.")
    check_place(folder)


def resolved(path: Path) -> Path:
    """Where `--out` leads. Raises UserError: nowhere, or to the root of all."""
    try:
        place = path.resolve()
    except (OSError, RuntimeError) as error:
        raise UserError(f"--out {path}: {brief(error)}; choose another place.") from error
    if not place.name:
        raise UserError(f"--out {path}: is the root of all folders; choose another place.")
    return place


def check_place(path: Path, given: str = "--out") -> None:
    """Raise UserError unless a file or folder can be made there. given: names the option in the message."""
    parent = next(parent for parent in path.parents if parent.exists())
    try:  # to ask is not enough: permissions do not tell of read-only and virtual file systems
        tempfile.TemporaryDirectory(dir=parent, prefix=".dpo-neurons-").cleanup()
    except OSError as error:
        raise UserError(
            f"{given} {path}: {parent} cannot be written ({error.strerror}); choose another place."
        ) from error


def is_ours(folder: Path) -> bool:
    """Whether every file of a folder was written by this project, by the list that `output` leaves in it.

    A folder without a list (an unfinished run's, or an earlier version's) is known by its record.
    """
    if not folder.is_dir():
        return False
    files = files_of(folder)
    if (folder / WRITTEN).is_file():
        written = read_object(folder / WRITTEN).get("files", [])
        return set(files) <= {*written, WRITTEN}
    known = all(Path(name).suffix in OWN_KINDS or name.split("/")[0] in OWN_NAMES for name in files)
    return not files or known and any(keys <= read_object(folder / name).keys() for name, keys in RECORDS.items())


def files_of(folder: Path) -> list[str]:
    """The files of a folder and its subfolders, by their relative names."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())


def read_object(path: Path) -> dict:
    """The object that a JSON file holds; an empty one where there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


@contextmanager
def output(folder: Path, settings: dict, overwrite: bool, needs_bytes: int = 0) -> Iterator[Path]:
    """Context that gives a work folder beside `folder` and puts it in its place when the block succeeds.

    A block that fails or is killed leaves the work folder, and the next run with the same settings goes on in it; a
    UserError before anything was finished leaves nothing.

    Raises:
        UserError: `folder` exists, holds another run's unfinished work, or is being written by another process
            (nothing is changed then).
    """
    folder = resolved(folder)
    check_output(folder, overwrite)
    parent = next(parent for parent in folder.parents if parent.exists())
    check_free(parent, needs_bytes, f"--out {folder}: {parent}", "it", "choose another disk")
    work = folder.with_name(folder.name + ".partial")
    locks = in_cache("locks")
    wanted = json.dumps({**settings, "code": settings.get("code") or running_code()}, indent=1, sort_keys=True)
    with writing(folder):
        lock = FileLock(locks / hashlib.sha256(str(folder).encode()).hexdigest()[:16])
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
            (work / WRITTEN).write_text(json.dumps({"files": files_of(work)}, indent=1))
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


@contextmanager
def writing(place: Path) -> Iterator[None]:
    """Context: a full disk or an unwritable folder becomes a UserError that names the place."""
    try:
        yield
    except Exception as error:  # raised again: safetensors and tokenizers report a failed write by classes of their own
        number = error.errno if isinstance(error, OSError) else None
        if number in DISK_FULL or "No space left" in str(error):
            raise UserError(f"{place}: no space left on the disk; free some, or choose another place.") from error
        if number in NOT_WRITABLE:
            where = error.filename or place
            raise UserError(f"{where}: cannot be written ({error.strerror}); choose another place.") from error
        raise
