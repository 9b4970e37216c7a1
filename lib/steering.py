"""What steer.py does around its traces: the search for an alpha, and Lee's example prompts.

Whatever is steered, an edit here is what the script's traces apply; what is found is kept in the output folder, so that
a killed run does not search again.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import nnsight

from lib.errors import UserError
from lib.experiment import Inputs, Run
from lib.families import input_device
from lib.generation import batches, decode, end_ids, until_end
from lib.interventions import NO_EDIT
from lib.remote import session
from lib.results import once
from lib.statistics import largest_within
from lib.table import Table

PRECISION = 0.01  # of a searched alpha, relative
EVERYWHERE = slice(None)


def allowed(table: Table, run: Run, factor: float | str) -> float:
    """The log-perplexity that a searched alpha may reach: the base model's plus log(factor), or DPO's (`dpo`).

    Raises:
        UserError: DPO's is not above the base model's.
    """
    file = table.inputs.work / "conditions" / f"allowed_{run.seed}.json"
    return once(file, partial(_limit, table, run, factor))["log_perplexity"]


def _limit(table: Table, run: Run, factor: float | str) -> dict[str, float]:
    base = table.log_perplexity(table.inputs.base, NO_EDIT)
    limit = table.log_perplexity(run.post, NO_EDIT) if factor == "dpo" else base + math.log(factor)
    if limit <= base:
        raise UserError("--factor dpo: DPO did not raise perplexity here, so no alpha matches it; give a number.")
    return {"log_perplexity": limit}


def search(table: Table, name: str, edit_of: Callable[[float], Any], limit: float, start: float) -> float:
    """The largest alpha whose log-perplexity, with every token steered, stays within the limit.

    Args:
        name: of the file that keeps it.
        edit_of: alpha -> what the traces apply to the base model.
        start: the first alpha that is tried.
    """

    def cost(alpha: float) -> float:
        return table.log_perplexity(table.inputs.base, edit_of(alpha))

    file = table.inputs.work / "conditions" / f"search_{name.replace(':', '-')}.json"
    return once(file, lambda: {"alpha": largest_within(cost, limit, start, PRECISION)})["alpha"]


def continuations(
    inputs: Inputs, prompts: tuple[str, ...], shown: dict[str, tuple], next_tokens: Callable, generate: Callable
) -> list[dict]:
    """Lee table 3: the most likely next tokens and the continuation of each example, all prompts in one batch.

    Args:
        shown: condition -> (nnsight model, edit).
        next_tokens, generate: the script's traces, `(model, batch, edit, where) -> ids [batch, n]`.

    Returns: `prompt`, `condition`, `top_tokens` and `continuation` of each.
    """
    tokenizer, where = inputs.base.tokenizer, EVERYWHERE  # a name of its own, as in `Table.log_perplexity`
    (batch,) = batches(tokenizer, list(prompts), len(prompts), input_device(inputs.base))
    lines = []
    for condition, (model, edit) in shown.items():
        with session(model, inputs.remote):
            top = nnsight.save(next_tokens(model, batch, edit, where))
            new = nnsight.save(generate(model, batch, edit, where))
        texts = decode(tokenizer, until_end(new, end_ids(model)))
        for prompt, ids, text in zip(prompts, top.tolist(), texts, strict=True):
            tokens = [tokenizer.decode([token]) for token in ids]
            lines.append({"prompt": prompt, "condition": condition, "top_tokens": tokens, "continuation": text})
    return lines
