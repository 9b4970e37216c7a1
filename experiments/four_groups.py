"""Who the four neuron groups are (Yang et al. 2025, section 5.2, tables 5, 6, 13, 15, 18, figures 2, 6, 7, 8).

DPO lowers the toxic projection of about half of all MLP neurons (table 18). By alignment with the toxicity probe (Toxic
or Anti) and sign of the mean activation before DPO (Positive or Negative; table 13) these form four groups. The claims:
all four take part in the reduction, TN and AP, which seem to be on the wrong side, too (table 5, figure 2a);
the reduction is spread over many neurons (2b); activations of toxic-aligned neurons fall and those of anti-toxic ones
rise (2c, 7); the reduction grows with depth (8). Value vectors that oppose the probe most have toxic tokens nearest to
their opposite (tables 6, 15). Nothing is edited here: what the groups do to toxicity is patch_four_groups.py's claim.

Needs a probe and a DPO checkpoint, made when missing or given (--probe, --post). Writes run.json (RAW tokens:
profanity), activations.safetensors and figures/ to runs/four_groups/<model>/.

    python experiments/four_groups.py
"""

import click

from lib.cli import LOOKING, check, options


@click.command(help=__doc__.split("\n")[0])
@options(*LOOKING, "raw-text")
def command(**options):
    main(**options)


check(command, __name__)  # --help and wrong options end here, before torch is imported

from lib import experiment, neurons, observation, paper, plots_neurons, tables, vectors
from lib.dry_run import Workload
from lib.metrics import mask, profane_pattern

RANKS = ((2000, 2500), (0, 500), (5000, 5500))  # figures 2c and 6c, 7a, 7b
N_ANTI = 128  # anti-toxic value vectors whose tokens are looked at; Yang table 15 lists ranks up to 19


def main(**options):
    with experiment.begin("four_groups", options, Workload(), means_suffice=True) as inputs:
        attributions = {run.seed: inputs.attribute(run) for run in inputs.runs()}
        rows = [
            {
                "seed": seed,
                **neurons.group_summary(attribution.groups, attribution.delta, attribution.pre),
                **falling(attribution),
                "anti_toxic_vectors": anti_toxic_vectors(inputs, attribution.cosine),
            }
            for seed, attribution in attributions.items()
        ]
        record = write(inputs, rows, attributions[inputs.seeds[0]])
    report(inputs, record)


def falling(attribution: neurons.Attribution) -> dict[str, dict[str, float]]:
    """Of each group the share of neurons whose mean activation falls, in % (figures 2c, 6c, 7)."""
    falls = attribution.post < attribution.pre
    return {
        "percent_falling": {
            group: observation.percent(falls[mask]) if mask.any() else None
            for group, mask in attribution.groups.items()
        }
    }


def anti_toxic_vectors(inputs, cosine) -> list[dict]:
    """The value vectors that align best with minus the probe, sign-reversed, and their nearest tokens (table 15).

    cosine: with the probe, `[n_layers, d_mlp]`.
    """
    best = cosine.flatten().argsort()[:N_ANTI]
    places = [divmod(int(at), cosine.shape[1]) for at in best]
    opposite = -inputs.at_weights(vectors.unit_vectors, best, inputs.protocol.value_vectors == "written")
    tokens = vectors.lenses(inputs.base, opposite, inputs.protocol, remote=inputs.remote)
    return [
        {
            "neuron": f"L{layer}.N{index}",
            "rank": rank,
            "cosine": float(cosine[layer, index]),
            "tokens": {name: lists[rank - 1] for name, lists in tokens.items()},
            "toxic": any(profane_pattern().search(token) for lists in tokens.values() for token in lists[rank - 1]),
        }
        for rank, (layer, index) in enumerate(places, start=1)
    ]


def write(inputs, rows: list[dict], first: neurons.Attribution) -> dict:
    """The record of all seeds; tensors and figures of the first."""
    theirs = paper.counterpart(inputs.options["model"])
    first.save(inputs.work / "activations.safetensors")
    delta, pre, post = (tensor.numpy() for tensor in (first.delta, first.pre, first.post))
    masks = {group: mask.numpy() for group, mask in first.groups.items()}
    figures = inputs.work / "figures"
    plots_neurons.group_shares(rows[0]["group_shares"], rows[0]["reduction_shares"], theirs, figures / "groups.png")
    plots_neurons.cumulative_reduction(delta, masks, figures / "cumulative_reduction.png")
    for ranks in RANKS:
        plots_neurons.activation_shifts(delta, pre, post, masks, ranks, figures / f"activation_shifts_{ranks[0]}.png")
    plots_neurons.reduction_by_layer(delta, masks, figures / "reduction_by_layer.png")
    return observation.write(inputs, rows, {"model": theirs} if theirs else {})


def report(inputs, record: dict) -> None:
    """Print each seed's groups, beside the published ones, and the anti-toxic vectors of the first."""
    console = tables.wide_console()
    for row in record["rows"]:
        tables.print_groups(console, record | row)
    listed = record["rows"][0]["anti_toxic_vectors"]
    toxic = [vector for vector in listed if vector["toxic"]]
    console.print(
        f"Of the {len(listed)} value vectors most opposed to the probe, {len(toxic)} have a profane word among the 10 "
        f"tokens nearest to their opposite{':' if toxic else '.'}"
    )
    for vector in toxic[:4]:
        for way, tokens in vector["tokens"].items():
            shown = tokens if inputs.options["raw_text"] else map(mask, tokens)
            console.print(f"  -{vector['neuron']} (rank {vector['rank']}), {way}: {' '.join(shown)}", markup=False)
    console.print(f"Record, tensors and figures: {inputs.out}", soft_wrap=True)


if __name__ == "__main__":
    command()
