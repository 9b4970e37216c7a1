"""Files of any content: a reader answers, or says in one line what is wrong, and changes nothing."""

import json

import pytest
import torch
from conftest import ROOT, load_script
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from lib import data, results
from lib.errors import UserError
from lib.families import read_family
from lib.models import base_of
from lib.neurons import load_activations
from lib.probes import load_probe
from lib.vectors import read_words

SHAPE = (3, 8)
edits_against_dpo = load_script("edits_against_dpo")
RECORD = ROOT / "results" / "probe_free_editing" / "gemma-270m"
ASSETS = ROOT / "lib" / "assets"


def tensors(**named) -> bytes:
    return save({name: tensor.contiguous() for name, tensor in named.items()})


# reader, the file's name, a good file to damage
READERS = {
    "prompts": (lambda file: data.prompts(str(file)), "p.jsonl", (ASSETS / "prompts.jsonl").read_bytes()[:2000]),
    "prompts.csv": (lambda file: data.prompts(str(file)), "p.csv", b'prompt,other\n"a, b",1\nc,2\n'),
    "comments": (lambda file: data.comments(str(file)), "c.jsonl", (ASSETS / "comments.jsonl").read_bytes()[:2000]),
    "passages": (lambda file: data.passages(str(file)), "t.jsonl", (ASSETS / "passages.jsonl").read_bytes()[:2000]),
    "pairs": (lambda file: data.pairs(str(file)), "p.jsonl", (ASSETS / "pairs.jsonl").read_bytes()[:2000]),
    "probe": (lambda file: load_probe(file, 8), "p.safetensors", tensors(direction=torch.ones(8), bias=torch.zeros(1))),
    "activations": (
        lambda file: load_activations(file, SHAPE), "a.safetensors", tensors(activation=torch.ones(SHAPE)),
    ),
    "words": (lambda file: read_words(str(file), "--words"), "w.txt", b"one\ntwo\n"),
    "config": (lambda file: read_family(file.parent, "--model m"), "config.json", b'{"model_type": "llama"}'),
    "unfinished pairs": (
        lambda file: results.Unfinished(file, {"a": 1}, False, mark="a"), "pairs.jsonl.partial",
        b'{"a": 1}\n{"number": 0, "pair": null}\n',
    ),
    "run.json": (lambda file: edits_against_dpo.read(file.parent), "run.json", (RECORD / "run.json").read_bytes()),
    "measurements": (
        lambda file: edits_against_dpo.read(file.parent), "measurements.jsonl",
        (RECORD / "measurements.jsonl").read_bytes()[:3000],
    ),
    "adapter": (
        lambda file: base_of(file.parent, "--post"), "adapter_config.json",
        b'{"base_model_name_or_path": "m", "revision": null}',
    ),
}  # fmt: skip
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["prompt", "text", "label", "rows", "model_type", "number"]), inner, max_size=3
        )
    ),
    max_leaves=6,
)


@st.composite
def damaged(draw, good: bytes) -> bytes:
    """A good file with a piece cut out, doubled, or replaced; JSON of another kind; or any bytes."""
    kind = draw(st.sampled_from(["cut", "insert", "flip", "json", "bytes"]))
    if kind == "json":
        return "\n".join(json.dumps(draw(JSON)) for _ in range(draw(st.integers(1, 3)))).encode()
    if kind == "bytes":
        return draw(st.binary(max_size=64))
    start = draw(st.integers(0, len(good)))
    stop = draw(st.integers(start, min(len(good), start + 200)))
    if kind == "cut":
        return good[:start] + good[stop:]
    if kind == "insert":
        return good[:start] + draw(st.binary(max_size=8)) + good[start:]
    return good[:start] + bytes(byte ^ draw(st.integers(1, 255)) for byte in good[start:][:1]) + good[start + 1 :]


@pytest.mark.parametrize("name", READERS)
def test_a_reader_answers_or_says_what_is_wrong(name, tmp_path):
    """100 bad inputs each, always the same ones."""
    read, file_name, good = READERS[name]
    folder = tmp_path / "given"
    folder.mkdir()
    if file_name == "measurements.jsonl":
        (folder / "run.json").write_bytes((RECORD / "run.json").read_bytes())
    elif file_name == "run.json":
        (folder / "measurements.jsonl").write_bytes((RECORD / "measurements.jsonl").read_bytes())
    file = folder / file_name
    file.write_bytes(good)

    @settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(damaged(good))
    def check(content: bytes) -> None:
        file.write_bytes(content)
        before = sorted(folder.iterdir())
        try:
            read(file)
        except UserError as error:
            assert str(error.message).strip() and "\n" not in error.message.strip()
        if name != "unfinished pairs":  # a run's own file, from which a line that was cut off is taken away
            assert file.read_bytes() == content
        assert sorted(folder.iterdir()) == before

    check()
    assert sorted(tmp_path.iterdir()) == [folder]


def test_records_of_results_are_read_whole_or_not_at_all(tmp_path):
    """What `write_json` wrote is there after a kill at any moment, or what was there before."""
    results.write_json(tmp_path / "run.json", {"a": 1})
    (tmp_path / "run.json.new").write_text('{"a"')  # a later write that was cut off
    assert results.read_whole_json(tmp_path / "run.json") == {"a": 1}
