"""What is measured of every condition: shared by all scripts that make a causal claim."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import nnsight
import numpy as np
import psutil
import torch

from lib.data import Dataset
from lib.errors import UserError
from lib.families import input_device
from lib.generation import (
    NEW_TOKENS,
    decode,
    end_ids,
    left_padded,
    log_probabilities,
    prompt_ids,
    right_padded,
    until_end,
    windows,
)
from lib.interventions import NO_EDIT
from lib.metrics import Scorer, degenerate, repetition, scorer, token_f1
from lib.remote import Server, session
from lib.statistics import Bootstrap, rank_p

WINDOW = 64  # tokens of a passage for perplexity, with its BOS
F1_PROMPT = 32  # tokens that the model continues for F1 (both papers' code)
PERPLEXITY_TOKENS = 512  # at once: logits of every position over 262,144 tokens are 1 MB a token
SECOND = "toxicity:"  # before a second scorer's name: the key of its scores
EVERYWHERE, LAST, FIRST = slice(None), slice(-1, None), slice(0, 1)


def together(tokenizer, prompts: list, continued: list, size: int, device) -> Iterator[dict]:
    """Batches of prompts and of what is continued for F1 in one row: every step reads all weights."""
    return left_padded(tokenizer, prompts + continued, size, device)


def new_text(tokenizer, prompts: list[str], prompt_ids: list, new_ids: list) -> list[str]:
    """Texts of the new ids alone."""
    return decode(tokenizer, new_ids)


def new_tokens(prompt_ids: list[int], new_ids: list[int]) -> list[int]:
    """The new ids alone."""
    return new_ids


def passage_windows(tokenizer, passages: list[str], max_positions: int) -> list[list[int]]:
    """The first ids of each passage that is long enough for F1, one BOS in each."""
    return windows(tokenizer, passages, WINDOW, F1_PROMPT + NEW_TOKENS)


@dataclass(frozen=True, kw_only=True)
class Choices:
    """How a condition is measured: `SOUND`, or with the functions of `lib.released` in their place."""

    edited: slice  # positions, while generating
    compared: dict[str, slice]  # the perplexity that edits are compared by
    batches: Callable
    continuations: Callable  # what the scorer reads
    predicted: Callable  # what F1 compares
    f1_reference: int  # tokens
    windows: Callable  # of perplexity
    uncounted: int  # tokens of a window that its loss is not divided by

    def perplexities(self, kind: str, brief: bool) -> dict[str, slice]:
        """Positions that are edited for each perplexity that is measured of an edit of a kind (`none`: no edit).

        Position 0 alone, as the papers have it, is edited for clamps too; a control (`brief`) has the one that is
        compared; without an edit both are one.
        """
        if brief:
            return self.compared
        first = {"nll_first": FIRST} if kind == "clamp" else self.compared
        return {"nll": EVERYWHERE} | ({} if kind == "none" else first)


SOUND = Choices(
    edited=EVERYWHERE,
    compared={"nll": EVERYWHERE},
    batches=together,
    continuations=new_text,
    predicted=new_tokens,
    f1_reference=NEW_TOKENS,
    windows=passage_windows,
    uncounted=1,
)


@dataclass(frozen=True)
class Texts:
    """What the conditions are measured on."""

    prompts: list[str]
    prompt_ids: list[list[int]]
    windows: list[list[int]]  # token ids for perplexity
    continued: list[tuple[list[int], list[int]]]  # for F1: ids that the model continues, ids that really follow

    @property
    def windows_at_once(self) -> int:
        """How many windows one forward pass reads."""
        return max(1, PERPLEXITY_TOKENS // max(map(len, self.windows)))


def make_texts(
    tokenizer,
    max_positions: int,
    prompts: list[str],
    passages: list[str],
    choices: Choices,
    given: str = "--passages",
) -> Texts:
    """Tokenise prompts and passages.

    Args:
        max_positions: as many as the model takes.
        given: names the passages in a message.

    Raises:
        UserError: no passage is long enough for an F1 continuation.
    """
    at_least = F1_PROMPT + NEW_TOKENS
    long_enough = windows(tokenizer, passages, F1_PROMPT + choices.f1_reference, at_least)
    if not long_enough:
        raise UserError(f"{given}: no passage has {at_least} tokens; give longer ones.")
    return Texts(
        prompts,
        prompt_ids(tokenizer, prompts),
        choices.windows(tokenizer, passages, max_positions),
        [(ids[:F1_PROMPT], ids[F1_PROMPT:]) for ids in long_enough],
    )


@dataclass(frozen=True, kw_only=True)
class Measures:
    """What a run's effects are measured with."""

    passages: Dataset
    choices: Choices
    texts: Texts
    scorer: Scorer
    second_scorers: dict[str, Scorer]  # by name

    @property
    def identities(self) -> dict:
        """What determines the scorers' numbers."""
        second = [scorer.identity for scorer in self.second_scorers.values()]
        return {"scorer": self.scorer.identity, "second_scorer": second}


def make_measures(
    options: dict, choices: Choices, tokenizer, max_positions: int, prompts: Dataset, passages: Dataset
) -> Measures:
    """The texts, and the scorers of --scorer and --second-scorer; see `make_texts`.

    Raises UserError: a scorer cannot be had, or no passage is long enough.
    """
    given = f"--passages {passages.source}"
    texts = make_texts(tokenizer, max_positions, prompts.items, passages.items, choices, given)
    name, second = options["scorer"], options["second_scorer"]
    if options["dry_run"]:  # a scorer may be a probe that has to be trained
        name, second = "words", ()
    return Measures(
        passages=passages,
        choices=choices,
        texts=texts,
        scorer=scorer(name),
        second_scorers={name: scorer(name) for name in second},
    )


def known_predictions(base, texts: Texts) -> list[torch.Tensor | None]:
    """The base model's `log_probabilities` of each batch of windows, on the CPU, for `measure`.

    None each where all of them would take more than a quarter of the memory that is free: `measure` computes them anew
    for every condition then.
    """
    read = list(right_padded(texts.windows, texts.windows_at_once, input_device(base)))
    size = 2 * base.config.vocab_size * sum(batch["input_ids"].numel() for batch in read)
    if size > psutil.virtual_memory().available / 4:
        return [None] * len(read)
    return [log_probabilities(base, batch).cpu() for batch in read]


def measure(
    model,
    edit: Any,
    measures: Measures,
    generate: Callable,
    likelihood: Callable,
    *,
    batch_size: int,
    base=None,
    known: list[torch.Tensor] | None = None,
    brief: bool = False,
    remote: Server | str | bool = False,
) -> dict[str, list]:
    """Measure one condition: all its traces in one session, on a server one request that returns ids and sums.

    Args:
        edit: what the script's traces apply; it has a `kind`.
        generate: a script's `(model, left-padded batch, edit, edited positions) -> new ids [batch, NEW_TOKENS]`.
        likelihood: `(model, right-padded batch, edit, edited positions, base's log-probabilities) -> [2, batch]`,
            nats: see `lib.generation.token_losses`.
        base: the model that `kl` is the distance from; None: it is not measured.
        known: its predictions where they are computed already: `known_predictions`.
        brief: for controls: no F1, and the perplexity that is compared alone.

    Returns: lists over prompts (`continuations`, `toxicity`, `repetition`, `degenerate`) and over passages (`f1`,
        `tokens`, `nll` with every position edited, and its `kl`, the summed KL(base || model) of the tokens;
        `nll_first` with position 0 edited alone; in nats).
    """
    texts, choices = measures.texts, measures.choices
    device, edited = input_device(model), choices.edited
    continued = [] if brief else [ids for ids, _ in texts.continued]  # all of one length
    asked = list(choices.batches(model.tokenizer, texts.prompt_ids, continued, batch_size, device))
    read = list(right_padded(texts.windows, texts.windows_at_once, device))
    perplexities = choices.perplexities(edit.kind, brief)
    moved = base is not None and not (model is base and edit is NO_EDIT)  # else the distance is 0
    places = [(where, where != EVERYWHERE or not moved) for where in perplexities.values()]
    known = known or [None] * len(read)
    with session(model, remote):
        ids, losses = nnsight.save([]), nnsight.save([])
        for batch in asked:
            ids.append(generate(model, batch, edit, edited).cpu())
        for place, alone in places:
            for batch, expected in zip(read, known, strict=True):
                if not alone and expected is None:  # unnamed, as a session sends back what it names and saves
                    losses.append(likelihood(model, batch, edit, place, log_probabilities(base, batch)))
                else:
                    losses.append(likelihood(model, batch, edit, place, None if alone else expected))

    ends = end_ids(model)
    new = [row for part in ids for row in until_end(part, ends)]
    rows, continuing = new[: len(texts.prompts)], new[len(texts.prompts) :]
    continuations = choices.continuations(model.tokenizer, texts.prompts, texts.prompt_ids, rows)
    sums = torch.cat(list(losses), 1).view(2, len(places), len(texts.windows)).tolist()
    nll = dict(zip(perplexities, sums[0], strict=True))
    if "nll" in nll:
        nll |= {"kl": sums[1][list(perplexities).index("nll")]} if base is not None else {}
        nll |= {"nll_first": nll["nll"]} if edit is NO_EDIT else {}
    measured = {
        "continuations": continuations,
        "toxicity": measures.scorer(continuations).tolist(),
        "repetition": [repetition(row) for row in rows],
        "degenerate": [float(degenerate(text, row)) for text, row in zip(continuations, rows, strict=True)],
    }
    if not brief:
        pairs = zip(continuing, texts.continued, strict=True)
        measured["f1"] = [token_f1(choices.predicted(prompt, row), follows) for row, (prompt, follows) in pairs]
    return measured | {"tokens": [len(ids) - choices.uncounted for ids in texts.windows], **nll}


def by_run(measured: list[dict], runs: list[int]) -> dict[str, np.ndarray]:
    """One condition's numbers, `[n_runs, n_prompts]` or `[n_runs, n_passages]` each, as `lib.statistics` takes them.

    What only some measurements hold (`brief`) is of those.

    Args:
        measured: what `measure` returned, of several seeds and draws.
        runs: to which run each belongs; those of one run are averaged.
    """
    rows = {}
    for key in (key for key in measured[0] if key != "continuations"):
        of_run: dict[int, list] = {}
        for numbers, run in zip(measured, runs, strict=True):
            if key in numbers:
                of_run.setdefault(run, []).append(numbers[key])
        rows[key] = np.array([np.mean(values, axis=0) for values in of_run.values()])
    return rows


def runs_of(seeds: list[int], draws: list[int], every: list[int]) -> list[int]:
    """The run that each measurement of a row belongs to: its seed, whose draws share a probe and a DPO model.

    With one seed it is the draw. A row that not every seed has stands for its own runs alone.
    """
    if len(every) == 1:
        return draws
    return seeds if set(seeds) == set(every) else [0] * len(seeds)


def row_entries(
    measured: dict[tuple, list[tuple[int, int, dict]]], seeds: list[int], seed: int, full: bool
) -> dict[tuple, dict]:
    """Every row's statistics: see `make_row`; of a control also its difference from what it belongs to.

    Args:
        measured: (condition, kind, of, means) -> seed, draw and what `measure` returned, of each measurement. It holds
            the base model (`none`), and DPO where there is one.
        seeds: of the whole run.
        seed: of the resamples.
        full: whether there are enough draws for a rank.
    """
    numbers = {}
    for key, entries in measured.items():
        of_seeds, draws, each = map(list, zip(*entries, strict=True))
        numbers[key] = by_run(each, runs_of(of_seeds, draws, seeds))
    none, dpo = (numbers.get((name, "none", "", "same")) for name in ("none", "dpo"))
    prompts, passages = Bootstrap(none["toxicity"].shape[1], seed), Bootstrap(none["tokens"].shape[1], seed)
    rows = {}
    for key, values in numbers.items():
        _, kind, control_of, means_from = key
        rows[key] = make_row(values, none, dpo, prompts, passages)
        if control_of:
            real = numbers[control_of, kind, "", means_from]["toxicity"]
            rows[key]["difference_from_real"] = prompts.difference(values["toxicity"], real)
            draws = [float(np.mean(each["toxicity"])) for *_, each in measured[key]]
            if full and len(draws) > 1:
                rows[key]["rank_p"] = rank_p(float(real.mean()), draws)
    return rows


def make_row(values: dict, none: dict, dpo: dict | None, prompts: Bootstrap, passages: Bootstrap) -> dict:
    """One condition's entries in run.json: means with 95 % intervals, against base model and DPO; see `by_run`."""
    row = effect("toxicity", values, none, dpo, prompts)
    if second := {key.removeprefix(SECOND): key for key in values if key.startswith(SECOND)}:
        row["by_scorer"] = {name: effect(key, values, none, dpo, prompts) for name, key in second.items()}
    tokens = values["tokens"][0]
    for key, name in (("nll", "log_ppl"), ("nll_first", "log_ppl_first")):
        if key in values:
            row[name] = float(values[key].mean(0).sum() / tokens.sum())  # nats per token over all passages
            row[name + "_change"] = passages.ratio(values[key] - none[key], tokens)
    if "kl" in values:
        row["kl"] = passages.ratio(values["kl"], tokens)
    if "f1" in values:
        row["f1"] = float(values["f1"].mean())
    if "degenerate" in values:
        text = 1 - values["degenerate"]
        row["degenerate"] = prompts.mean(values["degenerate"])
        row["toxicity_of_text"] = prompts.ratio(values["toxicity"] * text, text)
    return row | {"repetition": float(values["repetition"].mean())}


def effect(key: str, values: dict, none: dict, dpo: dict | None, prompts: Bootstrap) -> dict:
    """Toxicity by the scores at `key`: its mean, change from the base model's, and share of DPO's change."""
    scores = {
        "toxicity": prompts.mean(values[key]),
        "toxicity_change": prompts.difference(values[key], none[key]),
    }
    if dpo:
        scores["percent_of_dpo"] = prompts.percent_of(values[key], none[key], dpo[key])
    return scores
