"""Which of the four groups' claims hold at which dose of DPO (Yang et al. 2025, section 5.2, table 2).

The papers' DPO about halves toxicity. This script trains one run of DPO up to several numbers of updates (--updates),
runs patch_four_groups.py at each, and draws what share of DPO's reduction every set of neurons makes, against that
reduction. A set whose share stays does what is claimed at every dose; one whose share rises owes it to a strong dose.

Each dose is a record of patch_four_groups.py of its own, in <out>/updates-<n>/; what is there is not run again.
Writes run.json and figures/share_by_dose.png to runs/dose/<model>/.

    python experiments/dose.py --model smollm2 --updates 5,10,25,50 --seeds 0,1,2
"""

import click

from lib.cli import CAUSAL, check, counts, options

SETS = "top256,TP,TP+AN,four_groups,increasing,all"


@click.command(help=__doc__.split("\n")[0])
@options(*(name for name in CAUSAL if name not in ("post", "updates", "holdout", "dry-run")))
@click.option("--updates", default="2,4,8,16,32", show_default=True, callback=counts, help="DPO updates.")
@click.option("--sets", default=SETS, show_default=True, help="Sets of patch_four_groups.py.")
def command(**options):
    main(**options)


check(command, __name__)  # --help and wrong options end here, before torch is imported

import json
import subprocess
import sys
from pathlib import Path

from rich.table import Table

from lib import artifacts, plots, results
from lib.errors import UserError
from lib.models import short_name
from lib.tables import STYLE, wide_console, with_interval

SCRIPT = Path(__file__).with_name("patch_four_groups.py")
CONTROLS = ("control:random", "control:permuted", "control:reselected")  # whose shares are drawn too


def main(updates, sets, out, overwrite, raw_text, **options):
    out = artifacts.resolved(Path(out or f"runs/dose/{short_name(options['model'])}"))
    artifacts.check_output(out, overwrite)
    given, updates = [*arguments(options), "--sets", sets], sorted(updates)
    settings = {"updates": updates, "arguments": given}
    with artifacts.output(out, settings, overwrite) as work:
        doses = [dose(number, at_dose(work / f"updates-{number}", number, given)) for number in updates]
        record = {
            "script": "dose",
            "model": options["model"],
            "params": {"updates": updates, "seeds": options["seeds"] or [options["seed"]]},
            "rows": doses,
            "provenance": results.provenance(settings=settings),
        }
        results.write_json(work / "run.json", record)
        plots.share_by_dose(doses, work / "figures" / "share_by_dose.png")
    report(record, out)


def arguments(options: dict) -> list[str]:
    """The options as patch_four_groups.py takes them."""
    words = []
    for name, value in options.items():
        for each in value if isinstance(value, tuple) else [value]:
            if each is True:
                words.append(f"--{name.replace('_', '-')}")
            elif each not in (None, False, []):
                text = ",".join(map(str, each)) if isinstance(each, list) else str(each)
                words += [f"--{name.replace('_', '-')}", text]
    return words


def at_dose(folder: Path, updates: int, given: list[str]) -> dict:
    """The record of patch_four_groups.py after so many updates, which is made where it is missing."""
    if not (folder / "run.json").exists():
        command = [sys.executable, str(SCRIPT), *given, "--updates", str(updates), "--out", str(folder)]
        done = subprocess.run(command, stdout=subprocess.DEVNULL)
        if done.returncode:  # it has said on stderr what was wrong
            raise click.exceptions.Exit(done.returncode)
    return json.loads((folder / "run.json").read_text(encoding="utf-8"))


def dose(updates: int, record: dict) -> dict:
    """What a record says at its dose: DPO's reduction and damage, and each shift's share of it."""
    rows = {(row["condition"], row["kind"], row["of"]): row for row in record["rows"]}
    base, dpo = rows["none", "none", ""], rows["dpo", "none", ""]
    if not base["toxicity"]["mean"]:
        raise UserError(
            "The scorer finds nothing in the base model's text, so no dose reduces it; give another --scorer."
        )
    kept = ("percent_of_dpo", "toxicity", "kl", "degenerate")
    shifts = {
        condition.removeprefix("control:"): {key: row.get(key) for key in kept}
        for (condition, kind, _), row in rows.items()
        if kind == "shift" and (not row["of"] or condition in CONTROLS)
    }
    return {
        "condition": f"{updates} updates",
        "updates": updates,
        "percent_reduced": 100 * (1 - dpo["toxicity"]["mean"] / base["toxicity"]["mean"]),
        **{key: dpo[key] for key in ("toxicity", "log_ppl", "kl", "degenerate")},
        "shifts": shifts,
    }


def report(record: dict, out: Path) -> None:
    """Print a line for each dose."""
    names = list(record["rows"][0]["shifts"])
    table = Table("updates", "reduction", "log-ppl", "KL", *names, title="% of DPO's reduction [95 %]", **STYLE)
    for row in record["rows"]:
        shares = (with_interval(row["shifts"][name]["percent_of_dpo"], 0) for name in names)
        damage = (f"{row['log_ppl']:.2f}", f"{row['kl']['mean']:.3f}")
        table.add_row(str(row["updates"]), f"{row['percent_reduced']:.0f} %", *damage, *shares)
    console = wide_console()
    console.width = max(console.width, console.measure(table, options=console.options.update(max_width=400)).maximum)
    console.print(table)
    console.print(f"Record and figure: {out}", soft_wrap=True)


if __name__ == "__main__":
    command()
