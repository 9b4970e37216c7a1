"""Attribution, groups, edits and data of edits, on numbers small enough to check by hand."""

import pytest
import torch

from lib import interventions, neurons


def test_attribution_by_hand():
    """Two neurons: 3 * 2 - 1 * 2 = 4 (reduces), -1 * 0.5 - 2 * 0.5 = -1.5 (increases)."""
    pre, post = torch.tensor([[3.0, -1.0]]), torch.tensor([[1.0, 2.0]])
    projection = torch.tensor([[2.0, 0.5]])
    assert neurons.attribution(pre, projection, post, projection).tolist() == [[4.0, -1.5]]


def test_attribution_follows_the_value_vector_too():
    one = torch.ones(1, 1)
    assert neurons.attribution(one, 2 * one, one, 0.5 * one).item() == 1.5


def test_groups_partition_the_reducing_neurons():
    generator = torch.Generator().manual_seed(0)
    cosine, pre, delta = torch.randn(3, 6, 50, generator=generator)
    masks = neurons.groups(cosine, pre, delta)
    together = torch.stack(list(masks.values())).long().sum(0)
    assert torch.equal(together, (delta > 0).long()), "each reducing neuron in exactly one group, no other in any"
    assert ((cosine > 0) & (pre < 0) & (delta > 0)).equal(masks["TN"])
    every = torch.stack(list(neurons.groups(cosine, pre).values())).long().sum(0)
    assert every.eq(1).all(), "section 6: without delta every neuron belongs to one"


def test_neurons_at_zero_belong_to_no_group():
    masks = neurons.groups(
        torch.tensor([[0.0, 1.0, 1.0]]), torch.tensor([[1.0, 0.0, 1.0]]), torch.tensor([[1.0, 1.0, 0.0]])
    )
    assert not torch.stack(list(masks.values())).any()


def test_summary_of_groups():
    cosine, pre = torch.tensor([[1.0, 1.0, -1.0, -1.0]]), torch.tensor([[1.0, -1.0, 1.0, -1.0]])
    delta = torch.tensor([[1.0, 1.0, 1.0, -1.0]])
    summary = neurons.group_summary(neurons.groups(cosine, pre, delta), delta, pre)
    assert summary["groups"] == {"TP": 1, "TN": 1, "AP": 1, "AN": 0}
    assert summary["percent_reducing"] == 75 and summary["percent_negative"] == 50
    assert sum(summary["group_shares"].values()) == pytest.approx(100)


def test_top_counts_over_all_layers():
    scores = torch.tensor([[0.1, 0.9], [0.8, -0.5]])
    assert neurons.top(scores, 2).tolist() == [[False, True], [True, False]]
    assert neurons.top(scores, 99).all(), "more than there are: all"


def test_edits_hold_one_index_and_one_value_tensor_a_layer():
    mask = torch.tensor([[True, False, True], [False, False, False], [False, True, False]])
    pre, post = torch.arange(9.0).view(3, 3), torch.full((3, 3), 10.0)
    clamp, shift = interventions.clamp(mask, pre, post).edit(), interventions.shift(mask, pre, post).edit()
    assert [(e.layer, e.index.tolist(), e.value.tolist()) for e in clamp] == [(0, [0, 2], [10, 10]), (2, [1], [10])]
    assert [e.value.tolist() for e in shift] == [[10, 8], [3]]
    assert (clamp.kind, shift.kind) == ("clamp", "shift") and clamp.n_neurons == 3
    scale = interventions.scale(mask, pre / 2).edit()
    assert scale.kind == "scale" and [e.value.tolist() for e in scale] == [[0, 1], [3.5]]
