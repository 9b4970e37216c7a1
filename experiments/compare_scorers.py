"""How the toxicity scorers behave: what stands behind every number that the other scripts compare.

Both papers score with a model that cannot be asked here, or was trained on the probe's own data. This script puts the
scorers that can be had side by side:

floor        what an empty text gets, one word over and over, and a plain sentence: no score goes below
spelling     toxic comments with a listed word, as they are, masked (`*`), spaced out, and the word alone without spaces
comments     AUROC on labelled comments, on all and on those without a listed word
perspective  --perspective: correlation with Perspective's toxicity of RealToxicityPrompts' continuations, and AUROC of
             0.5 by it, on all and on those without a listed word
labels       continuations of the base model, after DPO and under two edits, labelled by hand in random order without
             their conditions: AUROC and agreement (Cohen's kappa at 0.5), and the labels of each condition

Writes run.json and figures/ to runs/compare_scorers/. Needs no model but what a scorer needs.

    python experiments/compare_scorers.py                                             # four scorers without a network
    python experiments/compare_scorers.py --scorers detoxify,words --perspective realtoxicityprompts.jsonl
"""

import click

from lib.cli import check, options

LABELS = "results/compare_scorers/labels.jsonl"


@click.command(help=__doc__.split("\n")[0])
@click.option("--scorers", default="profanity-check,words,hatesonar,probe:smollm2,probe:gemma-270m", show_default=True)
@options("comments")
@click.option("--perspective", help="RealToxicityPrompts' own JSON lines, with Perspective's scores.")
@click.option("--labels", default=LABELS, show_default=True, help="JSON lines: condition, continuation, label.")
@options("out", "overwrite")
def command(**options):
    main(**options)


check(command, __name__)  # --help and wrong options end here, before torch is imported

import json
from collections import Counter
from pathlib import Path

import numpy as np
from sklearn.metrics import cohen_kappa_score, roc_auc_score

from lib import artifacts, data, plots, results
from lib.errors import UserError
from lib.metrics import mask, profane_pattern, scorer
from lib.tables import number, plain_table, wide_console

KNOWN = ("toxic", "not toxic", "no text")  # labels by hand
LEAST = 0.5  # a score, and Perspective's, from which on a text counts as toxic


def main(scorers, comments, perspective, labels, out, overwrite):
    target = artifacts.resolved(Path(out or "runs/compare_scorers"))
    artifacts.check_output(target, overwrite)
    given, labelled = data.comments(comments), read_labels(labels)
    rated = read_rated(perspective) if perspective else []
    compared = {name: scorer(name) for name in scorers.split(",")}  # last: a probe may have to be trained
    settings = {
        "scorers": [each.identity for each in compared.values()],
        "comments": given.sha256,
        "labels": artifacts.file_sha256(Path(labels)),
        "perspective": artifacts.file_sha256(Path(perspective)) if perspective else None,
    }
    with artifacts.output(target, settings, overwrite) as work:
        rows = [
            {
                "condition": name,
                "floor": floor(score),
                "spelling": spelling(score, given.items),
                "comments": against_labels(score, *zip(*given.items, strict=True)),
                "perspective": against_perspective(score, rated) if rated else None,
                "labels": against_hand(score, labelled),
            }
            for name, score in compared.items()
        ]
        record = {
            "script": "compare_scorers",
            "model": "none",
            "params": {"scorers": list(compared), "n_rated": len(rated), "n_labelled": len(labelled)},
            "rows": rows,
            "labels": count(labelled),
            "provenance": results.provenance(settings=settings),
        }
        results.write_json(work / "run.json", record)
        plots.scorers(rows, record["labels"], work / "figures" / "scorers.png")
    report(record, target)


def read_labels(file: str) -> list[dict]:
    """Labelled continuations. Raises UserError."""
    try:
        lines = [json.loads(line) for line in Path(file).read_text(encoding="utf-8").splitlines()]
        lines = [{key: line[key] for key in ("condition", "continuation", "label")} for line in lines]
        known = {line["label"] for line in lines} <= set(KNOWN)
        written = all(isinstance(text, str) for line in lines for text in line.values())
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"--labels {file}: not JSON lines with condition, continuation, label ({error!r:.100})."
        ) from error
    if not (lines and written and known):
        raise UserError(f"--labels {file}: give texts, each with one of the labels {', '.join(KNOWN)}.")
    return lines


def read_rated(file: str) -> list[tuple[str, float]]:
    """RealToxicityPrompts' continuations with Perspective's toxicity, but those not rated. Raises UserError."""
    try:
        lines = [json.loads(line)["continuation"] for line in Path(file).read_text(encoding="utf-8").splitlines()]
        rated = [(str(line["text"]), line["toxicity"]) for line in lines if line.get("toxicity") is not None]
        rated = [(text, float(toxicity)) for text, toxicity in rated]
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"--perspective {file}: not RealToxicityPrompts' JSON lines, with `text` and `toxicity` in each "
            f"`continuation` ({error!r:.100})."
        ) from error
    if len(rated) < 2:
        raise UserError(f"--perspective {file}: {len(rated)} continuations have a toxicity; give two at least.")
    return rated


def floor(score) -> dict[str, float]:
    """Scores of texts that say nothing."""
    texts = {"empty": "", "one word": "mom " * 20, "plain": "The train to the coast leaves at nine in the morning."}
    return dict(zip(texts, score(list(texts.values())).tolist(), strict=True))


def spelling(score, comments: list[tuple[str, int]]) -> dict:
    """Mean scores of the toxic comments with a listed word, and of the same with that word written otherwise."""
    pattern = profane_pattern()
    rude = [text for text, label in comments if label and pattern.search(text)]
    written = {
        "as it is": rude,
        "masked": [mask(text) for text in rude],
        "spaced out": [pattern.sub(lambda word: " ".join(word.group()), text) for text in rude],
        "alone, without spaces": [pattern.search(text).group() * 20 for text in rude],
    }
    return {"n": len(rude), **{name: float(score(texts).mean()) if rude else None for name, texts in written.items()}}


def auroc(labels: np.ndarray, scores: np.ndarray) -> float | None:
    """Area under the ROC curve; None where the labels are all alike."""
    return float(roc_auc_score(labels, scores)) if len(set(labels.tolist())) == 2 else None


def against_labels(score, texts, labels) -> dict:
    """AUROC of labelled texts, on all and on those without a listed word."""
    scores, labels = score(list(texts)), np.array(labels)
    plain = np.array([profane_pattern().search(text) is None for text in texts])
    return {
        "n": len(labels),
        "auroc": auroc(labels, scores),
        "n_without_listed_words": int(plain.sum()),
        "auroc_without_listed_words": auroc(labels[plain], scores[plain]),
    }


def against_perspective(score, rated: list[tuple[str, float]]) -> dict:
    """Agreement with Perspective's toxicity of continuations."""
    texts, toxicity = zip(*rated, strict=True)
    theirs = np.array(toxicity)
    scores = score(list(texts))
    varied = scores.std() > 0 and theirs.std() > 0
    correlation = float(np.corrcoef(scores, theirs)[0, 1]) if varied else None
    return {"correlation": correlation, **against_labels(score, texts, theirs >= LEAST)}


def against_hand(score, labelled: list[dict]) -> dict:
    """Agreement with the labels by hand, and the mean score of each label and of each condition."""
    scores = score([each["continuation"] for each in labelled])
    by_hand, conditions = (np.array([each[key] for each in labelled]) for key in ("label", "condition"))
    texts = by_hand != "no text"
    toxic = by_hand[texts] == "toxic"
    return {
        "n": int(texts.sum()),
        "auroc": auroc(toxic, scores[texts]),
        "kappa": float(cohen_kappa_score(toxic, scores[texts] >= LEAST)) if len(set(toxic)) == 2 else None,
        "by_label": {name: float(scores[by_hand == name].mean()) for name in sorted(set(by_hand))},
        "by_condition": {name: float(scores[conditions == name].mean()) for name in dict.fromkeys(conditions)},
    }


def count(labelled: list[dict]) -> dict[str, dict[str, int]]:
    """How many continuations of each condition have each label."""
    conditions = dict.fromkeys(each["condition"] for each in labelled)
    return {name: dict(Counter(each["label"] for each in labelled if each["condition"] == name)) for name in conditions}


def report(record: dict, out: Path) -> None:
    """Print a column for each scorer, and the labels."""
    lines = []
    for part in ("floor", "spelling", "comments", "perspective", "labels"):
        for key in record["rows"][0][part] or ():
            values = [row[part][key] for row in record["rows"]]
            if not isinstance(values[0], dict):
                shown = ("-" if value is None else number(value) for value in values)
                lines.append([f"{part}: {key.replace('_', ' ')}", *shown])
    console = wide_console()
    console.print(plain_table(["", *(row["condition"] for row in record["rows"])], lines, "Scorers"))
    for name, labels in record["labels"].items():
        console.print(f"{name}: " + ", ".join(f"{n} {label}" for label, n in sorted(labels.items())))
    console.print(f"Record: {out}", soft_wrap=True)


if __name__ == "__main__":
    command()
