"""Data files as people have them, generated: the texts that were written, or one line and nothing written.

Each case draws a kind of data, a format, an encoding, line ends, a compression and texts with what breaks readers; half
of them also a fault. Pairs go through `python -m dpo --dry-run`, the rest through their reader and two commands.
"""

import csv
import gzip
import io
import json
import random

import pyarrow as pa
import pyarrow.parquet
import pytest
from click.testing import CliRunner
from test_given_models import check_refused

from lib import data
from lib.errors import UserError

CASES = 160
ODD = [
    "plain text here", "a line end\nwithin", "a carriage return\rwithin", "next line \x85 there",
    "separator \u2028 there",
    "paragraph \u2029 there", "vertical \x0b tab", "form \x0c feed", "file \x1c separator", "commas, and, more",
    'a "quote"', "tab\tthere", "back\\slash \\n", "emoji 🙂 and é", "nul \x00 byte", "<bos>opened", "ends with space ",
    "a" * 140_000,
    "zero \u200b width", "right \u202e to left", "{json: 1}", "'single'", "\ufeffmark", "mixed\r\nends",
]  # fmt: skip
KINDS = {
    "pairs": [("prompt_text", "unpert_gen_text", "pert_gen_text"), ("prompt", "chosen", "rejected")],
    "prompts": [("prompt",)],
    "comments": [("text", "label"), ("comment_text", "toxic")],
    "passages": [("text",)],
}


def rows_of(kind: str, schema: tuple, draw) -> list[dict]:
    rows = []
    for at in range(draw.randint(4, 7)):
        row = {field: draw.choice(ODD) for field in schema}
        if kind == "comments":
            row[schema[1]] = at % 2
        rows.append({**row, "other": draw.choice([None, "x", 3])} if draw.random() < 0.3 else row)
    return rows


def expected_of(kind: str, schema: tuple, rows: list[dict]) -> list:
    if kind == "pairs":
        return [data.Pair(*(row[field] for field in schema)) for row in rows]
    if kind == "comments":
        return [(row[schema[0]], row[schema[1]]) for row in rows]
    return [row[schema[0]] for row in rows]


def truth(value: int, draw):
    """Ways in which people write 0 and 1."""
    return draw.choice([value, str(value), bool(value), str(bool(value)), str(bool(value)).lower(), float(value)])


def as_jsonl(rows, draw) -> bytes:
    end = draw.choice(["\n", "\r\n"])
    blank = draw.choice(["", end])
    escaped = draw.random() < 0.5
    return (end.join(json.dumps(row, ensure_ascii=escaped) for row in rows) + blank).encode()


def as_csv(rows, draw) -> bytes:
    fields = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO(newline="")
    # QUOTE_MINIMAL leaves a lone carriage return bare: no reader can know that it ends no line.
    bare = any("\r" in str(value) for row in rows for value in row.values())
    quoting = csv.QUOTE_ALL if bare else draw.choice([csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
    writer = csv.DictWriter(text, fields, lineterminator=draw.choice(["\n", "\r\n"]), quoting=quoting)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def as_parquet(rows, draw) -> bytes:
    fields = list(dict.fromkeys(name for row in rows for name in row))
    columns = {name: [row.get(name) for row in rows] for name in fields}
    columns = {name: values if name != "other" else [str(v) for v in values] for name, values in columns.items()}
    out = io.BytesIO()
    pyarrow.parquet.write_table(pa.table(columns), out, compression=draw.choice(["none", "snappy", "gzip", "zstd"]))
    return out.getvalue()


FORMATS = {".jsonl": as_jsonl, ".csv": as_csv, ".parquet": as_parquet}


# ---- faults: each gives the file's bytes, or None where it cannot be made of this format


def another_encoding(raw, suffix, schema, draw):
    if suffix == ".parquet":
        return None
    text = raw.decode() + "é"
    return text.encode(draw.choice(["utf-16", "utf-32"])) if draw.random() < 0.5 else text.encode("latin-1", "replace")


def cut_off(raw, suffix, schema, draw):
    return raw[: len(raw) // 2] if suffix == ".parquet" else None


def not_what_its_name_says(raw, suffix, schema, draw):
    return b"PK\x03\x04 a zip" + bytes(range(128, 256)) if suffix != ".csv" else None


def a_field_is_missing(raw, suffix, schema, draw):
    return raw.replace(schema[0].encode(), b"something") if suffix != ".parquet" else None


def an_unknown_schema(raw, suffix, schema, draw):
    return FORMATS[suffix]([{"question": "a", "answer": "b"}, {"question": "c", "answer": "d"}], draw)


def a_null(raw, suffix, schema, draw):
    if schema == ("text",) and suffix != ".jsonl":
        return None  # an empty line of a text in prose, such as WikiText's, is left out
    rows = [dict.fromkeys(schema, "a") | {schema[0]: None}, dict.fromkeys(schema, "b")]
    return FORMATS[suffix](rows, draw)


def a_number(raw, suffix, schema, draw):
    return as_jsonl([dict.fromkeys(schema, 3)] * 4, draw) if suffix == ".jsonl" else None


def a_list_of_messages(raw, suffix, schema, draw):
    said = [{"role": "user", "content": "hello"}]
    return as_jsonl([dict.fromkeys(schema, said)] * 4, draw) if suffix == ".jsonl" else None


def half_a_character(raw, suffix, schema, draw):
    row = json.dumps(dict.fromkeys(schema, "x \ud83d"))
    return "\n".join([row] * 4).encode() if suffix == ".jsonl" else None


def a_bare_carriage_return(raw, suffix, schema, draw):
    line = ",".join(["a\rb"] * len(schema)) + "\n"
    return (",".join(schema) + "\n" + line * 4).encode() if suffix == ".csv" else None


def unquoted_commas(raw, suffix, schema, draw):
    line = ",".join(["a"] * len(schema)) + ",and more, and more\n"
    return (",".join(schema) + "\n" + line * 4).encode() if suffix == ".csv" else None


def nothing(raw, suffix, schema, draw):
    return draw.choice([b"", b"\n\n", b"[]"]) if suffix != ".parquet" else b""


def broken_gzip(raw, suffix, schema, draw):
    return gzip.compress(raw)[: draw.choice([5, 12, 30])]


FAULTS = [
    another_encoding, cut_off, not_what_its_name_says, a_field_is_missing, an_unknown_schema, a_null, a_number,
    a_list_of_messages, half_a_character, a_bare_carriage_return, unquoted_commas, nothing, broken_gzip,
]  # fmt: skip


@pytest.mark.parametrize("case", range(CASES))
def test_right_or_refused(case, tiny, tmp_path, monkeypatch):
    draw = random.Random(5000 + case)
    kind = draw.choice(list(KINDS))
    schema, suffix = draw.choice(KINDS[kind]), draw.choice(list(FORMATS))
    rows = rows_of(kind, schema, draw)
    expected = expected_of(kind, schema, rows)
    if kind == "comments":
        label = schema[1]
        typed = [truth(0, draw), truth(1, draw)] if suffix != ".parquet" else [0, 1]
        rows = [{**row, label: typed[row[label]]} for row in rows]
    raw = FORMATS[suffix](rows, draw)
    fault = draw.choice(FAULTS) if case % 2 else None
    if fault:
        raw = fault(raw, suffix, schema, draw)
        if raw is None:
            pytest.skip(f"{fault.__name__} cannot be in {suffix}")
    elif draw.random() < 0.3 and suffix != ".parquet":
        raw = b"\xef\xbb\xbf" + raw  # a byte-order mark
    if not fault and draw.random() < 0.3:
        raw, suffix = gzip.compress(raw), suffix + ".gz"
    file = tmp_path / f"given{suffix}"
    file.write_bytes(raw)
    if not fault:
        assert getattr(data, kind)(str(file)).items == expected
    else:
        with pytest.raises(UserError) as refused:
            getattr(data, kind)(str(file))
        assert len(refused.value.message) < 393 and file.name in refused.value.message
    if kind != "pairs":
        return
    from dpo.__main__ import command

    monkeypatch.setenv("DPO_NEURONS_CACHE", str(tmp_path / "cache"))
    given = ["--model", str(tiny("llama")), "--pairs", str(file), "--out", str(tmp_path / "out"), "--dry-run"]
    before = sorted(tmp_path.iterdir())
    done = CliRunner().invoke(command, given)
    if fault:
        check_refused(done, tmp_path / "out", tmp_path, before)
    else:
        assert done.exit_code == 0 and f"of {len(rows) - 1} pairs, 1 held out" in done.output, done.output
