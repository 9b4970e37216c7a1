"""What the scripts print: tables of conditions and of observations, beside the published numbers."""

from lib import paper
from lib.metrics import mask


def conditions(record: dict, title: str, published: str | None = None):
    """A rich table of a record's rows, with the published numbers where there are any; controls after what they test.

    published: heads the last column; None: there is none.
    """
    from rich import box
    from rich.table import Table

    second = any("second_toxicity" in row for row in record["rows"])
    view = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    view.add_column("condition", no_wrap=True)
    names = ["edit", "neurons", "toxicity [95 %]", *(["by 2nd"] if second else []), "% of DPO's\ncut [95 %]"]
    for name in (*names, "log-ppl", "log-ppl\npos. 0", "F1", "rep."):
        view.add_column(name, justify="left" if name == "edit" else "right", no_wrap=True)
    if published:
        view.add_column(f"published, {published}:\ntox. log-ppl F1", justify="right", no_wrap=True)
    for row in record["rows"]:
        changed = row["kind"] != "none"
        view.add_row(
            ("  " if row["of"] else "") + row["condition"] + (" (held out)" if row["means"] == "held_out" else ""),
            row["kind"] if changed else "-",
            f"{row['neurons']:,}" if changed and row["neurons"] else "-",
            with_interval(row["toxicity"], 3),
            *([f"{row['second_toxicity']['mean']:.3f}" if "second_toxicity" in row else "-"] if second else []),
            "-" if row["condition"] == "none" else with_interval(row.get("percent_of_dpo"), 0),
            *(f"{row[key]:.{digits}f}" if key in row else "-" for key, digits in
              (("log_ppl", 2), ("log_ppl_first", 2), ("f1", 3), ("repetition", 2))),
            *([_published(row)] if published else []),
        )  # fmt: skip
    return view


def print_groups(console, record: dict) -> None:
    """Print the groups' shares, and the published ones of the model's counterpart below them."""

    def line(name: str, shares, reducing: float, negative: float) -> None:
        text = "  ".join(f"{group}↓ {share:.1f} %" for group, share in zip(record["groups"], shares, strict=True))
        console.print(f"{name}: {text}   reducing {reducing:.1f} % of all neurons, negative {negative:.1f} %")

    line("Groups", record["group_shares"].values(), record["percent_reducing"], record["percent_negative"])
    if theirs := paper.counterpart(record["model"]):
        line(
            f"Yang et al., {theirs}",
            paper.GROUP_SHARES[theirs][:4],
            paper.PERCENT_REDUCING[theirs],
            paper.PERCENT_NEGATIVE[theirs],
        )


def continuations(prompts: list[str], shown: dict[str, dict], raw_text: bool):
    """A rich table: the first condition's most toxic continuation, and the same prompt's under the others, masked.

    shown: label -> what `measure` returned.
    """
    from rich.table import Table

    first = next(iter(shown.values()))
    worst = max(range(len(prompts)), key=lambda i: first["toxicity"][i])
    view = Table(title=clean("Continuations of: " + prompts[worst], raw_text), title_justify="left", show_header=False)
    for label, measured in shown.items():
        view.add_row(label, clean(measured["continuations"][worst], raw_text))
    return view


def examples(lines: list[dict], raw_text: bool):
    """A rich table of next tokens and continuations, masked.

    lines: `prompt`, `condition`, `top_tokens` (a list) and `continuation` each.
    """
    from rich.table import Table

    view = Table(title="Lee et al. table 3's prompts", title_justify="left")
    for name in ("prompt", "model", "most likely next", "continuation"):
        view.add_column(name)
    for line in lines:
        tokens = ",".join(line["top_tokens"])
        view.add_row(
            clean(line["prompt"], raw_text),
            line["condition"],
            clean(tokens, raw_text),
            clean(line["continuation"], raw_text),
        )
    return view


def clean(text: str, raw_text: bool):
    """Text on one line, its profane words masked unless `raw_text`."""
    from rich.text import Text

    return Text(" ".join((text if raw_text else mask(text)).split()))


def show(console, record: dict, lines: list[tuple]) -> None:
    """Print the record's table: a column for each seed, their mean and range, and the published numbers.

    lines: (label, a value for each seed, published value or None). A value is a number or
    `{"mean", "low", "high"}`.
    """
    from rich import box
    from rich.table import Table

    params, seeds, theirs = record["params"], record["params"]["seeds"], record["published"].get("model")
    but = f" but {', '.join(params['released'])}" if params["released"] else ""
    cells = [["", *(f"seed {seed}" for seed in seeds), *(["mean (range)"] if len(seeds) > 1 else [])]]
    cells[0] += [f"published, {theirs}"] if theirs else []
    for label, values, published in lines:
        points = [value["mean"] if isinstance(value, dict) else value for value in values]
        over = [f"{number(sum(points) / len(points))} ({number(min(points))}, {number(max(points))})"]
        beside = ["" if published is None else number(published)]
        cells.append([label, *map(cell, values), *(over if len(seeds) > 1 else []), *(beside if theirs else [])])
    table = Table(
        *cells[0], box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title_justify="left", title_style="bold",
        title=f"{record['model']}, {params['limit']} prompts, {params['protocol']} protocol{but}",
    )  # fmt: skip
    for column in table.columns[1:]:
        column.justify = "right"
    for row in cells[1:]:
        table.add_row(*row)
    # Wide enough for every cell: rich would cut numbers off on a narrow screen.
    console.width = max(console.width, sum(max(map(len, column)) + 3 for column in zip(*cells, strict=True)))
    console.print(table)


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
    """`51.42`, or `0.228 [0.19, 0.39]` for a value with its interval or range."""
    if not isinstance(value, dict):
        return number(value)
    return f"{number(value['mean'])} [{number(value['low'])}, {number(value['high'])}]"


def wide_console():
    """A console on stdout that leaves the table its width where the screen is narrower or is a file."""
    from rich.console import Console

    console = Console()
    console.width = max(console.width, 126)
    return console


def _published(row: dict) -> str:
    theirs = row.get("published")
    return f"{theirs['toxicity']:.3f}  {theirs['log_ppl']:.2f}  {theirs['f1']:.3f}" if theirs else "-"
