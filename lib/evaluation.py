"""What is measured of every condition: shared by all scripts that make a causal claim."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import nnsight
import numpy as np

from lib.errors import UserError
from lib.families import input_device
from lib.generation import NEW_TOKENS, decode, end_ids, left_padded, prompt_ids, right_padded, until_end, windows
from lib.interventions import NO_EDIT
from lib.metrics import Scorer, repetition, token_f1
from lib.protocol import Protocol
from lib.remote import Server, session
from lib.statistics import Bootstrap
from lib.tokens import encode

WINDOW = 64  # tokens of a passage for perplexity, with its BOS
STREAM_WINDOW = 1024  # of the released code, which joins all passages
F1_PROMPT = 32  # tokens that the model continues for F1 (both papers' code)
PERPLEXITY_TOKENS = 512  # at once: logits of every position over 262,144 tokens are 1 MB a token
EVERYWHERE, LAST, FIRST = slice(None), slice(-1, None), slice(0, 1)


@dataclass(frozen=True)
class Texts:
    """What the conditions are measured on."""

    prompts: list[str]
    windows: list[list[int]]  # token ids for perplexity
    continued: list[tuple[list[int], list[int]]]  # for F1: ids that the model continues, ids that really follow


def make_texts(
    tokenizer, max_positions: int, prompts: list[str], passages: list[str], given: str, protocol: Protocol
) -> Texts:
    """Tokenise the passages.

    Args:
        max_positions: as many as the model takes.
        given: names the passages in a message.

    Raises:
        UserError: none is long enough for an F1 continuation.
    """
    at_least = F1_PROMPT + NEW_TOKENS
    if protocol.perplexity_windows == "passage":
        rows = windows(tokenizer, passages, WINDOW, at_least)
    else:
        longest = min(STREAM_WINDOW, max_positions)
        (stream,) = encode(tokenizer, ["\n\n".join(passages)])
        rows = [stream[at : at + longest] for at in range(0, len(stream), longest)]
    # The released code's reference is the text that follows, up to 52 tokens; it counts the prompt in the prediction.
    follow = NEW_TOKENS if protocol.f1_prediction == "continuation" else at_least
    long_enough = windows(tokenizer, passages, F1_PROMPT + follow, at_least)
    if not long_enough:
        raise UserError(f"{given}: no passage has {at_least} tokens; give longer ones.")
    return Texts(prompts, rows, [(ids[:F1_PROMPT], ids[F1_PROMPT:]) for ids in long_enough])


def measure(
    model,
    texts: Texts,
    scorer: Scorer,
    batch_size: int,
    protocol: Protocol,
    generate: Callable,
    likelihood: Callable,
    edit: Any,
    brief: bool = False,
    position_0: bool = True,
    remote: Server | str | bool = False,
) -> dict[str, list]:
    """Measure one condition: all its traces in one session, on a server one request that returns ids and sums.

    Args:
        generate: a script's `(model, left-padded batch, edit, edited positions) -> new ids [batch, NEW_TOKENS]`.
        likelihood: `(model, right-padded batch, edit, edited positions) -> [batch]`, nats: summed negative
            log-likelihood.
        edit: what the script's traces apply; NO_EDIT: the model as it is, for which both perplexities are one.
        brief: for controls: no F1, and the protocol's own perplexity alone.
        position_0: also perplexity with position 0 edited alone, as the papers have it (of clamps).

    Returns: lists over prompts (`continuations`, `toxicity`, `repetition`) and over passages (`f1`, `tokens`, `nll`
        with every position edited, `nll_first` with position 0 edited alone, in nats).
    """
    ends, device = end_ids(model), input_device(model)
    where = EVERYWHERE if protocol.edit_positions == "all" else LAST
    attended = protocol.padding == "attended" and "gemma" in model._module.config.model_type
    asked = prompt_ids(model.tokenizer, texts.prompts)
    continued = [] if brief else [ids for ids, _ in texts.continued]  # all of one length
    # Together where they fit: every step reads all weights. Attended padding would depend on what stands beside it.
    parts = [asked, continued] if attended else [asked + continued]
    both = [batch for part in parts for batch in left_padded(model.tokenizer, part, batch_size, device, attended)]
    size = max(1, PERPLEXITY_TOKENS // max(map(len, texts.windows)))
    read = list(right_padded(texts.windows, size, device))
    kinds = {}
    if not brief or protocol.perplexity_edit == "all":
        kinds["nll"] = EVERYWHERE
    if not (edit is NO_EDIT and kinds) and (position_0 and not brief or protocol.perplexity_edit == "first"):
        kinds["nll_first"] = FIRST
    places = list(kinds.values())
    with session(model, remote):
        ids, losses = nnsight.save([]), nnsight.save([])
        for batch in both:
            ids.append(generate(model, batch, edit, where).cpu())
        for place in places:
            for batch in read:
                losses.append(likelihood(model, batch, edit, place).cpu())

    new = [row for part in ids for row in until_end(part, ends)]
    rows, predicted, f1 = new[: len(asked)], new[len(asked) :], []
    if protocol.prompt_removal == "ids":
        continuations = decode(model.tokenizer, rows)
    else:  # the whole text, from which the prompt is taken out where it is found as it was
        whole = decode(model.tokenizer, [prompt + more for prompt, more in zip(asked, rows, strict=True)])
        continuations = [text.replace(prompt, "") for text, prompt in zip(whole, texts.prompts, strict=True)]
    for found, (prompt, reference) in zip(predicted, [] if brief else texts.continued, strict=True):
        f1.append(token_f1(found if protocol.f1_prediction == "continuation" else prompt + found, reference))
    sums = [total for part in losses for total in part.tolist()]
    nll = {name: sums[at * len(texts.windows) : (at + 1) * len(texts.windows)] for at, name in enumerate(kinds)}
    if edit is NO_EDIT and "nll" in nll:
        nll["nll_first"] = nll["nll"]
    short = 1 if protocol.perplexity_windows == "passage" else 0  # the released code divides n - 1 terms by n
    return {
        "continuations": continuations,
        "toxicity": scorer(continuations).tolist(),
        "repetition": [repetition(row) for row in rows],
        **({} if brief else {"f1": f1}),
        "tokens": [len(ids) - short for ids in texts.windows],
        **nll,
    }


def average(measured: list[dict]) -> dict:
    """One condition over its runs (seeds, draws): each prompt's and passage's mean, `continuations` of the first.

    What only some runs hold (`brief`) is theirs.
    """
    numbers = [key for key in measured[0] if key != "continuations"]
    together = {key: np.mean([run[key] for run in measured if key in run], axis=0).tolist() for key in numbers}
    return together | {"continuations": measured[0]["continuations"]}


def make_row(measured: dict, none: dict, dpo: dict | None, prompts: Bootstrap, passages: Bootstrap) -> dict:
    """One condition's entries in run.json: means with 95 % paired bootstrap intervals, against base model and DPO."""
    row = {
        "toxicity": prompts.mean(measured["toxicity"]),
        "toxicity_change": prompts.difference(measured["toxicity"], none["toxicity"]),
    }
    if dpo:
        row["percent_of_dpo"] = prompts.percent_of(measured["toxicity"], none["toxicity"], dpo["toxicity"])
    if "second" in measured:
        row["second_toxicity"] = prompts.mean(measured["second"])
        row["second_toxicity_change"] = prompts.difference(measured["second"], none["second"])
    for key, name in (("nll", "log_ppl"), ("nll_first", "log_ppl_first")):
        if key in measured:
            row[name] = sum(measured[key]) / sum(measured["tokens"])  # nats per token over all passages
            change = [a - b for a, b in zip(measured[key], none[key], strict=True)]
            row[name + "_change"] = passages.ratio(change, measured["tokens"])
    if "f1" in measured:
        row["f1"] = sum(measured["f1"]) / len(measured["f1"])
    return row | {"repetition": sum(measured["repetition"]) / len(measured["repetition"])}
