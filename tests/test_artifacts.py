"""The cache and output folders: made once, damage, full disks, races."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import run

from lib import artifacts
from lib.errors import UserError


def build(text="made"):
    return lambda folder: (folder / "file.txt").write_text(text) and None


def test_made_once(cache):
    calls = []
    for _ in range(2):
        folder = artifacts.make("kind", {"a": 1}, lambda folder: (calls.append(1), build()(folder)))
    assert calls == [1] and (folder / "file.txt").read_text() == "made"
    assert artifacts.make("kind", {"a": 2}, build("other")) != folder, "other fields, another artifact"


@pytest.mark.parametrize("damage", ["truncate", "delete", "manifest"])
def test_a_damaged_entry_is_made_again_with_a_warning(cache, capsys, damage):
    folder = artifacts.make("kind", {"a": 1}, build())
    if damage == "truncate":
        (folder / "file.txt").write_text("ma")
    elif damage == "delete":
        (folder / "file.txt").unlink()
    else:
        (folder / artifacts.MANIFEST).write_text('{"sizes": {"fi')
    assert artifacts.make("kind", {"a": 1}, build()) == folder
    assert (folder / "file.txt").read_text() == "made"
    assert "damaged and is made again" in capsys.readouterr().err


def test_a_failed_build_leaves_nothing(cache):
    def broken(folder: Path):
        (folder / "half.txt").write_text("half")
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError):
        artifacts.make("kind", {"a": 1}, broken)
    assert not [p for p in (cache / "kind").iterdir() if p.suffix != ".lock"]


def test_a_resumable_build_finds_what_it_left(cache):
    def broken(folder: Path):
        (folder / "state").write_text("half way")
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError):
        artifacts.make("kind", {"a": 1}, broken, resumable=True)
    folder = artifacts.make(
        "kind", {"a": 1}, lambda f: (f / "seen").write_text((f / "state").read_text()), resumable=True
    )
    assert (folder / "seen").read_text() == "half way"


def test_no_space_is_said_before_anything_is_made(cache):
    with pytest.raises(UserError, match="GB free and making model needs"):
        artifacts.make("model", {"a": 1}, build(), needs_bytes=10**18)
    assert not [p for p in (cache / "model").iterdir() if p.suffix != ".lock"]


WRITE_MUCH = """
import resource, signal, sys
from pathlib import Path
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
from lib import artifacts
from lib.errors import UserError
try:
    artifacts.make("model", {"a": 1}, lambda folder: (folder / "weights").write_bytes(bytes(200_000)))
except UserError as error:
    sys.exit(error.message)
"""


def test_a_disk_that_fills_up_during_the_build(cache):
    """A limit on file size makes the kernel refuse the write, as a full disk does."""
    done = run("-c", WRITE_MUCH, DPO_NEURONS_CACHE=str(cache))
    assert done.returncode == 1 and "no space left" in done.stderr and "Traceback" not in done.stderr
    assert not [p for p in (cache / "model").iterdir() if p.suffix != ".lock"]


RACE = """
import sys, time
from lib import artifacts
def build(folder):
    time.sleep(1.0)
    (folder / "who").write_text(sys.argv[1])
print((artifacts.make("kind", {"race": 1}, build) / "who").read_text())
"""


def test_of_two_that_race_one_makes_and_one_waits(cache):
    command = [sys.executable, "-c", RACE]
    both = [subprocess.Popen([*command, name], stdout=subprocess.PIPE, text=True) for name in "ab"]
    found = {process.communicate(timeout=60)[0].strip() for process in both}
    assert len(found) == 1 and found <= {"a", "b"}


def test_output_appears_whole_or_not_at_all(cache, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(RuntimeError), artifacts.output(out, {"x": 1}, False) as work:
        (work / "row").write_text("1")
        raise RuntimeError("killed")
    assert not out.exists()
    with pytest.raises(UserError, match="unfinished run with other settings"), artifacts.output(out, {"x": 2}, False):
        pass
    with artifacts.output(out, {"x": 1}, False) as work:
        assert (work / "row").read_text() == "1", "the same settings go on where the run was"
    assert sorted(p.name for p in out.iterdir()) == [artifacts.WRITTEN, "row"] and not work.exists()
    with pytest.raises(UserError, match="exists"), artifacts.output(out, {"x": 1}, False):
        pass
    with artifacts.output(out, {"x": 1}, True) as work:
        assert (out / "row").exists(), "the old folder stays until the new one is whole"
    assert [p.name for p in out.iterdir()] == [artifacts.WRITTEN]


@pytest.mark.parametrize("name", ["thesis.txt", "figures/photo.png", "model.safetensors", ".git"])
def test_what_others_wrote_is_never_replaced(cache, tmp_path, name):
    """Neither a folder of theirs, nor one of ours that they put something into, nor through a link to it."""
    out = tmp_path / "out"
    for ours in (False, True):
        if ours:
            with artifacts.output(out, {"x": 1}, True) as work:
                (work / "run.json").write_text('{"script": "a", "provenance": {}}')
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("theirs")
        (tmp_path / f"link{ours}").symlink_to(out)
        for given in (out, tmp_path / f"link{ours}", tmp_path / "no" / ".." / "out"):
            with pytest.raises(UserError, match="no script here wrote"), artifacts.output(given, {"x": 1}, True):
                pass
        assert (out / name).read_text() == "theirs"
        (out / name).unlink()
        if not ours:
            shutil.rmtree(out)


def test_a_file_in_the_place_of_a_folder(cache, tmp_path):
    (tmp_path / "out").write_text("theirs")
    for overwrite in (False, True):
        with pytest.raises(UserError), artifacts.output(tmp_path / "out", {"x": 1}, overwrite):
            pass
    with pytest.raises(UserError, match="cannot be written"), artifacts.output(tmp_path / "out" / "deeper", {}, False):
        pass
    assert (tmp_path / "out").read_text() == "theirs"


HOLD = """
import sys, time
from pathlib import Path
from lib import artifacts
with artifacts.output(Path(sys.argv[1]), {}, False):
    Path(sys.argv[2]).write_text("")
    time.sleep(60)
"""


def test_two_runs_do_not_write_one_folder(cache, tmp_path):
    ready = tmp_path / "ready"
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "out"), str(ready)])
    try:
        deadline = time.monotonic() + 30
        while not ready.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        with pytest.raises(UserError, match="another run is writing it"), artifacts.output(tmp_path / "out", {}, False):
            pass
    finally:
        process.kill()
        process.wait()


def test_a_folder_that_cannot_be_written(cache, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises((UserError, NotADirectoryError)), artifacts.output(tmp_path / "file" / "out", {}, False):
        pass


def test_manifest_repeats_what_determined_the_artifact(cache):
    folder = artifacts.make("kind", {"a": 1, "seed": 3}, build())
    assert json.loads((folder / artifacts.MANIFEST).read_text())["fields"] == {"a": 1, "seed": 3}
