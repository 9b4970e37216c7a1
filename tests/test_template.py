"""docs/TEMPLATE.md, followed step by step in an empty folder."""

import json
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT

PAGE = (ROOT / "docs" / "TEMPLATE.md").read_text(encoding="utf-8")


def blocks(step: str, language: str = "") -> list[str]:
    """The code blocks of a numbered step."""
    section = re.split(r"\n## ", PAGE)[int(step)]
    assert section.startswith(step + ".")
    return re.findall(rf"```{language}\n(.*?)```", section, re.S)


def shell(commands: str, folder) -> None:
    threads = {"OMP_NUM_THREADS": str(os.cpu_count())}  # a real model has use for them
    done = subprocess.run(
        ["bash", "-ec", commands], cwd=folder, env={**os.environ, **threads}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]


def replaced(text: str, old: str, new: str) -> str:
    assert text.count(old) == 1, f"the template's lines must stand in the script once: {old}"
    return text.replace(old, new)


@pytest.mark.embedded
def test_the_steps_as_written(tmp_path):
    (tmp_path / "dpo-neurons").symlink_to(ROOT)
    shell("cd dpo-neurons\n" + "\n".join(blocks("1")), tmp_path)
    folder = tmp_path / "calmer"
    shell("\n".join(blocks("2")), folder)
    script = folder / "calmer.py"
    pairs = blocks("3", "python")
    for old, new in zip(pairs[::2], pairs[1::2], strict=True):
        script.write_text(replaced(script.read_text(), old, new))
    (command,) = blocks("4")
    assert "--limit 4" in command and "--model smollm2" in command
    shell(command.replace("python ", f"{sys.executable} ", 1), folder)
    record = json.loads((folder / "runs" / "first" / "run.json").read_text())
    assert record["script"] == "calmer" and record["model"] == "smollm2" and record["params"]["limit"] == 4
    assert record["words"]["away_from"][:2] == ["angry", "furious"] and record["words"]["towards"][0] == "calm"
    conditions = {row["condition"] for row in record["rows"]}
    assert {"none", "tokens a=0.2 b=1", "control:flipped", "control:gaussian"} <= conditions
    assert "dpo" not in conditions
    assert (folder / "runs" / "first" / "generations.jsonl").exists()
    before = edited_layers(record)

    shown, addition = blocks("6", "python")
    loop, rest = shown.split("\n", 1)
    script.write_text(replaced(script.read_text(), shown, f"{loop}\n{addition}{rest}"))
    again = command.replace("runs/first", "runs/late").replace("--controls quick ", "")
    shell(again.replace("python ", f"{sys.executable} ", 1), folder)
    late = json.loads((folder / "runs" / "late" / "run.json").read_text())
    assert edited_layers(late) != before, "half of the layers alone are another edit"


def edited_layers(record: dict) -> float:
    """A number that depends on which layers are edited."""
    return next(row["log_ppl"] for row in record["rows"] if row["condition"] == "tokens a=0.2 b=1")
