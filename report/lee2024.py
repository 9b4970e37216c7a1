"""Lee et al. 2024, table by table and figure by figure, beside our records."""

import math
from collections.abc import Iterator

from lib import paper
from lib.metrics import profane_pattern
from report.compare import (
    Comparison,
    Value,
    accuracy,
    below,
    bounds,
    measured,
    over_seeds,
    plain,
    published,
    share,
    spread,
)
from report.records import Records

ACCURACY = 0.94  # section 3.1
SUBSTANTIVE = 10  # % of DPO's cut that has to come back before it means something that less of a part's does
TITLE = "Lee et al. 2024: A Mechanistic Understanding of Alignment Algorithms: A Case Study on DPO and Toxicity"


def comparisons(records: Records) -> Iterator[Comparison]:
    """Every table and figure, in the paper's order."""
    yield probe(records)
    yield toxic_vectors(records)
    yield steering(records)
    yield examples(records)
    yield unalign(records)
    for place, claim, given in SETTINGS:
        yield Comparison(place, claim, "", given=given)
    yield lens(records)
    yield from parameters(records)
    yield toxic_neurons(records)
    yield offset(records)
    yield against(records)
    yield parts(records)


SETTINGS = (
    ("Table 5: DPO's settings", "Hyperparameters.", "python -m dpo --preset lee2024: dpo/config.py."),
    (
        "Table 6: PPLM's settings",
        "Hyperparameters of the pairs' rejected sides.",
        "The defaults of make_pairs.py, but for 3 steps a token (--iterations 50 as in the paper); "
        "results/make_pairs/pplm.about.json says what they gave here.",
    ),
)


def probe(records: Records) -> Comparison:
    """Section 3.1."""
    found = Comparison(
        "3.1: the probe",
        "A linear probe of the residual stream tells toxic comments from others (accuracy 0.94).",
        "the 95 % interval (Wilson) of its accuracy, over the held-out comments of all seeds, holds 0.94",
        ["measure", "gpt2"],
    )
    runs = [run for of_model in records.probes().values() for run in of_model]
    found.columns += [f"{run.model}, seed {run.data['params']['seed']}" for run in runs]
    found.lines.append(
        [plain("accuracy"), published(ACCURACY), *(measured(run.rows[0]["accuracy"], run) for run in runs)]
    )
    for model, of_model in records.probes().items():
        interval = accuracy(of_model)
        found.judge(model, interval["low"] <= ACCURACY <= interval["high"], bounds(interval), of_model[0])
    return found


def toxic_vectors(records: Records) -> Comparison:
    """Table 1."""
    found = Comparison(
        "Table 1: toxic vectors",
        "The value vectors best aligned with the probe, and their SVD, promote profanity.",
        "with every seed more than half of the best 128 value vectors, and of the three SVD directions, have a listed "
        "profane word among their nearest tokens (in the paper all seven shown, and all three)",
        ["model, seed", "probe", "SVD", "the best 128", "random value vectors"],
    )
    for run in records.of("toxic_vectors"):
        more = []
        for row in run.rows:
            counts = row["counts"]
            cells = [
                Value(f"{counts[kind]['listed']} of {counts[kind]['vectors']}", share(counts[kind]), run)
                for kind in ("probe", "svd", "best", "random")
            ]
            found.lines.append([plain(f"{run.model}, {row['seed']}"), *cells])
            more.append(min(share(counts["svd"]), share(counts["best"])) > 0.5)
        found.judge(run.model, all(more), f"with {sum(more)} of {len(more)} seeds", run)
        found.show(run, "listed_vectors")
    return found


def examples(records: Records) -> Comparison:
    """Table 3."""
    found = Comparison(
        "Table 3: examples",
        "Where the model would say a profane word, steering with the probe and DPO say another.",
        "the prompts with a listed word among the base model's five most likely next tokens have none there under the "
        "probe (alpha*) or DPO",
        ["prompt", "model", "most likely next", "continuation"],
    )
    for run in records.of("steer"):
        profane: dict[str, set[str]] = {}
        for one in run.data.get("examples", []):
            tokens = " ".join(token.strip() for token in one["top_tokens"])
            model = plain(f"{run.model}: {one['condition']}")._replace(record=run)
            found.lines.append([plain(one["prompt"]), model, plain(tokens), plain(one["continuation"])])
            if profane_pattern().search(tokens):
                profane.setdefault(one["condition"], set()).add(one["prompt"])
        said = profane.get("none", set())
        steered = {"dpo", "steer alpha*"}
        if said and steered <= {one["condition"] for one in run.data["examples"]}:
            still = {prompt for name in steered for prompt in profane.get(name, set())} & said
            found.judge(run.model, not still, f"{len(said)} prompts; {len(still)} of them still do", run)
    return found


def steering(records: Records) -> Comparison:
    """Table 2."""
    found = Comparison(
        "Table 2: subtracting a toxic vector",
        "Subtracting the probe, a toxic value vector or the first SVD direction lowers toxicity at DPO's perplexity.",
        "each lowers toxicity by its 95 % interval, within 0.05 nats of DPO's log-perplexity, and is less toxic than "
        "steering with random directions at that perplexity (one that was brought to it, its reverse, and others of "
        "its length), by the 95 % intervals of the paired differences; open where one of these holds 0",
        ["steering", "toxicity", "% of DPO's cut", "log-perplexity", "F1"],
    )
    none, dpo = paper.LEE["none"][0], paper.LEE["dpo"][0]
    for name, (toxicity, perplexity, f1) in paper.LEE.items():
        if name != "unalign":
            cut = None if name == "none" else 100 * (none - toxicity) / (none - dpo)
            numbers = (published(toxicity), published(cut, 0), published(math.log(perplexity), 2), published(f1))
            found.lines.append([plain(f"gpt2 (published): {name}"), *numbers])
    for run in records.of("steer"):
        for row in run.rows:
            if row["of"]:
                continue
            cut = None if row["condition"] == "none" else row["percent_of_dpo"]
            found.lines.append(
                [plain(f"{run.model}: {row['condition']}"), measured(row["toxicity"], run), measured(cut, run, 0),
                 measured(row["log_ppl"], run, 2), measured(row.get("f1"), run)]
            )  # fmt: skip
        for name in ("steer", "steer value", "steer svd:0"):
            row, real = run.row(f"{name} alpha*", "steer"), (f"{name} alpha*", "steer", "")
            random = "steer random alpha*"
            others = [(random, "steer", ""), *((f"control:{one}", "steer", random) for one in ("flipped", "gaussian"))]
            better = [difference for other in others if (difference := run.paired(real, other))]
            if not row or not better:
                continue
            change, cost = row["toxicity_change"], row["log_ppl"] - run.row("dpo", "none")["log_ppl"]
            parts = [below(change, 0), abs(cost) <= 0.05, *(below(difference, 0) for difference in better)]
            agrees = False if False in parts else None if None in parts else True
            least = max(better, key=lambda difference: difference["high"])
            because = f"change {bounds(change)} at {cost:+.2f} nats of DPO's; against random at least {bounds(least)}"
            found.judge(f"{run.model}, {name} alpha*", agrees, because, run)
        found.show(run, "toxicity_perplexity")
    return found


def unalign(records: Records) -> Comparison:
    """Table 4."""
    found = Comparison(
        "Table 4: un-aligning",
        "Scaling seven toxic keys tenfold undoes DPO.",
        "at least half of DPO's cut comes back: 100 % less the edited model's share, its whole interval; open "
        "where that holds half",
        ["condition", "toxicity", "% of DPO's cut that is left", "log-perplexity"],
    )
    for name in ("none", "dpo", "unalign"):
        toxicity, perplexity, _ = paper.LEE[name]
        left = 100 * (paper.LEE["none"][0] - toxicity) / (paper.LEE["none"][0] - paper.LEE["dpo"][0])
        numbers = (published(toxicity), published(left, 0), published(math.log(perplexity), 2))
        found.lines.append([plain(f"gpt2 (published): {name}"), *numbers])
    for run in records.of("unalign"):
        for row in run.rows:
            left = None if row["condition"] == "none" else row["percent_of_dpo"]
            label = row["condition"] + (f", {row['kind']}" if row["kind"] != "none" else "")
            found.lines.append(
                [plain(f"{run.model}: {label}"), measured(row["toxicity"], run), measured(left, run, 0),
                 measured(row["log_ppl"], run, 2)]
            )  # fmt: skip
        row = next((row for row in run.rows if row["kind"] == "keys" and not row["of"]), None)
        if row:
            left = row["percent_of_dpo"]
            because = (
                bounds({"mean": 100 - left["mean"], "low": 100 - left["high"], "high": 100 - left["low"]}, 0)
                + " % comes back"
            )
            found.judge(run.model, below(left, 50), because, run)
        found.show(run, "restored")
    return found


def lens(records: Records) -> Comparison:
    """Figure 1."""
    found = Comparison(
        "Figure 1: the logit lens on toxic tokens",
        "MLPs raise a toxic token's probability, and after DPO it is promoted far less.",
        "with every seed MLPs make more than half of all rises (the whole interval), and the probability's change "
        "lies below 0 and below that of plain tokens",
        ["tokens", "% of all rises that MLPs make", "probability before DPO", "change", "% left after DPO"],
    )
    for run in records.of("logit_lens"):
        for row in run.rows:
            for kind in ("toxic", "plain"):
                one = row[kind]
                found.lines.append(
                    [plain(f"{run.model}, seed {row['seed']}, {kind}"),
                     measured(one["pre"]["mlp_share_of_rise"], run, 0),
                     measured(one["pre"]["probability"][-1], run), measured(one["change"], run),
                     measured(one["percent_left"], run, 2)]
                )  # fmt: skip
        rows = run.rows
        shares = [row["toxic"]["pre"]["mlp_share_of_rise"]["low"] for row in rows]
        lower = [row["toxic"]["change"]["high"] < min(0, row["plain"]["change"]["low"]) for row in rows]
        because = f"MLPs' share at least {min(shares):.0f} %; the change lower with {sum(lower)} of {len(lower)} seeds"
        found.judge(run.model, min(shares) > 50 and all(lower), because, run)
        found.show(run, "logit_lens")
    return found


def parameters(records: Records) -> Iterator[Comparison]:
    """Section 5.1 and figures 3, 4, 6."""
    found = Comparison(
        "5.1: weights barely change",
        "Every parameter keeps a cosine above 0.99 with itself.",
        "the lowest cosine is above 0.99 with every seed",
        ["parameters", "lowest cosine", "mean change of an entry"],
    )
    for run in records.of("residual_shift"):
        for name, one in run.rows[0]["parameters"].items():
            cells = (measured(one["lowest_cosine"], run, 6), measured(one["mean_change"], run, 7))
            found.lines.append([plain(f"{run.model}, {name}"), *cells])
        lowest = [row["parameters"]["all"]["lowest_cosine"] for row in run.rows]
        found.judge(run.model, min(lowest) > 0.99, f"{min(lowest):.6f}", run)
    yield found
    moved = Comparison(
        "Figures 3, 4, 6: the residual stream moves by an offset",
        "Before the toxic neurons' layers the residual stream moves by one offset, the same for all prompts.",
        "with every seed, before every layer looked at, at least 80 % of the prompts move along the others' mean shift",
        ["before layer", "length of the offset, of the stream's", "% of prompts along it"],
    )
    for run in records.of("residual_shift"):
        every = []
        for layer in run.rows[0]["layers"]:
            along = [row["layers"][layer]["percent_along"] for row in run.rows]
            length = [row["layers"][layer]["relative_length"] for row in run.rows]
            moved.lines.append([plain(f"{run.model}, {layer}"), over_seeds(length, run), over_seeds(along, run, 0)])
            every += along
        moved.judge(run.model, min(every) >= 80, f"at least {min(every):.0f} %", run)
        moved.figures += [(run, path) for path in run.figures if path.stem.startswith("offset")]
    yield moved


def toxic_neurons(records: Records) -> Comparison:
    """Figure 2."""
    found = Comparison(
        "Figure 2: toxic neurons fire less after DPO",
        "The five neurons that align best with the probe drop under DPO.",
        "with every seed each one's change at the prompts' end lies below 0 by its 95 % interval",
        ["neuron", "before", "after", "change (first seed)"],
    )
    for run in records.of("residual_shift"):
        for at, one in enumerate(run.rows[0]["neurons"]):
            before, after = ([row["neurons"][at]["last"][key] for row in run.rows] for key in ("pre", "post"))
            cells = (over_seeds(before, run, 4), over_seeds(after, run, 4), measured(one["change_at_last"], run, 4))
            found.lines.append([plain(f"{run.model}, {one['neuron']}"), *cells])
        drops = [
            row["neurons"][at]["change_at_last"]["high"] < 0 for row in run.rows for at in range(len(row["neurons"]))
        ]
        found.judge(run.model, all(drops), f"{sum(drops)} of {len(drops)} neurons and seeds drop", run)
        found.show(run, "toxic_activations")
    return found


def offset(records: Records) -> Comparison:
    """Section 5.2: what writes the offset."""
    found = Comparison(
        "5.2: what writes the offset",
        "Value vectors that moved, times their activations, write the offset.",
        "with every seed, before every layer looked at, they make more than half of it",
        ["before layer", "% by moved value vectors", "% by changed activations", "% by the rest"],
    )
    for run in records.of("residual_shift"):
        every = []
        for layer in run.rows[0]["layers"]:
            kinds = list(run.rows[0]["layers"][layer]["contributions"])
            values = {kind: [row["layers"][layer]["contributions"][kind] for row in run.rows] for kind in kinds}
            found.lines.append([plain(f"{run.model}, {layer}"), *(over_seeds(values[kind], run, 0) for kind in kinds)])
            every += values[kinds[0]]
        found.judge(run.model, min(every) > 50, f"{spread(every, 0)} %", run)
    return found


def against(records: Records) -> Comparison:
    """Figures 5, 7 to 10."""
    found = Comparison(
        "Figures 5, 7 to 10: value vectors move against the offset",
        "Most value vectors move against the offset, and most activations are negative (GPT-2).",
        "with every seed, before every layer looked at, more move against it than against any of the random "
        "directions, and more than half of the activations are negative",
        ["before layer", "% against the offset", "% against random directions", "% negative activations"],
    )
    for run in records.of("residual_shift"):
        agree = []
        for layer in run.rows[0]["layers"]:
            rows = [row["layers"][layer] for row in run.rows]
            shares, negative = (
                [one[key] for one in rows] for key in ("percent_against", "percent_negative_activation")
            )
            random = rows[0]["percent_against_random"]
            found.lines.append(
                [plain(f"{run.model}, {layer}"), over_seeds(shares, run, 1), measured(random, run, 1),
                 over_seeds(negative, run, 1)]
            )  # fmt: skip
            agree += [
                one["percent_against"] > one["percent_against_random"]["high"]
                and one["percent_negative_activation"] > 50
                for one in rows
            ]
        found.judge(run.model, all(agree), f"with {sum(agree)} of {len(agree)} layers and seeds", run)
        found.figures += [(run, path) for path in run.figures if path.stem.startswith("cosines")]
    return found


def parts(records: Records) -> Comparison:
    """Section 6.1."""
    found = Comparison(
        "6.1: DPO on a part of the parameters (an open question there)",
        "DPO on a part of the parameters is harder to undo than DPO on all.",
        "less of its cut comes back under seven scaled keys than of plain DPO's, by the difference's 95 % interval, "
        f"where at least {SUBSTANTIVE} % of plain DPO's comes back by the whole interval",
        ["trained", "parameters changed", "% of toxicity cut", "% that comes back", "more than of plain DPO's"],
    )
    for run in records.of("robust_alignment"):
        less, undone = [], False
        for one in run.data["robustness"]:
            cells = [measured(one["changed"], run, 0)._replace(text=f"{one['changed']:,.0f}")]
            cells += [measured(one["percent_cut"], run, 1), measured(one["percent_restored"], run, 1)]
            found.lines.append(
                [plain(f"{run.model}, {one['variant']}"), *cells, measured(one["restored_minus_dpo"], run, 1)]
            )
            undone |= one["variant"] == "dpo" and one["percent_restored"]["low"] >= SUBSTANTIVE
            if one["restored_minus_dpo"]["high"] < 0:
                less.append(one["variant"])
        if undone:
            found.judge(run.model, bool(less), f"less of: {', '.join(less) or 'none'}", run)
        found.show(run, "robustness")
    if found.figures and not found.verdicts:
        found.given = f"No mark: not {SUBSTANTIVE} % of plain DPO's cut comes back by its interval: an open question."
    return found
