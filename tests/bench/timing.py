"""What every benchmark does around the two things that it compares."""

import json
import resource
import statistics
import sys
import time
from collections.abc import Callable

import torch


def in_turn(works: dict[str, Callable], rounds: int, warm: int = 1) -> dict[str, list[float]]:
    """Seconds of each work in each round; the order changes from round to round, so that drift hits all alike.

    warm: rounds before, which are not counted.
    """
    seconds = {name: [] for name in works}
    for turn in range(warm + rounds):
        names = list(works)
        for name in names if turn % 2 else reversed(names):
            started = time.perf_counter()
            works[name]()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn >= warm:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def paired(seconds: dict[str, list[float]], rival: str, ours: str = "ours") -> float:
    """How many times as fast as the rival: the median over rounds of the ratio within a round."""
    return statistics.median(r / o for r, o in zip(seconds[rival], seconds[ours], strict=True))


def row(work: str, rival: str, value: float, bar: str, **more) -> dict:
    """One row of the table: what was compared, the ratio, and whether it meets `bar` (`>= 3` or `<= 0.8`)."""
    sign, limit = bar.split()
    met = value >= float(limit) if sign == ">=" else value <= float(limit)
    return {"work": work, "rival": rival, "value": round(value, 6), "bar": bar, "met": met, **more}


def medians(seconds: dict[str, list[float]]) -> dict[str, float]:
    return {name: round(statistics.median(values), 4) for name, values in seconds.items()}


def peak_memory() -> int:
    """The most memory that this process has held, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def machine(device: str = "cpu") -> dict[str, float]:
    """This machine's measured rates in float32: `flops` of a matrix product, `bytes` a second of reading memory."""
    from lib.dry_run import rates

    return dict(zip(("flops", "bytes"), rates(device, 4), strict=True))


def say(*rows: dict, **more) -> None:
    """Print the rows, and what else is worth a record, as one line of JSON."""
    print(json.dumps({"rows": rows, "threads": torch.get_num_threads(), **more}))
