"""Editing activations without DPO (Yang et al. 2025, section 6; tables 2, 7, 19).

The claim: no DPO is needed. With any direction for toxicity, all neurons fall into four groups by alignment (Toxic or
Anti) and sign of their mean activation (Positive or Negative); moving a share beta of each group by a factor alpha away
from toxicity (TP and AN by 1 - alpha, TN and AP by 1 + alpha) lowers toxicity like DPO. The direction is the probe, or
the difference of the mean embeddings of a few toxic and plain words (table 7), which needs no labelled data at all:

--representation tokens | probe        the direction; or both, as tokens,probe
--order cosine | activation            which share beta: the best aligned, or the smallest absolute mean activation
--kinds clamp,scale,shift              clamp: to (1 ∓ alpha) times the mean, a constant, what the paper's code does;
                                       scale: (1 ∓ alpha) times each token's own activation, what its equation says;
                                       shift: each token's own activation ∓ alpha times the absolute mean

`--controls quick` decides what an effect means: alpha = 0 (of a clamp: the means themselves) and -alpha for every edit,
for the largest alpha at the first beta random, matched and permuted neurons and random directions too.

With --toxic-words and --plain-words (comma-separated, or a file) the direction is any concept's, away from the first
list; --scorer words:<file> counts a concept's words in the continuations, and no DPO model is needed.

Writes run.json, generations.jsonl (RAW TEXT), measurements.jsonl and figures/ to runs/probe_free_editing/<model>/.

    python experiments/probe_free_editing.py --controls quick          # 15 minutes on two CPU cores
    python experiments/probe_free_editing.py --toxic-words terrible,awful,sad --plain-words wonderful,great,happy
"""

import click

from lib.cli import CAUSAL, EXPORT, check, names_of, numbers, options


@click.command(help=__doc__.split("\n")[0])
@options(*CAUSAL, *EXPORT)
@click.option("--representation", default="tokens", show_default=True, callback=names_of(("tokens", "probe")))
@click.option("--order", type=click.Choice(["cosine", "activation"]), default="cosine", show_default=True)
@click.option("--alpha", default="0.01,0.3", show_default=True, callback=numbers, help="Grid of alphas.")
@click.option("--beta", default="0.55,1", show_default=True, callback=numbers, help="Grid of betas, 0 < beta <= 1.")
@click.option("--kinds", callback=names_of(("clamp", "scale", "shift")), help="[default: clamp,scale; faithful: clamp]")
@click.option("--positions", type=click.Choice(["last", "all"]), help="Edited in generation.  [default: by --protocol]")
@click.option("--toxic-words", help="Move away from these: words, or a file of them.  [default: Yang table 7's]")
@click.option("--plain-words", help="Move towards these.  [default: Yang table 7's]")
def command(**options):
    main(**options)


check(command, __name__)  # --help and wrong options end here, before torch is imported

from dataclasses import replace
from functools import partial
from itertools import product

from lib import controls, experiment, export, interventions, neurons, paper, plots, vectors
from lib.dry_run import Planned, Workload, controls_of
from lib.errors import UserError
from lib.families import mlp_out
from lib.generation import NEW_TOKENS, greedy, token_losses
from lib.interventions import edited
from lib.protocol import chosen_protocol
from lib.table import Table


def main(representation, order, alpha, beta, kinds, positions, toxic_words, plain_words, **options):
    if not all(0 < share <= 1 for share in beta):
        raise UserError(f"--beta {','.join(map(str, beta))}: a share of neurons is above 0 and at most 1.")
    own = toxic_words is not None or plain_words is not None
    words = [
        vectors.read_words(toxic_words, "--toxic-words") or paper.TOXIC_WORDS,
        vectors.read_words(plain_words, "--plain-words") or paper.PLAIN_WORDS,
    ]
    protocol = chosen_protocol(options)
    protocol = replace(protocol, edit_positions=positions or protocol.edit_positions)
    kinds = kinds or (["clamp", "scale"] if protocol.edit_kind == "scale" else ["clamp"])
    # A concept of one's own has no DPO model, unless one is given.
    needs = ("probe",) * ("probe" in representation) + ("post",) * (not own or options["post"] is not None)
    # No seed enters the words' direction (nor means that are not sampled): a later one brings draws of controls alone.
    seeded = [name for name in representation if name == "probe" or protocol.means_over != "generated"]
    planned = plan_conditions(options, representation, seeded, kinds, alpha, beta)
    exportable = [(label(name, order, a, b), kind) for name, kind, a, b in product(representation, kinds, alpha, beta)]
    wanted = export.asked(options, exportable, protocol)
    options |= {"representation": representation, "order": order, "alpha": alpha, "beta": beta, "kinds": kinds}
    options |= {"positions": protocol.edit_positions, "words": words}

    with experiment.begin("probe_free_editing", options, planned, needs=needs, protocol=protocol) as inputs:
        table = Table(inputs, generate, likelihood, wanted)
        table.add("none")
        norms, contrast = inputs.at_weights(controls.value_norms), None
        if "tokens" in representation:
            contrast = vectors.contrast(inputs.base, *words, protocol.contrast_rows == "both", inputs.remote)
        for run in inputs.runs():  # one for each seed
            if run.post:
                table.add("dpo", run=run, model=run.post, source=run.post_source)
            for name, kind in product(representation, kinds):
                all_edits = run.seed == inputs.seeds[0] or name in seeded
                if not all_edits and options["controls"] == "none":
                    continue
                direction = run.probe if name == "probe" else contrast
                plans = {
                    label(name, order, a, b): make_plan(inputs, run, direction, kind, order, alpha=a, beta=b)
                    for a, b in product(alpha, beta)
                }
                if all_edits:
                    for edit_name, plan in plans.items():
                        table.add(edit_name, kind, plan.edit(), run=run)
                    for edit_name, plan in plans.items():
                        for control in undrawn(plan) if options["controls"] != "none" else ():
                            table.add_control(control, kind, control.edit, run=run, control_of=edit_name)
                tested = label(name, order, alpha[-1], beta[0])  # its beta leaves other neurons to draw from
                alike = [norms, run.pre_means.activation.abs()]
                for control in inputs.edit_controls(run, plans[tested], alike, direction):
                    if all_edits or control.draw:  # those without a draw are the same for every seed
                        table.add_control(control, kind, control.edit, run=run, control_of=tested)
                for control in inputs.other_directions(run, contrast if name == "tokens" else None):
                    plan = make_plan(inputs, run, control.direction, kind, order, alpha=alpha[-1], beta=beta[0])
                    table.add_control(control, kind, plan.edit(), run=run, control_of=tested)
            table.measure()

        shown = {"away_from": list(words[0]), "towards": list(words[1])}
        record = table.save(partial(paper.published_row, model=options["model"]), words=shown)
        plots.trade_off(record["rows"], record["params"]["scorer"], inputs.work / "figures" / "toxicity_perplexity.png")
    table.show(record, ("none", "dpo", label(representation[0], order, alpha[-1], beta[-1])))


def plan_conditions(options: dict, representation, seeded, kinds, alpha: list[float], beta: list[float]) -> Workload:
    """What `main` will measure, for --dry-run."""
    n_edits = len(set(product(alpha, beta)))
    conditions = [[] for _ in options["seeds"] or [options["seed"]]]
    for at, of_seed in enumerate(conditions):
        for name, kind in product(representation, kinds):
            of_tested = controls_of(options, kind, words=name == "tokens", all_neurons=beta[0] == 1)
            n_undrawn = 2 if kind == "clamp" else 1  # `zero` is the unedited model
            n_drawless = n_undrawn + (kind == "shift")  # the push against the direction is the tested edit's alone
            if at == 0 or name in seeded:
                of_seed += [Planned(kind)] * n_edits + of_tested[:n_undrawn] * n_edits
                of_seed += of_tested[n_undrawn:n_drawless]
            of_seed += of_tested[n_drawless:]
    return Workload(conditions)


def label(representation: str, order: str, alpha: float, beta: float) -> str:
    """`tokens a=0.3 b=0.55`; `activation ...` for the probe with the other order, as Yang table 19 names it."""
    name = representation if order == "cosine" else "activation" if representation == "probe" else "tokens activation"
    return f"{name} a={alpha:g} b={beta:g}"


def make_plan(inputs, run, direction, kind: str, order: str, alpha: float, beta: float) -> interventions.Plan:
    """The edit of section 6.1: the share beta of each group, moved by alpha away from the direction."""
    cosine, pre = inputs.cosines(direction), run.pre_means.activation
    by = "activation" if order == "activation" else inputs.protocol.beta_order
    mask = sum(neurons.select(neurons.groups(cosine, pre), cosine, pre, beta, by).values()).bool()
    if kind == "scale":
        return interventions.scale(mask, 1 - alpha * cosine.sign() * pre.sign())
    moved = pre - alpha * cosine.sign() * pre.abs()
    return (interventions.clamp if kind == "clamp" else interventions.shift)(mask, pre, moved)


def undrawn(plan: interventions.Plan) -> list[controls.Control]:
    """The controls of every edit: -alpha, and alpha = 0 (of a clamp: the means themselves)."""
    zero = "own_means" if plan.kind == "clamp" else "zero"
    return [controls.Control(name, plan=plan, strength=at) for name, at in (("flipped", -1.0), (zero, 0.0))]


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
