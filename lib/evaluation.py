"""What is measured of every condition, and the table of it: shared by all scripts that make a causal claim."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from lib import paper
from lib.errors import UserError
from lib.generation import NEW_TOKENS, batches, decode, end_ids, right_padded, until_end, windows
from lib.metrics import Scorer, mask, repetition, token_f1
from lib.statistics import Bootstrap

WINDOW = 64  # tokens of a passage for perplexity, with its BOS
F1_PROMPT = 32  # the first of them, which the model continues for F1 (both papers' code)
PERPLEXITY_ROWS = 8  # rows at once: logits of every position over 262,144 tokens are 67 MB a row


@dataclass(frozen=True)
class Texts:
    """What the conditions are measured on."""

    prompts: list[str]
    windows: list[list[int]]  # token ids of passages, at most WINDOW each


def make_texts(model, prompts: list[str], passages: list[str], given: str) -> Texts:
    """Tokenise the passages. Raises UserError when none is long enough for an F1 continuation."""
    rows = windows(model.tokenizer, passages, WINDOW, F1_PROMPT + NEW_TOKENS)
    if not rows:
        raise UserError(f"{given}: no passage has {F1_PROMPT + NEW_TOKENS} tokens; give longer ones.")
    return Texts(prompts, rows)


def measure(
    model,
    texts: Texts,
    scorer: Scorer,
    batch_size: int,
    generate: Callable[[dict], torch.Tensor],
    all_positions: Callable[[dict], torch.Tensor],
    first_position: Callable[[dict], torch.Tensor] | None,
) -> dict[str, list]:
    """Measure one condition.

    Args:
        generate: left-padded batch -> new ids `[batch, NEW_TOKENS]`, edited as the condition says.
        all_positions: right-padded batch -> summed negative log-likelihood `[batch]` with every position edited.
        first_position: the same with position 0 edited alone (the papers' perplexity); None: no edit, so the same.

    Returns: lists over prompts (`continuations`, `toxicity`, `repetition`) and over passages (`f1`, `tokens`, `nll`,
        `nll_first`, in nats).
    """
    ends = end_ids(model)
    rows = [
        row
        for batch in batches(model.tokenizer, texts.prompts, batch_size, model.device)
        for row in until_end(generate(batch), ends)
    ]
    continuations = decode(model.tokenizer, rows)
    f1 = []
    for start in range(0, len(texts.windows), batch_size):
        part = texts.windows[start : start + batch_size]
        (batch,) = right_padded([ids[:F1_PROMPT] for ids in part], batch_size, model.device)  # all of one length
        new = until_end(generate(batch), ends)
        f1 += [token_f1(p, ids[F1_PROMPT : F1_PROMPT + NEW_TOKENS]) for p, ids in zip(new, part, strict=True)]

    def total(likelihood: Callable[[dict], torch.Tensor]) -> list[float]:
        return [
            x
            for batch in right_padded(texts.windows, PERPLEXITY_ROWS, model.device)
            for x in likelihood(batch).tolist()
        ]

    nll = total(all_positions)
    return {
        "continuations": continuations,
        "toxicity": scorer(continuations).tolist(),
        "repetition": [repetition(row) for row in rows],
        "f1": f1,
        "tokens": [len(ids) - 1 for ids in texts.windows],
        "nll": nll,
        "nll_first": total(first_position) if first_position else nll,
    }


def make_row(measured: dict, none: dict, dpo: dict, prompts: Bootstrap, passages: Bootstrap) -> dict:
    """One condition's entries in run.json: means with 95 % paired bootstrap intervals, against base model and DPO."""
    per_token = {key: nats_per_token(measured[key], measured["tokens"]) for key in ("nll", "nll_first")}
    return {
        "toxicity": prompts.mean(measured["toxicity"]),
        "toxicity_change": prompts.difference(measured["toxicity"], none["toxicity"]),
        "percent_of_dpo": prompts.percent_of(measured["toxicity"], none["toxicity"], dpo["toxicity"]),
        "log_ppl": per_token["nll"],
        "log_ppl_change": passages.ratio(
            [a - b for a, b in zip(measured["nll"], none["nll"], strict=True)], measured["tokens"]
        ),
        "log_ppl_first": per_token["nll_first"],
        "f1": sum(measured["f1"]) / len(measured["f1"]),
        "repetition": sum(measured["repetition"]) / len(measured["repetition"]),
    }


def nats_per_token(totals: list[float], tokens: list[int]) -> float:
    """Nats per token over all passages."""
    return sum(totals) / sum(tokens)


def table(record: dict, title: str):
    """A rich table of a record's rows, with the published numbers where there are any."""
    from rich import box
    from rich.table import Table

    published = next((row["published"]["model"] for row in record["rows"] if row.get("published")), None)
    view = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    view.add_column("condition", no_wrap=True)
    for name in (
        "edit",
        "neurons",
        "toxicity [95 %]",
        "% of DPO's\ncut [95 %]",
        "log-ppl",
        "log-ppl\npos. 0",
        "F1",
        "rep.",
    ):
        view.add_column(name, justify="left" if name == "edit" else "right", no_wrap=True)
    if published:
        view.add_column(f"published, {published}:\ntox. log-ppl F1", justify="right", no_wrap=True)
    for row in record["rows"]:
        edited = row["kind"] != "none"
        view.add_row(
            row["condition"],
            row["kind"] if edited else "-",
            f"{row['neurons']:,}" if edited else "-",
            _with_interval(row["toxicity"], 3),
            "-" if row["condition"] == "none" else _with_interval(row["percent_of_dpo"], 0),
            f"{row['log_ppl']:.2f}",
            f"{row['log_ppl_first']:.2f}",
            f"{row['f1']:.3f}",
            f"{row['repetition']:.2f}",
            *([_published(row)] if published else []),
        )
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


def published_row(condition: str, model: str) -> dict:
    """`{"published": ...}` for a condition of Yang tables 2 and 19, or nothing."""
    theirs = paper.counterpart(model)
    if theirs is None or condition not in paper.PATCHING:
        return {}
    toxicity, log_ppl, f1 = paper.PATCHING[condition][theirs]
    return {"published": {"model": theirs, "toxicity": toxicity, "log_ppl": log_ppl, "f1": f1}}


def continuations_table(prompts: list[str], measured: dict, shown: list[tuple], raw_text: bool):
    """A rich table: the base model's most toxic continuation, and the same prompt's under other conditions, masked."""
    from rich.table import Table
    from rich.text import Text

    def clean(text: str) -> Text:
        return Text(" ".join((text if raw_text else mask(text)).split()))

    worst = max(range(len(prompts)), key=lambda i: measured["none", "none"]["toxicity"][i])
    view = Table(title=clean("Continuations of: " + prompts[worst]), title_justify="left", show_header=False)
    for name, kind in shown:
        label = name if kind == "none" else f"{name}, {kind}"
        view.add_row(label, clean(measured[name, kind]["continuations"][worst]))
    return view


def _published(row: dict) -> str:
    theirs = row.get("published")
    return f"{theirs['toxicity']:.3f}  {theirs['log_ppl']:.2f}  {theirs['f1']:.3f}" if theirs else "-"


def _with_interval(value: dict, digits: int) -> str:
    if value["mean"] is None:
        return "-"
    if value["low"] is None:
        return f"{value['mean']:.{digits}f} [-]"
    return f"{value['mean']:.{digits}f} [{value['low']:.{digits}f}, {value['high']:.{digits}f}]"


def wide_console():
    """A console on stdout that leaves the table its width where the screen is narrower or is a file."""
    from rich.console import Console

    console = Console()
    console.width = max(console.width, 126)
    return console
