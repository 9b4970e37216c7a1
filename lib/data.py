"""Prompts, comments, passages and preference pairs: embedded, from the Hub, or from a file, each with its hash.

File formats (UTF-8; one JSON object a line, CSV with a header, or parquet; gzip of each):

| data | fields |
|---|---|
| prompts | `prompt` (a string, or RealToxicityPrompts' `{"text": ...}`) |
| comments | `text` and `label` (0/1), or Jigsaw's `comment_text` and `toxic` |
| passages | `text` |
| pairs | the papers' `prompt_text`, `unpert_gen_text` (preferred), `pert_gen_text`; or `prompt`, `chosen`, `rejected` |
"""

import csv
import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from lib.errors import UserError, brief
from lib.hub import dataset_file

ASSETS = Path(__file__).parent / "assets"
HUB = {  # data -> (repository, file)
    "prompts": ("allenai/real-toxicity-prompts", "prompts.jsonl"),
    "comments": ("thesofakillers/jigsaw-toxic-comment-classification-challenge", "train.csv"),  # a mirror of Kaggle's
    "passages": ("Salesforce/wikitext", "wikitext-2-raw-v1/test-00000-of-00001.parquet"),
}

PACKED = {b"\x28\xb5\x2f\xfd": "zstd", b"\x1f\x8b": "gzip in gzip", b"PK\x03\x04": "zip", b"BZh": "bzip2",
          b"\xfd7zXZ": "xz"}  # fmt: skip
FALSE, TRUE = {"0", "0.0", "false"}, {"1", "1.0", "true"}  # labels, as text
PAIR_SCHEMAS = (("prompt_text", "unpert_gen_text", "pert_gen_text"), ("prompt", "chosen", "rejected"))


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
    return _load("passages", source, _passage)


def pairs(source: str = "embedded") -> Dataset:
    """Preference pairs: `embedded`, or a file in the papers' schema or TRL's. Items: Pair."""
    return _load("pairs", source, _pair)


def _prompt(row: dict) -> str | None:
    if row.get("challenging") is not None and not _truth(row, "challenging"):
        return None  # RealToxicityPrompts: the papers use its 1,199 challenging prompts
    prompt = row.get("prompt")
    return _text(prompt, "text") if isinstance(prompt, dict) else _text(row, "prompt")


def _comment(row: dict) -> tuple[str, int]:
    text, label = ("text", "label") if "text" in row else ("comment_text", "toxic")
    return _text(row, text), int(_truth(row, label))


def _pair(row: dict) -> Pair:
    for schema in PAIR_SCHEMAS:
        if row.keys() >= set(schema):
            return Pair(*(_text(row, field) for field in schema))
    known = " or ".join(", ".join(schema) for schema in PAIR_SCHEMAS)
    raise ValueError(f"it has {_names(row)}; known are {known}")


def _passage(row: dict) -> str | None:
    if isinstance(row.get("text"), str) and not row["text"].strip():
        return None  # WikiText's empty lines
    return _text(row, "text")


def _text(row: dict, field: str) -> str:
    value = row.get(field)
    if value is None:
        raise ValueError(f"{field!r} is missing, expected some text (the row has {_names(row)})")
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{field!r} is {repr(value)[:40]}, expected some text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{field!r} holds half of a character ({value[error.start]!r}); write it whole") from None
    return value


def _truth(row: dict, field: str) -> bool:
    """A value that means yes or no: 0 and 1, as numbers or text, and true and false."""
    value = row.get(field)
    if str(value).lower() not in FALSE | TRUE:
        raise ValueError(f"{field!r} is {repr(value)[:40]}, expected 0 or 1")
    return str(value).lower() in TRUE


def _names(row: dict) -> str:
    names = ", ".join(str(name) for name in list(row)[:8]) or "nothing"
    return names if len(names) <= 100 else names[:100] + "..."


def _load(kind: str, source: str, parse: Callable[[dict], Any], option: str | None = None) -> Dataset:
    option = f"--{option or kind} {source}"
    path, origin = Path(source), Path(source).name
    if source == "embedded":
        path, origin = ASSETS / f"{kind}.jsonl", source
    elif source == "hub":
        if kind not in HUB:
            raise UserError(f"{option}: not on the Hub under its own name; give a file, or `embedded`.")
        path, origin = dataset_file(*HUB[kind]), "hub:" + "/".join(HUB[kind])
    try:
        raw = path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a name that can be none
        said = getattr(error, "strerror", None) or brief(error)
        raise UserError(f"{option}: {said}; give a JSON-lines, CSV or parquet file, or `embedded`.") from error
    items = []
    for line, row in _rows(raw, path, option):
        try:
            if not isinstance(row, dict):
                raise ValueError(f"a JSON {type(row).__name__}, expected an object")
            items.append(parse(row))
        except ValueError as error:
            raise UserError(f"{option}, line {line}: {error}.") from error
    items = [item for item in items if item is not None]  # None: a row that this data does not want
    if not items:
        raise UserError(f"{option}: holds no {kind}; expected one a line.")
    return Dataset(items, origin, "sha256:" + hashlib.sha256(raw).hexdigest())


def _rows(raw: bytes, path: Path, option: str) -> Iterator[tuple[int, Any]]:
    """(line number from 1, row) of a JSON-lines, CSV or parquet file, as it is or in gzip."""
    name = path.name.lower()
    if raw[:2] == b"\x1f\x8b":
        try:
            raw, name = gzip.decompress(raw), name.removesuffix(".gz")
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{option}: not a whole gzip file ({brief(error)}); copy it anew.") from error
    if raw[:4] == b"PAR1":
        return _parquet_rows(raw, option)
    if name.endswith(".parquet"):
        raise UserError(f"{option}: not a parquet file, whatever its name says; copy it anew.")
    if kind := next((said for start, said in PACKED.items() if raw.startswith(start)), None):
        raise UserError(f"{option}: is {kind}, which is not read; unpack it, or pack it with gzip once.")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise UserError(f"{option}, line {line}: not UTF-8 text; convert the file (iconv -t UTF-8).") from error
    return _csv_rows(text, option) if name.endswith(".csv") else _json_rows(text, option)


def _parquet_rows(raw: bytes, option: str) -> Iterator[tuple[int, dict]]:
    try:
        return enumerate(pyarrow.parquet.read_table(io.BytesIO(raw)).to_pylist(), start=1)
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        raise UserError(f"{option}: parquet that cannot be read ({brief(error)}); copy or write it anew.") from error


def _json_rows(text: str, option: str) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except ValueError as error:
            raise UserError(f"{option}, line {number}: not a JSON object ({brief(error)}).") from error
        except RecursionError as error:
            raise UserError(f"{option}, line {number}: nested too deeply.") from error


def _csv_rows(text: str, option: str) -> Iterator[tuple[int, dict]]:
    before = csv.field_size_limit(len(text) + 1)
    # Lines end at \n, not at every character that Unicode calls a line's end; a lone \r outside quotes is an error.
    reader = csv.DictReader(io.StringIO(text, newline="\n"), strict=True)
    try:
        names = reader.fieldnames or []
        if len(set(names)) < len(names):
            raise UserError(f"{option}: the header names a column twice ({', '.join(names)[:80]}); rename one.")
        for row in reader:
            if None in row:
                raise UserError(
                    f"{option}, line {reader.line_num}: {len(row) - 1 + len(row[None])} fields, the header has "
                    f'{len(reader.fieldnames)}; put text that holds commas into "quotes".'
                )
            yield reader.line_num, row
    except csv.Error as error:
        raise UserError(f"{option}, line {reader.line_num}: not CSV ({brief(error)}).") from error
    finally:
        csv.field_size_limit(before)
