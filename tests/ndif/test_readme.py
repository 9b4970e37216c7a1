"""README's section about NDIF, word for word, in an empty folder."""

import os
import re
import subprocess
import sys

from server import KEY
from tiny_models import ROOT


def test_the_commands_of_run_it_on_ndif(ndif, tmp_path):
    """`--model llama` is the loopback Hub's tiny model of that name; all else is what a user types."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("## Run it on NDIF")[1].split("\n## ")[0]
    (block,) = re.findall(r"```\n(.*?)```", section, re.S)
    assert block.count("--remote") == 4
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    python = tmp_path / ".venv" / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    settings = {
        **os.environ, "HF_ENDPOINT": ndif.hub, "HF_HOME": str(tmp_path / "hub"), "HF_HUB_DISABLE_XET": "1",
        "NDIF_HOST": f"http://127.0.0.1:{ndif.front.port}", "NDIF_API_KEY": KEY, "OMP_NUM_THREADS": "1",
        "DPO_NEURONS_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    done = subprocess.run(
        ["bash", "-ec", block], cwd=tmp_path, env=settings, text=True, capture_output=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for folder in ("lora", "means", "probe_free_editing/llama", "toxic_vectors/llama"):
        assert (tmp_path / "runs" / folder / "run.json").exists()
    assert KEY not in done.stdout + done.stderr
