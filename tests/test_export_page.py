"""docs/EXPORT.md, followed: the command, then the pipeline in a process of its own."""

import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT

PAGE = (ROOT / "docs" / "EXPORT.md").read_text(encoding="utf-8")


@pytest.mark.embedded
def test_the_page_as_written(tmp_path):
    (command,), (code,) = (re.findall(rf"```{language}\n(.*?)```", PAGE, re.S) for language in ("bash", "python"))
    assert "--controls quick" in command
    command = command.replace("--controls quick", "--limit 4").replace("python ", f"{sys.executable} ", 1)
    for given in ("experiments/", "docs/moods/bad", "docs/moods/prompts"):  # the folder of the run is an empty one
        command = command.replace(given, f"{ROOT}/{given}")
    threads = {"OMP_NUM_THREADS": str(os.cpu_count())}  # a real model has use for them
    done = subprocess.run(
        ["bash", "-ec", command], cwd=tmp_path, env={**os.environ, **threads}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "wrote the trace's text for 4 of 4 prompts" in (tmp_path / "calmer" / "README.md").read_text()
    (tmp_path / "use.py").write_text(code)
    used = subprocess.run([sys.executable, "use.py"], cwd=tmp_path, capture_output=True, text=True)
    assert used.returncode == 0, used.stderr[-3000:]
    assert used.stdout.startswith("I had a bad day at work, and on the way home I felt")
