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

from lib.cli import LOOKING, check, options


@click.command(help=__doc__.split("\n")[0])
@options(*LOOKING)
@click.option("--top", type=click.IntRange(1), default=5, show_default=True, help="Toxic neurons by cosine (figure 2).")
@click.option("--neurons", help="These instead, such as L19.N770,L12.N771.")
def command(**options):
    main(**options)


check(command, __name__)  # --help and wrong options end here, before torch is imported

import torch
from safetensors.torch import save_file

from lib import experiment, observation, plots_neurons, vectors, weights
from lib.dry_run import Traces, Workload
from lib.families import d_mlp, mlp_norm, mlp_out, n_layers, parse_neuron
from lib.generation import prompt_ids
from lib.neurons import Means, text_means
from lib.observation import percent, spread
from lib.remote import at_weights
from lib.statistics import Bootstrap
from lib.streams import reduced
from lib.tables import line_at, show, wide_console

DRAWS = 20  # random directions


def main(top, neurons, **options):
    options |= {"top": top, "neurons": neurons}
    at_ends = Traces("read", models=2)  # once for streams and neurons, once for the means
    plan = Workload(traces=[at_ends, at_ends, Traces("generate", once=True), Traces("read generated", models=2)])
    with experiment.begin("residual_shift", options, plan) as inputs:
        sizes = {"layers": n_layers(inputs.base), "neurons": d_mlp(inputs.base)}
        names = neurons.split(",") if neurons else []
        chosen = [parse_neuron(name, **sizes, given="--neurons") for name in names]
        text, rows = observation.own_text(inputs), []
        for run in inputs.runs():
            if not chosen:  # by the first seed's probe, in every seed's model after DPO
                cosine = inputs.cosines(run.probe)
                chosen = [divmod(int(at), cosine.shape[1]) for at in vectors.ranked(cosine)[:top]]
            row, seen = measure(inputs, run, chosen, text)
            rows.append(row)
            if run.seed == inputs.seeds[0]:
                save(inputs, row["neurons"], chosen, **seen)
        record = observation.write(inputs, rows, published={}, top=top, neurons=neurons)
    report(inputs, record)


def measure(inputs, run, chosen: list[tuple[int, int]], text: tuple) -> tuple[dict, dict]:
    """One seed's row of the record, and what `save` takes. text: what `observation.own_text` returned."""
    models, layers, remote = (inputs.base, run.post), sorted({layer for layer, _ in chosen}), inputs.remote
    batches, prompts = observation.prompts_of(inputs), prompt_ids(inputs.base.tokenizer, inputs.prompts.items)
    ends = [range(len(ids) - 1, len(ids)) for ids in prompts]
    activations, streams = at_weights(observe, run.post, inputs.base, batches, layers, chosen, remote=remote)
    both_means = {
        "last": [text_means(model, prompts, ends, inputs.batch_size, remote) for model in models],
        "shared": [text_means(model, *text, inputs.batch_size, remote) for model in models],
        "own": [run.pre_means, run.post_means],
    }
    over_prompts = Bootstrap(len(prompts), inputs.options["seed"])
    neurons, entries, cosines = [], {}, {}
    for at, (layer, index) in enumerate(chosen):
        neuron = {"neuron": f"L{layer}.N{index}"}
        for name, pair in both_means.items():
            pre, post = (float(mean.activation[layer, index]) for mean in pair)
            neuron[name] = {"pre": pre, "post": post}
        before, after = activations[:, :, at].numpy()
        neurons.append(neuron | {"change_at_last": over_prompts.difference(values=after, baseline=before)})
    for layer in layers:
        entries[str(layer)], cosines[layer] = written(inputs, run, layer, streams[layer], *both_means["last"])
    parameters = at_weights(weights.changes, run.post, inputs.base, remote=remote)
    row = {"seed": run.seed, "parameters": parameters, "neurons": neurons, "layers": entries}
    pre, _ = both_means["last"]
    return row, {"activations": activations, "streams": streams, "cosines": cosines, "pre": pre.activation}


def observe(post, base, batches: list[dict], layers: list[int], chosen: list[tuple[int, int]]) -> tuple:
    """At each prompt's last position, before and after DPO: the neurons' activations, and what `reduced` keeps of the
    residual stream between attention and MLP in each of the layers.

    Returns: activations `[2, n_prompts, n_chosen]`, and {layer: its tensors}; float64.
    """
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
    return activations.double(), {layer: reduced(*streams[:, at].double()) for at, layer in enumerate(layers)}


def written(inputs, run, layer: int, stream: dict, pre: Means, post: Means) -> tuple[dict, list]:
    """What wrote the offset of the residual stream before a layer's MLP, and which value vectors oppose it.

    stream: the layer's, of `reduced`. pre, post: both models' mean activations at the prompts' last positions.

    Returns: the layer's entry of the record, and the cosines of all earlier layers' value-vector moves with the offset,
        `[d_mlp]` each.
    """
    total = float(stream["offset"].norm())
    unit = stream["offset"] / max(total, 1e-30)
    generator = torch.Generator().manual_seed(run.seed)
    random = torch.randn(DRAWS, len(unit), generator=generator, dtype=torch.float64)
    random /= random.norm(dim=1, keepdim=True)
    cosines, parts, against_random = [], {"moved value vectors": 0.0, "changed activations": 0.0}, 0
    moves = at_weights(weights.moves, run.post, inputs.base, layer, unit, random, remote=inputs.remote)
    for earlier, (cosine, before, after, against) in enumerate(moves):
        cosines.append(cosine)
        against_random = against_random + against  # [DRAWS]
        parts["moved value vectors"] += float(pre.write[earlier] @ (after - before))
        parts["changed activations"] += float((post.write[earlier] - pre.write[earlier]) @ after)
    parts["the rest (attention, embedding, biases)"] = total - sum(parts.values())
    entry = {
        "length": total,
        "relative_length": total / stream["length"],
        "percent_along": percent(stream["along"] > 0),
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


def save(inputs, neurons: list[dict], chosen: list[tuple[int, int]], activations, streams, cosines, pre) -> None:
    """Write the first seed's tensors and figures.

    neurons: of the record. activations, streams: of `observe`. cosines: {layer: of `written`}. pre: mean activations
    at the prompts' ends before DPO, `[n_layers, d_mlp]`.
    """
    figures, tensors = inputs.work / "figures", {"activations": activations.float()}
    plots_neurons.toxic_activations(neurons, figures / "toxic_activations.png")
    for layer, stream in streams.items():
        tensors |= {f"{name}.L{layer}": stream[name].float().contiguous() for name in ("offset", "points")}
        place = [at for at, _ in chosen].index(layer)  # the layer's first neuron colours the points
        name, colours = neurons[place]["neuron"], activations[:, 1::2, place].numpy()
        plots_neurons.offset(stream["points"].numpy(), colours, name, figures / f"offset_{name}.png")
        if own_cosines := [cosine.numpy() for cosine in cosines[layer]]:
            plots_neurons.shift_cosines(own_cosines, pre[:layer].numpy(), layer, figures / f"cosines_L{layer}.png")
    save_file(tensors, inputs.work / "shifts.safetensors")


def report(inputs, record: dict) -> None:
    """Print parameters, toxic neurons, and the offsets of their layers."""
    rows, lines, console = record["rows"], [], wide_console()
    for kind in rows[0]["parameters"]:
        cosines = [row["parameters"][kind]["lowest_cosine"] for row in rows]
        lines.append((f"{kind}: 1 - lowest cosine with itself", [1 - cosine for cosine in cosines], None))
        lines.append(line_at("  mean |change| of an entry", rows, "parameters", kind, "mean_change"))
    for at, neuron in enumerate(rows[0]["neurons"]):
        label = f"{neuron['neuron']}: change at the prompt's end"
        lines.append(line_at(label, rows, "neurons", at, "change_at_last"))
        for text in ("own", "shared"):
            lines.append(line_at(f"  before DPO, {text} text", rows, "neurons", at, text, "pre"))
            lines.append(line_at(f"  after DPO, {text} text", rows, "neurons", at, text, "post"))
    for layer, entry in rows[0]["layers"].items():
        path = ("layers", layer)
        lines.append(line_at(f"layer {layer}: offset / length of the stream", rows, *path, "relative_length"))
        lines.append(line_at("  prompts that move along the others' mean, %", rows, *path, "percent_along"))
        for part in entry["contributions"]:
            lines.append(line_at(f"  written by {part}, %", rows, *path, "contributions", part))
        if "against" in entry:
            lines.append(line_at("  value vectors that moved against it, %", rows, *path, "percent_against"))
            lines.append(line_at("    against random directions", rows, *path, "percent_against_random"))
            lines.append(line_at("  negative activations, %", rows, *path, "percent_negative_activation"))
            lines.append(line_at("  activation and move of one sign, %", rows, *path, "percent_contributing"))
    show(console, record, lines)
    console.print("Lee et al., GPT2-medium: 1 - cosine below 0.01, mean norm difference below 1e-5", markup=False)
    console.print(f"Record, offsets and figures: {inputs.out}", soft_wrap=True)


if __name__ == "__main__":
    command()
