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

import dataclasses

import click

from lib.cli import CAUSAL, numbers, options
from lib.families import mlp_out
from lib.generation import NEW_TOKENS, greedy, summed_nll
from lib.interventions import edited


def _several(*known):
    def check(context, parameter, value):
        parts = [part.strip() for part in value.split(",")] if value else None
        if parts and (wrong := [part for part in parts if part not in known]):
            raise click.BadParameter(f"{wrong[0]} given, expected some of {', '.join(known)}, separated by commas.")
        return parts

    return check


@click.command(help=__doc__.split("\n")[0])
@options(*CAUSAL)
@click.option("--representation", default="tokens", show_default=True, callback=_several("tokens", "probe"))
@click.option("--order", type=click.Choice(["cosine", "activation"]), default="cosine", show_default=True)
@click.option("--alpha", default="0.01,0.3", show_default=True, callback=numbers, help="Grid of alphas.")
@click.option(
    "--beta", default="0.55,1", show_default=True, callback=numbers, help="Grid of betas, above 0, at most 1."
)
@click.option("--kinds", callback=_several("clamp", "scale", "shift"), help="[default: clamp,scale; faithful: clamp]")
@click.option("--positions", type=click.Choice(["last", "all"]), help="Edited in generation.  [default: by --protocol]")
@click.option("--toxic-words", help="Move away from these: words, or a file of them.  [default: Yang table 7's]")
@click.option("--plain-words", help="Move towards these.  [default: Yang table 7's]")
def main(representation, order, alpha, beta, kinds, positions, toxic_words, plain_words, **options):
    from lib import controls, experiment, paper, vectors
    from lib.errors import UserError

    if not all(0 < share <= 1 for share in beta):
        raise UserError(f"--beta {','.join(map(str, beta))}: a share of neurons is above 0 and at most 1.")
    own = toxic_words is not None or plain_words is not None
    words = [
        vectors.read_words(toxic_words, "--toxic-words") or paper.TOXIC_WORDS,
        vectors.read_words(plain_words, "--plain-words") or paper.PLAIN_WORDS,
    ]
    protocol = experiment.chosen_protocol(options)
    kinds = kinds or (["clamp", "scale"] if protocol.edit_kind == "scale" else ["clamp"])
    chosen = {"representation": representation, "order": order, "alpha": alpha, "beta": beta, "kinds": kinds}
    chosen |= {"positions": positions or protocol.edit_positions, "words": words}
    # A concept of one's own has no DPO model, unless one is given.
    needs = ("probe",) * ("probe" in representation) + ("post",) * (not own or options["post"] is not None)
    with experiment.begin("probe_free_editing", {**options, **chosen}, needs) as run:
        run.protocol = dataclasses.replace(run.protocol, edit_positions=chosen["positions"])
        norms = run.at_weights(controls.value_norms)
        for stage in run.stages():
            edits = {}
            for name in representation:
                # No seed enters the words' direction (nor means, unless they are sampled): a later one brings further
                # draws of its controls alone.
                again = name == "tokens" and stage.seed != run.seeds[0] and run.protocol.means_over == "generated"
                if again and run.options["controls"] == "none":
                    continue
                direction = (
                    stage.probe
                    if name == "probe"
                    else vectors.contrast(run.base, *words, run.protocol.contrast_rows == "both", run.remote)
                )
                for kind in kinds:
                    plans = {
                        label(name, order, a, b): make_plan(run, stage, direction, kind, order, a, b)
                        for a in alpha
                        for b in beta
                    }
                    found = {stage.condition(key, kind): plan.edit() for key, plan in plans.items()}
                    found |= controlled(run, stage, plans, direction, name, kind, order, alpha[-1], beta[0], norms)
                    edits |= {condition: edit for condition, edit in found.items() if condition.draw or not again}
            run.measure(stage, edits, generate, negative_log_likelihood)
        record = write(run, words)
    run.report(record, ("none", "dpo", label(representation[0], order, alpha[-1], beta[-1])))


def label(representation: str, order: str, alpha: float, beta: float) -> str:
    """`tokens a=0.3 b=0.55`; `activation ...` for the probe with the other order, as Yang table 19 names it."""
    name = representation if order == "cosine" else "activation" if representation == "probe" else "tokens activation"
    return f"{name} a={alpha:g} b={beta:g}"


def make_plan(run, stage, direction, kind: str, order: str, alpha: float, beta: float):
    """The edit of section 6.1: the share beta of each group, moved by alpha away from the direction."""
    from lib import interventions, neurons

    cosine = run.cosines(direction)
    pre = stage.pre_means.activation
    by = "activation" if order == "activation" else run.protocol.beta_order
    mask = sum(neurons.select(neurons.groups(cosine, pre), cosine, pre, beta, by).values()).bool()
    if kind == "scale":
        return interventions.scale(mask, 1 - alpha * cosine.sign() * pre.sign())
    moved = pre - alpha * cosine.sign() * pre.abs()
    return (interventions.clamp if kind == "clamp" else interventions.shift)(mask, pre, moved)


def controlled(run, stage, plans: dict, direction, name, kind, order, alpha, beta, norms) -> dict:
    """alpha = 0 and -alpha for every edit; all controls for one, whose beta leaves other neurons to draw from."""
    from lib.interventions import NO_EDIT

    if run.options["controls"] == "none":
        return {}
    edits = {}
    for key, plan in plans.items():
        edits[stage.condition("control:flipped", kind, key)] = plan.edit(-1.0)
        zero = stage.condition("control:own_means" if kind == "clamp" else "control:zero", kind, key)
        edits[zero] = plan.edit(0.0) if kind == "clamp" else NO_EDIT

    def replan(other):
        return make_plan(run, stage, other, kind, order, alpha, beta)

    tested = label(name, order, alpha, beta)
    return edits | run.controlled(
        stage, tested, plans[tested], replan, [norms, stage.pre_means.activation.abs()],
        direction=None if name == "probe" else direction,
    )  # fmt: skip


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


def write(run, words: list) -> dict:
    """The figure and the record."""
    from lib import plots
    from lib.paper import published_row

    record = run.finish(
        lambda name, kind: published_row(name, kind, run.options["model"]),
        words={"away_from": list(words[0]), "towards": list(words[1])},
    )
    plots.trade_off(record["rows"], record["params"]["scorer"], run.work / "figures" / "toxicity_perplexity.png")
    return record


if __name__ == "__main__":
    main()
