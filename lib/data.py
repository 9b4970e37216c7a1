"""Prompts, comments, passages and preference pairs: embedded, from the Hub, or from a file, each with its hash.

File formats (UTF-8; one JSON object a line, or CSV with a header):

| data | fields |
|---|---|
| prompts | `prompt` (a string, or RealToxicityPrompts' `{"text": ...}`) |
| comments | `text` and `label` (0/1), or Jigsaw's `comment_text` and `toxic` |
| passages | `text` |
| pairs | `prompt_text`, `unpert_gen_text` (preferred), `pert_gen_text` (rejected): the papers' schema |
"""

import csv
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib.errors import UserError

ASSETS = Path(__file__).parent / "assets"
HUB = {  # data -> (repository, file)
    "prompts": ("allenai/real-toxicity-prompts", "prompts.jsonl"),
    "comments": ("thesofakillers/jigsaw-toxic-comment-classification-challenge", "train.csv"),  # a mirror of Kaggle's
    "passages": ("Salesforce/wikitext", "wikitext-2-raw-v1/test-00000-of-00001.parquet"),
}


@dataclass(frozen=True)
class Pair:
    """One preference pair."""

    prompt: str
    chosen: str
    rejected: str


@dataclass(frozen=True)
class Dataset:
    """Items in their order, where they came from, and the sha256 of the source file."""

    items: list
    source: str
    sha256: str

    def first(self, limit: int | None) -> "Dataset":
        """The first `limit` items (all for None)."""
        return Dataset(self.items[:limit], self.source, self.sha256)

    def half(self, which: int) -> "Dataset":
        """Every second item: the even ones (0) or the odd ones (1)."""
        return Dataset(self.items[which::2], self.source, f"{self.sha256}[{which}::2]")

    @property
    def provenance(self) -> dict:
        """What a record says about this data."""
        return {"source": self.source, "sha256": self.sha256, "items": len(self.items)}


def prompts(source: str = "embedded") -> Dataset:
    """Prompts that elicit toxic text: `embedded`, `hub` (RealToxicityPrompts, `challenging`), or a file. Items: str."""
    return _load("prompts", source, _prompt)


def pair_prompts(source: str = "embedded") -> Dataset:
    """Prompts to make preference pairs from, `embedded` ones other than those of evaluation, or a file. Items: str."""
    return _load("pair_prompts", source, _prompt, "prompts")


def comments(source: str = "embedded") -> Dataset:
    """Labelled comments for the probe: `embedded`, `hub` (Jigsaw), or a file such as its train.csv.

    Items: (text, label).
    """
    data = _load("comments", source, _comment)
    for label in (0, 1):
        if (count := sum(item[1] == label for item in data.items)) < 2:
            raise UserError(f"--comments {source}: {count} comments with label {label}; a probe needs two of each.")
    return data


def passages(source: str = "embedded") -> Dataset:
    """Plain text for perplexity and F1: `embedded`, `hub` (WikiText-2 raw, test), or a file. Items: str."""
    return _load("passages", source, lambda row: _text(row, "text"))


def pairs(source: str = "embedded") -> Dataset:
    """Preference pairs: `embedded` or a file in the papers' schema. Items: Pair."""
    return _load("pairs", source, _pair)


class _Skip(Exception):
    """A row that the source holds but this data does not want."""


def _prompt(row: dict) -> str:
    if row.get("challenging") is False:  # RealToxicityPrompts: the papers use its 1,199 challenging prompts
        raise _Skip
    prompt = row.get("prompt")
    return _text(prompt, "text") if isinstance(prompt, dict) else _text(row, "prompt")


def _comment(row: dict) -> tuple[str, int]:
    text, label = ("text", "label") if "text" in row else ("comment_text", "toxic")
    value = row.get(label)
    if str(value) not in {"0", "1"}:
        raise ValueError(f"{label!r} is {value!r}, expected 0 or 1")
    return _text(row, text), int(value)


def _pair(row: dict) -> Pair:
    return Pair(_text(row, "prompt_text"), _text(row, "unpert_gen_text"), _text(row, "pert_gen_text"))


def _text(row: dict, field: str) -> str:
    value = row.get(field)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{field!r} is {'missing' if value is None else repr(value)[:40]}, expected some text")
    return value


def _load(kind: str, source: str, parse: Callable[[dict], Any], option: str | None = None) -> Dataset:
    if source == "embedded":
        path, origin = ASSETS / f"{kind}.jsonl", "embedded"
    elif source == "hub":
        if kind not in HUB:
            raise UserError(f"--{option or kind} hub: not on the Hub under its own name; give a file, or `embedded`.")
        from lib.hub import dataset_file

        path, origin = dataset_file(*HUB[kind]), "hub:" + "/".join(HUB[kind])
    else:
        path, origin = Path(source), Path(source).name
    option = f"--{option or kind} {source}"
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UserError(f"{option}: {error.strerror}; give a JSON-lines or CSV file, or `embedded`.") from error
    items = []
    for line, row in _rows(raw, path, option):
        try:
            if not isinstance(row, dict):
                raise ValueError(f"a JSON {type(row).__name__}, expected an object")
            items.append(parse(row))
        except _Skip:
            continue
        except ValueError as error:
            raise UserError(f"{option}, line {line}: {error}.") from error
    if not items:
        raise UserError(f"{option}: holds no {kind}; expected one a line.")
    return Dataset(items, origin, "sha256:" + hashlib.sha256(raw).hexdigest())


def _rows(raw: bytes, path: Path, option: str):
    """Yield (line number from 1, row) of a JSON-lines, CSV or parquet file."""
    if path.suffix == ".parquet":
        import datasets

        yield from enumerate((row for row in datasets.Dataset.from_parquet(str(path)) if row["text"].strip()), start=1)
        return
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise UserError(f"{option}, line {line}: not UTF-8 text; convert the file (iconv -t UTF-8).") from error
    if path.suffix.lower() == ".csv":
        reader = csv.DictReader(text.splitlines(keepends=True), strict=True)
        try:
            for row in reader:
                yield reader.line_num, row
        except csv.Error as error:
            raise UserError(f"{option}, line {reader.line_num}: not CSV ({error}).") from error
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except ValueError as error:
            raise UserError(f"{option}, line {number}: not a JSON object ({error}).") from error
        except RecursionError as error:
            raise UserError(f"{option}, line {number}: nested too deeply.") from error
