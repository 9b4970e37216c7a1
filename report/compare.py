"""What a table of the report is made of: published and measured numbers, and when they agree."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from lib.errors import UserError
from report.records import Record

PAPER_MODELS = ("gpt2", "llama", "gemma", "mistral")


class Value(NamedTuple):
    """A cell: its text, the number that its column is sorted by, and the record that it comes from (None: a paper)."""

    text: str
    number: float | None = None
    record: Record | None = None


class Verdict(NamedTuple):
    """Whether a claim holds in one record."""

    label: str
    agrees: bool | None  # None: the interval leaves it open
    because: str  # the numbers that the rule looked at
    record: Record


@dataclass
class Comparison:
    """One table or figure of a paper beside ours."""

    place: str  # in the paper
    claim: str
    rule: str  # when a record agrees
    columns: list[str] = field(default_factory=list)
    lines: list[list[Value]] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)
    figures: list[tuple[Record, Path]] = field(default_factory=list)
    anchor: str = ""  # the id on the page
    given: str = ""  # in place of a rule: what is a definition, or cannot come out otherwise, gets no mark

    def judge(self, label: str, agrees: bool | None, because: str, record: Record) -> None:
        """Add a verdict."""
        self.verdicts.append(Verdict(label, None if agrees is None else bool(agrees), because, record))

    def show(self, record: Record, *names: str) -> None:
        """Add figures of a record."""
        self.figures += [(record, path) for path in record.figures if path.stem in names]


def published(number: float | None, digits: int = 3) -> Value:
    """A number of a paper."""
    return Value("" if number is None else fixed(number, digits), number)


def plain(text: str) -> Value:
    """A line's name."""
    return Value(text)


def measured(found: dict | float | None, record: Record, digits: int = 3) -> Value:
    """A number of ours, with its interval where it has one."""
    if found is None:
        return Value("")
    if isinstance(found, dict):
        return Value(bounds(found, digits), found["mean"], record)
    return Value(fixed(found, digits), found, record)


def bounds(found: dict, digits: int = 3) -> str:
    """`mean [low, high]`."""
    mean, low, high = (fixed(found[key], digits) for key in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def fixed(number: float, digits: int) -> str:
    """A number with so many digits, and no minus before a zero; `–` for none."""
    if not math.isfinite(number):
        return "–"
    return f"{round(number, digits) + 0.0:.{digits}f}"


def above(found: dict, bar: float) -> bool | None:
    """Whether a whole interval lies at or above a value; None where it holds the value within it."""
    if found["low"] >= bar:
        return True
    return None if found["high"] >= bar else False


def below(found: dict, bar: float) -> bool | None:
    """Whether a whole interval lies at or below a value; None where it holds the value within it."""
    if found["high"] <= bar:
        return True
    return None if found["low"] <= bar else False


def overlaps(found: dict, others: list[float]) -> bool:
    """Whether an interval and the range of the papers' models have a value in common."""
    return found["low"] <= max(others) and found["high"] >= min(others)


def spread(values: list[float], digits: int = 3) -> str:
    """Values over seeds: `a to b`."""
    low, high = fixed(min(values), digits), fixed(max(values), digits)
    return low if low == high else f"{low} to {high}"


def over_seeds(values: list[float], record: Record, digits: int = 3) -> Value:
    """The range over seeds."""
    return measured(sum(values) / len(values), record, digits)._replace(text=spread(values, digits))


def wilson(share: float, n: float) -> dict:
    """The 95 % interval of a share of n."""
    z = 1.96
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (share * (1 - share) / n + z * z / (4 * n * n)) ** 0.5
    return {"mean": share, "low": middle - half, "high": middle + half}


def accuracy(probes: list[Record]) -> dict:
    """Of one model's probes with several seeds, with the Wilson interval over the comments that any of them held out.

    Their splits overlap: a comment that several held out counts once, as the share of probes that were right about it.
    """
    if old := [run.name for run in probes if "held_out" not in run.data]:
        raise UserError(f"{old[0]}: a probe's record of an earlier version; run train_probe.py again.")
    right: dict[int, list[bool]] = {}
    for one in (one for run in probes for one in run.data["held_out"]):
        right.setdefault(one["comment"], []).append((one["logit"] > 0) == one["label"])
    return wilson(sum(sum(each) / len(each) for each in right.values()) / len(right), len(right))


def share(count: dict) -> float:
    """The share of vectors that show a listed word."""
    return count["listed"] / count["vectors"]
