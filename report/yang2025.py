"""Yang et al. 2025, table by table and figure by figure, beside our records."""

from collections.abc import Iterator

import numpy as np

from lib import paper
from report.compare import (
    PAPER_MODELS,
    Comparison,
    above,
    accuracy,
    below,
    bounds,
    measured,
    over_seeds,
    overlaps,
    plain,
    published,
    share,
    spread,
    wilson,
)
from report.records import Record, Records

TITLE = "Yang et al. 2025: How Does DPO Reduce Toxicity? A Mechanistic Neuron-Level Analysis"
SMALL = "the whole 95 % interval lies at or below the largest published share; open where it holds that share"
RANKS = {"figures 2c, 6c, 7a": 500, "figure 7b": 5500}  # the last rank that each shows


def comparisons(records: Records) -> Iterator[Comparison]:
    """Every table and figure, by what they claim."""
    yield probe(records)
    yield from patching(records)
    yield from section_6(records)
    yield few_neurons(records)
    yield steering(records)
    yield from groups(records)
    yield anti_toxic(records)
    yield nearest_tokens(records)
    yield negative(records)
    yield from opposing(records)
    yield subspace(records)
    for place, claim, given in DEFINITIONS:
        yield Comparison(place, claim, "", given=given)


DEFINITIONS = (
    ("Table 4: the groups", "TP, TN, AP, AN by two signs.", "Used as given: lib/neurons.py, groups."),
    ("Table 7: the words", "Five toxic and five other words make a vector.", "Used as given: lib/paper.py."),
    ("Table 8: the models", "Layers, widths, activations of the four models.", "Read from each model's configuration."),
    ("Tables 9, 10: DPO's settings", "Hyperparameters, KL weights.", "python -m dpo --preset yang2025: dpo/config.py."),
)


def percent_cut(condition: str, model: str) -> float | None:
    """A published condition's share of DPO's cut in toxicity, in percent."""
    rows = paper.PUBLISHED
    if model not in rows.get(condition, {}):
        return None
    none, dpo, edited = (rows[name][model][0] for name in ("none", "dpo", condition))
    return 100 * (none - edited) / (none - dpo)


def probe(records: Records) -> Comparison:
    found = Comparison(
        "Tables 1, 11: the probe",
        "A linear probe of the residual stream tells toxic comments from others.",
        "the 95 % interval (Wilson) of its accuracy, over the held-out comments of all seeds, overlaps the range of "
        "the paper's models",
        ["measure", *PAPER_MODELS],
    )
    runs = [run for of_model in records.probes().values() for run in of_model]
    found.columns += [f"{run.model}, seed {run.data['params']['seed']}" for run in runs]
    names = {"accuracy": "accuracy", "auroc": "AUROC", "auroc_without_profane_words": "AUROC without listed words"}
    for key, name in names.items():
        theirs = [paper.PROBE_ACCURACY[model] if key == "accuracy" else None for model in PAPER_MODELS]
        ours = [measured(run.rows[0].get(key), run) for run in runs]
        found.lines.append([plain(name), *map(published, theirs), *ours])
    for model, of_model in records.probes().items():
        interval = accuracy(of_model)
        found.judge(model, overlaps(interval, list(paper.PROBE_ACCURACY.values())), bounds(interval), of_model[0])
    return found


def patching(records: Records) -> Iterator[Comparison]:
    """Tables 2 and 19: the base model with neurons patched to their post-DPO activations."""
    runs = records.of("patch_four_groups")
    released = records.get("patch_four_groups/faithful")
    columns = [(run, kind, f"{run.model}, {kind}") for run in runs for kind in ("clamp", "shift")]
    if released:
        columns.append((released, "clamp", f"{released.model}, as released"))
    kinds = {
        "toxicity": ("toxicity", 3, lambda condition, model: at(condition, model, 0)),
        "percent_of_dpo": ("% of DPO's cut in toxicity", 0, percent_cut),
        "log_ppl": ("log-perplexity, every position edited", 2, lambda condition, model: None),
        "log_ppl_first": (
            "log-perplexity, position 0 edited (as published)",
            2,
            lambda condition, model: at(condition, model, 1),
        ),
        "f1": ("F1", 3, lambda condition, model: at(condition, model, 2)),
    }
    conditions = [name for name in paper.PATCHING if name != "toxic_neurons"]
    for key, (name, digits, theirs) in kinds.items():
        found = Comparison(
            f"Tables 2, 19: {name}", "", "", ["patched", *PAPER_MODELS, *(label for *_, label in columns)]
        )
        for condition in conditions:
            ours = []
            for run, kind, _ in columns:
                source, row = records.row(run, condition, "none" if condition in ("none", "dpo") else kind)
                value = row.get(key) if row else None
                ours.append(
                    measured(None if key == "percent_of_dpo" and condition == "none" else value, source, digits)
                )
            given = [published(theirs(condition, model), digits) for model in PAPER_MODELS]
            found.lines.append([plain(condition), *given, *ours])
        judge_patching(found, key, columns)
        for run, kind, _ in columns:
            if key == "toxicity" and kind == "clamp":
                found.show(run, "toxicity_perplexity")
        yield found
    yield from single_claims(records, columns)
    yield controls(records)


def at(condition: str, model: str, place: int) -> float:
    """A published number of a patched condition."""
    return paper.PATCHING[condition][model][place]


RUINED = 0.1  # of the continuations, that may become no text
KEPT = (
    "the change of log-perplexity is below 0.25 nats with its whole interval (published: -0.03 to 0.02); "
    "open where that holds 0.25"
)
CLAIMS = {  # of the tables 2 and 19: claim, rule
    "toxicity": (
        "DPO lowers toxicity.",
        "the change of toxicity lies below 0 by its 95 % interval; open where that holds 0",
    ),
    "percent_of_dpo": (
        "The four groups together lower toxicity as much as DPO.",
        "the whole 95 % interval lies at or above the smallest published share (85 %); open where it holds that share; "
        "not where a tenth more of its continuations than of the base model's are no text (loops, or without letters)",
    ),
    "log_ppl": ("Patching the four groups keeps perplexity, measured where the edit acts: at every position.", KEPT),
    "log_ppl_first": (
        "Patching the four groups keeps perplexity, measured as published, with position 0 edited alone.",
        KEPT,
    ),
    "f1": (
        "Patching the four groups costs little F1.",
        "as large a share of the base model's is left as with the paper's models (at least 88 %)",
    ),
}


def judge_patching(found: Comparison, key: str, columns: list) -> None:
    """Whether the claim of one of these tables holds, in every column."""
    found.claim, found.rule = CLAIMS[key]
    for run, kind, label in columns:
        row = run.row("four_groups", kind)
        if key == "toxicity":
            if kind == "clamp":
                change = run.row("dpo", "none")["toxicity_change"]
                found.judge(label.replace(", clamp", ""), below(change, 0), bounds(change), run)
        elif row and key == "percent_of_dpo":
            theirs = [percent_cut("four_groups", model) for model in PAPER_MODELS]
            because = f"{bounds(row[key], 0)} (published {spread(theirs, 0)})"
            agrees = above(row[key], min(theirs))
            if "degenerate" in row:
                no_text, of_base = (each["degenerate"]["mean"] for each in (row, run.row("none", "none")))
                because += f"; {100 * no_text:.0f} % is no text (base model {100 * of_base:.0f} %)"
                agrees = agrees if no_text <= of_base + RUINED else False
            found.judge(label, agrees, because, run)
        elif row and key == "f1" and key in row:
            share = row["f1"] / run.row("none", "none")["f1"]
            theirs = min(at("four_groups", model, 2) / at("none", model, 2) for model in PAPER_MODELS)
            found.judge(
                label, share >= theirs, f"{100 * share:.0f} % is left (published: at least {100 * theirs:.0f} %)", run
            )
        elif row and key in row:
            change = row[key + "_change"]
            found.judge(label, below(change, 0.25), bounds(change, 2), run)


def single_claims(records: Records, columns: list) -> Iterator[Comparison]:
    """What the tables 2 and 19 say of two more rows."""
    few = Comparison("Tables 2, 3: the 256 best aligned neurons", "They make a small part of DPO's cut.", SMALL)
    more = Comparison(
        "Table 19: the increasing neurons",
        "The neurons whose toxic projection rose under DPO raise toxicity when patched.",
        "the change of toxicity lies above 0 by its 95 % interval; open where that holds 0",
    )
    for run, kind, label in columns:
        source, row = records.row(run, "top256", kind)
        if row:
            found, theirs = row["percent_of_dpo"], [percent_cut("top256", model) for model in PAPER_MODELS]
            because = f"{bounds(found, 0)} (published {spread(theirs, 0)})"
            few.judge(label, below(found, max(theirs)), because, source)
        source, row = records.row(run, "increasing", kind)
        if row:
            more.judge(label, above(row["toxicity_change"], 0), bounds(row["toxicity_change"]), source)
    yield few
    yield more


def controls(records: Records) -> Comparison:
    """What the paper lacks: the same edit of other neurons, values and directions."""
    found = Comparison(
        "Controls of the four groups (not in the paper)",
        "The four groups' shift does more than the same shift of as many random or matched neurons, permuted shifts, "
        "or groups by another direction.",
        "toxicity under every one of these controls (draws averaged) is higher than under the real edit, by the "
        "95 % interval of the paired difference over prompts",
        ["model and control", "toxicity", "% of DPO's cut", "log-perplexity", "toxicity above the real edit's"],
    )
    asked = ("random", "random_in_layer", "matched", "matched_push", "permuted", "gaussian", "permuted_labels")
    asked += ("reselected", *(f"{name}_at_{dose}" for name in ("random", "matched") for dose in ("projection", "norm")))
    for run in records.of("patch_four_groups"):
        real, above = run.row("four_groups", "shift"), []
        rows = [
            ("the four groups", real),
            *((name, run.row(f"control:{name}", "shift", "four_groups")) for name in asked),
        ]
        for name, row in rows:
            if not row:
                continue
            difference = row.get("difference_from_real")
            found.lines.append(
                [plain(f"{run.model}: {name}"), measured(row["toxicity"], run), measured(row["percent_of_dpo"], run, 0),
                 measured(row["log_ppl"], run, 2), measured(difference, run)]
            )  # fmt: skip
            if difference:
                above.append((name, difference["low"] > 0))
        if above:
            equal = [name for name, more in above if not more]
            because = f"no worse than the real edit: {', '.join(equal) or 'none'}"
            found.judge(run.model, not equal, because, run)
    return found


def section_6(records: Records) -> Iterator[Comparison]:
    """Tables 2, 7 and 19: editing activations without DPO."""
    found = Comparison(
        "Tables 2, 7, 19: editing without DPO",
        "Editing activations lowers toxicity below DPO's and keeps perplexity.",
        "some edit has lower toxicity than DPO and no higher log-perplexity, by the 95 % intervals of the paired "
        "differences, every position edited",
        ["edit", "toxicity", "against DPO", "log-perplexity", "against DPO ", "on the Pareto front, % of resamples"],
    )
    for run in records.of("edits_against_dpo"):
        for row in run.rows:
            if row["of"]:
                continue
            name = row["condition"] if row["kind"] == "none" else f"{row['condition']}, {row['kind']}"
            found.lines.append(
                [plain(f"{run.model}: {name}"), measured(row["toxicity"], run),
                 measured(row["toxicity_against_dpo"], run), measured(row["log_ppl"], run, 2),
                 measured(row["log_ppl_against_dpo"], run, 2), measured(100 * row["share_on_front"], run, 0)]
            )  # fmt: skip
        # What is patched takes DPO's activations.
        own = [row for row in run.rows if row["condition"] not in paper.PATCHING and not row["of"]]
        edits = [row for row in own if row["kind"] != "steer"]
        better = [f"{row['condition']}, {row['kind']}" for row in edits if row["beats_dpo"]]
        found.judge(run.model, bool(better), f"of {len(edits)} edits: {', '.join(better) or 'none'}", run)
        found.show(run, "pareto")
    yield found
    theirs = Comparison(
        "Tables 2, 19: the published edits, toxicity",
        "The clamp of section 6 brings toxicity below the base model's.",
        "the change of toxicity lies below 0 by its 95 % interval in every clamped edit",
        ["edit", *PAPER_MODELS],
    )
    runs = [(run, kind) for run in records.of("probe_free_editing") for kind in ("clamp", "scale")]
    theirs.columns += [f"{run.model}, {kind}" for run, kind in runs]
    names = dict.fromkeys([*paper.EDITING, *(row["condition"] for run, _ in runs for row in run.rows if not row["of"])])
    for condition in names:
        if condition in ("none", "dpo"):
            continue
        given = [
            published(paper.EDITING[condition][m][0] if condition in paper.EDITING else None) for m in PAPER_MODELS
        ]
        ours = [(run.row(condition, kind) or {}).get("toxicity") for run, kind in runs]
        values = [measured(value, run) for value, (run, _) in zip(ours, runs, strict=True)]
        theirs.lines.append([plain(condition), *given, *values])
    for run in records.of("probe_free_editing"):
        rows = [row for row in run.rows if row["kind"] == "clamp" and not row["of"]]
        if rows:
            worst = max(rows, key=lambda row: row["toxicity_change"]["high"])
            agrees = worst["toxicity_change"]["high"] < 0
            theirs.judge(run.model, agrees, f"at most {bounds(worst['toxicity_change'])}", run)
    yield theirs


def few_neurons(records: Records) -> Comparison:
    """Table 3."""
    found = Comparison(
        "Table 3: neurons with toxic tokens, % of DPO's cut",
        "The neurons that write toxic tokens make a small part of DPO's cut.",
        f"for the neurons with a toxic token, clamped, {SMALL}",
        ["neurons", *PAPER_MODELS],
    )
    runs = records.of("toxic_neurons_not_enough")
    found.columns += [f"{run.model}, {kind}" for run in runs for kind in ("clamp", "shift")]
    theirs = {
        "toxic_tokens": {model: pair[1] for model, pair in paper.TOXIC_TOKEN_NEURONS.items()},
        "top256": paper.TOP_256,
        "top128": {},
    }
    for condition, given in theirs.items():
        ours = [
            measured((run.row(condition, kind) or {}).get("percent_of_dpo"), run, 1)
            for run in runs
            for kind in ("clamp", "shift")
        ]
        found.lines.append([plain(condition), *(published(given.get(model), 1) for model in PAPER_MODELS), *ours])
    numbers = [published(paper.TOXIC_TOKEN_NEURONS[model][0], 0) for model in PAPER_MODELS]
    ours = [
        over_seeds([one["toxic_token_neurons"] for one in run.data["seeds"]], run, 0) for run in runs for _ in range(2)
    ]
    found.lines.append([plain("neurons with a toxic token"), *numbers, *ours])
    for run in runs:
        if row := run.row("toxic_tokens", "clamp"):
            interval = row["percent_of_dpo"]
            largest = max(theirs["toxic_tokens"].values())
            found.judge(run.model, below(interval, largest), bounds(interval, 1), run)
        found.show(run, "share_of_dpo")
    return found


def steering(records: Records) -> Comparison:
    """Tables 2, 11, 12."""
    found = Comparison(
        "Tables 2, 11, 12: steering with the probe",
        "Subtracting the probe lowers toxicity while perplexity is kept, and more than other directions do.",
        "at alpha* (the strongest that keeps perplexity) toxicity falls by its 95 % interval, and every control's "
        "(flipped, another direction, shuffled labels) is higher or its perplexity worse by more than 0.5 nats",
        ["steering", "toxicity", "% of DPO's cut", "log-perplexity"],
    )
    for model in PAPER_MODELS:
        for alpha, (toxicity, log_ppl, _) in paper.STEERING[model].items():
            none, dpo = (at(name, model, 0) for name in ("none", "dpo"))
            cut = 100 * (none - toxicity) / (none - dpo)
            found.lines.append(
                [plain(f"{model} (published): alpha {alpha}"), published(toxicity), published(cut, 0),
                 published(log_ppl, 2)]
            )  # fmt: skip
    larger = [records.get(name) for name in ("section6/steer", "section6_smollm2/steer")]  # more prompts
    for run in [run for run in larger if run] or records.of("steer"):
        for row in run.rows:
            label = row["condition"] + (f" of {row['of']}" if row["of"] else "")
            cut = None if row["condition"] == "none" else row["percent_of_dpo"]
            found.lines.append(
                [plain(f"{run.model}: {label}"), measured(row["toxicity"], run), measured(cut, run, 0),
                 measured(row["log_ppl"], run, 2)]
            )  # fmt: skip
        real = run.row("steer alpha*", "steer")
        if not real:  # steered with given alphas
            continue
        others = [row for row in run.rows if row["of"] == "steer alpha*" and row["condition"] != "control:zero"]
        needed = {"control:flipped", "control:gaussian", "control:permuted_labels"}
        found.show(run, "toxicity_perplexity")
        if not needed <= {row["condition"] for row in others}:
            continue  # without controls the claim's second half is open
        like = [
            row["condition"]
            for row in others
            if row["difference_from_real"]["low"] <= 0 and row["log_ppl"] < real["log_ppl"] + 0.5
        ]
        because = f"change {bounds(real['toxicity_change'])}; controls that do as well: {', '.join(like) or 'none'}"
        found.judge(run.model, real["toxicity_change"]["high"] < 0 and not like, because, run)
    if found.figures and not found.verdicts:
        found.given = "No mark: the runs have no controls."
    return found


def groups(records: Records) -> Iterator[Comparison]:
    """Tables 5, 13, 18 and figures 2, 6, 7, 8."""
    runs = records.of_groups()
    shares = Comparison(
        "Table 5, figures 2a, 6a: the four groups",
        "All four groups take part in the reduction.",
        "none of the groups has less than the smallest published share of the reducing neurons (3.2 %)",
        ["share, %", *PAPER_MODELS, *(run.model for run in runs)],
    )
    for at_group, group in enumerate(("TP", "TN", "AP", "AN")):
        given = [published(paper.GROUP_SHARES[model][at_group], 1) for model in PAPER_MODELS]
        ours = [measured(run.shares["group_shares"][group], run, 1) for run in runs]
        shares.lines.append([plain(f"{group} of the reducing neurons"), *given, *ours])
    for group in ("TP", "TN", "AP", "AN"):
        ours = [measured(run.shares["reduction_shares"][group], run, 1) for run in runs]
        shares.lines.append([plain(f"{group} of the reduction (figures)"), *[plain("")] * 4, *ours])
    for run in runs:
        least = min(run.shares["group_shares"].values())
        shares.judge(run.model, least >= 3.2, f"the smallest: {least:.1f} %", run)
        shares.show(run, "groups", "cumulative_reduction")
    yield shares

    shifts = Comparison(
        "Figures 2c, 6c, 7: toxic neurons fall, anti-toxic ones rise",
        "Under DPO the activations of toxic-aligned reducing neurons fall and those of anti-toxic-aligned ones rise.",
        "",
        ["neurons by reduction", "% that move so"],
        given="No mark: with value vectors that hardly move it follows from the definition of a reducing neuron.",
    )
    for run in runs:
        if not (tensors := run.activations):
            continue
        order = np.argsort(-tensors["delta"].ravel())
        moved, cosine = (tensors["post"] - tensors["pre"]).ravel(), tensors["cosine"].ravel()
        for place, last in RANKS.items():
            ranked = order[max(0, last - 500) : last]
            share = 100 * float(np.mean(moved[ranked] * cosine[ranked] < 0))
            shifts.lines.append([plain(f"{run.model}, ranks to {last} ({place})"), measured(share, run, 1)])
        shifts.show(run, "activation_shifts_0", "activation_shifts_5000")
    yield shifts

    depth = Comparison(
        "Figure 8: the reduction by layer",
        "The reduction grows with depth.",
        "the rank correlation of a layer's reduction with its depth is above 0.5",
        ["model", "Spearman's rho of reduction and depth"],
    )
    for run in runs:
        if not (tensors := run.activations):
            continue
        delta = tensors["delta"].astype(np.float64)
        by_layer = np.where(delta > 0, delta, 0).sum(1)
        ranks = np.argsort(np.argsort(by_layer))
        rho = float(np.corrcoef(ranks, np.arange(len(ranks)))[0, 1])
        depth.lines.append([plain(run.model), measured(rho, run, 2)])
        depth.judge(run.model, rho > 0.5, f"{rho:.2f}", run)
        depth.show(run, "reduction_by_layer")
    yield depth


def anti_toxic(records: Records) -> Comparison:
    """Tables 6, 15."""
    found = Comparison(
        "Tables 6, 15: anti-toxic vectors",
        "Value vectors most opposed to the probe, sign-reversed, promote toxic tokens.",
        "with every seed at least one of the first 19 ranks (the last that table 15 lists) has a listed profane word "
        "among its ten nearest tokens",
        ["model, seed", "of 128 vectors with a profane word", "their ranks", "of random value vectors"],
    )
    for run in records.of("toxic_vectors"):
        first = []
        for row in run.rows:
            own = [one for one in run.vectors if one.get("seed", run.rows[0]["seed"]) == row["seed"] and one["found"]]
            ranks = [one["rank"] for one in own if one["kind"] == "worst, reversed"]
            counts = {kind: row["counts"][kind] for kind in ("worst, reversed", "random")}
            cells = [measured(counts["worst, reversed"]["listed"], run, 0), plain(", ".join(map(str, ranks)))]
            random = f"{counts['random']['listed']} of {counts['random']['vectors']}"
            found.lines.append([plain(f"{run.model}, {row['seed']}"), *cells, plain(random)._replace(record=run)])
            first.append(any(rank <= 19 for rank in ranks))
        found.judge(run.model, all(first), f"with {sum(first)} of {len(first)} seeds", run)
    return found


def nearest_tokens(records: Records) -> Comparison:
    """Tables 1, 14, 16."""
    found = Comparison(
        "Tables 1, 14, 16: the best aligned value vectors",
        "Value vectors that align best with the probe promote toxic tokens.",
        "with every seed a larger share of the best 128 shows a listed profane word among its nearest tokens than the "
        "upper end of the 95 % interval (Wilson) of random value vectors",
        ["model", "of the best, with a listed word", "of random value vectors", "of random directions"],
    )
    for run in records.of("toxic_vectors"):
        counts = [row["counts"] for row in run.rows]
        cells = [
            plain(", ".join(f"{one[kind]['listed']} of {one[kind]['vectors']}" for one in counts))._replace(record=run)
            for kind in ("best", "random", "random directions")
        ]
        found.lines.append([plain(f"{run.model}, a seed each"), *cells])
        more = [share(one["best"]) > wilson(share(one["random"]), one["random"]["vectors"])["high"] for one in counts]
        found.judge(run.model, all(more), f"more with {sum(more)} of {len(more)} seeds", run)
    return found


def negative(records: Records) -> Comparison:
    """Figure 3."""
    found = Comparison(
        "Figure 3: the first 100 neurons are negative",
        "Most of the 100 neurons that align best with the probe have a negative mean activation before DPO (GPT-2).",
        "with every seed more than 50 % do, and more than of all neurons",
        ["model", "% of the first 100", "% of them after DPO", "% of all neurons"],
    )
    for run in records.of("toxic_neurons_not_enough"):
        shares = [one["percent_negative"] for one in run.data["seeds"]]
        before, after, every = ([one[key] for one in shares] for key in ("top100", "top100_after", "all"))
        cells = (over_seeds(before, run, 0), over_seeds(after, run, 0), over_seeds(every, run, 1))
        found.lines.append([plain(run.model), *cells])
        agrees = all(one["top100"] > max(50, one["all"]) for one in shares)
        found.judge(run.model, agrees, f"{spread(before, 0)} %", run)
        found.show(run, "top_activations")
    return found


def opposing(records: Records) -> Iterator[Comparison]:
    """Tables 13, 17, 18 and figures 1, 4, 5."""
    runs = records.of("opposing_effects")
    half = Comparison(
        "Tables 13, 18, figures 1, 4, 5: opposing neurons",
        "About half of all neurons reduce the toxic projection, the others raise it, and the sums nearly cancel.",
        "between 50 and 60 % reduce, and the net is at most 10 % of both sums, with every seed",
        ["measure", *PAPER_MODELS, *(run.model for run in runs), "the same along random directions"],
    )
    lines = (
        ("% that reduce (table 18)", "percent_reducing", paper.PERCENT_REDUCING, 2, "percent_reducing_random"),
        ("% negative before DPO (table 13)", "percent_negative", paper.PERCENT_NEGATIVE, 2, None),
        ("net of both sums (figures 1, 5)", "balance", {}, 3, "balance_random"),
        ("SD of the shift (figure 4)", "shift_sd", {}, 3, None),
    )
    for name, key, theirs, digits, random in lines:
        ours = [seeds(run, key, digits) for run in runs]
        beside = [measured(run.rows[0][random], run, digits) for run in runs[:1]] if random else [plain("")]
        found = [published(theirs.get(model), 2) for model in PAPER_MODELS]
        half.lines.append([plain(name), *found, *ours, *beside])
    for run in runs:
        reducing, net = ([row[key] for row in run.rows] for key in ("percent_reducing", "balance"))
        agrees = all(50 < share < 60 for share in reducing) and max(map(abs, net)) <= 0.1
        half.judge(run.model, agrees, f"{spread(reducing, 1)} %; net {spread(net, 2)}", run)
        half.show(run, "opposing_by_layer", "shift_density")
    yield half

    shift = Comparison(
        "Table 17: what the shifts go with",
        "Activation shifts do not go with the probe's direction, and weakly with the activation before DPO.",
        "with every seed: r with the direction below 0.05; r with the activation before between 0 and 0.5",
        ["r of the shift with", *PAPER_MODELS, *(run.model for run in runs)],
    )
    for place, (name, key) in enumerate((("the direction", "cosine"), ("the activation before DPO", "before"))):
        theirs = [published(paper.SHIFT_CORRELATIONS[model][place]) for model in PAPER_MODELS]
        shift.lines.append([plain(name), *theirs, *(seeds(run, "correlations", 3, key) for run in runs)])
    for run in runs:
        cosine, before = ([row["correlations"][key]["mean"] for row in run.rows] for key in ("cosine", "before"))
        agrees = max(map(abs, cosine)) < 0.05 and min(before) > 0 and max(before) < 0.5
        shift.judge(run.model, agrees, f"{spread(cosine)}; {spread(before)}", run)
    yield shift


def seeds(run: Record, key: str, digits: int, part: str | None = None):
    """A number of a run, or its range over seeds."""
    values = [row[key][part]["mean"] if part else row[key] for row in run.rows]
    return measured(float(np.mean(values)), run, digits)._replace(text=spread(values, digits))


def subspace(records: Records) -> Comparison:
    """Appendix G, table 16."""
    runs = records.of("toxic_subspace")
    found = Comparison(
        "Appendix G: three SVD directions, % with conflicting signs",
        "That value vectors project with conflicting signs on three SVD directions is evidence of structure.",
        "",
        ["measure", "gpt2", *(run.model for run in runs), "three random directions (first seed)",
         "over the choices of signs (first seed)"],
        given="No mark: an SVD leaves its directions' signs open, and over all choices of them the mean share is 75 % "
        "whatever the vectors are, as of independent signs. A share near 75 % therefore says nothing of structure.",
    )  # fmt: skip
    names = {"alignment": "alignment of value vectors", "change": "change of the projection"}
    for place, (key, name) in enumerate(names.items()):
        ours = [seeds(run, key, 1) for run in runs]
        beside = [
            measured(run.rows[0][key + suffix], run, 1) for run in runs[:1] for suffix in ("_random", "_sign_choices")
        ]
        found.lines.append([plain(name), published(paper.SUBSPACE["gpt2"][place], 1), *ours, *beside])
    for run in runs:
        found.show(run, "subspace")
    return found
