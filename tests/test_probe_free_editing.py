"""Section 6's edits: the equation by hand, the contrastive vector from raw embeddings, the script as a whole."""

import inspect
import json

import pytest
import torch
from conftest import FAMILIES, LAYERS, NEURONS, ROOT, Run, load_script, run
from test_cli import inputs  # noqa: F401  a fixture

from lib import neurons, protocol, vectors
from lib.probes import Probe

script = load_script("probe_free_editing")


class OfSeed:
    """A seed's run with these mean activations `[n_layers, d_mlp]`."""

    def __init__(self, pre):
        self.pre_means = neurons.Means(pre, pre)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["scale", "clamp", "shift"])
def test_the_equation_of_section_6(traced, family, kind):
    """TP and AN times 1 - alpha, TN and AP times 1 + alpha: of each token's activation, or of the mean."""
    model = traced(family)
    generator = torch.Generator().manual_seed(0)
    pre = torch.randn(LAYERS, NEURONS, generator=generator, dtype=torch.float64)
    probe = Probe(torch.randn(model._module.config.hidden_size, generator=generator), 0.0)
    plan = script.make_plan(Run(model, protocol.SOUND), OfSeed(pre), probe, kind, "cosine", alpha=0.3, beta=1.0)
    _, cosine = neurons.value_projections(model._module, probe.unit, through_norm=True)
    edit = {layer.layer: layer for layer in plan.edit()}
    for layer in range(LAYERS):
        for index in range(NEURONS):
            mean = pre[layer, index]
            group = ("T" if cosine[layer, index] > 0 else "A") + ("P" if mean > 0 else "N")
            factor = {"TP": 0.7, "AN": 0.7, "TN": 1.3, "AP": 1.3}[group]
            value = edit[layer].value[edit[layer].index == index].item()
            expected = {"scale": factor, "clamp": factor * mean, "shift": (factor - 1) * mean}[kind]
            assert value == pytest.approx(float(expected), abs=1e-6), group


def test_every_edit_moves_away_from_the_direction(traced):
    """Whatever the signs, the sum of what the edited means write along the direction falls; -alpha raises it."""
    model = traced("llama")
    pre = torch.randn(LAYERS, NEURONS, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    probe = Probe(torch.randn(model._module.config.hidden_size), 0.0)
    projection, _ = neurons.value_projections(model._module, probe.unit, through_norm=True)
    plan = script.make_plan(Run(model, protocol.SOUND), OfSeed(pre), probe, "clamp", "cosine", alpha=0.2, beta=1.0)
    for strength, sign in ((1.0, -1), (-1.0, 1)):
        moved = plan.start + strength * (plan.target - plan.start)
        assert (sign * ((moved - pre) * projection) > 0).all()


def test_beta_takes_the_share_of_every_group(traced):
    model = traced("gpt2")
    pre = torch.randn(LAYERS, NEURONS, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    probe = Probe(torch.randn(model._module.config.hidden_size), 0.0)
    _, cosine = neurons.value_projections(model._module, probe.unit, through_norm=True)
    masks = neurons.groups(cosine, pre)
    for order in ("cosine", "activation"):
        plan = script.make_plan(Run(model, protocol.SOUND), OfSeed(pre), probe, "scale", order, alpha=0.3, beta=0.55)
        for mask in masks.values():
            chosen = plan.mask & mask
            assert int(chosen.sum()) == round(0.55 * int(mask.sum()))
            score = cosine.abs() if order == "cosine" else -pre.abs()
            assert score[chosen].min() >= score[mask & ~chosen].max()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_contrastive_vector(traced, family):
    """The difference of mean embeddings; tied and untied models, faithful from the unembedding alone."""
    model = traced(family)
    toxic, plain = ["river", "mountains"], ["iron"]
    module, tokenizer = model._module, model.tokenizer

    def mean(table, words):
        rows = [table[tokenizer(word, add_special_tokens=False)["input_ids"]].double().mean(0) for word in words]
        return sum(rows) / len(rows)

    def unit(table):
        difference = mean(table, toxic) - mean(table, plain)
        return difference / difference.norm()

    head, embedding = module.get_output_embeddings().weight, module.get_input_embeddings().weight
    found = vectors.contrast(model, toxic, plain, both=False)
    torch.testing.assert_close(found.unit, unit(head), rtol=1e-5, atol=1e-6)
    both = unit(head) + unit(embedding)
    found = vectors.contrast(model, toxic, plain, both=True)
    torch.testing.assert_close(found.unit, both / both.norm(), rtol=1e-5, atol=1e-6)


NEURON_SCRIPTS = ("patch_four_groups", "toxic_neurons_not_enough", "probe_free_editing")
CAUSAL_SCRIPTS = (*NEURON_SCRIPTS, "steer", "unalign", "robust_alignment", "difference_in_means")


@pytest.mark.parametrize("name", CAUSAL_SCRIPTS)
def test_the_trace_is_one_in_all_scripts(name):
    """Each script shows its own copy; what the raw-hook tests say of one holds for all while the copies agree."""
    reference, other = load_script("patch_four_groups"), load_script(name)
    for function in ("generate", "likelihood", *(["intervene"] if name in NEURON_SCRIPTS else [])):
        assert inspect.getsource(getattr(other, function)) == inspect.getsource(getattr(reference, function)), function


def test_a_concept_of_ones_own(inputs, tmp_path):  # noqa: F811
    """Own words, own scorer, no probe, no DPO model, on the simulated server."""
    (tmp_path / "sad.txt").write_text("sad\nterrible awful\n")
    given = {key: inputs[key] for key in ("--model", "--prompts", "--passages")}
    changed = {"--toxic-words": tmp_path / "sad.txt", "--plain-words": "happy,great", "--limit": 2, "--alpha": "0.3",
               "--beta": "1", "--kinds": "scale", "--scorer": f"words:{tmp_path / 'sad.txt'}", "--remote": "local",
               "--out": tmp_path / "out"}  # fmt: skip
    parts = [str(part) for pair in {**given, **changed}.items() for part in pair]
    done = run("experiments/probe_free_editing.py", *parts, cwd=ROOT, DPO_NEURONS_CACHE=str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr[-2000:]
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert [row["condition"] for row in record["rows"]] == ["none", "tokens a=0.3 b=1"]
    assert record["words"] == {"away_from": ["sad", "terrible", "awful"], "towards": ["happy", "great"]}
    assert record["rows"][1]["neurons"] == LAYERS * NEURONS
    assert {part.name for part in (tmp_path / "cache").iterdir()} == {"activations", "locks", "unedited"}, (
        "nothing else"
    )


def test_words_have_no_seed_but_their_controls_have(inputs, tmp_path):  # noqa: F811
    """What no seed enters is measured once; three seeds' draws of random controls come together in one row."""
    given = {key: inputs[key] for key in ("--model", "--prompts", "--passages")}
    changed = {"--toxic-words": "sad", "--plain-words": "happy", "--limit": 2, "--alpha": "0.3", "--beta": "0.5",
               "--kinds": "scale", "--scorer": "words", "--seeds": "0,1,2", "--controls": "quick",
               "--out": tmp_path / "out"}  # fmt: skip
    parts = [str(part) for pair in {**given, **changed}.items() for part in pair]
    done = run("experiments/probe_free_editing.py", *parts, cwd=ROOT, DPO_NEURONS_CACHE=str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads((tmp_path / "out" / "run.json").read_text())["rows"]
    runs = {row["condition"]: [(one["seed"], one["draw"]) for one in row["runs"]] for row in rows}
    random = ("random", "random_in_layer", "matched", "permuted", "gaussian")
    once = ("none", "tokens a=0.3 b=0.5", "control:flipped", "control:zero")
    expected = {f"control:{name}": [(0, 0), (1, 1), (2, 2)] for name in random}
    assert runs == expected | dict.fromkeys(once, [(0, 0)])


@pytest.mark.parametrize(
    "changed, says",
    [
        ({"--beta": "1.5"}, "a share of neurons is above 0"),
        ({"--alpha": "a lot"}, "expected numbers such as"),
        ({"--kinds": "nudge"}, "nudge given"),
        ({"--toxic-words": ","}, "holds no word"),
        ({"--representation": "vibes"}, "vibes given"),
    ],
)
def test_bad_options(inputs, tmp_path, changed, says):  # noqa: F811
    parts = [str(part) for pair in {**inputs, "--out": tmp_path / "out", **changed}.items() for part in pair]
    done = run("experiments/probe_free_editing.py", *parts, cwd=ROOT, DPO_NEURONS_CACHE=str(tmp_path / "cache"))
    assert done.returncode == 2 and says in done.stderr.splitlines()[-1], done.stderr[-2000:]
    assert not (tmp_path / "out").exists()
