"""Build one page of all that was measured: results/report.html, from the records alone.

A page for each paper (every table as published and as measured, with intervals, and whether it agrees), the plot of
toxicity against perplexity, the groups and layers of each model, cards of neurons, and the provenance of each number.
The file holds everything that it shows and needs no network.

    python -m report                     # seconds; or `make report`
    python -m report --results runs --out my_report.html
"""

from pathlib import Path

import click

from lib import cli

ROOT = Path(__file__).parents[1]
PROGRAM = "python -m report"


@click.command(help=__doc__.split("\n")[0])
@click.option(
    "--results", "root", type=click.Path(file_okay=False, path_type=Path), default=ROOT / "results", help="Records."
)
@click.option("--marks", is_flag=True, help="Print each claim's marks as a Markdown table, and write nothing.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="[default: report.html among the records]")
def command(**given):
    main(**given)


cli.check(command, __name__, PROGRAM)  # --help and wrong options end here, before the slow imports

import base64
import json
from importlib.metadata import version

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from plotly.offline import get_plotlyjs

from lib import results
from lib.artifacts import writing
from lib.errors import UserError
from lib.metrics import mask
from report import chart, lee2024, yang2025
from report.compare import PAPER_MODELS
from report.records import Record, Records

MARK = b"<title>dpo-neurons: what was measured</title>"  # of page.html.j2: a file that this command may replace


def main(root: Path, marks: bool, out: Path | None) -> None:
    """Build the page, write it and print its path; or print the marks."""
    if marks:
        click.echo("\n".join(table_of_marks(Records(root))))
        return
    out = out or root / "report.html"
    if out.exists() and MARK not in out.read_bytes()[:1000]:
        raise UserError(f"--out {out}: is there and is no report of this project; choose another file.")
    page = build(Records(root))
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        ready = out.with_name(out.name + ".new")
        ready.write_text(page, encoding="utf-8")
        ready.replace(out)
    click.echo(out)


def table_of_marks(records: Records) -> list[str]:
    """Lines of a Markdown table: a claim that has marks, and what each record says of it."""
    words = {True: "yes", False: "no", None: "open"}
    lines = ["| where | claim | marks |", "|---|---|---|"]
    for paper, module in (("Yang", yang2025), ("Lee", lee2024)):
        for comparison in module.comparisons(records):
            marks = ", ".join(f"{verdict.label}: {words[verdict.agrees]}" for verdict in comparison.verdicts)
            lines += [f"| {paper}, {comparison.place} | {comparison.claim} | {marks} |"] if marks else []
    return lines


def build(records: Records) -> str:
    """The page."""
    papers = [
        {"id": name, "short": short, "title": module.TITLE, "comparisons": list(module.comparisons(records))}
        for name, short, module in (("yang2025", "Yang", yang2025), ("lee2024", "Lee", lee2024))
    ]
    for paper in papers:
        for place, comparison in enumerate(paper["comparisons"]):
            comparison.anchor = f"{paper['id']}-{place}"
    plots = [
        entry(f"pareto-{run.model}", f"{run.model}: toxicity against perplexity", run, chart.pareto(records, run))
        for run in records.of("edits_against_dpo")
    ]
    views = []
    for run in records.of_groups():
        views.append(entry(f"groups-{run.model}", f"{run.model}: shares of the groups", run, chart.groups(run)))
        if run.activations:
            views.append(entry(f"layers-{run.model}", f"{run.model}: reduction by layer", run, chart.layers(run)))
    models = sorted({run.model for run in records.every.values()})
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    charts = {item["id"]: item["chart"] for item in plots + views}
    pages = [("overview", "Overview"), *((paper["id"], f"{paper['short']} et al.") for paper in papers)]
    return environment.get_template("page.html.j2").render(
        pages=[*pages, ("models", "Groups and layers"), ("neurons", "Neurons"), ("records", "Records")],
        papers=papers,
        plots=plots,
        views=views,
        cards=records.of("neuron_card"),
        records=records.every.values(),
        folder=records.folder,
        n_records=len(records.every),
        models=models,
        missing=[model for model in PAPER_MODELS if model not in models],
        charts=json.dumps(charts).replace("</", "<\\/"),
        plotly=get_plotlyjs(),
        css=(Path(__file__).parent / "page.css").read_text("utf-8"),
        js=(Path(__file__).parent / "page.js").read_text("utf-8"),
        inline=inline,
        mask=mask,
        dumps=json.dumps,
        version=version("dpo-neurons"),
        commit=results.commit()["commit"][:12],
    )


def entry(name: str, title: str, record: Record, figure: dict) -> dict:
    """A chart with its id, title and record."""
    return {"id": name.replace("/", "-"), "title": title, "record": record, "chart": figure}


def inline(path: Path) -> str:
    """An image as a data address."""
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


if __name__ == "__main__":
    command(prog_name=PROGRAM)
