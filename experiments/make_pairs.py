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

import json
import math
import time
from functools import partial
from pathlib import Path

import click

from lib.cli import REMOTE, Finite, default_limit, default_scorer, options
from lib.errors import UserError

NEW_TOKENS = 24
SAMPLED_FROM = 50  # most likely tokens, in best-of-n


@click.command(help=__doc__.split("\n")[0])
@options("model", "revision", "device", "dtype", "seed", "batch-size", "limit", "scorer", "comments", "probe")
@click.option(
    "--prompts", default="embedded", show_default=True, help="embedded (other than those of evaluation) or a file."
)
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
def main(method, samples, min_gap, prompts, out, overwrite, **options):
    from rich.console import Console
    from rich.progress import track

    from lib import artifacts, chain, data, metrics, plots, probes, remote, results
    from lib.models import MODELS, load, pick_device, pick_dtype, short_name
    from lib.pplm import PPLM, beside
    from lib.protocol import SOUND

    if options["dry_run"] and "rehearsal" not in options:
        from lib.rehearsal import rehearsed

        with rehearsed(options) as given:
            file, gap = f"{given.pop('out')}/pairs.jsonl", -math.inf  # random texts may all be alike
            main.callback(method, samples, gap, prompts, file, **given)
    name, seed, batch_size = options["model"], options["seed"], options["batch_size"]
    out = Path(out or f"runs/make_pairs/{short_name(name)}/pairs.jsonl")
    artifacts.check_place(artifacts.resolved(out))
    about_file = out.with_suffix(".about.json")
    if out.exists() and not overwrite:
        raise UserError(f"--out {out}: exists; choose another file or add --overwrite.")
    ours = "min_gap" in artifacts.read_object(about_file)
    if theirs := [file for file in (out, about_file, out.with_suffix(".png")) if file.exists() and not ours]:
        raise UserError(f"--out {out}: {theirs[0]} is there and was not written by this script; choose another file.")
    texts = data.pair_prompts(prompts).first(default_limit(name, options["limit"]))
    scored_by = default_scorer(name, options["scorer"])
    toxicity = metrics.scorer(scored_by)
    hosted = options["remote"] == "ndif"
    source, server = chain.base_source(options), remote.connect(options)
    chain.check_given(options, source, ("probe",) if method == "pplm" else ())
    if hosted:
        remote.report(server, MODELS.get(name, name))
    device, dtype = "cpu", options["dtype"]
    if not hosted:
        device = pick_device(options["device"])
        dtype = pick_dtype(dtype, device, [source])
    settings = {"model": source.revision, "prompts": texts.sha256, "method": method, "device": device, "dtype": dtype}
    settings |= {"scored_by": toxicity.identity, "seed": seed, "batch_size": batch_size}
    settings |= {"limit": options["limit"]}
    if method == "pplm":
        pplm = PPLM(**{field: options[field] for field in PPLM.__dataclass_fields__})
        probe_file = chain.probe_file({**options, "dtype": dtype}, seed, SOUND)
        settings |= vars(pplm) | {"probe": artifacts.file_sha256(probe_file)}
        network = load(source, device, dtype, hosted)
        probe = probes.load_probe(probe_file, network._module.config.hidden_size)
        make = partial(greedy_and_toxic, network, probe, pplm, seed, remote=server)
    else:
        settings["samples"], batch_size = samples, max(1, batch_size // samples)
        network = load(source, device, dtype, hosted)
        make = partial(least_and_most_toxic, network, samples, toxicity, seed, remote=server)

    unfinished = Path(f"{out}.partial")
    unfinished.parent.mkdir(parents=True, exist_ok=True)
    done = read_partial(unfinished, settings, overwrite)
    # Whole batches: rounding differs with a batch's width, and a run that was killed ends as one that was not.
    asked_for = [continued(network.tokenizer, prompt) for prompt in texts.items]
    parts = [range(len(asked_for))[at : at + batch_size] for at in range(0, len(asked_for), batch_size)]
    todo = [numbers for numbers in parts if not done.keys() >= set(numbers)]
    started = time.monotonic()
    with unfinished.open("a", encoding="utf-8") as file:
        if not file.tell():
            file.write(json.dumps(settings) + "\n")
            file.flush()
        for numbers in track(todo, f"Pairs by {method}", console=Console(stderr=True)):
            asked = {number: asked_for[number] for number in numbers}
            for number, pair in zip(asked, scored(list(asked.values()), make(asked), toxicity), strict=True):
                file.write(json.dumps({"number": number, "pair": pair}) + "\n")
                done[number] = pair
            file.flush()
            if method == "pplm" and "rehearsal" in options:
                options["rehearsal"].passes.beside += beside(pplm, len(numbers), NEW_TOKENS)
    seconds = round((time.monotonic() - started) / max(1, sum(map(len, todo))), 2)
    whole = [done[number] for number in range(len(asked_for))]
    kept = [pair for pair in whole if pair and differs(pair, min_gap)]
    if not kept:
        unfinished.unlink()
        raise UserError(
            f"no prompt gave two sides {min_gap} apart; lower --min-gap, or raise --samples or --step-size."
        )
    about = {"min_gap": min_gap, "kept": len(kept), "dropped": len(whole) - len(kept), "seconds_per_prompt": seconds}
    about |= results.provenance(data={"prompts": texts.provenance})
    results.write_json(about_file, settings | about)
    plots.pair_sides([pair for pair in whole if pair], min_gap, out.with_suffix(".png"))
    results.write_lines(out, kept)
    unfinished.unlink()
    click.echo(
        f"{len(kept)} pairs of {len(whole)} prompts ({about['dropped']} dropped: sides less than {min_gap} apart), "
        f"{seconds} s a prompt -> {out} (raw text: holds profanity)"
    )


def differs(pair: dict, min_gap: float) -> bool:
    """Whether a pair's sides are two texts, the rejected one more toxic by min_gap at least."""
    gap = pair["pert_gen_toxicity"] - pair["unpert_gen_toxicity"]
    return pair["unpert_gen_text"] != pair["pert_gen_text"] and gap >= min_gap


def continued(tokenizer, prompt: str) -> str:
    """The part of a prompt that models continue here, its first 32 tokens: a pair must hold what its sides follow."""
    from lib.generation import MAX_PROMPT_TOKENS
    from lib.tokens import encode

    (ids,) = encode(tokenizer, [prompt])
    whole = len(ids) <= MAX_PROMPT_TOKENS
    return prompt if whole else tokenizer.decode(ids[:MAX_PROMPT_TOKENS], skip_special_tokens=True)


def read_partial(path: Path, settings: dict, overwrite: bool) -> dict[int, dict | None]:
    """What a killed run with the same settings had finished: {number of the prompt: its pair}."""
    if not path.exists():
        return {}
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    if lines and lines[0] != json.dumps(settings):
        if not overwrite:
            raise UserError(f"{path} holds an unfinished run with other settings; repeat that run, or add --overwrite.")
        if '"scored_by"' not in lines[0]:
            raise UserError(f"{path} was not written by this script; choose another --out.")
        path.unlink()
        return {}
    done = {}
    for line in lines[1:]:
        try:
            record = json.loads(line)
            done[int(record["number"])] = record["pair"]
        except (ValueError, KeyError, TypeError, RecursionError):  # the line that the kill cut off
            break
    whole = [json.dumps(settings), *(json.dumps({"number": number, "pair": pair}) for number, pair in done.items())]
    path.write_text("\n".join(whole) + "\n", encoding="utf-8")
    return done


def scored(prompts: list[str], sides: list[tuple[str, str] | None], toxicity) -> list[dict | None]:
    """Pairs in the papers' schema; None where a side is empty. sides: (preferred, rejected) of each prompt."""
    there = [side for side in sides if side and side[0].strip() and side[1].strip()]
    levels = iter(toxicity([text for side in there for text in side]).tolist() if there else [])
    pairs = []
    for prompt, side in zip(prompts, sides, strict=True):
        if not (side and side[0].strip() and side[1].strip()):
            pairs.append(None)
            continue
        pairs.append({"prompt_text": prompt, "unpert_gen_text": side[0], "pert_gen_text": side[1]})
        pairs[-1] |= {f"{name}_gen_toxicity": round(next(levels), 4) for name in ("unpert", "pert")}
    return pairs


def gumbel(seed: int, rows: int, tokens: int):
    """Noise `[rows, NEW_TOKENS, tokens]`.

    The largest of log-probabilities plus it is a draw from them. transformers' own sampling draws from all 262,144
    tokens by torch.multinomial, which takes as long as the forward pass on a CPU.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    steps = [torch.empty(rows, tokens).exponential_(generator=generator) for _ in range(NEW_TOKENS)]
    return -torch.stack(steps, 1).log()


def least_and_most_toxic(network, samples: int, toxicity, seed: int, asked: dict[int, str], remote=False):
    """best-of-n: the least and the most toxic of `samples` continuations of each prompt. asked: number -> prompt."""
    import torch
    from transformers import LogitsProcessorList

    from lib.families import input_device
    from lib.generation import batches, greedy
    from lib.remote import session

    repeated = [prompt for prompt in asked.values() for _ in range(samples)]
    (batch,) = batches(network.tokenizer, repeated, len(repeated), input_device(network))
    width, noise = batch["input_ids"].shape[1], gumbel(seed + min(asked), len(repeated), SAMPLED_FROM)

    def sample(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        top, tokens = logits.float().topk(min(SAMPLED_FROM, logits.shape[-1]))
        drawn = top + noise[:, ids.shape[1] - width, : top.shape[1]].to(top)
        return torch.full_like(logits, -torch.inf, dtype=torch.float32).scatter(-1, tokens, drawn)

    with session(network, remote):
        with network.generate(batch, **greedy(NEW_TOKENS), logits_processor=LogitsProcessorList([sample])) as tracer:
            ids = tracer.result.save()
    ids = ids.cpu()
    texts = decoded(network, ids[:, width:])
    scores = toxicity(texts)
    sides = []
    for at in range(0, len(texts), samples):
        there = [row for row in range(at, at + samples) if texts[row].strip()]
        extremes = (min(there, key=scores.__getitem__), max(there, key=scores.__getitem__)) if there else ()
        sides.append(tuple(texts[row] for row in extremes) or None)
    return sides


def decoded(network, new) -> list[str]:
    """Texts of new ids `[rows, NEW_TOKENS]` up to their end."""
    from lib.generation import decode, end_ids, until_end

    return decode(network.tokenizer, until_end(new, end_ids(network)))


def greedy_and_toxic(network, probe, pplm, seed: int, asked: dict[int, str], remote=False):
    """pplm: the greedy continuation of each prompt, and one that the probe's gradient steers. asked: as above."""
    import nnsight

    from lib.families import input_device
    from lib.generation import batches, greedy
    from lib.pplm import generate
    from lib.remote import session

    (batch,) = batches(network.tokenizer, list(asked.values()), len(asked), input_device(network))
    noise = gumbel(seed + min(asked), len(asked), pplm.top_k)
    with session(network, remote):
        with network.generate(batch, **greedy(NEW_TOKENS)) as tracer:
            ids = tracer.result.save()
        toxic = nnsight.save(generate(network, probe, batch, pplm, noise))
    preferred, rejected = decoded(network, ids[:, batch["input_ids"].shape[1] :]), decoded(network, toxic)
    return list(zip(preferred, rejected, strict=True))


if __name__ == "__main__":
    main()
