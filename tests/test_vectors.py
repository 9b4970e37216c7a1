"""Directions: read in the vocabulary, from words, and their order. SVD and unit vectors: test_toxic_subspace.py."""

import pytest
import torch
from conftest import FAMILIES, LAYERS, NEURONS, WIDTH

from lib import vectors
from lib.errors import UserError
from lib.families import value_vectors, write_gain
from lib.paper import steering_scales
from lib.probes import Probe
from lib.protocol import PROTOCOLS


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


@pytest.mark.parametrize("protocol", ["sound", "faithful"])
@pytest.mark.parametrize("family", FAMILIES)
def test_vectors_from_raw_weights(traced, family, protocol):
    """A named value vector and the best aligned one, seen as the protocol says; SVD up to sign; random by seed."""
    raw = traced(family)._module
    probe = Probe(torch.randn(WIDTH, generator=torch.Generator().manual_seed(4)), 0.0)

    def named(name: str, seed: int = 0):
        return vectors.named(raw, name, probe, seed, protocol, PROTOCOLS[protocol].value_vectors == "written")

    rows = torch.cat([value_vectors(raw, at).double() for at in range(LAYERS)])
    seen = rows
    if protocol == "sound":
        seen = torch.cat([value_vectors(raw, at).double() * write_gain(raw, at).double() for at in range(LAYERS)])
    torch.testing.assert_close(named("value:L2.N7").direction.double(), seen[2 * NEURONS + 7], rtol=1e-5, atol=1e-6)
    best = torch.nn.functional.cosine_similarity(seen, probe.direction.double()[None]).argmax()
    torch.testing.assert_close(named("value").direction.double(), seen[best], rtol=1e-5, atol=1e-6)
    cosine = torch.nn.functional.cosine_similarity(seen, probe.direction.double()[None])
    chosen = seen[cosine.argsort(descending=True)[: vectors.SPANNED[protocol][0]]]
    expected = torch.linalg.svd(chosen / chosen.norm(dim=1, keepdim=True)).Vh[1]
    found = named("svd:1").direction.double()
    assert abs(float(found @ expected)) == pytest.approx(1, abs=1e-4)
    random = named("random").direction
    assert torch.equal(random, named("random").direction)
    assert not torch.equal(random, named("random", 1).direction)
    assert named("probe") is probe
    for name, says in (("value:L3.N0", "layers 0 to 2"), ("value:19", "no neuron"), ("svd:32", "directions 0 to 31")):
        with pytest.raises(UserError, match=says):
            named(name)


def test_published_scales():
    assert steering_scales("gpt2", "value:L19.N770") == [20] and steering_scales("gpt2", "svd:0") == [100]
    assert steering_scales("gpt2", "probe") == [30, 40, 50]
    with pytest.raises(UserError, match="give numbers"):
        steering_scales("gpt2", "random")
