"""Attribution, groups, edits and data of edits, on numbers small enough to check by hand."""

import json

import pytest
import torch
from conftest import ROOT, run

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


GROUPING = """
import json, resource, time
import torch
from lib import neurons

def grouped(pre, projection_pre, post, projection_post, cosine):
    delta = neurons.attribution(pre, projection_pre, post, projection_post)
    masks = neurons.groups(cosine, pre, delta)
    every = neurons.groups(cosine, pre)
    chosen = [neurons.select(every, cosine, pre, 0.55, order) for order in ("aligned", "released", "activation")]
    return delta, masks, chosen, neurons.top(cosine, 256)

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

grouped(*torch.randn(5, 2, 64, dtype=torch.float64))  # what is loaded and set up once
given = torch.randn(5, 32, 14336, dtype=torch.float64)
before, seconds = peak(), []
for _ in range(3):
    started = time.process_time()
    delta, masks, chosen, best = grouped(*given)
    seconds.append(time.process_time() - started)
sizes = [sum(int(mask.sum()) for mask in one.values()) for one in (masks, *chosen)]
print(json.dumps({"seconds": min(seconds), "bytes": peak() - before, "sizes": sizes, "reducing": int((delta > 0).sum()),
                  "top": int(best.sum())}))
"""


def test_grouping_is_quick_on_as_many_neurons_as_an_8b_model_has():
    """Attribution, groups, three selections and top of 32 x 14,336 neurons: 0.5 s of one core, 200 MB."""
    done = run("-c", GROUPING, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["seconds"] <= 0.5 and found["bytes"] <= 200e6, found
    assert found["sizes"][0] == found["reducing"] and found["top"] == 256
    assert all(abs(size - 0.55 * 32 * 14336) <= 4 for size in found["sizes"][1:])
