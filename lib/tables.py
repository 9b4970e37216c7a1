"""What the scripts print: tables of conditions and of observations, beside the published numbers."""

from functools import partial, reduce
from operator import getitem

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lib import paper
from lib.metrics import mask

STYLE = {"box": box.SIMPLE_HEAD, "padding": (0, 1, 0, 0), "title_justify": "left", "title_style": "bold"}


def conditions(record: dict, title: str, published: str | None = None) -> Table:
    """A table of a record's rows, with the published numbers where there are any; controls after what they test.

    published: heads the last column; None: there is none.
    """
    table, held_out = Table(title=title, **STYLE), {"held_out": " (held out)"}
    columns = {
        "condition": lambda row: ("  " if row["of"] else "") + row["condition"] + held_out.get(row["means"], ""),
        "edit": lambda row: row["kind"] if row["kind"] != "none" else "-",
        "neurons": lambda row: f"{row['neurons']:,}" if row["kind"] != "none" and row["neurons"] else "-",
        "toxicity [95 %]": lambda row: with_interval(row["toxicity"], 3),
        **{
            f"by {name}:\ntox. % of cut": partial(by_second, name=name)
            for name in record["params"].get("second_scorer") or ()
        },
        "% of DPO's\ncut [95 %]": lambda row: (
            "-" if row["condition"] == "none" else with_interval(row.get("percent_of_dpo"), 0)
        ),
        "log-ppl": lambda row: f"{row['log_ppl']:.2f}" if "log_ppl" in row else "-",
        "KL": lambda row: f"{row['kl']['mean']:.2f}" if "kl" in row else "-",
        "log-ppl\npos. 0": lambda row: f"{row['log_ppl_first']:.2f}" if "log_ppl_first" in row else "-",
        "F1": lambda row: f"{row['f1']:.3f}" if "f1" in row else "-",
        "rep.": lambda row: f"{row['repetition']:.2f}",
        "no text": lambda row: f"{row['degenerate']['mean']:.2f}" if "degenerate" in row else "-",
        "offset:\ncos. proj.": lambda row: (
            "{cosine:.2f}  {projection:.2f}".format(**row["offset"]) if "offset" in row else "-"
        ),
        f"published, {published}:\ntox. log-ppl F1": lambda row: (
            "{toxicity:.3f}  {log_ppl:.2f}  {f1:.3f}".format(**row["published"]) if row.get("published") else "-"
        ),
    }
    if not any("kl" in row for row in record["rows"]):
        del columns["KL"]
    if not any("offset" in row for row in record["rows"]):
        del columns["offset:\ncos. proj."]
    if not published:
        columns.popitem()
    for name in columns:
        table.add_column(name, justify="left" if name in ("condition", "edit") else "right", no_wrap=True)
    for row in record["rows"]:
        table.add_row(*(text_of(row) for text_of in columns.values()))
    return table


def by_second(row: dict, name: str) -> str:
    """A row's toxicity by a second scorer, and the share of DPO's reduction by it."""
    by_name = row["by_scorer"][name]
    toxicity, percent = (
        with_interval(by_name.get(key), n).split()[0] for key, n in (("toxicity", 3), ("percent_of_dpo", 0))
    )
    return f"{toxicity}  {percent if row['condition'] != 'none' else '-'}"


def print_groups(console: Console, record: dict) -> None:
    """Print the groups' shares, and the published ones of the model's counterpart below them."""
    lines = {"Groups": (record["group_shares"].values(), record["percent_reducing"], record["percent_negative"])}
    if theirs := paper.counterpart(record["model"]):
        shares = paper.GROUP_SHARES[theirs][:4]
        lines[f"Yang et al., {theirs}"] = shares, paper.PERCENT_REDUCING[theirs], paper.PERCENT_NEGATIVE[theirs]
    for name, (shares, reducing, negative) in lines.items():
        text = "  ".join(f"{group}↓ {share:.1f} %" for group, share in zip(record["groups"], shares, strict=True))
        console.print(f"{name}: {text}   reducing {reducing:.1f} % of all neurons, negative {negative:.1f} %")


def continuations(prompts: list[str], shown: dict[str, dict], raw_text: bool) -> Table:
    """The first condition's most toxic continuation, and the same prompt's under the others, masked.

    shown: label -> what `measure` returned.
    """
    toxicity = next(iter(shown.values()))["toxicity"]
    worst = max(range(len(prompts)), key=lambda at: toxicity[at])
    table = Table(title=clean("Continuations of: " + prompts[worst], raw_text), title_justify="left", show_header=False)
    for label, measured in shown.items():
        table.add_row(label, clean(measured["continuations"][worst], raw_text))
    return table


def examples(lines: list[dict], raw_text: bool) -> Table:
    """A table of next tokens and continuations, masked.

    lines: `prompt`, `condition`, `top_tokens` (a list) and `continuation` each.
    """
    names = ("prompt", "model", "most likely next", "continuation")
    table = Table(*names, title="Lee et al. table 3's prompts", title_justify="left")
    for line in lines:
        cells = (line["prompt"], line["condition"], ",".join(line["top_tokens"]), line["continuation"])
        table.add_row(*(clean(text, raw_text) for text in cells))
    return table


def print_robustness(console: Console, record: dict) -> None:
    """Print the variants of DPO in robust_alignment.py's record, and how much un-aligning brings back of each."""
    table = Table(title="Which parameters DPO trained, and how much un-aligning brings back", box=box.SIMPLE_HEAD)
    for name in ("trained", "numbers changed", "relative change", "cut, %", "back, %", "minus plain DPO's", "random"):
        table.add_column(name, justify="left" if name == "trained" else "right", no_wrap=True)
    shares = ("percent_restored", "restored_minus_dpo", "percent_restored_random")
    for row in record["robustness"]:
        table.add_row(
            "all (plain DPO)" if row["variant"] == "dpo" else row["variant"],
            f"{row['changed']:,.0f}",
            f"{row['relative_change']:.1e}",
            "-" if row["percent_cut"] is None else f"{row['percent_cut']:.0f}",
            *(with_interval(row.get(share), 0) for share in shares),
        )
    console.print(table)


def clean(text: str, raw_text: bool) -> Text:
    """Text on one line, its profane words masked unless `raw_text`."""
    return Text(" ".join((text if raw_text else mask(text)).split()))


def show(console: Console, record: dict, lines: list[tuple]) -> None:
    """Print the record's table: a column for each seed, their mean and range, and the published numbers.

    lines: (label, a value for each seed, published value or None). A value is a number or
    `{"mean", "low", "high"}`.
    """
    params, seeds, theirs = record["params"], record["params"]["seeds"], record["published"].get("model")
    released = f" but {', '.join(params['released'])}" if params["released"] else ""
    rows = [["", *(f"seed {seed}" for seed in seeds)]]
    rows[0] += ["mean (range)"] if len(seeds) > 1 else []
    rows[0] += [f"published, {theirs}"] if theirs else []
    for label, values, published in lines:
        rows.append([label, *map(cell, values)])
        if len(seeds) > 1:
            points = [value["mean"] if isinstance(value, dict) else value for value in values]
            rows[-1].append(f"{number(sum(points) / len(points))} ({number(min(points))}, {number(max(points))})")
        if theirs:
            rows[-1].append("" if published is None else number(published))
    title = f"{record['model']}, {params['limit']} prompts, {params['protocol']} protocol{released}"
    table = plain_table(rows[0], rows[1:], title)
    # Wide enough for every cell: rich would cut numbers off on a narrow screen.
    console.width = max(console.width, sum(max(map(len, column)) + 3 for column in zip(*rows, strict=True)))
    console.print(table)


def plain_table(head: list[str], lines: list[list[str]], title: str) -> Table:
    """A table with names on the left and numbers on the right."""
    table = Table(*head, title=title, **STYLE)
    for column in table.columns[1:]:
        column.justify = "right"
    for line in lines:
        table.add_row(*line)
    return table


def line_at(label: str, rows: list[dict], *path, published: float | None = None) -> tuple:
    """A line for `show`: what stands at a path of keys and places in each seed's row of a record."""
    return label, [reduce(getitem, path, row) for row in rows], published


def with_interval(value: dict | None, digits: int) -> str:
    """`0.123 [0.100, 0.150]`; `-` for what has no value."""
    if value is None or value["mean"] is None:
        return "-"
    if value["low"] is None:
        return f"{value['mean']:.{digits}f} [-]"
    return f"{value['mean']:.{digits}f} [{value['low']:.{digits}f}, {value['high']:.{digits}f}]"


def number(value: float) -> str:
    """`51.42`, `0.9999`, `0.228`, `5.5e-05`."""
    return f"{value:.4g}" if abs(value) >= 0.999 else f"{value:.3g}" if abs(value) >= 1e-3 else f"{value:.2g}"


def cell(value) -> str:
    """`51.42`, or `0.228 [0.19, 0.39]` for a value with its interval or range (`[-]`: none from so few)."""
    if not isinstance(value, dict):
        return number(value)
    if value["low"] is None:
        return f"{number(value['mean'])} [-]"
    return f"{number(value['mean'])} [{number(value['low'])}, {number(value['high'])}]"


def wide_console() -> Console:
    """A console on stdout that leaves the table its width where the screen is narrower or is a file."""
    console = Console()
    console.width = max(console.width, 126)
    return console
