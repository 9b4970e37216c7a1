"""Every choice of lib/protocol.py: what the sound and the released one compute, by hand or against raw PyTorch.

Where else the choices are tested: steered places against raw hooks in test_steer.py, the contrastive vector in
test_probe_free_editing.py, features on all families in test_traces.py.
"""

import dataclasses
import json
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import LAYERS, NEURONS, ROOT, WIDTH, Run, load_script, run, texts, write_lines
from safetensors.torch import load_file
from test_traces import ALL, FIRST, LAST, example_edit, hooked, modules, raw_generate, raw_nll
from transformers import AutoModelForCausalLM

from lib import evaluation, interventions, metrics, neurons, paper, probes, protocol, released
from lib.data import Dataset
from lib.families import FAMILIES as KINDS
from lib.families import layers, mlp_out, reach, value_vectors, write_gain
from lib.generation import NEW_TOKENS, batches, right_padded
from lib.interventions import NO_EDIT
from lib.models import load, resolve
from lib.protocol import FAITHFUL, SOUND, with_released
from lib.statistics import Bootstrap

PROMPTS = ["The river", "A much longer opening of a sentence about mountains and", "Music is"]
LONG = "You stupid idiot, " + " ".join(f"the {thing} number {at}" for at, thing in enumerate(("shit", "bank") * 9))
PASSAGES = texts("passages", "text")[:3]
patch = load_script("patch_four_groups")


def raw_of(tiny, family):
    """The same weights without nnsight."""
    return AutoModelForCausalLM.from_pretrained(tiny(family)).eval()


def until_end(tokenizer, ids) -> list[str]:
    """Texts of rows of new ids, each up to its end token."""
    cut = [row[: row.index(1)] if 1 in row else row for row in ids.tolist()]
    return [tokenizer.decode(row, skip_special_tokens=True) for row in cut]


def no_scores(continuations):
    return np.zeros(len(continuations))


def measured(model, settings, edit=NO_EDIT, prompts=PROMPTS, scorer=no_scores, brief=False, seen=None):
    """What is measured of an edit under a protocol, and the texts; seen: collects what `generate` was called with."""
    choices = released.choices(settings, model.config.model_type)
    tokens = evaluation.make_texts(model.tokenizer, 256, prompts, PASSAGES, choices)
    measures = evaluation.Measures(passages=None, choices=choices, texts=tokens, scorer=scorer, second_scorers={})

    def generate(model, batch, edit, where):
        if seen is not None:
            seen.append(({name: tensor.clone() for name, tensor in batch.items()}, where))
        return patch.generate(model, batch, edit, where)

    traces = generate, patch.likelihood
    return evaluation.measure(model, edit, measures, *traces, batch_size=4, brief=brief), tokens


# ---- the record


def test_differences_names_exactly_the_fields_that_differ():
    names = {field.name for field in dataclasses.fields(protocol.Protocol)}
    assert set(protocol.differences()) == {n for n in names if getattr(SOUND, n) != getattr(FAITHFUL, n)}
    assert names - set(protocol.differences()) == {"delta", "neuron_index"}, "one choice is right for both"


@pytest.mark.parametrize("name", protocol.differences())
def test_with_released_flips_only_the_named(name):
    flipped = dataclasses.asdict(with_released(name))
    assert flipped == {**dataclasses.asdict(SOUND), name: getattr(FAITHFUL, name)} != dataclasses.asdict(SOUND)


def test_with_released_of_none_and_of_all():
    assert with_released() == SOUND and with_released(*protocol.differences()) == FAITHFUL
    with pytest.raises(AttributeError):
        with_released("no_such_choice")


# ---- a: which positions are edited


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_a_generation_edits_all_positions_or_the_last(family, traced, tiny):
    model, raw = traced(family), raw_of(tiny, family)
    edit, change_at = example_edit("clamp")
    (batch,) = batches(model.tokenizer, PROMPTS, 4)
    continued = {}
    for settings, where in ((SOUND, ALL), (with_released("edit_positions"), LAST)):
        with hooked(raw, family, change_at(where)):
            ids = raw_generate(raw, batch)
        continued[settings] = measured(model, settings, edit)[0]["continuations"]
        assert continued[settings] == until_end(model.tokenizer, ids)
    assert continued[SOUND] != continued[with_released("edit_positions")]


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_a_perplexity_with_every_position_edited_or_the_first_alone(family, traced, tiny):
    """`nll` and `nll_first` against raw hooks; a control, which is brief, has the protocol's own alone."""
    model, raw = traced(family), raw_of(tiny, family)
    edit, change_at = example_edit("clamp")  # whose perplexity with position 0 alone is measured under both
    found, tokens = measured(model, SOUND, edit)
    batch = next(right_padded(tokens.windows, len(tokens.windows)))
    for name, where in (("nll", ALL), ("nll_first", FIRST)):
        with hooked(raw, family, change_at(where)):
            expected = raw_nll(raw, batch)
        torch.testing.assert_close(torch.tensor(found[name]).double(), expected, rtol=1e-5, atol=1e-4)
    assert np.abs(np.subtract(found["nll"], found["nll_first"])).min() > 0.01
    brief = measured(model, SOUND, edit, brief=True)[0]
    assert brief["nll"] == pytest.approx(found["nll"]) and "nll_first" not in brief and "f1" not in brief
    released = measured(model, with_released("perplexity_edit"), edit, brief=True)[0]
    assert "nll" not in released and released["nll_first"] == pytest.approx(found["nll_first"])


def test_a_the_first_position_alone_changes(traced):
    """In the first edited layer; what follows changes through attention, as it does in the released code."""
    model = traced("llama")
    everywhere = torch.ones(LAYERS, NEURONS, dtype=torch.bool)
    edit = interventions.clamp(everywhere, torch.zeros(LAYERS, NEURONS), torch.full((LAYERS, NEURONS), 7.0)).edit()
    (batch,) = right_padded([[2, 30, 31, 32, 33]], 1)
    seen = []
    handle = mlp_out(model, 0)._module.register_forward_hook(lambda m, args, out: seen.append(args[0].clone()))
    try:
        for which in (NO_EDIT, edit):
            patch.likelihood(model, batch, which, FIRST)
    finally:
        handle.remove()
    plain, edited = seen
    assert (edited[:, 0] == 7).all() and torch.equal(edited[:, 1:], plain[:, 1:])


def test_c_an_edit_that_fails_is_an_error_and_leaves_nothing(traced, tiny):
    """The released code prints the error and goes on with the unedited output."""
    model, raw = traced("llama"), raw_of(tiny, "llama")
    wrong = interventions.Edit("clamp", (interventions.LayerEdit(1, torch.tensor([NEURONS]), torch.ones(1)),))
    (batch,) = batches(model.tokenizer, PROMPTS, 4)
    for trace in (patch.generate, patch.likelihood):
        with pytest.raises(Exception, match="out of bounds"):
            trace(model, batch, wrong, ALL)
    assert torch.equal(patch.generate(model, batch, NO_EDIT, ALL), raw_generate(raw, batch))


# ---- b: what section 6's edit writes


def test_b_scale_keeps_each_token_s_own_activation_and_clamp_does_not(traced):
    """The activations after the edit: (1 - alpha) times each token's own, or one constant for all tokens."""
    model, script = traced("llama"), load_script("probe_free_editing")
    pre = torch.randn(LAYERS, NEURONS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    stage = SimpleNamespace(pre_means=neurons.Means(pre, pre))
    probe = probes.Probe(torch.randn(WIDTH, generator=torch.Generator().manual_seed(1)), 0.0)
    (batch,) = right_padded([[2, 30, 31, 32, 33], [2, 50, 51, 52, 53]], 2)
    after = {}
    for kind in ("none", "scale", "clamp"):
        plan = kind != "none" and script.make_plan(Run(model, SOUND), stage, probe, kind, "cosine", alpha=0.3, beta=1.0)
        handle = mlp_out(model, 0)._module.register_forward_hook(
            lambda m, args, out, kind=kind: after.update({kind: args[0].clone()})
        )
        try:
            script.likelihood(model, batch, plan.edit() if plan else NO_EDIT, ALL)
        finally:
            handle.remove()
    _, cosine = neurons.value_projections(model._module, probe.unit, True)
    factor = (1 - 0.3 * cosine.sign() * pre.sign())[0].float()
    assert {round(x, 6) for x in factor.tolist()} == {0.7, 1.3}
    torch.testing.assert_close(after["scale"], after["none"] * factor)
    torch.testing.assert_close(after["clamp"], (pre[0].float() * factor).expand_as(after["clamp"]))


@pytest.mark.parametrize("released, kinds", [(None, {"clamp", "scale"}), ("edit_kind", {"clamp"})])
def test_b_the_script_takes_its_edits_from_the_protocol_and_run_json_repeats_it(tiny, tmp_path, released, kinds):
    write_lines(tmp_path / "prompts.jsonl", [{"prompt": prompt} for prompt in PROMPTS[:2]])
    write_lines(tmp_path / "passages.jsonl", [{"text": text} for text in PASSAGES[:1]])
    given = {"--model": tiny("llama"), "--prompts": tmp_path / "prompts.jsonl", "--out": tmp_path / "out",
             "--passages": tmp_path / "passages.jsonl", "--scorer": "words", "--toxic-words": "river",
             "--plain-words": "iron", "--alpha": "0.3", "--beta": "1"}  # fmt: skip
    given |= {"--released": released} if released else {}
    parts = [str(part) for pair in given.items() for part in pair]
    done = run("experiments/probe_free_editing.py", *parts, cwd=ROOT, DPO_NEURONS_CACHE=str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr[-2000:]
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert {row["kind"] for row in record["rows"]} == {"none"} | kinds
    assert record["protocol"] == dataclasses.asdict(with_released(*[released] if released else []))


# ---- d: the probe's features and fit


@pytest.mark.parametrize("name", ["sound", "faithful"])
def test_d_the_probe_is_fitted_as_the_record_says(name, tiny, tmp_path):
    """Features from raw hidden states; faithful: all 128 positions after the final norm, C = 1, split by seed 42."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import train_test_split

    comments = [f"{word} number {at} {'is awful' if at % 2 else 'is kind'}" for at in range(20) for word in "ab"]
    labels = np.array([at // 2 % 2 for at in range(40)])
    rows = [{"text": text, "label": int(label)} for text, label in zip(comments, labels, strict=True)]
    file, out = write_lines(tmp_path / "comments.jsonl", rows), tmp_path / "probe"
    command = ["--model", tiny("gemma2"), "--comments", file, "--protocol", name, "--seed", 3, "--out", out]
    done = run("experiments/train_probe.py", *command, cwd=ROOT, DPO_NEURONS_CACHE=str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr[-2000:]
    stored, direction = load_file(out / "features.safetensors"), load_file(out / "probe.safetensors")["direction"]
    features, raw = stored["features"].numpy(), raw_of(tiny, "gemma2")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny("gemma2"))
    for at in (0, 7):
        ids = torch.tensor([tokenizer(comments[at])["input_ids"]])
        if name == "faithful":
            padding = 128 - ids.shape[1]
            mask = torch.tensor([[0] * padding + [1] * ids.shape[1]])
            ids = torch.cat([torch.full((1, padding), tokenizer.eos_token_id), ids], 1)
            with torch.no_grad():
                states = raw(
                    input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
                    output_hidden_states=True,
                ).hidden_states  # fmt: skip
            expected = states[-1][0].mean(0)  # transformers' last entry is after the final norm
        else:
            kept = []
            handle = raw.model.layers[-1].register_forward_hook(lambda m, args, out, kept=kept: kept.append(out))
            with torch.no_grad():
                raw(input_ids=ids)
            handle.remove()
            hidden = kept[0] if isinstance(kept[0], torch.Tensor) else kept[0][0]
            expected = hidden[0, 1:].mean(0)  # not the BOS
        torch.testing.assert_close(torch.tensor(features[at]), expected, rtol=1e-4, atol=1e-4)
    seed = 42 if name == "faithful" else 3
    fitted, held_out = train_test_split(np.arange(40), test_size=4, stratify=labels, random_state=seed)
    assert stored["held_out"].tolist() == held_out.tolist()
    if name == "faithful":
        expected = LogisticRegression(C=1.0, max_iter=500).fit(features[fitted], labels[fitted]).coef_[0]
        np.testing.assert_allclose(direction.numpy(), expected, rtol=1e-4, atol=1e-6)
    else:
        assert torch.equal(direction, probes.fit(features[fitted], labels[fitted], 3).direction)
    row = json.loads((out / "run.json").read_text())["rows"][0]
    assert {"auroc", "balanced_accuracy", "majority_rate"} < set(row)


# ---- f: where the steering vector is subtracted


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_f_steering_reaches_the_residual_stream_whole_or_through_the_mlp_s_norm(family, traced):
    """The change of the last layer's output: the vector itself, and in Gemma not when it enters before a norm."""
    model, script = traced(family), load_script("steer")
    probe = probes.Probe(torch.randn(WIDTH, generator=torch.Generator().manual_seed(0)), 0.0)
    (batch,) = right_padded([[2, 30, 31, 32, 33]], 1)
    last, outputs = layers(model)[-1]._module, []
    for settings in (None, SOUND, with_released("steer_at")):
        edit = script.steering(SimpleNamespace(protocol=settings), probe, 0.5) if settings else NO_EDIT
        kept = []
        norm = reach(model._module, KINDS[family].final_norm)
        handle = norm.register_forward_pre_hook(lambda m, args, kept=kept: kept.append(args[0].clone()))
        try:
            script.likelihood(model, batch, edit, ALL)
        finally:
            handle.remove()
        outputs.append(kept[0])
    plain, residual, mlp = outputs
    torch.testing.assert_close(residual, plain - 0.5 * probe.direction, rtol=1e-4, atol=1e-4)
    if family == "llama":
        torch.testing.assert_close(mlp, residual, rtol=1e-4, atol=1e-4)
        return
    kept = []
    handle = last.mlp.register_forward_hook(lambda m, args, out: kept.append(out.clone()))
    with torch.no_grad():
        model._module(**batch)
    handle.remove()
    norm = last.post_feedforward_layernorm
    with torch.no_grad():
        expected = plain - norm(kept[0]) + norm(kept[0] - 0.5 * probe.direction)
    torch.testing.assert_close(mlp, expected, rtol=1e-4, atol=1e-4)
    assert (mlp - residual).abs().max() > 0.1


# ---- h: padding


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "llama"])
def test_h_gemma_attends_to_padding_in_the_released_evaluation(family, traced, tiny):
    """Under `attended` the batch is end-of-text tokens that no mask hides, and the model continues that input."""
    model, raw = traced(family), raw_of(tiny, family)
    assert len({len(model.tokenizer(prompt)["input_ids"]) for prompt in PROMPTS}) == 3
    continued = {}
    for settings in (SOUND, with_released("padding")):
        seen = []
        continued[settings] = measured(model, settings, seen=seen)[0]["continuations"]
        batch = seen[0][0]
        (plain,) = batches(model.tokenizer, PROMPTS, 4)
        padding = plain["attention_mask"] == 0
        if settings == SOUND or family == "llama":  # with F1's prompts in one batch, so that the padding is wider
            assert len(batch["input_ids"]) > len(PROMPTS) and not batch["attention_mask"].all() and padding.any()
            width = plain["input_ids"].shape[1]
            for name in plain:
                assert torch.equal(batch[name][: len(PROMPTS), -width:], plain[name])
            assert not batch["attention_mask"][: len(PROMPTS), :-width].any()
        else:
            assert (batch["input_ids"][padding] == model.tokenizer.eos_token_id).all()
            assert torch.equal(batch["input_ids"][~padding], plain["input_ids"][~padding])
            assert batch["attention_mask"].all()
        ids = raw_generate(raw, batch)
        assert continued[settings] == until_end(model.tokenizer, ids)[: len(PROMPTS)]
    assert (continued[SOUND] == continued[with_released("padding")]) == (family == "llama")


# ---- i: how the prompt is removed


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_i_a_prompt_that_was_cut_stays_in_the_scored_text(family, traced):
    """Prompts are cut to 32 tokens; the text of a cut prompt is not the prompt's, so `replace` does not find it."""
    model, words = traced(family), metrics.scorer("words")
    prompts = ["The river", LONG]
    assert len(model.tokenizer(LONG)["input_ids"]) > 32
    sound, _ = measured(model, SOUND, prompts=prompts, scorer=words)
    released, _ = measured(model, with_released("prompt_removal"), prompts=prompts, scorer=words)
    assert released["continuations"][0] == sound["continuations"][0], "a short prompt is found and taken out"
    cut = model.tokenizer.decode(model.tokenizer(LONG)["input_ids"][:32], skip_special_tokens=True)
    assert LONG.startswith(cut) and "shit" in cut
    assert released["continuations"][1] == cut + sound["continuations"][1]
    assert sound["toxicity"] == [0, 0] and released["toxicity"] == [0, 1], "the prompt's own words are scored"


# ---- k: F1


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_k_f1_of_the_continuation_or_with_the_prompt_counted(family, traced, tiny):
    model, raw = traced(family), raw_of(tiny, family)
    sound, _ = measured(model, SOUND)
    released, _ = measured(model, with_released("f1_prediction"))
    assert len(sound["f1"]) == len(released["f1"]) == len(PASSAGES)
    for at, passage in enumerate(PASSAGES):
        ids = model.tokenizer(passage)["input_ids"]
        new = raw_generate(raw, {"input_ids": torch.tensor([ids[:32]]), "attention_mask": torch.ones(1, 32).long()})
        new = new[0].tolist()
        new = new[: new.index(1)] if 1 in new else new
        for found, prediction, reference in (
            (sound, new, ids[32:52]),
            (released, ids[:32] + new, ids[32:84]),  # up to 52 tokens that follow
        ):
            common = sum(min(n, Counter(reference)[token]) for token, n in Counter(prediction).items())
            precision, recall = common / len(prediction), common / len(reference)
            expected = 2 * precision * recall / (precision + recall) if common else 0.0
            assert found["f1"][at] == pytest.approx(expected)
    assert sum(released["f1"]) > sum(sound["f1"]), "counting the prompt raises the score"


# ---- l: perplexity windows


def window_nll(raw, ids) -> float:
    """Of the tokens but the first, one window at a time."""
    with torch.no_grad():
        log_probs = raw(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return -float(sum(log_probs[at - 1, ids[at]] for at in range(1, len(ids))))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_l_windows_of_a_stream_and_of_passages(family, traced, tiny):
    """stream: one BOS before all passages, n - 1 terms divided by n. passage: a BOS each, divided by n - 1."""
    model, raw = traced(family), raw_of(tiny, family)
    longest = raw.config.max_position_embeddings
    stream = model.tokenizer("\n\n".join(PASSAGES))["input_ids"]
    expected = {
        "passage": [model.tokenizer(passage)["input_ids"][:64] for passage in PASSAGES],
        "stream": [stream[at : at + longest] for at in range(0, len(stream), longest)],
    }
    assert len(expected["stream"]) > 2
    bos = [[row[0] == 2 for row in expected[name]] for name in ("passage", "stream")]
    if family == "llama":
        assert bos == [[True] * 3, [True] + [False] * (len(bos[1]) - 1)]
    for settings in (SOUND, with_released("perplexity_windows")):
        found, tokens = measured(model, settings)
        rows = expected[settings.perplexity_windows]
        assert tokens.windows == rows
        nll = [window_nll(raw, row) for row in rows]
        divisor = sum(len(row) - (settings == SOUND) for row in rows)
        assert found["nll"] == pytest.approx(nll, rel=1e-5) and sum(found["tokens"]) == divisor
        values = evaluation.by_run([found], [0])
        row = evaluation.make_row(values, values, None, Bootstrap(len(PROMPTS), 0), Bootstrap(len(rows), 0))
        assert row["log_ppl"] == pytest.approx(sum(nll) / divisor, rel=1e-5)


def test_l_a_model_that_reads_more_gets_windows_of_1024(traced):
    model = traced("llama")
    passages = texts("passages", "text")[:12]
    choices = released.choices(with_released("perplexity_windows"), "llama")
    tokens = evaluation.make_texts(model.tokenizer, 4096, PROMPTS, passages, choices)
    assert {len(row) for row in tokens.windows[:-1]} == {1024} and 0 < len(tokens.windows[-1]) <= 1024
    assert sum(tokens.windows, []) == model.tokenizer("\n\n".join(passages))["input_ids"]


# ---- m, n: mean activations


def activations(raw, family, **inputs):
    """Activations, and the same divided by the root mean square of what the MLP's last map gives (Gemma's norm)."""
    kept, scaled, handles = {}, {}, []
    for at, module in enumerate(modules(raw, family)):

        def hook(module, args, out, at=at):
            kept[at] = args[0].double()
            rms = (out.double().square().mean(-1, keepdim=True) + getattr(raw.config, "rms_norm_eps", 0.0)).sqrt()
            scaled[at] = kept[at] / rms if KINDS[family].post_norm else kept[at]

        handles.append(module.register_forward_hook(hook))
    try:
        with torch.no_grad():
            raw(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack([torch.stack([part[at] for at in range(LAYERS)], 2) for part in (kept, scaled)])


@pytest.fixture
def ending(traced, tiny):
    """family -> (nnsight model, raw model), in which the first prompt's greedy continuation ends early."""
    changed = []

    def pair(family):
        model, raw = traced(family), raw_of(tiny, family)
        (batch,) = batches(model.tokenizer, PROMPTS[:1], 1)
        end = int(raw_generate(raw, batch)[0, 4])
        for config in (model._module.generation_config, raw.generation_config):
            changed.append((config, config.eos_token_id))
            config.eos_token_id = end
        return model, raw, end

    yield pair
    for config, before in changed:
        config.eos_token_id = before


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_m_released_means_are_of_the_last_20_positions_padding_included(family, ending):
    """A second pass over what `generate` gave: new tokens' own positions, and padding after a row that ended."""
    model, raw, _ = ending(family)
    prompts = [*PROMPTS, LONG]  # the last is not cut to 32 tokens
    total, count, ended = torch.zeros(2, LAYERS, NEURONS, dtype=torch.float64), 0, 0
    for start in (0, 2):
        batch = model.tokenizer(prompts[start : start + 2], return_tensors="pt", padding=True, padding_side="left")
        assert start == 0 or batch["input_ids"].shape[1] > 32
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            ids = raw.generate(**inputs, max_new_tokens=NEW_TOKENS)
        ended += int((ids[:, -1] == 0).sum())  # the padding token
        mask = torch.cat([inputs["attention_mask"], torch.ones_like(ids[:, inputs["input_ids"].shape[1] :])], 1)
        last = activations(raw, family, input_ids=ids, attention_mask=mask)[:, :, -20:]  # no position ids
        total += last.sum((1, 2))
        count += last.shape[1] * last.shape[2]
    assert ended, "a row must end early, or this shows nothing of padding"
    found = neurons.released_means(model, prompts, 2, seed=0)
    torch.testing.assert_close(found.activation, total[0] / count, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.write, total[1] / count, rtol=1e-4, atol=1e-5)


def test_m_released_means_sample_where_the_model_s_configuration_does(traced, monkeypatch):
    model = traced("llama")
    greedy = neurons.released_means(model, PROMPTS, 2, seed=0).activation
    monkeypatch.setattr(model._module.generation_config, "do_sample", True)
    one, again, other = (neurons.released_means(model, PROMPTS, 2, seed).activation for seed in (0, 0, 1))
    assert torch.equal(one, again) and not torch.equal(one, other) and not torch.equal(one, greedy)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_m_text_means_are_of_the_counted_positions_alone(family, traced, tiny):
    model, raw = traced(family), raw_of(tiny, family)
    rows = [[2, 30, 31, 32, 33, 34], [2, 50, 51], [2, 60, 61, 62]]
    counted = [range(2, 5), range(0, 3), range(3, 4)]
    parts = [
        activations(raw, family, input_ids=torch.tensor([row]))[:, 0, at.start : at.stop]
        for row, at in zip(rows, counted, strict=True)
    ]
    expected = torch.cat(parts, 1)
    assert expected.shape[1] == 7
    found = neurons.text_means(model, rows, counted, 2)
    torch.testing.assert_close(found.activation, expected[0].mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.write, expected[1].mean(0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_m_sound_means_equal_those_over_the_finished_text(family, ending):
    """Means taken while generating (real tokens, prompts cut to 32) and over prompt and continuation read again."""
    model, raw, end = ending(family)
    prompts, rows, counted = [*PROMPTS, LONG], [], []
    for prompt in prompts:
        (batch,) = batches(model.tokenizer, [prompt], 1)
        ids, new = batch["input_ids"][0].tolist(), raw_generate(raw, batch)[0].tolist()
        assert len(ids) <= 32
        new = new[: new.index(end) + 1] if end in new else new
        rows.append(ids + new)
        counted.append(range(len(ids) - 1, len(ids) + len(new) - 1))
    assert min(map(len, counted)) < 20
    *_, generated = neurons.mean_activations(model, prompts, 2)
    read = neurons.text_means(model, rows, counted, 2)
    torch.testing.assert_close(generated.activation, read.activation, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(generated.write, read.write, rtol=1e-4, atol=1e-5)


def test_m_the_protocol_chooses_the_means(traced, tiny, cache):
    model, source = traced("llama"), resolve(str(tiny("llama")))
    prompts = Dataset(PROMPTS, "here", "sha256:0")
    *_, generated = neurons.mean_activations(model, PROMPTS, 2)
    expected = {SOUND: generated, with_released("means_over"): neurons.released_means(model, PROMPTS, 2, seed=5)}
    for settings, means in expected.items():
        for _ in range(2):
            found = neurons.cached_means(model, source, prompts, 2, settings, seed=5)
            assert torch.equal(found.activation, means.activation) and found.activation.dtype == torch.float64
    assert len([p for p in (cache / "activations").iterdir() if p.is_dir()]) == 2, "each made once"


def test_n_sums_do_not_overflow(tiny):
    """The released code's float16 sums overflow at 65,504; here activations of 10,000 over 60 tokens stay exact."""
    model = load(resolve(str(tiny("gpt2"))), "cpu")  # one of its own: it is changed
    for layer in model._module.transformer.h:
        layer.mlp.c_fc.bias.data += 1e4
    *_, means = neurons.mean_activations(model, PROMPTS, 2)
    assert means.activation.isfinite().all() and means.activation.min() > 9_000


# ---- o, p: attribution


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("settings", [SOUND, with_released("value_vectors")], ids=["written", "raw"])
def test_o_p_delta_is_before_minus_after_of_what_is_written(family, settings, traced, tiny):
    """One neuron by hand. written: m / rms times v (1 + g) in Gemma; raw: m times the weight's row."""
    base, post = traced(family), traced(family, 1)
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn(4, LAYERS, NEURONS, generator=generator, dtype=torch.float64)
    pre, after = neurons.Means(numbers[0], numbers[1]), neurons.Means(numbers[2], numbers[3])
    probe = probes.Probe(torch.randn(WIDTH, generator=generator), 0.0)
    found = neurons.attribute(base, post, probe, pre, after, settings)
    layer, index = 1, 7
    unit = probe.direction.double() / probe.direction.double().norm()
    written = settings == SOUND and family == "gemma2"
    projections = []
    for seed, means in ((0, pre), (1, after)):
        module = AutoModelForCausalLM.from_pretrained(tiny(family, seed)).model.layers[layer]
        row = module.mlp.down_proj.weight.detach()[:, index].double()
        if written:
            row = row * (1 + module.post_feedforward_layernorm.weight.detach().double())
        m = (means.write if settings == SOUND else means.activation)[layer, index]
        projections.append(float(m * (row @ unit)))
        if seed == 0:
            assert found.cosine[layer, index].item() == pytest.approx(float(row @ unit / row.norm()), rel=1e-5)
    assert found.delta[layer, index].item() == pytest.approx(projections[0] - projections[1], rel=1e-5)
    assert torch.equal(found.pre, pre.activation) and torch.equal(found.post, after.activation)
    assert torch.equal(sum(mask.long() for mask in found.groups.values()), (found.delta > 0).long())
    if family == "gemma2":
        other = neurons.attribute(base, post, probe, pre, after, FAITHFUL if settings == SOUND else SOUND)
        assert (found.cosine - other.cosine).abs().max() > 0.01


def test_o_a_neuron_that_wrote_more_before_dpo_reduces():
    """Eq. 2, before - after: above 0 where DPO lowered the toxic projection (one appendix says it the other way)."""
    assert SOUND.delta == FAITHFUL.delta == "pre - post"
    one = torch.ones(1, 1)
    assert neurons.attribution(5 * one, one, 2 * one, one).item() == 3
    assert neurons.groups(one, one, 3 * one)["TP"].item() and not neurons.groups(one, one, -3 * one)["TP"].item()


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_p_lists_of_tokens_from_the_raw_vector_or_after_the_norm(family, traced):
    """The anti-toxic value vectors as written, sign-reversed: `both` lists, or that after the final norm (table 15)."""
    model = traced(family)
    cosine = torch.randn(LAYERS, NEURONS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    layer, index = divmod(int(cosine.flatten().argmin()), NEURONS)
    vector = -value_vectors(model._module, layer)[index] * write_gain(model._module, layer)
    norm, head = reach(model._module, KINDS[family].final_norm), model._module.get_output_embeddings().weight
    with torch.no_grad():
        products = {"raw": head @ vector, "normed": head @ norm(vector[None])[0]}
    expected = {name: [model.tokenizer.decode([i]) for i in p.topk(10).indices] for name, p in products.items()}
    for settings, names in ((SOUND, {"raw", "normed"}), (with_released("lens"), {"normed"})):
        first = load_script("four_groups").anti_toxic_vectors(Run(model, settings), cosine)[0]
        assert first["neuron"] == f"L{layer}.N{index}" and first["cosine"] == cosine.min()
        assert first["tokens"] == {name: expected[name] for name in names}


# ---- q: which share beta


def test_q_released_takes_the_least_aligned_of_ap_and_tn():
    """Four neurons in each group, half of them taken."""
    cosine = torch.tensor([[0.1, 0.4, 0.3, 0.2, 0.8, 0.5, 0.6, 0.7], [-0.1, -0.4, -0.3, -0.2, -0.8, -0.5, -0.6, -0.7]])
    pre = torch.tensor([[1.0, 2, 3, 4, -1, -2, -3, -4], [-4, -3, -2, -1, 4, 3, 2, 1]])
    masks = neurons.groups(cosine, pre)

    def taken(order: str) -> dict[str, list[float]]:
        chosen = neurons.select(masks, cosine, pre, 0.5, order)
        return {name: sorted(round(x, 1) for x in cosine[mask].tolist()) for name, mask in chosen.items()}

    aligned = {"TP": [0.3, 0.4], "TN": [0.7, 0.8], "AN": [-0.4, -0.3], "AP": [-0.8, -0.7]}
    assert taken("aligned") == aligned
    assert taken("released") == {**aligned, "TN": [0.5, 0.6], "AP": [-0.6, -0.5]}
    by_activation = neurons.select(masks, cosine, pre, 0.5, "activation")
    assert {name: sorted(pre[mask].tolist()) for name, mask in by_activation.items()} == {
        "TP": [1, 2], "TN": [-2, -1], "AN": [-2, -1], "AP": [1, 2],
    }  # fmt: skip


def test_q_a_share_is_of_each_group_and_all_is_all():
    generator = torch.Generator().manual_seed(0)
    cosine, pre = torch.randn(2, 6, 50, generator=generator)
    masks = neurons.groups(cosine, pre)
    for order in ("aligned", "released", "activation"):
        for share in (0.0, 0.33, 1.0):
            chosen = neurons.select(masks, cosine, pre, share, order)
            for name, mask in masks.items():
                assert int(chosen[name].sum()) == round(share * int(mask.sum()))
                assert not (chosen[name] & ~mask).any()


def test_q_the_script_takes_the_order_from_the_protocol(traced):
    model, script = traced("llama"), load_script("probe_free_editing")
    pre = torch.randn(LAYERS, NEURONS, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    stage = SimpleNamespace(pre_means=neurons.Means(pre, pre))
    probe = probes.Probe(torch.randn(WIDTH, generator=torch.Generator().manual_seed(3)), 0.0)
    _, cosine = neurons.value_projections(model._module, probe.unit, True)
    for settings in (SOUND, with_released("beta_order")):
        run = Run(model, settings)
        plan = script.make_plan(run, stage, probe, "clamp", "cosine", alpha=0.3, beta=0.5)
        for name, group in neurons.groups(cosine, pre).items():
            inside, outside = cosine[group & plan.mask].abs(), cosine[group & ~plan.mask].abs()
            least = settings != SOUND and name in {"AP", "TN"}
            assert (inside.max() <= outside.min()) if least else (inside.min() >= outside.max())


# ---- s: neuron indices


@pytest.mark.parametrize("model", list(paper.MISNAMED))
def test_s_the_published_names_come_from_dividing_by_four_times_4096(model):
    """The same flat index divided by 16,384 gives the published pair, by d_mlp = 14,336 the right one."""
    for published, right in paper.MISNAMED[model].items():
        flat = published[0] * 4 * 4096 + published[1]
        assert paper.neuron(flat, 4 * 4096) == published
        assert paper.neuron(flat, 14_336) == right and right[1] < 14_336
    assert any(index >= 14_336 for _, index in paper.MISNAMED[model]), "one that cannot exist"
    assert SOUND.neuron_index == FAITHFUL.neuron_index == "corrected"


def test_s_neurons_are_named_by_the_model_s_own_width(traced):
    """`neuron` inverts flattening, so that what is named is what was ranked."""
    cosine = torch.randn(LAYERS, NEURONS, generator=torch.Generator().manual_seed(0))
    best = paper.neuron(int(cosine.argmax()), NEURONS)
    assert cosine[best] == cosine.max() and neurons.top(cosine, 1)[best]
