"""Does any edit beat DPO? (the conclusion of Yang et al. 2025, section 6; tables 2 and 19)

The paper concludes that editing activations, without DPO's weights or data, lowers toxicity further than DPO and keeps
perplexity. Its perplexity was measured with one position edited. This script takes what patch_four_groups.py,
probe_free_editing.py and steer.py measured on the same prompts and passages, puts all edits and DPO into one plane,
toxicity against log-perplexity with every position edited, and asks of each:

beats DPO      lower toxicity and no higher perplexity, both 95 % intervals of the paired difference apart from 0
on the front   in how many bootstrap resamples no other condition is at least as good in both (Pareto front)
scorers        by how many of the scorers toxicity is lower than DPO's, the interval apart from 0

It measures nothing itself and needs no model. Writes run.json and figures/ to runs/edits_against_dpo/<model>/.

    python experiments/edits_against_dpo.py                                   # the records of results/section6
    python experiments/edits_against_dpo.py runs/patch_four_groups/gemma runs/probe_free_editing/gemma runs/steer/gemma
"""

import click

from lib.cli import check, options


@click.command(help=__doc__.split("\n")[0])
@click.argument("folders", nargs=-1)
@options("seed", "out", "overwrite")
def command(**options):
    main(**options)


check(command, __name__)  # --help and wrong options end here, before numpy is imported

import json
from pathlib import Path

import numpy as np
from rich import box
from rich.table import Table

from lib import artifacts, plots, results
from lib.errors import UserError
from lib.evaluation import SECOND, by_run
from lib.models import short_name
from lib.statistics import Bootstrap, paired
from lib.tables import wide_console, with_interval

DEFAULT = "results/section6"
COMPARED = ("toxicity", "nll", "kl", "tokens")  # beginnings of the keys of measurements.jsonl that are read
SAME = ("model", "limit", "protocol", "scorer", "second_scorer")  # what all records must have in common


def main(folders, seed, out, overwrite):
    known = (Path(__file__).parents[1] / DEFAULT).glob("*/run.json")
    folders = [Path(folder) for folder in folders] or sorted(path.parent for path in known)
    records = [read(folder) for folder in folders]
    check_alike(folders, records)
    target = Path(out or f"runs/edits_against_dpo/{short_name(records[0]['model'])}")
    settings = {"records": [artifacts.file_sha256(folder / "run.json") for folder in folders], "seed": seed}
    with artifacts.output(target, settings, overwrite) as work:
        record = compare(records, seed)
        plots.trade_off(record["rows"], record["params"]["scorer"], work / "figures" / "pareto.png")
        record["provenance"] = results.provenance(settings=settings, records=[folder.name for folder in folders])
        results.write_json(work / "run.json", record)
    report(record, target)


def read(folder: Path) -> dict:
    """A record with its measurements. Raises UserError when it is none."""
    try:
        record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        lines = (folder / "measurements.jsonl").read_text(encoding="utf-8").splitlines()
        record["measurements"] = [json.loads(line) for line in lines]
        conditions = {(row["condition"], row["kind"]) for row in record["rows"]}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{folder}: not a run of patch_four_groups, probe_free_editing or steer ({error!r}); give their folders."
        ) from error
    if not isinstance(record.get("params", {}).get("second_scorer"), list):
        raise UserError(f"{folder}: its run.json is of an earlier version of this project; run its command again.")
    if not {("none", "none"), ("dpo", "none")} <= conditions:
        raise UserError(f"{folder}: holds no base model and no DPO model to compare with.")
    return record


def check_alike(folders: list[Path], records: list[dict]) -> None:
    """Raise UserError unless all were measured alike: numbers on other prompts cannot be paired."""
    if not records:
        raise UserError(f"no records given, and none in {DEFAULT}; run the three scripts first and give their folders.")

    def alike(record: dict) -> dict:
        common = {key: {"model": record["model"], **record["params"]}.get(key) for key in SAME}
        data = record["provenance"]["data"]
        return common | {name: [part["sha256"], part["items"]] for name, part in data.items()}

    first = alike(records[0])
    for folder, record in zip(folders[1:], records[1:], strict=True):
        if differing := [key for key, value in alike(record).items() if value != first[key]]:
            raise UserError(f"{folder}: its {differing[0]} is another than that of {folders[0]}; measure both alike.")


def compare(records: list[dict], seed: int) -> dict:
    """Every condition against DPO; conditions of several seeds and draws are averaged first."""
    runs: dict[tuple, list[dict]] = {}  # (condition, kind, of, means) -> measurements
    seeds: dict[tuple, list[int]] = {}  # and of each
    for number, record in enumerate(records):
        for line in record["measurements"]:
            if line["name"] in ("none", "dpo") and number:  # measured in every record, the same each time
                continue
            compared = {key: line[key] for key in line if key.startswith(COMPARED)}
            key = (line["name"], line["kind"], line["of"], line["means"])
            runs.setdefault(key, []).append(compared)
            seeds.setdefault(key, []).append(line["seed"])
    numbers = {key: by_run(measured, seeds[key]) for key, measured in runs.items()}
    none, dpo = (numbers[name, "none", "", "same"] for name in ("none", "dpo"))
    prompts, passages = Bootstrap(dpo["toxicity"].shape[1], seed), Bootstrap(dpo["nll"].shape[1], seed + 1)
    shown = [key for key in numbers if "nll" in numbers[key]]
    toxicity = np.stack([numbers[key]["toxicity"].mean(0)[prompts.rows].mean(1) for key in shown])
    nll = np.stack([numbers[key]["nll"].mean(0)[passages.rows].sum(1) for key in shown])
    log_ppl = nll / dpo["tokens"][0][passages.rows].sum(1)
    rows = []
    for key, on_front in zip(shown, share_on_front(toxicity, log_ppl), strict=True):
        row = dict(zip(("condition", "kind", "of", "means"), key, strict=True))
        row |= {"means": None if row["means"] == "same" else row["means"], "runs": len(runs[key])}
        rows.append(row | against_dpo(numbers[key], none, dpo, float(on_front), prompts, passages))
    rows.sort(key=lambda row: row["toxicity"]["mean"])
    params = {key: records[0]["params"][key] for key in SAME if key != "model"}
    return {"script": "edits_against_dpo", "model": records[0]["model"], "params": params, "rows": rows}


def against_dpo(values: dict, none: dict, dpo: dict, on_front: float, prompts: Bootstrap, passages: Bootstrap) -> dict:
    """A condition's entries in run.json: toxicity and nats per token, and paired differences to base model and DPO."""
    toxicity = prompts.difference(values["toxicity"], dpo["toxicity"])
    tokens = values["tokens"][0]
    change, log_ppl = (passages.ratio(np.subtract(*paired(values["nll"], of["nll"])), tokens) for of in (none, dpo))
    row = {
        "toxicity": prompts.mean(values["toxicity"]),
        "toxicity_against_dpo": toxicity,
        "log_ppl": float(values["nll"].mean(0).sum() / tokens.sum()),
        "log_ppl_change": change,
        "log_ppl_against_dpo": log_ppl,
        "beats_dpo": toxicity["high"] is not None and toxicity["high"] < 0 and log_ppl["high"] <= 0,
        "share_on_front": on_front,
    }
    if "kl" in values and "kl" in dpo:  # a record from before it was measured has none
        row["kl"] = passages.ratio(values["kl"], tokens)
        row["kl_against_dpo"] = passages.ratio(np.subtract(*paired(values["kl"], dpo["kl"])), tokens)
    lower = [toxicity["high"]]
    for key in (key for key in values if key.startswith(SECOND)):
        against = prompts.difference(values[key], dpo[key])
        by_scorer = {"toxicity": prompts.mean(values[key]), "toxicity_against_dpo": against}
        row.setdefault("by_scorer", {})[key.removeprefix(SECOND)] = by_scorer
        lower.append(against["high"])
    row["scorers_lower"] = sum(high is not None and high < 0 for high in lower)
    return row


def share_on_front(toxicity, log_ppl):
    """In which share of resamples each condition is on the Pareto front. Both `[n_conditions, n_resamples]`."""
    shares = np.zeros(len(toxicity))
    for at in range(len(toxicity)):
        as_good = (toxicity <= toxicity[at]) & (log_ppl <= log_ppl[at])
        better = as_good & ((toxicity < toxicity[at]) | (log_ppl < log_ppl[at]))
        shares[at] = 1 - better.any(0).mean()
    return shares


def report(record: dict, out: Path) -> None:
    """Print every condition that is no control, by toxicity, and the answer."""
    console, params = wide_console(), record["params"]
    console.width = max(console.width, 160)
    scorers = f"scorers: {', '.join([params['scorer'], *params['second_scorer']])}, toxicity by the first"
    title = f"{record['model']}, {params['limit']} prompts, {scorers}"
    view = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    names = ("edit", "toxicity [95 %]", "against DPO", "log-ppl", "against DPO", "KL", "on front", "scorers")
    view.add_column("condition", no_wrap=True)
    for name in names:
        view.add_column(name, justify="right", no_wrap=True)
    for row in record["rows"]:
        if row["of"]:
            continue
        kl = f"{row['kl']['mean']:.2f}" if "kl" in row else "-"
        scorers = f"{row['scorers_lower']} of {1 + len(row.get('by_scorer', ()))}"
        toxicity = (with_interval(row["toxicity"], 3), with_interval(row["toxicity_against_dpo"], 3))
        log_ppl = (f"{row['log_ppl']:.2f}", with_interval(row["log_ppl_against_dpo"], 2))
        on_front = f"{100 * row['share_on_front']:.0f} %"
        view.add_row(row["condition"], row["kind"], *toxicity, *log_ppl, kl, on_front, scorers)
    console.print(view)
    edits = [row for row in record["rows"] if row["kind"] != "none" and not row["of"]]
    winners = [f"{row['condition']} ({row['kind']})" for row in edits if row["beats_dpo"]]
    console.print(f"Beat DPO on toxicity at no more perplexity: {', '.join(winners) or f'none of {len(edits)} edits'}.")
    console.print(f"Record and figure: {out}", soft_wrap=True)


if __name__ == "__main__":
    command()
