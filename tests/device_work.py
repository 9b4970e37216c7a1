"""What lib, dpo and the scripts compute where a model's weights are: each name a function of a pair of tiny models."""

import torch
from conftest import LAYERS, NEURONS, WIDTH, load_script, texts

from lib import controls, interventions, neurons, pplm, probes, vectors, weights
from lib.families import input_device
from lib.generation import batches, prompt_ids, right_padded, windows
from lib.probes import Probe
from lib.protocol import SOUND

PROMPTS = texts("prompts", "prompt")[:5]
COMMENTS = texts("comments", "text")[:6]
ALL = slice(None)
PATCH, STEER, UNALIGN, ROBUST = map(load_script, ("patch_four_groups", "steer", "unalign", "robust_alignment"))
LENS, SHIFT, CARD, SUBSPACE = map(load_script, ("logit_lens", "residual_shift", "neuron_card", "toxic_subspace"))
TABLE_6 = pplm.PPLM(0.4, 2, kl_scale=0.1, gm_scale=0.95, gamma=1.0, window=0, top_k=10, temperature=1.0)


def probe() -> Probe:
    return Probe(torch.randn(WIDTH, generator=torch.Generator().manual_seed(1)), 0.2)


def weak_probe() -> Probe:
    """Not sure of any text: PPLM's steps all have one length, and where a probe is sure they are rounding alone."""
    return Probe(probe().direction / 10, 0.2)


def asked(model) -> dict:
    (batch,) = batches(model.tokenizer, PROMPTS, len(PROMPTS), input_device(model))
    return batch


def passages(model) -> dict:
    rows = windows(model.tokenizer, texts("passages", "text")[:3], 40, 20)
    (batch,) = right_padded(rows, 3, input_device(model))
    return batch


def edit(kind: str):
    generator = torch.Generator().manual_seed(1)
    mask = torch.rand(LAYERS, NEURONS, generator=generator) < 0.5
    pre, post = torch.randn(2, LAYERS, NEURONS, generator=generator, dtype=torch.float64)
    plans = {"clamp": (mask, pre, post), "shift": (mask, pre, post), "scale": (mask, post)}
    return getattr(interventions, kind)(*plans[kind]).edit()


def some_neurons() -> torch.Tensor:
    mask = torch.zeros(LAYERS, NEURONS, dtype=torch.bool)
    mask[0, [3, 7]] = mask[2, 40] = True
    return mask


def attributed(base, post) -> neurons.Attribution:
    (pre,), (after,) = (list(neurons.mean_activations(model, PROMPTS, len(PROMPTS))) for model in (base, post))
    return neurons.attribute(base, post, probe(), pre, after, SOUND)


def chosen_sets(base, post) -> list[torch.Tensor]:
    """Everything that main of patch_four_groups does between the means and the edits."""
    attribution = attributed(base, post)
    plan = interventions.shift(attribution.groups["TP"], attribution.pre, attribution.post)
    generator = torch.Generator().manual_seed(0)
    norms = controls.value_norms(base)
    matched = controls.matched(plan.mask, [norms, attribution.pre.abs()], generator)
    selected = neurons.select(attribution.groups, attribution.cosine, attribution.pre, 0.3, "aligned")
    return [plan.mask, matched, controls.permuted(plan.mask, plan.target, generator), *selected.values()]


def directions(base, post) -> list[torch.Tensor]:
    names = ("value", "value:L1.N7", "svd:0")
    named = [vectors.named(base, name, probe(), 0, "sound", True).direction for name in names]
    words = [vectors.contrast(base, ["bad", "stone"], ["good"], True), vectors.concept(base, ["bad", "stone"])]
    return [*named, *(word.direction for word in words)]


def trained(model, **changes) -> list[float]:
    """Losses of three DPO updates of a copy of the model, as `dpo.train` makes them, without its files."""
    import copy

    from dpo import train
    from dpo.config import Config
    from dpo.data import tokenize
    from dpo.trainable import choose
    from lib.data import Pair

    words = "river stone cloud engine violin harbour".split()
    pairs = [Pair(f"The {a} and the {b}", f" were {b} and calm.", f" hated {a} {b}") for a in words for b in words[:2]]
    copied = copy.deepcopy(model._module).requires_grad_(True)  # traces need no gradients
    if model.dtype == torch.bfloat16:  # as `python -m dpo --dtype bfloat16`
        changes["dtype"] = "bfloat16"
        copied = copied if "lora" in changes.get("trainable", "") else copied.float()
    config = Config(learning_rate=1e-3, **changes)
    torch.manual_seed(0)
    network, masks = choose(copied, config.trainable)
    train.prepare(network)
    tokens = tokenize(model.tokenizer, pairs, 16, 8, False)
    reference = copy.deepcopy(network).requires_grad_(False) if config.kl_weight else None
    known = None if reference else train._log_probs(network, tokens, config)
    optimizer, losses, device = train._optimizer(network, config), [], next(network.parameters()).device
    for step in range(3):
        batches = [list(range(4 * step, 4 * step + 2)), list(range(4 * step + 2, 4 * step + 4))]
        losses.append(train.objective(network, reference, tokens, known, batches, config, device)["loss"])
        for parameter, mask in masks.items():
            parameter.grad.mul_(mask)
        torch.nn.utils.clip_grad_norm_(network.parameters(), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return losses


def keys(model):
    return interventions.scaled_by("keys", some_neurons(), 10.0)


WORK = {
    "edited generation": lambda a, b: [PATCH.generate(a, asked(a), edit(k), ALL) for k in ("clamp", "shift", "scale")],
    "edited likelihood": lambda a, b: [
        PATCH.likelihood(a, passages(a), edit(kind), where)
        for kind in ("clamp", "shift", "scale")
        for where in (ALL, slice(0, 1))
    ],
    "steered generation": lambda a, b: STEER.generate(a, asked(a), STEER.Steering(3 * probe().direction, "mlp"), ALL),
    "steered likelihood": lambda a, b: STEER.likelihood(
        a, passages(a), STEER.Steering(3 * probe().direction, "residual"), ALL
    ),
    "scaled keys, generation": lambda a, b: UNALIGN.generate(a, asked(a), keys(a), ALL),
    "scaled keys, likelihood": lambda a, b: [
        UNALIGN.likelihood(a, passages(a), keys(a), ALL),
        UNALIGN.likelihood(a, passages(a), interventions.scaled_by("values", some_neurons(), 2.0), ALL),
        ROBUST.likelihood(a, passages(a), keys(a), ALL),
    ],
    "mean activations": lambda a, b: [
        part for means in neurons.mean_activations(a, PROMPTS, 3) for part in (means.activation, means.write)
    ],
    "means of given texts": lambda a, b: (
        neurons.text_means(a, prompt_ids(a.tokenizer, PROMPTS), [range(1, 4)] * len(PROMPTS), 2).write
    ),
    "released means": lambda a, b: neurons.released_means(a, PROMPTS, 2, 0).activation,
    "probe features": lambda a, b: [
        torch.tensor(probes.mean_residuals(a, COMMENTS, 4, over)) for over in ("tokens", "padded")
    ],
    "value projections": lambda a, b: [*neurons.value_projections(a, probe().unit, True), controls.value_norms(a)],
    "attribution": lambda a, b: [getattr(attributed(a, b), name) for name in ("pre", "post", "cosine", "delta")],
    "sets of neurons": chosen_sets,
    "directions": directions,
    "nearest tokens": lambda a, b: torch.tensor(vectors.nearest_ids(a, probe().direction[None], 5, True)),
    "value vectors": lambda a, b: vectors.unit_vectors(a, torch.arange(60), True),
    "pplm": lambda a, b: pplm.generate(a, weak_probe(), asked(a), TABLE_6, torch.zeros(len(PROMPTS), 3, 10)),
    "logit lens": lambda a, b: [part for part in LENS.lens(a, [(asked(a), LENS.next_tokens(a, [asked(a)])[0])])],
    "residual streams": lambda a, b: SHIFT.observe(b, a, [asked(a)], [0, 2], [(0, 5), (2, 40)])[0],
    "moved value vectors": lambda a, b: [
        part for parts in weights.moves(b, a, 2, probe().unit, probe().unit[None]) for part in parts
    ],
    "changed weights": lambda a, b: torch.tensor(weights.changes(b, a)["all"]["relative_change"]),
    "lowest cosine": lambda a, b: torch.tensor(weights.lowest_value_cosine(b, a)),
    "largest activations": lambda a, b: [
        part for parts in CARD.largest(a, [asked(a)], {0: [3, 7], 2: [40]}) for part in parts
    ],
    "subspace": lambda a, b: SUBSPACE.projections(a, torch.eye(WIDTH, dtype=torch.float64)[None, :3], True),
    "dpo": lambda a, b: torch.tensor(trained(a)),
    "dpo with kl": lambda a, b: torch.tensor(trained(a, kl_weight=0.1)),
    "dpo of adapters": lambda a, b: torch.tensor(trained(a, trainable="lora:2")),
    "dpo of values": lambda a, b: torch.tensor(trained(a, trainable="values:L0.N3,L2.N40")),
    "dpo of biases": lambda a, b: torch.tensor(trained(a, trainable="biases")),
}


def tensors(found) -> list[torch.Tensor]:
    return [found] if isinstance(found, torch.Tensor) else list(found)
