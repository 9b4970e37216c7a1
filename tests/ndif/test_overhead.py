"""What a request costs; NDIF_RECORD=FILE keeps the numbers."""

import json
import os
import statistics
from importlib.metadata import version
from pathlib import Path

from server import MODEL

from lib.embedded import unpack

HERE = Path(__file__).parent


def test_a_warm_request(client, hub_root):
    """Within a second of the same condition here, for the tiny model; also SmolLM2's numbers, for the record."""
    found = []
    for name, folder, rounds in ((MODEL, hub_root / MODEL, 9), ("tests/smollm2", unpack("smollm2"), 3)):
        done = client(HERE / "overhead.py", name, folder, rounds, timeout=600)
        assert done.returncode == 0, done.stderr[-3000:]
        found.append(json.loads(done.stdout.splitlines()[-1]))
    medians = [{place: statistics.median(one[f"{place}_seconds"]) for place in ("here", "remote")} for one in found]
    if file := os.environ.get("NDIF_RECORD"):
        versions = {name: version(name) for name in ("nnsight", "torch", "transformers")} | {"ndif": "0.1.2"}
        record = {
            "rows": [one | {"median": two} for one, two in zip(found, medians, strict=True)],
            "versions": versions,
        }
        Path(file).write_text(json.dumps(record, indent=1) + "\n")
    assert medians[0]["remote"] - medians[0]["here"] < 1
