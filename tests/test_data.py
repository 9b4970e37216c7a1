"""Readers of prompts, comments, passages and pairs: what they accept, and one clear line for what they do not."""

import json

import pytest
from conftest import texts

from lib import data
from lib.errors import UserError

GOOD_PAIR = {"prompt_text": "a", "unpert_gen_text": " b", "pert_gen_text": " c"}


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def lines(*rows) -> str:
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


def test_embedded_sets():
    assert len(data.prompts().items) >= 128 and len(set(data.prompts().items)) == len(data.prompts().items)
    labels = [label for _, label in data.comments().items]
    assert len(labels) == 1000 and sum(labels) == 500
    assert len(data.passages().items) == 200 and len(data.pairs().items) == 256
    pair_prompts = {pair.prompt for pair in data.pairs().items}
    assert not pair_prompts & set(data.prompts().items), "nothing that DPO sees is measured on"
    assert pair_prompts <= set(texts("pair_prompts", "prompt"))


def test_formats(tmp_path):
    assert data.prompts(write(tmp_path / "a.jsonl", lines({"prompt": "x"}, "", {"prompt": {"text": "y"}}))).items == [
        "x",
        "y",
    ]
    assert data.prompts(write(tmp_path / "a.csv", '\ufeffprompt,n\n"one, two",1\n')).items == ["one, two"]
    jigsaw = 'id,comment_text,toxic\n1,"a\nb",0\n2,c,1\n3,d,1\n4,e,0\n'
    assert data.comments(write(tmp_path / "train.csv", jigsaw)).items[0] == ("a\nb", 0)
    assert data.pairs(write(tmp_path / "p.jsonl", lines(GOOD_PAIR))).items == [data.Pair("a", " b", " c")]


def test_the_hash_is_the_file_s(tmp_path):
    import hashlib

    content = lines({"prompt": "x"})
    found = data.prompts(write(tmp_path / "a.jsonl", content))
    assert found.sha256 == "sha256:" + hashlib.sha256(content.encode()).hexdigest() and found.source == "a.jsonl"


@pytest.mark.parametrize(
    "kind, content, says",
    [
        ("prompts", "", "holds no prompts"),
        ("prompts", "\n\n", "holds no prompts"),
        ("prompts", lines({"prompt": "x"}, "{broken"), "line 2: not a JSON object"),
        ("prompts", lines({"prompt": "x"}, {"text": "y"}), "line 2: 'prompt' is missing"),
        ("prompts", lines({"prompt": "x"}, '"only text"'), "line 2: a JSON str"),
        ("prompts", lines({"prompt": "  "}), "line 1: 'prompt' is"),
        ("prompts", b'{"prompt": "x"}\n{"prompt": "caf\xe9"}\n', "line 2: not UTF-8"),
        ("prompts", "[" * 100_000, "line 1: nested too deeply"),
        ("comments", lines({"text": "x", "label": 2}), "line 1: 'label' is 2"),
        (
            "comments",
            lines({"text": "x", "label": 1}, {"text": "y", "label": 0}, {"text": "z", "label": 0}),
            "two of each",
        ),
        ("comments", lines({"text": "x"}), "'label' is None"),
        ("pairs", lines(GOOD_PAIR, {**GOOD_PAIR, "pert_gen_text": ""}), "line 2: 'pert_gen_text'"),
        ("pairs", lines({**GOOD_PAIR, "unpert_gen_text": None}), "'unpert_gen_text' is missing"),
        ("passages", lines({"text": 7}), "'text' is 7"),
    ],
)
def test_bad_files(tmp_path, kind, content, says):
    path = write(tmp_path / "bad.jsonl", content)
    with pytest.raises(UserError) as error:
        getattr(data, kind)(path)
    assert says in error.value.message and f"--{kind} {path}" in error.value.message
    assert "\n" not in error.value.message


def test_missing_files_and_wrong_sources(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        data.prompts(str(tmp_path / "none.jsonl"))
    with pytest.raises(UserError, match="Is a directory"):
        data.prompts(str(tmp_path))
    with pytest.raises(UserError, match="give a file"):
        data.pairs("hub")
