"""What every script that looks at neurons and edits none does around its own measures: inputs, record, table."""

from lib.cli import CAUSAL

# What `lib.experiment` asks for and only an edit's effects need: the cheapest that there is.
UNUSED = {"passages": "embedded", "scorer": "words", "second_scorer": None, "controls": "none", "holdout": False}
OPTIONS = tuple(name for name in CAUSAL if name.replace("-", "_") not in {*UNUSED, "raw_text"})


def begin(script: str, options: dict, needs: tuple[str, ...] = ("probe", "post")):
    """Context: what is missing is made, the base model loaded, the output folder open; see `lib.experiment.begin`."""
    from lib import experiment

    return experiment.begin(script, {**options, **UNUSED}, needs)


def write(run, rows: list[dict], published: dict, **params) -> dict:
    """Write run.json; returns the record. rows: one a seed. published: `model` and its numbers, or nothing."""
    import dataclasses
    import time

    from lib import results

    record = {
        "script": run.script,
        "model": run.options["model"],
        "params": {
            "limit": len(run.prompts.items),
            "seeds": run.seeds,
            "batch_size": run.batch_size,
            "protocol": run.options["protocol"],
            "released": run.options["released"],
            **params,
        },
        "protocol": dataclasses.asdict(run.protocol),
        "rows": rows,
        "published": published,
        "provenance": results.provenance(
            model_revision=run.source.revision,
            runs=run.settings["runs"],
            data={"prompts": run.prompts.provenance},
            dtype=str(run.base.dtype).removeprefix("torch."),
            **({"update_left": run.update_left} if run.update_left else {}),
            device=run.device,
            seconds=round(time.monotonic() - run.started, 1),
            **({"remote": run.remote.record()} if run.hosted else {}),
        ),
    }
    results.write_json(run.work / "run.json", record)
    return record


def continue_greedily(model, batches: list[dict], remote=False) -> list:
    """Greedy new tokens `[batch, NEW_TOKENS]` of each batch."""
    import nnsight

    from lib.generation import greedy
    from lib.remote import session

    with session(model, remote):
        found = nnsight.save([])
        for batch in batches:
            with model.generate(batch, **greedy()) as tracer:
                ids = tracer.result.save()
            found.append(ids[:, batch["input_ids"].shape[1] :].cpu())
    return found


def own_text(run) -> tuple[list[list[int]], list[range]]:
    """The prompts with the base model's continuations, and the positions whose activations count: `text_means`' input.

    The end-of-text token is kept: the position that predicts it counts in `mean_activations` too.
    """
    from lib.generation import end_ids

    ends, rows, counted = end_ids(run.base), [], []
    asked = prompts_of(run)
    for batch, new in zip(asked, continue_greedily(run.base, asked, run.remote), strict=True):
        for padded, real, ids in zip(batch["input_ids"], batch["attention_mask"].bool(), new.tolist(), strict=True):
            prompt = padded[real].tolist()
            kept = next((at + 1 for at, token in enumerate(ids) if token in ends), len(ids))
            rows.append(prompt + ids[:kept])
            counted.append(range(len(prompt) - 1, len(prompt) + kept - 1))
    return rows, counted


def prompts_of(run) -> list[dict]:
    """The prompts' batches, padded on the left."""
    from lib.families import input_device
    from lib.generation import batches

    return list(batches(run.base.tokenizer, run.prompts.items, run.batch_size, input_device(run.base)))


def percent(mask) -> float:
    """How much of a bool tensor is true, in %."""
    return 100 * float(mask.double().mean())


def spread(values: list[float]) -> dict[str, float]:
    """Mean and range."""
    return {"mean": sum(values) / len(values), "low": min(values), "high": max(values)}
