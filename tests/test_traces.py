"""Every trace against raw PyTorch hooks on an independently loaded model, for every family."""

from contextlib import contextmanager

import nnsight
import pytest
import torch
from conftest import DEVICE, FAMILIES, LAYERS, NEURONS, WIDTH, load_script, texts

from lib import interventions, neurons, probes
from lib.families import FAMILIES as KINDS
from lib.families import reach, value_vectors, write_gain
from lib.generation import NEW_TOKENS, batches, greedy, log_probabilities, right_padded, windows
from lib.probes import Probe
from lib.remote import session

PROMPTS = [
    "The river",
    "A much longer opening of a sentence about mountains and",
    "Music is",
    "Iron and copper are old",
]
ALL, LAST, FIRST = slice(None), slice(-1, None), slice(0, 1)
EDITS = ["clamp", "shift", "scale"]
script = load_script("patch_four_groups")


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def raw(family, tiny):
    """The same weights without nnsight."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny(family)).eval().to(DEVICE)


def modules(raw, family):
    kind = KINDS[family]
    return [reach(layer, kind.mlp_out) for layer in reach(raw, kind.layers)]


@contextmanager
def hooked(raw, family, change):
    """Raw forward pre-hooks: `change(layer, activations)` edits a copy in place."""

    def hook_of(layer):
        def hook(module, args):
            activations = args[0].clone()
            change(layer, activations)
            return (activations, *args[1:])

        return hook

    handles = [m.register_forward_pre_hook(hook_of(at)) for at, m in enumerate(modules(raw, family))]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def example_edit(kind: str):
    """An edit of about half of all neurons, and the change that raw hooks make for it."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.rand(LAYERS, NEURONS, generator=generator) < 0.5
    pre, post = torch.randn(2, LAYERS, NEURONS, generator=generator, dtype=torch.float64)
    plan = {
        "clamp": interventions.clamp(mask, pre, post),
        "shift": interventions.shift(mask, pre, post),
        "scale": interventions.scale(mask, post),
    }[kind]

    def change_at(where):
        def change(layer, activations):
            part, edited = activations[:, where], mask[layer]
            if kind == "clamp":
                part[..., edited] = post[layer, edited].to(part)
            elif kind == "shift":
                part[..., edited] += (post - pre)[layer, edited].to(part)
            else:
                part[..., edited] *= post[layer, edited].to(part)

        return change

    return plan.edit(), change_at


def left_batch(model):
    (batch,) = batches(model.tokenizer, PROMPTS, len(PROMPTS), DEVICE)
    return batch


def raw_generate(raw, batch):
    with torch.no_grad():
        return raw.generate(**batch, **greedy())[:, batch["input_ids"].shape[1] :]


def raw_nll(raw, batch):
    with torch.no_grad():
        log_probs = raw(**batch).logits.double().log_softmax(-1)
    ids, real = batch["input_ids"], batch["attention_mask"].bool()
    return torch.stack(
        [-log_probs[row, :-1].gather(-1, ids[row, 1:, None])[:, 0][real[row, 1:]].sum() for row in range(len(ids))]
    ).cpu()


@pytest.mark.parametrize("where", [LAST, ALL], ids=["last", "all"])
@pytest.mark.parametrize("kind", EDITS)
def test_edited_generation_equals_raw_hooks(family, traced, raw, kind, where):
    model = traced(family)
    edit, change_at = example_edit(kind)
    batch = left_batch(model)
    with hooked(raw, family, change_at(where)):
        expected = raw_generate(raw, batch)
    assert torch.equal(script.generate(model, batch, edit, where), expected)
    assert not torch.equal(expected, raw_generate(raw, batch)), "the edit must do something, or this shows nothing"


@pytest.mark.parametrize("where", [FIRST, ALL], ids=["first", "all"])
@pytest.mark.parametrize("kind", EDITS)
def test_edited_likelihood_equals_raw_hooks(family, traced, raw, kind, where):
    model = traced(family)
    edit, change_at = example_edit(kind)
    (batch,) = right_padded(windows(model.tokenizer, texts("passages", "text")[:5], 40, 20), 5, DEVICE)
    with hooked(raw, family, change_at(where)):
        expected = raw_nll(raw, batch)
    found = script.likelihood(model, batch, edit, where)[0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert (found - raw_nll(raw, batch)).abs().min() > 1e-3


@pytest.mark.parametrize("kind", EDITS)
def test_kl_from_the_base_model_equals_raw_hooks(family, traced, raw, kind):
    """Summed over each row's tokens but the first, in float64 by hand; shipped to a server too."""
    model = traced(family)
    edit, change_at = example_edit(kind)
    (batch,) = right_padded(windows(model.tokenizer, texts("passages", "text")[:5], 40, 20), 5, DEVICE)
    with torch.no_grad():
        p = raw(**batch).logits.double().log_softmax(-1)
        with hooked(raw, family, change_at(ALL)):
            q = raw(**batch).logits.double().log_softmax(-1)
    per_token = (p.exp() * (p - q)).sum(-1)[:, :-1]
    expected = (per_token * batch["attention_mask"][:, 1:]).sum(-1).cpu()
    base = log_probabilities(model, batch)
    found = script.likelihood(model, batch, edit, ALL, base)[1]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)  # the base model's are kept in float16
    assert expected.min() > 1e-3
    same = script.likelihood(model, batch, interventions.NO_EDIT, ALL, base)[1]
    assert same.abs().max() < 1e-4
    assert (script.likelihood(model, batch, edit, ALL)[1] == 0).all(), "not asked for"
    likelihood, everywhere = script.likelihood, ALL
    with session(model, "local"):
        shipped = nnsight.save(likelihood(model, batch, edit, everywhere, log_probabilities(model, batch))[1])
    torch.testing.assert_close(shipped, found)


def test_no_edit_equals_the_model_itself(family, traced, raw):
    model = traced(family)
    batch = left_batch(model)
    assert torch.equal(script.generate(model, batch, interventions.NO_EDIT, ALL), raw_generate(raw, batch))
    zeros = torch.zeros(LAYERS, NEURONS)
    nothing = interventions.clamp(zeros.bool(), zeros, zeros + 1).edit()
    assert nothing.n_neurons == 0
    assert torch.equal(script.generate(model, batch, nothing, ALL), raw_generate(raw, batch))


def test_nothing_of_an_edit_remains(family, traced, raw):
    model = traced(family)
    edit, _ = example_edit("clamp")
    batch = left_batch(model)
    script.generate(model, batch, edit, ALL)
    assert torch.equal(script.generate(model, batch, interventions.NO_EDIT, ALL), raw_generate(raw, batch))
    with torch.no_grad():
        assert torch.equal(model._module(**batch).logits, raw(**batch).logits)


def test_an_edit_reaches_every_step(family, traced, raw):
    """With `last`, what each forward pass of the decoding loop writes is the clamped value, at every step."""
    model = traced(family)
    edit, change_at = example_edit("clamp")
    batch = left_batch(model)
    seen = []
    module = modules(model._module, family)[1]
    expected = next(layer for layer in edit if layer.layer == 1)
    handle = module.register_forward_hook(lambda m, args, output: seen.append(args[0][:, -1, expected.index].clone()))
    try:
        script.generate(model, batch, edit, LAST)
    finally:
        handle.remove()
    assert len(seen) == NEW_TOKENS
    for step in seen:
        torch.testing.assert_close(step.cpu(), expected.value.expand_as(step))


def test_rows_do_not_depend_on_their_batch(family, traced):
    """Left padding with mask and position ids: a prompt alone and beside longer ones gives the same ids."""
    model = traced(family)
    edit, _ = example_edit("shift")
    together = script.generate(model, left_batch(model), edit, ALL)
    for row, prompt in enumerate(PROMPTS):
        (batch,) = batches(model.tokenizer, [prompt], 1, DEVICE)
        assert torch.equal(script.generate(model, batch, edit, ALL)[0], together[row])


def last_means(model, prompts=PROMPTS, **more):
    *_, means = neurons.mean_activations(model, prompts, 2, **more)
    return means


def test_mean_activations_equal_raw_hooks(family, traced, raw):
    model = traced(family)
    ends = {1}
    total = torch.zeros(LAYERS, NEURONS, dtype=torch.float64)
    count = 0
    for prompt in PROMPTS:
        (batch,) = batches(model.tokenizer, [prompt], 1, DEVICE)
        ids = raw_generate(raw, batch)[0].tolist()
        kept = ids.index(1) + 1 if ends & set(ids) else len(ids)
        steps = {layer: [] for layer in range(LAYERS)}
        with hooked(raw, family, lambda layer, m, steps=steps: steps[layer].append(m[0, -1].double().cpu())):
            raw_generate(raw, batch)
        for layer in range(LAYERS):
            total[layer] += torch.stack(steps[layer][:kept]).sum(0)
        count += kept
    torch.testing.assert_close(last_means(model).activation, total / count, rtol=1e-5, atol=1e-5)


def test_steps_after_the_end_of_text_do_not_count(traced):
    """The end token is made the most frequent greedy choice, so that some rows end early."""
    model = traced("llama")
    (batch,) = batches(model.tokenizer, PROMPTS, 4, DEVICE)
    ids = script.generate(model, batch, interventions.NO_EDIT, ALL)
    before = model._module.generation_config.eos_token_id
    model._module.generation_config.eos_token_id = int(ids[0, 3])
    try:
        alone = last_means(model, PROMPTS[:1])
    finally:
        model._module.generation_config.eos_token_id = before
    first = ids[0].tolist().index(int(ids[0, 3])) + 1
    *_, short = neurons.mean_activations(model, PROMPTS[:1], 2, new_tokens=first)
    torch.testing.assert_close(alone.activation, short.activation)


def test_writes_add_up_to_what_the_residual_stream_gets(family, traced, raw):
    """Sum over neurons of mean write x value vector x gain = mean of what the MLP adds to the residual stream."""
    model = traced(family)
    kind = KINDS[family]
    added = [[] for _ in range(LAYERS)]
    handles = []
    for at, layer in enumerate(reach(raw, kind.layers)):
        module = reach(layer, kind.post_norm) if kind.post_norm else layer.mlp
        handles.append(
            module.register_forward_hook(lambda m, a, out, at=at: added[at].append(out[0, -1].double().cpu()))
        )
    for prompt in PROMPTS:
        (batch,) = batches(model.tokenizer, [prompt], 1, DEVICE)
        raw_generate(raw, batch)
    for handle in handles:
        handle.remove()
    means = last_means(model)
    for layer in range(LAYERS):
        written = means.write[layer] @ (value_vectors(raw, layer).double() * write_gain(raw, layer).double()).cpu()
        if family == "gpt2":
            written = written + reach(raw, kind.layers)[layer].mlp.c_proj.bias.double().cpu()
        torch.testing.assert_close(written, torch.stack(added[layer]).mean(0), rtol=1e-4, atol=1e-4)


def test_value_projections(family, traced, raw):
    probe = Probe(torch.randn(WIDTH, generator=torch.Generator().manual_seed(2)), 0.0)
    unit = probe.direction.double() / probe.direction.double().norm()
    module = modules(raw, family)[2]
    weight = module.weight.detach().double().cpu()
    row = weight[7] if family == "gpt2" else weight[:, 7]
    projection, cosine = neurons.value_projections(traced(family)._module, probe.unit, through_norm=False)
    assert projection[2, 7].item() == pytest.approx(float(row @ unit), rel=1e-6)
    assert cosine[2, 7].item() == pytest.approx(float(row @ unit / row.norm()), rel=1e-6)


def test_probe_features_equal_hidden_states(family, traced, raw):
    """tokens: mean over real tokens before the final norm; padded: over 128 positions, padded with eos, after it."""
    model = traced(family)
    comments = ["short one", "a somewhat longer comment, with more words than the first", "mid sized comment here"]
    kind = KINDS[family]
    for over in ("tokens", "padded"):
        found = probes.mean_residuals(model, comments, 2, over)
        for row, text in enumerate(comments):
            if over == "tokens":
                ids = model.tokenizer(text, return_tensors="pt").to(DEVICE)["input_ids"]
                kept = []
                handle = reach(raw, kind.layers)[-1].register_forward_hook(
                    lambda m, a, out, kept=kept: kept.append(out)
                )
                with torch.no_grad():
                    raw(ids)
                handle.remove()
                hidden = kept[0] if isinstance(kept[0], torch.Tensor) else kept[0][0]
                expected = hidden[0, (0 if family == "gpt2" else 1) :].mean(0)
            else:
                batch = model.tokenizer(
                    text, return_tensors="pt", padding="max_length", padding_side="left", max_length=128
                ).to(DEVICE)
                batch["input_ids"][batch["attention_mask"] == 0] = model.tokenizer.eos_token_id
                with torch.no_grad():  # the released code hands over no position ids: padding counts
                    hidden = raw(**batch, output_hidden_states=True).hidden_states
                expected = hidden[-1][0].mean(0)
            torch.testing.assert_close(torch.tensor(found[row]), expected.cpu(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_is_what_transformers_loads(family, tiny, dtype):
    """Buffers too: rotary frequencies stay in float32 whatever the weights are in. At positions where it tells."""
    from transformers import AutoModelForCausalLM

    from lib.models import load, resolve

    ids = torch.randint(3, 300, (1, 200), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    plain = AutoModelForCausalLM.from_pretrained(tiny(family), dtype=getattr(torch, dtype)).eval().to(DEVICE)
    model = load(resolve(str(tiny(family))), DEVICE, dtype)
    with torch.no_grad():
        assert torch.equal(model._module(ids).logits, plain(ids).logits)
    buffers = dict(plain.named_buffers())
    assert all(buffer.dtype == buffers[name].dtype for name, buffer in model._module.named_buffers())


def test_every_trace_can_be_shipped(family, traced):
    """nnsight's simulated server restores each trace from what was sent, without the caller's modules."""
    model = traced(family)
    batch = left_batch(model)
    (right,) = right_padded(windows(model.tokenizer, texts("passages", "text")[:2], 40, 20), 2, DEVICE)
    generate, likelihood, everywhere = script.generate, script.likelihood, ALL
    for kind in EDITS:
        edit, _ = example_edit(kind)
        with session(model, "local"):
            shipped_ids = nnsight.save(generate(model, batch, edit, everywhere))
            shipped_nll = nnsight.save(likelihood(model, right, edit, everywhere))
        assert torch.equal(shipped_ids, generate(model, batch, edit, ALL))
        torch.testing.assert_close(shipped_nll, likelihood(model, right, edit, ALL))
    shipped, here = last_means(model, remote="local"), last_means(model)
    torch.testing.assert_close(shipped.activation, here.activation)
    torch.testing.assert_close(shipped.write, here.write)
    comments = ["a comment", "another and longer comment"]
    for over in ("tokens", "padded"):
        features = probes.mean_residuals(model, comments, 2, over)
        assert (probes.mean_residuals(model, comments, 2, over, "local") == features).all()
    rows, counted = [[2, 30, 31, 32], [2, 40, 41]], [range(1, 4), range(0, 2)]
    shipped, here = (neurons.text_means(model, rows, counted, 2, remote) for remote in ("local", False))
    torch.testing.assert_close(shipped.write, here.write)
    shipped, here = (neurons.released_means(model, PROMPTS, 2, 0, remote) for remote in ("local", False))
    torch.testing.assert_close(shipped.write, here.write)
