"""What every script that looks at neurons and edits none does around its own measures: texts, record."""

import dataclasses

import nnsight

from lib import results
from lib.experiment import Inputs
from lib.families import input_device
from lib.generation import batches, end_ids, greedy
from lib.remote import session


def write(inputs: Inputs, rows: list[dict], published: dict, **params) -> dict:
    """Write run.json; returns the record. rows: one a seed. published: `model` and its numbers, or nothing."""
    record = {
        "script": inputs.script,
        "model": inputs.options["model"],
        "params": {
            "limit": len(inputs.prompts.items),
            "seeds": inputs.seeds,
            "batch_size": inputs.batch_size,
            "protocol": inputs.options["protocol"],
            "released": inputs.options["released"],
            **params,
        },
        "protocol": dataclasses.asdict(inputs.protocol),
        "rows": rows,
        "published": published,
        "provenance": results.provenance(
            model_revision=inputs.source.revision,
            runs=inputs.settings["runs"],
            data={"prompts": inputs.prompts.provenance},
            **inputs.circumstances,
        ),
    }
    results.write_json(inputs.work / "run.json", record)
    return record


def continue_greedily(model, asked: list[dict], remote=False) -> list:
    """Greedy new tokens `[batch, NEW_TOKENS]` of each batch, on the CPU."""
    with session(model, remote):
        continued = nnsight.save([])
        for batch in asked:
            with model.generate(batch, **greedy()) as tracer:
                ids = tracer.result.save()
            continued.append(ids[:, batch["input_ids"].shape[1] :].cpu())
    return continued


def own_text(inputs: Inputs) -> tuple[list[list[int]], list[range]]:
    """`own_text_at_once` with as many prompts at once as fit into memory."""
    return inputs.fitting(lambda: own_text_at_once(inputs))


def own_text_at_once(inputs: Inputs) -> tuple[list[list[int]], list[range]]:
    """The prompts with the base model's continuations, and the positions whose activations count: `text_means`' input.

    The end-of-text token is kept: the position that predicts it counts in `mean_activations` too.
    """
    ends, rows, counted = end_ids(inputs.base), [], []
    asked = prompts_of(inputs)
    for batch, new in zip(asked, continue_greedily(inputs.base, asked, inputs.remote), strict=True):
        for padded, real, ids in zip(batch["input_ids"], batch["attention_mask"].bool(), new.tolist(), strict=True):
            prompt = padded[real].tolist()
            kept = next((at + 1 for at, token in enumerate(ids) if token in ends), len(ids))
            rows.append(prompt + ids[:kept])
            counted.append(range(len(prompt) - 1, len(prompt) + kept - 1))
    return rows, counted


def prompts_of(inputs: Inputs) -> list[dict]:
    """The prompts' batches, padded on the left."""
    device = input_device(inputs.base)
    return list(batches(inputs.base.tokenizer, inputs.prompts.items, inputs.batch_size, device))


def percent(mask) -> float:
    """How much of a bool tensor is true, in %."""
    return 100 * float(mask.double().mean())


def spread(values: list[float]) -> dict[str, float]:
    """Mean and range."""
    return {"mean": sum(values) / len(values), "low": min(values), "high": max(values)}
