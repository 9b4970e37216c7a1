"""Records of two runs that must be alike."""

import json
import math

TEXT = ("--prompts", "embedded", "--limit", 4)
PASSAGES = ("--passages", "embedded", "--scorer", "profanity-check")
UNLIKE = {"provenance", "seconds", "seconds_per_prompt", "model"}


def compare(here, there, at="") -> None:
    """Numbers to 1e-5, everything else exactly."""
    if isinstance(here, dict):
        assert here.keys() == there.keys(), at
        for name in here:
            if name not in UNLIKE:
                compare(here[name], there[name], f"{at}.{name}")
    elif isinstance(here, list):
        assert len(here) == len(there), at
        for number, (one, other) in enumerate(zip(here, there, strict=True)):
            compare(one, other, f"{at}[{number}]")
    elif isinstance(here, float):
        assert math.isclose(here, there, rel_tol=1e-5, abs_tol=1e-5), (at, here, there)
    else:
        assert here == there, at


def record(folder) -> dict:
    return json.loads((folder / "run.json").read_text(encoding="utf-8"))


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
