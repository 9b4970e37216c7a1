"""How DPO's small weight changes move the residual stream (Lee et al. 2024, 5.1, 5.2; figures 2 to 10).

The claims: every parameter keeps a cosine above 0.99 with itself; toxic value vectors stay, but their neurons fire
less, because the residual stream before their MLP has moved by an offset (figures 3, 4, 6); and this offset is
written by value vectors that moved against it and are multiplied by negative activations (figures 5, 7 to 10).
Measured at the last position of each prompt, which both models read alike, for the layers of the --top neurons that
align best with the (first seed's) probe. What the paper does not have, and this adds:

shared text   the toxic neurons' mean activations when both models read the base model's continuations
contributions what really wrote the offset, along itself: MLPs by moved value vectors, MLPs by changed activations, and
              the rest (exact for the mean over prompts, Gemma's norms included); the claim is about the first
random        share of moved value vectors that point against a random direction instead of the offset
intervals     over prompts, of each toxic neuron's drop; and each prompt is held against the other prompts' offset,
              since any noise lies along a mean that it is part of

Weights are compared in the run's --dtype: in bfloat16 changes as small as DPO's are mostly rounding.

Needs a probe and a DPO checkpoint, made when missing or given (--probe, --post). Writes run.json, figures/, and their
points and the offsets as shifts.safetensors to runs/residual_shift/<model>/.

    python experiments/residual_shift.py
    python experiments/residual_shift.py --model gpt2 --neurons L19.N770,L12.N771,L18.N2669,L13.N668
"""

import click

from lib.cli import options
from lib.families import mlp_norm, mlp_out
from lib.observation import OPTIONS, percent, spread

DRAWS = 20  # random directions


@click.command(help=__doc__.split("\n")[0])
@options(*OPTIONS)
@click.option("--top", type=click.IntRange(1), default=5, show_default=True, help="Toxic neurons by cosine (figure 2).")
@click.option("--neurons", help="These instead, such as L19.N770,L12.N771.")
def main(top, neurons, **options):
    from lib import observation
    from lib.families import d_mlp, n_layers, parse_neuron

    with observation.begin("residual_shift", {**options, "top": top, "neurons": neurons}) as run:
        sizes = n_layers(run.base), d_mlp(run.base)
        chosen = neurons and [parse_neuron(name, *sizes, "--neurons") for name in neurons.split(",")]
        rows = []
        for stage in run.stages():
            chosen = chosen or best(run, stage, top)  # of the first seed's probe, in every seed's DPO model
            row, tensors = measure(run, stage, chosen)
            rows.append(row)
            if stage.seed == run.seeds[0]:
                first = tensors
        record = write(run, rows, first)
    report(run, record)


def best(run, stage, top: int) -> list[tuple[int, int]]:
    """The neurons whose value vectors align best with the probe, as (layer, index)."""
    from lib import vectors

    cosine = run.cosines(stage.probe)
    return [divmod(int(at), cosine.shape[1]) for at in vectors.ranked(cosine)[:top]]


def measure(run, stage, chosen: list[tuple[int, int]]) -> tuple[dict, dict]:
    """One seed's row of the record, and what its figures are drawn from."""
    from lib import neurons, observation, weights
    from lib.remote import at_weights
    from lib.statistics import Bootstrap

    remote = run.remote
    models = {"pre": run.base, "post": stage.post}
    layers = sorted({layer for layer, _ in chosen})
    asked = observation.prompts_of(run)
    activations, shifts = at_weights(observe, stage.post, run.base, asked, layers, chosen, remote=remote)
    shifts = dict(zip(layers, shifts, strict=True))
    prompts = [ids for batch in asked for ids in unpadded(batch)]
    at_last = [range(len(ids) - 1, len(ids)) for ids in prompts]
    shared = observation.own_text(run)
    means = {
        "last": [neurons.text_means(m, prompts, at_last, run.batch_size, remote) for m in models.values()],
        "shared": [neurons.text_means(m, *shared, run.batch_size, remote) for m in models.values()],
        "own": [stage.pre_means, stage.post_means],
    }
    over_prompts = Bootstrap(len(prompts), run.options["seed"])
    found = []
    for at, (layer, index) in enumerate(chosen):
        before, after = activations[:, :, at]
        one = {"neuron": f"L{layer}.N{index}"}
        for text, pair in means.items():
            one[text] = {name: float(mean.activation[layer, index]) for name, mean in zip(models, pair, strict=True)}
        one["change_at_last"] = over_prompts.difference(after, before)
        found.append(one)
    offsets = {layer: written(run, stage, layer, shifts[layer], means["last"]) for layer in layers}
    row = {
        "seed": stage.seed,
        "parameters": at_weights(weights.changes, stage.post, run.base, remote=remote),
        "neurons": found,
        "layers": {str(layer): entry for layer, (entry, _) in offsets.items()},
    }
    figures = {"shifts": shifts, "activations": activations, "chosen": chosen, "means": means["last"][0].activation}
    return row, figures | {"cosines": {layer: cosines for layer, (_, cosines) in offsets.items()}}


def unpadded(batch: dict) -> list[list[int]]:
    """Token ids of each row."""
    pairs = zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True)
    return [ids[real].tolist() for ids, real in pairs]


def observe(post, base, batches: list[dict], layers: list[int], chosen: list[tuple[int, int]]) -> tuple:
    """At each prompt's last position, before and after DPO: the neurons' activations, and what `reduced` keeps of the
    residual stream between attention and MLP in each of the layers.

    Returns: activations `[2, n_prompts, n_chosen]`, and the layers' tensors; float64.
    """
    import torch

    rows, width = sum(len(batch["input_ids"]) for batch in batches), base._module.config.hidden_size
    streams = torch.zeros(2, len(layers), rows, width)
    activations = torch.zeros(2, rows, len(chosen))
    for which, model in enumerate((base, post)):
        first = 0
        for batch in batches:
            own = slice(first, first + len(batch["input_ids"]))
            first = own.stop
            with model.trace(batch, logits_to_keep=1):
                for at, layer in enumerate(layers):
                    streams[which, at, own] = mlp_norm(model, layer).input[:, -1].float().cpu()
                    m = mlp_out(model, layer).input[:, -1].float().cpu()  # [batch, d_mlp]
                    for place, (where, index) in enumerate(chosen):
                        if where == layer:
                            activations[which, own, place] = m[:, index]
    return activations.double(), [reduced(*streams[:, at].double()) for at in range(len(layers))]


def reduced(before, after) -> dict:
    """What is kept of a layer's residual streams `[n_prompts, d_model]` before and after DPO.

    Returns: the `offset`, the mean shift `[d_model]`; the streams' mean `length` before DPO; `along` `[n_prompts]`:
        each prompt's shift times the others' offset; and for the figure `points` `[2, 2, n_prompts // 2]`: the streams
        before and after, on the offset and on the first principal component of the rest.
    """
    import torch

    own = after - before
    offset = own[::2].mean(0)  # every second prompt's; the others are the points: noise has no part in both
    unit = offset / offset.norm().clamp(min=1e-30)
    both = torch.cat([before[1::2], after[1::2]])
    rest = both - both.mean(0)
    rest = rest - (rest @ unit)[:, None] * unit
    component = torch.linalg.svd(rest, full_matrices=False).Vh[0] if len(rest) else unit
    component = component * component[component.abs().argmax()].sign()  # a component has no sign of its own
    return {
        "offset": own.mean(0),
        "length": float(before.norm(dim=1).mean()),
        "along": (own * (own.sum(0) - own)).sum(1),
        "points": torch.stack([both @ unit, both @ component]).unflatten(1, (2, len(rest) // 2)).transpose(0, 1),
    }


def written(run, stage, layer: int, shift: dict, means: list) -> tuple[dict, list]:
    """What wrote the offset of the residual stream before a layer's MLP, and which value vectors oppose it.

    shift: the layer's, of `reduced`. means: both models' mean activations at the prompts' last positions.

    Returns: the layer's entry of the record, and the cosines of all earlier layers' value-vector moves with the offset,
        `[d_mlp]` each.
    """
    import torch

    from lib.remote import at_weights
    from lib.weights import moves

    total = float(shift["offset"].norm())
    unit = shift["offset"] / max(total, 1e-30)
    generator = torch.Generator().manual_seed(stage.seed)
    random = torch.randn(DRAWS, len(unit), generator=generator, dtype=torch.float64)
    random /= random.norm(dim=1, keepdim=True)
    pre, post = means
    cosines, parts, against_random = [], {"moved value vectors": 0.0, "changed activations": 0.0}, 0
    found = at_weights(moves, stage.post, run.base, layer, unit, random, remote=run.remote)
    for earlier, (cosine, first, second, against) in enumerate(found):
        cosines.append(cosine)
        against_random = against_random + against  # [DRAWS]
        parts["moved value vectors"] += float(pre.write[earlier] @ (second - first))
        parts["changed activations"] += float((post.write[earlier] - pre.write[earlier]) @ second)
    parts["the rest (attention, embedding, biases)"] = total - sum(parts.values())
    entry = {
        "length": total,
        "relative_length": total / shift["length"],
        "percent_along": percent(shift["along"] > 0),
        "contributions": {name: 100 * part / (total or 1) for name, part in parts.items()},
    }
    if cosines:
        every, activation = torch.stack(cosines), pre.activation[:layer]
        entry |= {
            "against": [percent(cosine < 0) for cosine in cosines],
            "percent_against": percent(every < 0),
            "percent_against_random": spread((100 * against_random / every.numel()).tolist()),
            "percent_negative_activation": percent(activation < 0),
            "percent_contributing": percent(every * activation > 0),
        }
    return entry, cosines


def write(run, rows: list[dict], first: dict) -> dict:
    """The record of all seeds; tensors and figures of the first."""
    from safetensors.torch import save_file

    from lib import observation, plots

    figures, shifts = run.work / "figures", first["shifts"]
    tensors = {"activations": first["activations"].float()}  # [2, n_prompts, n_chosen]
    for layer, shift in shifts.items():
        tensors |= {f"{name}.L{layer}": shift[name].float().contiguous() for name in ("offset", "points")}
    save_file(tensors, run.work / "shifts.safetensors")
    plots.toxic_activations(rows[0]["neurons"], figures / "toxic_activations.png")
    for place, (layer, index) in enumerate(first["chosen"]):
        if layer in [other for other, _ in first["chosen"][:place]]:
            continue
        points, activations = shifts[layer]["points"], first["activations"][:, 1::2, place]
        name = f"L{layer}.N{index}"
        plots.offset(points.numpy(), activations.numpy(), name, figures / f"offset_{name}.png")
        if cosines := first["cosines"][layer]:
            means = first["means"][:layer].numpy()
            plots.shift_cosines([c.numpy() for c in cosines], means, layer, figures / f"cosines_L{layer}.png")
    return observation.write(run, rows, {}, top=run.options["top"], neurons=run.options["neurons"])


def report(run, record: dict) -> None:
    """Print parameters, toxic neurons, and the offsets of their layers."""
    from lib.tables import show, wide_console

    rows, lines = record["rows"], []
    for kind in rows[0]["parameters"]:
        found = [row["parameters"][kind] for row in rows]
        lines.append((f"{kind}: 1 - lowest cosine with itself", [1 - one["lowest_cosine"] for one in found], None))
        lines.append(("  mean |change| of an entry", [one["mean_change"] for one in found], None))
    for at, one in enumerate(rows[0]["neurons"]):
        lines.append(
            (f"{one['neuron']}: change at the prompt's end", [r["neurons"][at]["change_at_last"] for r in rows], None)
        )
        for text in ("own", "shared"):
            pairs = [row["neurons"][at][text] for row in rows]
            lines.append((f"  before DPO, {text} text", [pair["pre"] for pair in pairs], None))
            lines.append((f"  after DPO, {text} text", [pair["post"] for pair in pairs], None))
    for layer in rows[0]["layers"]:
        found = [row["layers"][layer] for row in rows]
        lines.append((f"layer {layer}: offset / length of the stream", [one["relative_length"] for one in found], None))
        lines.append(("  prompts that move along the others' mean, %", [one["percent_along"] for one in found], None))
        for part in found[0]["contributions"]:
            lines.append((f"  written by {part}, %", [one["contributions"][part] for one in found], None))
        if "against" in found[0]:
            lines.append(("  value vectors that moved against it, %", [one["percent_against"] for one in found], None))
            lines.append(("    against random directions", [one["percent_against_random"] for one in found], None))
            lines.append(("  negative activations, %", [one["percent_negative_activation"] for one in found], None))
            lines.append(("  activation and move of one sign, %", [one["percent_contributing"] for one in found], None))
    console = wide_console()
    show(console, record, lines)
    console.print(
        "Lee et al., GPT2-medium: 1 - cosine below 0.01, mean norm difference below 1e-5",
        markup=False,
    )
    console.print(f"Record, offsets and figures: {run.out}", soft_wrap=True)


if __name__ == "__main__":
    main()
