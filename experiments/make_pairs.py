"""Preference pairs of a non-toxic and a toxic continuation of one prompt (Lee et al. 2024, section 4.2; table 6).

pplm        the paper's way (Dathathri et al. 2019). Preferred: the model's greedy continuation. Rejected: a sample for
            which, before every token, the key-value cache is moved up the gradient of the probe's p(toxic): a
            forward pass with the moved cache gives next-token probabilities, the unmoved model reads their mean
            embedding, and the probe sees the mean residual stream with it (horizon 1, no decay). KL to the unmoved
            probabilities holds back. The algorithm is in lib/pplm.py.
best-of-n   cheap: sample N continuations, take the least toxic as preferred and the most toxic as rejected.

Prompts whose two sides differ in toxicity by less than --min-gap are dropped and counted.

Writes JSON lines in the papers' schema (`prompt_text`, `unpert_gen_text` preferred, `pert_gen_text` rejected) with the
toxicity of both sides, and beside it what they were made with and a figure. RAW TEXT: the file holds profanity. A
killed run goes on with the batch of prompts that it was at.

    python experiments/make_pairs.py                                          # 48 prompts of the embedded ones
    python experiments/make_pairs.py --model gpt2 --prompts wiki.jsonl --iterations 50    # as Lee et al.
"""

from pathlib import Path

import click

from lib.cli import REMOTE, Finite, check, default_limit, default_scorer, options

NEW_TOKENS = 24
SAMPLED_FROM = 50  # most likely tokens, in best-of-n
FIELDS = ("prompt_text", "unpert_gen_text", "pert_gen_text", "unpert_gen_toxicity", "pert_gen_toxicity")


@click.command(help=__doc__.split("\n")[0])
@options("model", "revision", "device", "dtype", "seed", "batch-size", "limit", "scorer", "comments", "probe")
@click.option("--prompts", default="embedded", show_default=True,
              help="embedded (other than those of evaluation) or a file.")  # fmt: skip
@click.option("--method", type=click.Choice(["pplm", "best-of-n"]), default="pplm", show_default=True)
@click.option("--samples", type=click.IntRange(2), default=6, show_default=True, help="best-of-n's N.")
@click.option("--step-size", type=Finite(0, min_open=True), default=0.4, show_default=True)
@click.option("--iterations", type=click.IntRange(1), default=3, show_default=True, help="Steps a token; Lee: 50.")
@click.option("--kl-scale", type=Finite(0), default=0.1, show_default=True)
@click.option("--gm-scale", type=Finite(0, 1), default=0.95, show_default=True)
@click.option("--gamma", type=Finite(0), default=1.0, show_default=True)
@click.option("--window", type=click.IntRange(0), default=0, show_default=True, help="Last positions moved; 0: all.")
@click.option("--top-k", type=click.IntRange(1), default=10, show_default=True, help="Tokens that pplm samples from.")
@click.option("--temperature", type=Finite(0, min_open=True), default=1.0, show_default=True)
@click.option("--min-gap", type=Finite(), default=0.6, show_default=True, help="Least toxicity gap of a pair's sides.")
@click.option("--out", type=click.Path(dir_okay=False), help="File.  [default: runs/make_pairs/<model>/pairs.jsonl]")
@click.option("--overwrite", is_flag=True, help="Replace the file if it exists.")
@options(*REMOTE, "dry-run")
def command(**options):
    main(**options)


check(command, __name__)  # --help and wrong options end here, before torch is imported

import time
from functools import partial

import nnsight
import torch
from rich.console import Console
from rich.progress import track
from transformers import LogitsProcessorList

from lib import artifacts, chain, data, dry_run, metrics, models, plots_training, probes, protocol, remote, results
from lib.errors import UserError
from lib.families import input_device
from lib.generation import MAX_PROMPT_TOKENS, batches, decode, end_ids, greedy, gumbel, prompt_ids, until_end
from lib.pplm import PPLM, generate, passes
from lib.remote import session
from lib.tokens import encode


def main(method, samples, min_gap, prompts, out, overwrite, **options):
    name, seed, hosted = options["model"], options["seed"], options["remote"] == "ndif"
    out = Path(out or f"runs/make_pairs/{models.short_name(name)}/pairs.jsonl")
    about_file, figure = out.with_suffix(".about.json"), out.with_suffix(".png")
    check_files(out, about_file, figure, overwrite)
    texts = data.pair_prompts(prompts).first(default_limit(name, options["limit"]))
    source, server = chain.base_source(options), remote.connect(options)
    needs = ("probe",) if method == "pplm" else ()
    tokenizer, shape = chain.check_given(options, source, needs)
    asked = [continued(tokenizer, prompt) for prompt in texts.items]
    pplm = PPLM(**{field: options[field] for field in PPLM.__dataclass_fields__}) if method == "pplm" else None
    copies = 1 if pplm else samples  # of each prompt in a batch
    at_once = max(1, options["batch_size"] // copies)  # prompts
    if options["dry_run"]:
        rows = [row for row in prompt_ids(tokenizer, asked) for _ in range(copies)]
        steered, gradients = passes(pplm, rows, at_once, NEW_TOKENS) if pplm else ([], [])
        over_ids = [*dry_run.generating(rows, at_once * copies, NEW_TOKENS), *steered]
        first = chain.commands(options, [seed], needs, more=[])
        dry_run.tell(options, source, over_ids, first=first, beside=gradients)

    toxicity = metrics.scorer(default_scorer(name, options["scorer"]))
    if hosted:
        remote.report(server, models.MODELS.get(name, name))
    device = "cpu" if hosted else models.pick_device(options["device"])
    dtype = options["dtype"] if hosted else models.pick_dtype(options["dtype"], device, [source])
    settings = {"model": source.revision, "prompts": texts.sha256, "method": method, "device": device, "dtype": dtype}
    settings |= {"scored_by": toxicity.identity, **{field: options[field] for field in ("seed", "batch_size", "limit")}}
    if pplm:
        probe_file = chain.probe_file({**options, "dtype": dtype}, seed, protocol.SOUND)
        settings |= vars(pplm) | {"probe": artifacts.file_sha256(probe_file)}
        probe = probes.load_probe(probe_file, shape.d_model)
        make = partial(greedy_and_toxic, probe=probe, pplm=pplm, seed=seed, remote=server)
    else:
        settings |= {"samples": samples}
        make = partial(least_and_most_toxic, samples=samples, toxicity=toxicity, seed=seed, remote=server)
    network = models.load(source, device, dtype, hosted)

    unfinished = results.Unfinished(Path(f"{out}.partial"), settings, overwrite, mark="scored_by")
    done = {row["number"]: row["pair"] for row in unfinished.rows if row.keys() == {"number", "pair"}}
    # Whole batches: rounding differs with a batch's width, and a run that was killed ends as one that was not.
    parts = [range(len(asked))[at : at + at_once] for at in range(0, len(asked), at_once)]
    todo = [part for part in parts if not done.keys() >= set(part)]
    started = time.monotonic()
    for part in track(todo, f"Pairs by {method}", console=Console(stderr=True)):
        sides = make(network, asked={number: asked[number] for number in part})
        finished = dict(zip(part, scored([asked[number] for number in part], sides, toxicity), strict=True))
        unfinished.add([{"number": number, "pair": pair} for number, pair in finished.items()])
        done |= finished
    seconds = round((time.monotonic() - started) / max(1, sum(map(len, todo))), 2)
    pairs = [done[number] for number in range(len(asked))]
    kept = [pair for pair in pairs if pair and differs(pair, min_gap)]
    if not kept:
        unfinished.path.unlink()
        instead = "lower --min-gap, or raise --samples or --step-size"
        raise UserError(f"no prompt gave two sides {min_gap} apart; {instead}.")
    dropped = len(pairs) - len(kept)
    settings |= {"min_gap": min_gap, "kept": len(kept), "dropped": dropped, "seconds_per_prompt": seconds}
    results.write_json(about_file, settings | results.provenance(data={"prompts": texts.provenance}))
    plots_training.pair_sides([pair for pair in pairs if pair], min_gap, figure)
    results.write_lines(out, kept)
    unfinished.path.unlink()
    click.echo(
        f"{len(kept)} pairs of {len(pairs)} prompts ({dropped} dropped: sides less than {min_gap} apart), "
        f"{seconds} s a prompt -> {out} (raw text: holds profanity)"
    )


def check_files(out: Path, about_file: Path, figure: Path, overwrite: bool) -> None:
    """Raise UserError where the files cannot be written, or would replace others than this script's."""
    artifacts.check_place(artifacts.resolved(out))
    if out.exists() and not overwrite:
        raise UserError(f"--out {out}: exists; choose another file or add --overwrite.")
    ours = "min_gap" in artifacts.read_object(about_file)
    if theirs := [file for file in (out, about_file, figure) if file.exists() and not ours]:
        raise UserError(f"--out {out}: {theirs[0]} is there and was not written by this script; choose another file.")


def continued(tokenizer, prompt: str) -> str:
    """The part of a prompt that models continue here, its first 32 tokens: a pair must hold what its sides follow."""
    (ids,) = encode(tokenizer, [prompt])
    cut = tokenizer.decode(ids[:MAX_PROMPT_TOKENS], skip_special_tokens=True)
    return cut if len(ids) > MAX_PROMPT_TOKENS else prompt


def scored(prompts: list[str], sides: list[tuple[str, str] | None], toxicity) -> list[dict | None]:
    """Pairs in the papers' schema; None where a side is empty. sides: (preferred, rejected) of each prompt."""
    whole = [side if side and side[0].strip() and side[1].strip() else None for side in sides]
    levels = iter([round(level, 4) for level in toxicity([text for side in whole if side for text in side]).tolist()])
    return [
        dict(zip(FIELDS, (prompt, *side, next(levels), next(levels)), strict=True)) if side else None
        for prompt, side in zip(prompts, whole, strict=True)
    ]


def differs(pair: dict, min_gap: float) -> bool:
    """Whether a pair's sides are two texts, the rejected one more toxic by min_gap at least."""
    gap = pair["pert_gen_toxicity"] - pair["unpert_gen_toxicity"]
    return pair["unpert_gen_text"] != pair["pert_gen_text"] and gap >= min_gap


def least_and_most_toxic(network, samples: int, toxicity, seed: int, asked: dict[int, str], remote=False) -> list:
    """best-of-n: the least and the most toxic of `samples` continuations of each prompt. asked: number -> prompt."""
    repeated = [prompt for prompt in asked.values() for _ in range(samples)]
    (batch,) = batches(network.tokenizer, repeated, len(repeated), input_device(network))
    width, noise = batch["input_ids"].shape[1], gumbel(seed + min(asked), len(repeated), NEW_TOKENS, SAMPLED_FROM)

    def sample(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        top, tokens = logits.float().topk(min(SAMPLED_FROM, logits.shape[-1]))
        drawn = top + noise[:, ids.shape[1] - width, : top.shape[1]].to(top)
        return torch.full_like(logits, -torch.inf, dtype=torch.float32).scatter(-1, tokens, drawn)

    with session(network, remote):
        with network.generate(batch, **greedy(NEW_TOKENS), logits_processor=LogitsProcessorList([sample])) as tracer:
            ids = tracer.result.save()
    texts = decoded(network, ids.cpu()[:, width:])
    score, sides = toxicity(texts).__getitem__, []
    for at in range(0, len(texts), samples):
        there = [row for row in range(at, at + samples) if texts[row].strip()]
        sides.append((texts[min(there, key=score)], texts[max(there, key=score)]) if there else None)
    return sides


def greedy_and_toxic(network, probe, pplm: PPLM, seed: int, asked: dict[int, str], remote=False) -> list:
    """pplm: the greedy continuation of each prompt, and one that the probe's gradient steers. asked: as above."""
    (batch,) = batches(network.tokenizer, list(asked.values()), len(asked), input_device(network))
    noise = gumbel(seed + min(asked), len(asked), NEW_TOKENS, pplm.top_k)
    with session(network, remote):
        with network.generate(batch, **greedy(NEW_TOKENS)) as tracer:
            ids = tracer.result.save()
        toxic = nnsight.save(generate(network, probe, batch, pplm, noise))
    preferred, rejected = decoded(network, ids[:, batch["input_ids"].shape[1] :]), decoded(network, toxic)
    return list(zip(preferred, rejected, strict=True))


def decoded(network, new: torch.Tensor) -> list[str]:
    """Texts of new ids `[rows, NEW_TOKENS]` up to their end."""
    return decode(network.tokenizer, until_end(new, end_ids(network)))


if __name__ == "__main__":
    command()
