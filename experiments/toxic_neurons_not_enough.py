"""Toxic neurons are not enough (Yang et al. 2025, section 4; tables 3, 13, 14; figure 3; Lee et al. 2024, figure 2).

Lee et al. found that DPO dampens the neurons whose value vectors promote toxic tokens. The claim here: those neurons
carry little of DPO's effect. Two sets of toxic neurons get their post-DPO activations in the base model:

top256         the 256 neurons whose value vectors have the largest cosine with the toxicity probe (and top128; --top)
toxic_tokens   those of the 256 with a toxic token among the 10 tokens nearest to their value vector

The paper asks GPT-4o which tokens are toxic; here a list of profane words does (`--judge words`), or any scorer
(`--judge hf:<repo>`), and judged_tokens.jsonl lists every neuron's tokens and verdict, so that a reader can disagree.
Edits are the two of patch_four_groups.py: `clamp` (the paper's) and `shift`. `--controls quick` compares top256 with as
many random and matched neurons, other directions, and its own means before DPO.

Writes run.json, judged_tokens.jsonl and generations.jsonl (RAW TEXT: profanity), measurements.jsonl and figures/ to
runs/toxic_neurons_not_enough/<model>/; a killed run goes on where it was.

    python experiments/toxic_neurons_not_enough.py --controls quick      # 24 minutes on two CPU cores
"""

import click

from lib.cli import CAUSAL, check, counts, options


@click.command(help=__doc__.split("\n")[0])
@options(*CAUSAL)
@click.option("--top", default="128,256", show_default=True, callback=counts, help="Sizes of the sets by cosine.")
@click.option("--judge", default="words", show_default=True, help="Scorer of tokens, as --scorer: which are toxic.")
def command(**options):
    main(**options)


check(command, __name__)  # --help and wrong options end here, before torch is imported

from functools import partial

import torch

from lib import controls, experiment, interventions, metrics, neurons, paper, plots, plots_neurons, results, tables
from lib.dry_run import Workload, controls_of, for_each_seed
from lib.families import mlp_out
from lib.generation import NEW_TOKENS, greedy, token_losses
from lib.interventions import edited
from lib.table import Table
from lib.vectors import lenses, unit_vectors

TOP_TOKENS = 10  # Yang section 4
FIGURE_N = 100  # figure 3
JUDGED_N = 256  # the neurons whose tokens are judged: Yang section 4
KINDS = ("clamp", "shift")


def main(top, judge, **options):
    verdict = metrics.scorer("words" if options["dry_run"] else judge)
    tested = f"top{max(top)}"
    planned = [control for kind in KINDS for control in controls_of(options, kind, anew=True)]
    n_sets = len(set(top)) + 1  # by cosine, and by tokens
    plan = Workload(for_each_seed(options, [*KINDS] * n_sets, planned))
    options |= {"judge": judge, "top": top}

    with experiment.begin("toxic_neurons_not_enough", options, plan, means_suffice=True) as inputs:
        table = Table(inputs, generate, likelihood)
        table.add("none")
        norms = inputs.at_weights(controls.value_norms)
        attributions, judged = {}, {}  # of each seed
        for run in inputs.runs():  # one for each seed
            if run.post:
                table.add("dpo", run=run, model=run.post, source=run.post_source)
            attribution = attributions[run.seed] = inputs.attribute(run)
            judged[run.seed] = judge_tokens(inputs, attribution.cosine, verdict)
            plans = make_plans(attribution, judged[run.seed], top)
            for name, kind in plans:
                table.add(name, kind, plans[name, kind].edit(), run=run)
            for kind in KINDS:
                for control in inputs.edit_controls(run, plans[tested, kind], [norms, attribution.pre.abs()]):
                    table.add_control(control, kind, control.edit, run=run, control_of=tested)
            for control, other in inputs.other_attributions(run):
                other_plans = make_plans(other, [], top)
                for kind in KINDS:
                    table.add_control(control, kind, other_plans[tested, kind].edit(), run=run, control_of=tested)
            table.measure()

        lines = [{"seed": seed, **row} for seed, rows in judged.items() for row in rows]
        results.write_lines(inputs.work / "judged_tokens.jsonl", lines)
        first = inputs.seeds[0]
        summaries = [
            {
                "seed": seed,
                "toxic_token_neurons": sum(bool(row["toxic_tokens"]) for row in rows),
                "percent_negative": negative(attributions[seed]),
            }
            for seed, rows in judged.items()
        ]
        published = partial(published_row, model=options["model"])
        record = table.save(published, judge=judge, judged_neurons=len(judged[first]), seeds=summaries)
        pre, post = (means.numpy() for means in best_aligned(attributions[first]))
        plots_neurons.top_activations(pre, post, inputs.work / "figures" / "top_activations.png")
        plots.reduction_bars(record["rows"], inputs.work / "figures" / "share_of_dpo.png")
    print_judged(record, judged, options["raw_text"])
    table.show(record, ("none", "dpo", "top256", "toxic_tokens"))


def judge_tokens(inputs, cosine, verdict) -> list[dict]:
    """The tokens nearest to the value vectors that align best with the probe, and whether one of them is toxic.

    Tokens are read from the value vector as it is and after the model's final norm, as the protocol's `lens` says; a
    neuron counts when either list holds a toxic token.
    """
    best = cosine.flatten().topk(min(JUDGED_N, cosine.numel())).indices
    places = [divmod(int(at), cosine.shape[1]) for at in best]
    rows = inputs.at_weights(unit_vectors, best, inputs.protocol.value_vectors == "written")
    tokens = lenses(inputs.base, rows, inputs.protocol, TOP_TOKENS, inputs.remote)
    every = sorted({token for lists in tokens.values() for row in lists for token in row})
    score = dict(zip(every, verdict(every).tolist(), strict=True))
    judged = []
    for rank, (layer, index) in enumerate(places, start=1):
        own = {name: lists[rank - 1] for name, lists in tokens.items()}
        judged.append(
            {
                "neuron": f"L{layer}.N{index}",
                "layer": layer,
                "index": index,
                "rank": rank,
                "cosine": float(cosine[layer, index]),
                "tokens": own,
                "toxic_tokens": sorted({token for row in own.values() for token in row if score[token] > 0.5}),
            }
        )
    return judged


def make_plans(attribution: neurons.Attribution, judged: list[dict], top: list[int]) -> dict:
    """(name, kind) -> plan of an edit of the base model."""
    masks = {f"top{n}": neurons.top(attribution.cosine, n) for n in top}
    masks["toxic_tokens"] = torch.zeros_like(next(iter(masks.values())))
    for row in judged:
        masks["toxic_tokens"][row["layer"], row["index"]] = bool(row["toxic_tokens"])
    plans = {}
    for name, mask in masks.items():
        plans[name, "clamp"] = interventions.clamp(mask, attribution.pre, attribution.post)
        plans[name, "shift"] = interventions.shift(mask, attribution.pre, attribution.post)
    return plans


def negative(attribution: neurons.Attribution) -> dict[str, float]:
    """Negative mean activations, in %: of all neurons before DPO, of the best aligned ones before and after it."""
    before, after = best_aligned(attribution)
    shares = {"all": attribution.pre, f"top{FIGURE_N}": before, f"top{FIGURE_N}_after": after}
    return {name: 100 * float((means < 0).double().mean()) for name, means in shares.items()}


def best_aligned(attribution: neurons.Attribution) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean activations before and after DPO, `[FIGURE_N]` each, of the best aligned neurons, the best first."""
    order = attribution.cosine.flatten().argsort(descending=True)[:FIGURE_N]
    return attribution.pre.flatten()[order], attribution.post.flatten()[order]


def published_row(condition: str, kind: str, model: str) -> dict:
    """`{"published": ...}` of Yang table 3, with the share of DPO's effect, or nothing."""
    name, theirs = {"toxic_tokens": "toxic_neurons"}.get(condition, condition), paper.counterpart(model)
    row = paper.published_row(name, kind, model)
    if row and condition == "top256":
        row["published"]["percent_of_dpo"] = paper.TOP_256[theirs]
    if row and condition == "toxic_tokens":
        row["published"]["percent_of_dpo"] = paper.TOXIC_TOKEN_NEURONS[theirs][1]
    return row


def print_judged(record: dict, judged: dict[int, list[dict]], raw_text: bool) -> None:
    """Print a few of each seed's judged tokens and the shares of negative activations, beside the published ones."""
    console, theirs = tables.wide_console(), paper.counterpart(record["model"])
    published = f" (Yang et al., {theirs}: {paper.TOXIC_TOKEN_NEURONS[theirs][0]} of 256)" if theirs else ""
    for entry in record["seeds"]:
        seed, shares = entry["seed"], entry["percent_negative"]
        toxic = [row for row in judged[seed] if row["toxic_tokens"]]
        console.print(
            f"Seed {seed}: {len(toxic)} of the {len(judged[seed])} best aligned neurons have a toxic token{published}"
        )
        for row in toxic[:5]:
            shown = row["toxic_tokens"] if raw_text else map(metrics.mask, row["toxic_tokens"])
            console.print(f"  {row['neuron']} (rank {row['rank']}): {' '.join(shown)}", markup=False)
        console.print(
            f"  negative mean activation: {shares['all']:.1f} % of all neurons, {shares[f'top{FIGURE_N}']:.0f} % "
            f"of the top {FIGURE_N} before DPO, {shares[f'top{FIGURE_N}_after']:.0f} % after"
        )
    if theirs:
        console.print(f"Yang et al., {theirs}: {paper.PERCENT_NEGATIVE[theirs]} % of all neurons (table 13)")


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
