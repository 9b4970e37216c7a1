"""Directions: read in the vocabulary, from words, and their order. SVD and unit vectors: test_toxic_subspace.py."""

import pytest
import torch
from conftest import WIDTH

from lib import vectors


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_nearest_tokens(traced, family):
    """The tokens with the largest products, by a full sort; Gemma's and GPT-2's final norms change the order."""
    model = traced(family)
    directions = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(0))
    head = model._module.get_output_embeddings().weight
    norm = model._module.transformer.ln_f if family == "gpt2" else model._module.model.norm
    for normed in (False, True):
        with torch.no_grad():
            products = (norm(directions) if normed else directions) @ head.T
        expected = [[model.tokenizer.decode([i]) for i in row.argsort(descending=True)[:5]] for row in products]
        assert vectors.nearest_tokens(model, directions, 5, normed) == expected
    assert vectors.nearest_tokens(model, directions, 5) != expected
    assert len(vectors.nearest_tokens(model, directions[:1])[0]) == 10


def test_a_concept_by_hand(traced):
    model = traced("llama")
    head = model._module.get_output_embeddings().weight.double()
    ids = [model.tokenizer(word, add_special_tokens=False)["input_ids"] for word in ("river", "zq")]
    assert len(ids[1]) > 1, "a word of several tokens is the mean of them"
    expected = (head[ids[0]].mean(0) + head[ids[1]].mean(0)) / 2 - head.mean(0)
    torch.testing.assert_close(vectors.concept(model, ["river", "zq"]).direction, expected.float())


def test_ranked():
    cosine = torch.tensor([[0.9, 0.8, -0.1], [0.7, 0.6, 0.85]])
    assert vectors.ranked(cosine).tolist() == [0, 5, 1, 3, 4, 2]
    assert vectors.ranked(cosine, per_layer=1).tolist() == [0, 5], "the best of each layer alone"
