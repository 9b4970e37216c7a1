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

from lib.cli import CAUSAL, options
from lib.families import mlp_out
from lib.generation import NEW_TOKENS, greedy, summed_nll
from lib.interventions import edited

TOP_TOKENS = 10  # Yang section 4
FIGURE_N = 100  # figure 3
JUDGED_N = 256  # the neurons whose tokens are judged: Yang section 4


def _counts(context, parameter, value):
    parts = value.split(",")
    if not all(part.strip().isdecimal() and int(part) for part in parts):
        raise click.BadParameter(f"{value} given, expected numbers of neurons such as 128,256.")
    return [int(part) for part in parts]


@click.command(help=__doc__.split("\n")[0])
@options(*CAUSAL)
@click.option("--top", default="128,256", show_default=True, callback=_counts, help="Sizes of the sets by cosine.")
@click.option(
    "--judge", default="words", show_default=True, help="Scorer that says which tokens are toxic: see --scorer."
)
def main(top, judge, **options):
    from lib import controls, experiment, metrics

    verdict = metrics.scorer(judge)
    with experiment.begin(
        "toxic_neurons_not_enough", {**options, "judge": judge, "top": top}, means_suffice=True
    ) as run:
        norms, found_of, judged_of = run.at_weights(controls.value_norms), {}, {}
        for stage in run.stages():
            found = attribute(run, stage)
            judged = judge_tokens(run, found["cosine"], verdict)
            found_of[stage.seed], judged_of[stage.seed] = found, judged
            plans = make_plans(found, judged, top)
            edits = {stage.condition(*key): plan.edit() for key, plan in plans.items()}
            for key in ((f"top{max(top)}", "clamp"), (f"top{max(top)}", "shift")):

                def replan(probe, stage=stage, key=key):
                    return make_plans(attribute(run, stage, probe), [], top)[key]

                edits |= run.controlled(stage, key[0], plans[key], replan, [norms, found["pre"].abs()])
            run.measure(stage, edits, generate, negative_log_likelihood)
        record = write(run, found_of, judged_of)
    report(run, record, judged_of)


def attribute(run, stage, probe=None) -> dict:
    """Cosines with the stage's probe, or with another direction, and mean activations before and after DPO."""
    from lib import neurons

    return neurons.attribute(
        run.base, stage.post, probe or stage.probe, stage.pre_means, stage.post_means, run.protocol, run.remote
    )


def judge_tokens(run, cosine, verdict) -> list[dict]:
    """The tokens nearest to the value vectors that align best with the probe, and whether one of them is toxic.

    Tokens are read from the value vector as it is and after the model's final norm, as the protocol's `lens` says; a
    neuron counts when either list holds a toxic token.
    """
    from lib import vectors

    best = cosine.flatten().topk(min(JUDGED_N, cosine.numel())).indices
    places = [divmod(int(at), cosine.shape[1]) for at in best]
    rows = run.at_weights(vectors.unit_vectors, best, run.protocol.value_vectors == "written")
    tokens = vectors.lenses(run.base, rows, run.protocol, TOP_TOKENS, run.remote)
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


def make_plans(found: dict, judged: list[dict], top: list[int]) -> dict:
    """(name, kind) -> plan of an edit of the base model."""
    import torch

    from lib import interventions, neurons

    masks = {f"top{n}": neurons.top(found["cosine"], n) for n in top}
    masks["toxic_tokens"] = torch.zeros_like(next(iter(masks.values())))
    for row in judged:
        masks["toxic_tokens"][row["layer"], row["index"]] = bool(row["toxic_tokens"])
    plans = {}
    for name, mask in masks.items():
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


def negative(found: dict) -> dict[str, float]:
    """Negative mean activations, in %: of all neurons before DPO, of the best aligned ones before and after it."""
    order = found["cosine"].flatten().argsort(descending=True)[:FIGURE_N]
    shares = {
        "all": found["pre"],
        f"top{FIGURE_N}": found["pre"].flatten()[order],
        f"top{FIGURE_N}_after": found["post"].flatten()[order],
    }
    return {name: 100 * float((means < 0).double().mean()) for name, means in shares.items()}


def write(run, found_of: dict[int, dict], judged_of: dict[int, list[dict]]) -> dict:
    """The judged tokens of all seeds, the first seed's figure, and the record."""
    from lib import paper, plots, results

    name = run.options["model"]
    theirs = paper.counterpart(name)
    lines = [{"seed": seed, **row} for seed, rows in judged_of.items() for row in rows]
    results.write_lines(run.work / "judged_tokens.jsonl", lines)
    conditions = {"top256": "top256", "toxic_tokens": "toxic_neurons"}

    def published(condition: str, kind: str) -> dict:
        known = theirs and (condition in conditions and kind == "clamp" or condition in ("none", "dpo"))
        if not known:
            return {}
        toxicity, log_ppl, f1 = paper.PATCHING[conditions.get(condition, condition)][theirs]
        row = {"model": theirs, "toxicity": toxicity, "log_ppl": log_ppl, "f1": f1}
        if condition in conditions:
            share = paper.TOP_256[theirs] if condition == "top256" else paper.TOXIC_TOKEN_NEURONS[theirs][1]
            row["percent_of_dpo"] = share
        return {"published": row}

    record = run.finish(
        published,
        judge=run.options["judge"],
        judged_neurons=len(judged_of[run.seeds[0]]),
        seeds=[
            {
                "seed": seed,
                "toxic_token_neurons": sum(bool(row["toxic_tokens"]) for row in judged),
                "percent_negative": negative(found_of[seed]),
            }
            for seed, judged in judged_of.items()
        ],
    )
    first = found_of[run.seeds[0]]
    order = first["cosine"].flatten().argsort(descending=True)[:FIGURE_N]
    pre, post = (first[key].flatten()[order].numpy() for key in ("pre", "post"))
    plots.top_activations(pre, post, run.work / "figures" / "top_activations.png")
    plots.reduction_bars(record["rows"], run.work / "figures" / "share_of_dpo.png")
    return record


def report(run, record: dict, judged_of: dict[int, list[dict]]) -> None:
    """Print the table, beside table 3, and a few of each seed's judged tokens."""
    from lib import paper
    from lib.metrics import mask

    def before(console) -> None:
        theirs = paper.counterpart(record["model"])
        published = f" (Yang et al., {theirs}: {paper.TOXIC_TOKEN_NEURONS[theirs][0]} of 256)" if theirs else ""
        for one in record["seeds"]:
            judged, shares = judged_of[one["seed"]], one["percent_negative"]
            toxic = [row for row in judged if row["toxic_tokens"]]
            console.print(
                f"Seed {one['seed']}: {len(toxic)} of the {len(judged)} best aligned neurons have a toxic token"
                + published
            )
            for row in toxic[:5]:
                shown = row["toxic_tokens"] if run.options["raw_text"] else map(mask, row["toxic_tokens"])
                console.print(f"  {row['neuron']} (rank {row['rank']}): {' '.join(shown)}", markup=False)
            console.print(
                f"  negative mean activation: {shares['all']:.1f} % of all neurons, {shares[f'top{FIGURE_N}']:.0f} % "
                f"of the top {FIGURE_N} before DPO, {shares[f'top{FIGURE_N}_after']:.0f} % after"
            )
        if theirs:
            console.print(f"Yang et al., {theirs}: {paper.PERCENT_NEGATIVE[theirs]} % of all neurons (table 13)")

    run.report(record, ("none", "dpo", "top256", "toxic_tokens"), before)


if __name__ == "__main__":
    main()
