"""Controls: what each leaves as it was, on random masks, and strengths of edits by hand."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import FAMILIES, LAYERS, NEURONS, WIDTH, load_script
from safetensors.torch import save_file
from test_traces import ALL, left_batch

from lib import controls, interventions, offsets, probes
from lib.families import FAMILIES as KINDS
from lib.families import reach, value_vectors, write_gain
from lib.neurons import Means

SHAPE = (4, 300)


@pytest.fixture(params=range(4))
def random(request):
    """A generator, a mask of about 2, 20, 50 or 90 % of all neurons, and two features, one of them with ties."""
    generator = torch.Generator().manual_seed(request.param)
    mask = torch.rand(SHAPE, generator=generator) < (0.02, 0.2, 0.5, 0.9)[request.param]
    smooth = torch.randn(SHAPE, generator=generator, dtype=torch.float64)
    return generator, mask, [smooth, (3 * smooth + torch.randn(SHAPE, generator=generator)).round()]


def plan_of(kind: str, mask, generator) -> interventions.Plan:
    pre, post = torch.randn(2, *mask.shape, generator=generator, dtype=torch.float64)
    if kind == "scale":
        return interventions.scale(mask, post)
    return {"clamp": interventions.clamp, "shift": interventions.shift}[kind](mask, pre, post)


def test_random_masks_keep_the_number(random):
    generator, mask, _ = random
    one, other = (controls.random_mask(mask, generator) for _ in range(2))
    assert one.sum() == other.sum() == mask.sum() and one.shape == mask.shape and one.dtype == torch.bool
    assert not one.equal(other) and not one.equal(mask)


def test_random_masks_take_every_neuron_alike():
    """Over 2,000 draws of 3 of 12 each neuron comes up about 500 times, whether it was masked or not."""
    mask = torch.zeros(3, 4, dtype=torch.bool)
    mask[0, :3] = True
    generator = torch.Generator().manual_seed(0)
    counts = sum(controls.random_mask(mask, generator).long() for _ in range(2000))
    assert counts.sum() == 6000 and counts.min() > 400 and counts.max() < 600


def test_random_in_layer_keeps_the_number_of_each_layer(random):
    generator, mask, _ = random
    found = controls.random_in_layer(mask, generator)
    assert torch.equal(found.sum(1), mask.sum(1)) and not found.equal(mask)


def bins(values: torch.Tensor) -> np.ndarray:
    """Which fifth of a layer's values each belongs to, by sorting."""
    order = sorted(range(len(values)), key=lambda at: float(values[at]))
    place = np.empty(len(values), dtype=int)
    for rank, at in enumerate(order):
        place[at] = rank * controls.BINS // len(values)
    return place


def test_matched_keeps_the_number_of_each_layer_and_bin(random):
    """And takes neurons outside the mask while there are any."""
    generator, mask, features = random
    distinct = [features[0], features[1] + 1e-6 * features[0]]  # without ties a bin is one set of neurons
    found = controls.matched(mask, distinct, generator)
    assert torch.equal(found.sum(1), mask.sum(1))
    for layer in range(SHAPE[0]):
        cells = list(zip(*(bins(feature[layer]) for feature in distinct), strict=True))
        for cell in set(cells):
            here = torch.tensor([one == cell for one in cells])
            masked, free = int((here & mask[layer]).sum()), int((here & ~mask[layer]).sum())
            assert int((here & found[layer]).sum()) == masked
            assert int((here & found[layer] & ~mask[layer]).sum()) == min(masked, free)


def test_matched_is_alike_where_random_is_not():
    """Neurons of the largest feature: matched ones are large too, random ones are not."""
    generator = torch.Generator().manual_seed(0)
    feature = torch.rand(SHAPE, generator=generator)
    mask = (feature > 0.8) & (torch.rand(SHAPE, generator=generator) < 0.4)
    matched, drawn = controls.matched(mask, [feature], generator), controls.random_in_layer(mask, generator)
    assert feature[matched].mean() > 0.85 and feature[drawn].mean() < 0.65 and not (matched & mask).any()


def test_permuted_keeps_each_layer_s_values(random):
    generator, mask, (value, _) = random
    found = controls.permuted(mask, value, generator)
    assert torch.equal(found[~mask], value[~mask]) and not torch.equal(found, value)
    for layer, row in enumerate(mask):
        assert torch.equal(found[layer, row].sort().values, value[layer, row].sort().values)


@pytest.mark.parametrize("level, n", [("none", 0), ("quick", 3), ("full", 20)])
@pytest.mark.parametrize("runs", [1, 2, 3, 5])
def test_draws_are_spread_over_the_runs(level, n, runs):
    parts = [controls.draws(level, run, runs) for run in range(runs)]
    every = sorted(sum(parts, []))
    assert every == list(range(len(every))) and n <= len(every) < n + runs
    assert len({len(part) for part in parts}) == 1, "no seed weighs more than another"


def all_of(plan, draws, seed, features) -> dict:
    return {(one.name, one.draw): (one.plan, one.strength) for one in controls.of_plan(plan, draws, seed, features)}


@pytest.mark.parametrize("kind", ["clamp", "shift", "scale"])
def test_a_seed_and_a_draw_name_one_control(random, kind):
    generator, mask, features = random
    plan = plan_of(kind, mask, generator)
    one, again = (all_of(plan, [0, 1], 5, features) for _ in range(2))
    other = all_of(plan, [0, 1], 6, features)
    assert one.keys() == again.keys() == other.keys()

    def same(a, b) -> bool:
        return torch.equal(a[0].mask, b[0].mask) and torch.equal(a[0].target, b[0].target) and a[1] == b[1]

    assert all(same(one[key], again[key]) for key in one)
    assert same(all_of(plan, [1], 5, features)["matched", 1], one["matched", 1]), "whichever draws are beside it"
    for key in one:
        if key[0] in {"random", "random_in_layer", "permuted", "matched"}:
            assert not same(one[key], other[key])
            assert not same(one[key[0], 0], one[key[0], 1])


@pytest.mark.parametrize("kind", ["clamp", "shift", "scale"])
def test_what_a_control_of_an_edit_changes(random, kind):
    """Other neurons get the values that the same rule gives to them; permuted ones are the same neurons."""
    generator, mask, features = random
    plan = plan_of(kind, mask, generator)
    found = all_of(plan, [0], 0, features)
    names = {name for name, _ in found}
    assert names == {"flipped", "random", "random_in_layer", "matched"} | (
        {"own_means"} if kind == "clamp" else {"zero", "permuted"} | ({"matched_push"} if kind == "shift" else set())
    )
    for (name, _), (other, strength) in found.items():
        edit = other.edit(strength)
        assert edit.kind == kind and edit.n_neurons == int(mask.sum())
        chosen = torch.zeros(SHAPE, dtype=torch.bool)
        for layer, index, value in edit:
            chosen[layer, index] = True
            start, target = plan.start[layer, index], plan.target[layer, index]
            if name in {"random", "random_in_layer", "matched", "matched_push"}:
                torch.testing.assert_close(value, target.float())
            elif name in {"own_means", "zero"}:
                torch.testing.assert_close(value, start.float())
            elif name == "flipped":
                torch.testing.assert_close(value.double() - start, start - target, rtol=1e-4, atol=1e-5)
            else:
                torch.testing.assert_close(value.sort().values, target.float().sort().values)
        assert chosen.equal(mask) == (name in {"own_means", "zero", "flipped", "permuted"})


@pytest.mark.parametrize("kind", ["clamp", "shift", "scale"])
def test_where_all_neurons_are_edited_there_are_no_others(kind):
    plan = plan_of(kind, torch.ones(SHAPE, dtype=torch.bool), torch.Generator().manual_seed(0))
    names = {name for name, _ in all_of(plan, [0], 0, [plan.target])}
    assert names == ({"own_means", "flipped"} if kind == "clamp" else {"zero", "flipped", "permuted"})


def test_strengths_by_hand():
    """value = start + strength (target - start), for one neuron whose mean goes from 2 to 5, or is multiplied by 5."""
    mask, two, five = torch.ones(1, 1, dtype=torch.bool), torch.full((1, 1), 2.0), torch.full((1, 1), 5.0)
    expected = {
        "clamp": {1: 5, 0: 2, -1: -1, 0.5: 3.5, 2: 8},
        "shift": {1: 3, 0: 0, -1: -3, 0.5: 1.5, 2: 6},
        "scale": {1: 5, 0: 1, -1: -3, 0.5: 3, 2: 9},
    }
    plans = {
        "clamp": interventions.clamp(mask, two, five), "shift": interventions.shift(mask, two, five),
        "scale": interventions.scale(mask, five),
    }  # fmt: skip
    for kind, values in expected.items():
        found = {strength: next(iter(plans[kind].edit(strength))).value.item() for strength in values}
        assert found == values
        assert next(iter(plans[kind].edit())).value.item() == values[1]
    m = torch.tensor([[[10.0]]])
    after = {kind: interventions.edited(kind, m, next(iter(plans[kind].edit())).value).item() for kind in expected}
    assert after == {"clamp": 5, "shift": 13, "scale": 50}


def test_strength_0_is_the_unedited_model_but_for_a_clamp(traced):
    """Why `zero` needs no measurement of its own for shift and scale, and `own_means` does."""
    model, script = traced("llama"), load_script("patch_four_groups")
    generator = torch.Generator().manual_seed(0)
    mask, batch = torch.rand(LAYERS, NEURONS, generator=generator) < 0.5, left_batch(model)
    plain = script.generate(model, batch, interventions.NO_EDIT, ALL)
    for kind in ("clamp", "shift", "scale"):
        plan = plan_of(kind, mask, generator)
        assert torch.equal(script.generate(model, batch, plan.edit(0), ALL), plain) == (kind != "clamp")
        assert not torch.equal(script.generate(model, batch, plan.edit(1), ALL), plain)


def test_directions_in_the_probe_s_place(tmp_path):
    """Random ones always; probes of shuffled labels where train_probe.py left the comments' features beside it."""
    probe = probes.Probe(torch.ones(6), -1.0)
    file = tmp_path / "probe.safetensors"
    probe.save(file)
    without = list(controls.of_direction(probe, file, [0, 2], 7))
    assert [(control.name, control.draw) for control in without] == [("gaussian", 0), ("gaussian", 2)]
    assert [control.name for control in controls.of_direction(probe, None, [0], 7)] == ["gaussian"]
    assert all(control.direction.direction.shape == (6,) for control in without)
    assert abs(float(without[0].direction.unit @ without[1].direction.unit)) < 0.99

    random = np.random.default_rng(0)
    labels = np.arange(60) % 2
    features = (random.normal(size=(60, 6)) + labels[:, None]).astype(np.float32)

    def found(features):
        stored = {"features": torch.tensor(features), "labels": torch.tensor(labels), "held_out": torch.arange(50, 60)}
        save_file(stored, tmp_path / "features.safetensors")
        return {(one.name, one.draw): one.direction for one in controls.of_direction(probe, file, [0, 2], 7)}

    first = found(features)
    assert set(first) == {("gaussian", 0), ("gaussian", 2), ("permuted_labels", 0), ("permuted_labels", 2)}
    assert torch.equal(first["gaussian", 0].direction, without[0].direction.direction)
    true = probes.fit(features[:50], labels[:50], 7)
    shuffled = first["permuted_labels", 0], first["permuted_labels", 2]
    assert not torch.equal(shuffled[0].direction, shuffled[1].direction)
    for one in shuffled:
        assert not torch.equal(one.direction, true.direction)
        correct = ((probes.scores(one, features[:50]) > 0) == labels[:50]).mean()
        assert correct < ((probes.scores(true, features[:50]) > 0) == labels[:50]).mean()
    changed = features.copy()
    changed[50:] *= 100
    assert torch.equal(found(changed)["permuted_labels", 0].direction, shuffled[0].direction), (
        "held-out ones are not used"
    )
    changed[:50] *= -3
    assert not torch.equal(found(changed)["permuted_labels", 0].direction, shuffled[0].direction)


def test_the_table_names_every_control():
    """The table at the top of lib/controls.py, and what is yielded for the three kinds and for a direction."""
    table = set(re.findall(r"^\| `(\w+)` \|", controls.__doc__, flags=re.M))
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(SHAPE, generator=generator) < 0.5
    yielded = {
        control.name
        for kind in ("clamp", "shift", "scale")
        for control in controls.of_plan(plan_of(kind, mask, generator), [0], 0, [mask.double()])
    }
    at_dose = controls.at_dose([controls.Control(name) for name in controls.DOSED], *torch.rand(3, 3, 2, 5))
    anew = {"gaussian", "permuted_labels", "reselected"}
    assert table == yielded | {control.name for control in at_dose} | anew | {"probe_direction"}


@pytest.mark.parametrize("family", FAMILIES)
def test_value_norms(family, traced):
    model = traced(family)
    module = reach(reach(model._module, KINDS[family].layers)[2], KINDS[family].mlp_out)
    weight = module.weight.double() if family == "gpt2" else module.weight.double().T
    found = controls.value_norms(model)
    assert found.shape == (LAYERS, NEURONS) and found.dtype == torch.float64
    torch.testing.assert_close(found[2], weight.square().sum(-1).sqrt())
    assert weight.shape == (NEURONS, WIDTH)


def test_a_control_at_the_dose_of_the_real_edit(traced):
    """Its offset, recomputed from the edit that is measured, has the real one's projection on DPO's, or its length."""
    generator, model = torch.Generator().manual_seed(0), traced("llama")
    pre, post = torch.randn(2, LAYERS, NEURONS, generator=generator, dtype=torch.float64)
    mask = torch.rand(LAYERS, NEURONS, generator=generator) < 0.5
    plan, full_plan = (interventions.shift(each, pre, post) for each in (mask, torch.ones_like(mask)))
    plans = [replace(plan, mask=torch.rand(mask.shape, generator=generator) < 0.5) for _ in controls.DOSED]
    drawn = [controls.Control(name, plan=other) for name, other in zip(controls.DOSED, plans, strict=True)]
    full, real, *own = offsets.offsets(model, [full_plan.edit(), plan.edit(), *(one.edit for one in drawn)])
    dosed = list(controls.at_dose(drawn, torch.stack(own), real, full))
    assert len(dosed) == 5
    for control, offset in zip(dosed, offsets.offsets(model, [one.edit for one in dosed]), strict=True):
        if control.name.endswith("_at_norm"):
            assert float(offset.norm()) == pytest.approx(float(real.norm()), rel=1e-6)
        else:
            assert float((offset * full).sum()) == pytest.approx(float((real * full).sum()), rel=1e-5)


def test_reselected_moves_a_neuron_s_change_whole():
    """Each layer keeps its changes; activation and write go to the same neuron, from its own mean before DPO."""
    generator = torch.Generator().manual_seed(0)
    pre, post = (Means(*torch.randn(2, *SHAPE, generator=generator, dtype=torch.float64)) for _ in range(2))
    after = controls.reselected(pre, post, 3, 1)
    assert torch.equal(after.write, controls.reselected(pre, post, 3, 1).write)
    assert not torch.equal(after.write, controls.reselected(pre, post, 3, 2).write)
    for layer in range(SHAPE[0]):
        changes, moved = (
            torch.stack([means.activation - pre.activation, means.write - pre.write], -1)[layer]
            for means in (post, after)
        )
        by_activation = changes[changes[:, 0].argsort()], moved[moved[:, 0].argsort()]
        torch.testing.assert_close(*by_activation, rtol=0, atol=1e-12)
        assert not torch.equal(changes, moved)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_shift_away_from_a_direction_writes_it_in_every_layer(family, traced):
    """As long as the real offset after the gain of a norm that follows, and straight against the direction."""
    generator, model = torch.Generator().manual_seed(0), traced(family)
    direction = torch.randn(WIDTH, generator=generator)
    offset = torch.randn(LAYERS, WIDTH, generator=generator, dtype=torch.float64)
    shift = offsets.away_from(model, direction, offset)
    assert shift.shape == (LAYERS, NEURONS)
    for layer in range(LAYERS):
        gain = write_gain(model, layer).cpu().double()
        written = gain * (shift[layer] @ value_vectors(model, layer).cpu().double())
        torch.testing.assert_close(written.norm(), (gain * offset[layer]).norm())
        cosine = torch.nn.functional.cosine_similarity(written, direction.double(), 0)
        assert cosine == pytest.approx(-1, abs=1e-6)


def test_a_shift_that_adds_nothing_has_no_dose():
    """Two models alike, or neurons that write nothing: strength 0, no NaN."""
    nothing, something = torch.zeros(2, 5, dtype=torch.float64), torch.ones(2, 5, dtype=torch.float64)
    drawn = [controls.Control(name) for name in controls.DOSED]
    for own, real, full in (
        (nothing, something, something),
        (nothing, nothing, nothing),
        (something, nothing, nothing),
    ):
        dosed = controls.at_dose(drawn, torch.stack([own] * 3), real, full)
        assert [control.strength for control in dosed] == [0.0] * 5
