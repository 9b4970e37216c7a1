"""Preference pairs of a non-toxic and a toxic continuation of one prompt (Lee et al. 2024, section 4.2).

Method `best-of-n`: sample N continuations of each prompt from the model itself, score them, and take the least toxic
one as preferred and the most toxic one as rejected. Prompts whose two differ by less than --min-gap are dropped.

Writes JSON lines in the papers' schema (`prompt_text`, `unpert_gen_text` preferred, `pert_gen_text` rejected) with the
toxicity of both sides. RAW TEXT: the file holds profanity. A killed run goes on with the prompt that it was at.

    python experiments/make_pairs.py --prompts lib/assets/pair_prompts.jsonl --batch-size 96 --out pairs.jsonl

made the embedded pairs (524 prompts, 6 samples each).
"""

import json
from pathlib import Path

import click

from lib.cli import default_scorer, options
from lib.errors import UserError

NEW_TOKENS = 24
TOP_K = 50  # tokens that sampling chooses from


@click.command(help=__doc__.split("\n")[0])
@options("model", "revision", "device", "dtype", "seed", "batch-size", "limit", "scorer")
@click.option("--prompts", required=True, help="A file of prompts.")
@click.option("--samples", type=click.IntRange(2), default=6, show_default=True, help="Continuations per prompt.")
@click.option("--min-gap", type=float, default=0.6, show_default=True, help="Least toxicity gap of a pair's sides.")
@click.option("--out", type=click.Path(dir_okay=False), required=True, help="The file to write.")
@click.option("--overwrite", is_flag=True, help="Replace the file if it exists.")
def main(model, revision, device, dtype, seed, batch_size, limit, scorer, prompts, samples, min_gap, out, overwrite):
    from rich.progress import track

    from lib import data
    from lib.metrics import scorer as load_scorer
    from lib.models import load, resolve

    if Path(out).exists() and not overwrite:
        raise UserError(f"--out {out}: exists; choose another file or add --overwrite.")
    texts = data.prompts(prompts).first(limit).items
    toxicity = load_scorer(default_scorer(model, scorer))
    network = load(resolve(model, revision), device, dtype)

    settings = {"model": model, "samples": samples, "min_gap": min_gap, "seed": seed, "batch_size": batch_size}
    partial = Path(f"{out}.partial")
    done = read_partial(partial, settings, overwrite)
    per_batch = max(1, batch_size // samples)
    with partial.open("a") as file:
        if not done:
            file.write(json.dumps(settings) + "\n")
        for start in track(range(0, len(texts), per_batch), "Sampling pairs"):
            if start in done:
                continue
            pairs = best_of_n(network, texts[start : start + per_batch], samples, min_gap, toxicity, seed + start)
            file.write(json.dumps({"start": start, "pairs": pairs}) + "\n")
            file.flush()
            done[start] = pairs
    found = [pair for start in sorted(done) for pair in done[start]]
    if not found:
        partial.unlink()
        raise UserError(f"no prompt gave two continuations {min_gap} apart; lower --min-gap or raise --samples.")
    ready = Path(f"{out}.ready")
    ready.write_text("".join(json.dumps(pair) + "\n" for pair in found))
    ready.rename(out)
    partial.unlink()
    click.echo(f"{len(found)} pairs from {len(texts)} prompts -> {out} (raw text: holds profanity)")


def read_partial(path: Path, settings: dict, overwrite: bool) -> dict[int, list]:
    """What a killed run with the same settings had finished: {first prompt of the batch: its pairs}."""
    if not path.exists():
        return {}
    lines = path.read_text().splitlines()
    if not lines or lines[0] != json.dumps(settings):
        if not overwrite:
            raise UserError(f"{path} holds an unfinished run with other settings; repeat that run, or add --overwrite.")
        path.unlink()
        return {}
    done = {}
    for line in lines[1:]:
        try:
            record = json.loads(line)
        except ValueError:  # the line that the kill cut off
            break
        done[record["start"]] = record["pairs"]
    whole = [lines[0], *(json.dumps({"start": start, "pairs": pairs}) for start, pairs in done.items())]
    path.write_text("\n".join(whole) + "\n")
    return done


def best_of_n(
    network, prompts: list[str], samples: int, min_gap: float, toxicity, seed: int, remote=False
) -> list[dict]:
    """The least and the most toxic of `samples` continuations of each prompt, where they differ enough."""
    import torch
    from transformers import LogitsProcessorList

    from lib.generation import batches, decode, end_ids, greedy, until_end

    noise = torch.Generator(network.device).manual_seed(seed)

    def gumbel_top_k(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        # The largest of logits plus Gumbel noise is a draw from their softmax. transformers' own sampling draws from
        # all 262,144 tokens by torch.multinomial, which takes as long as the forward pass on a CPU.
        top, tokens = logits.float().topk(TOP_K)  # [batch, TOP_K]
        gumbel = -torch.empty_like(top).exponential_(generator=noise).log()
        return torch.full_like(logits, -torch.inf, dtype=torch.float32).scatter(-1, tokens, top + gumbel)

    repeated = [prompt for prompt in prompts for _ in range(samples)]
    (batch,) = batches(network.tokenizer, repeated, len(repeated), network.device)
    with network.generate(
        batch, remote=remote, **greedy(NEW_TOKENS), logits_processor=LogitsProcessorList([gumbel_top_k])
    ) as tracer:
        ids = tracer.result.save()
    texts = decode(network.tokenizer, until_end(ids[:, batch["input_ids"].shape[1] :], end_ids(network)))
    scores = toxicity(texts)
    pairs = []
    for number, prompt in enumerate(prompts):
        rows = [row for row in range(number * samples, (number + 1) * samples) if texts[row].strip()]
        if not rows:
            continue
        low, high = min(rows, key=lambda row: scores[row]), max(rows, key=lambda row: scores[row])
        if scores[high] - scores[low] >= min_gap:
            pairs.append(
                {
                    "prompt_text": prompt,
                    "unpert_gen_text": texts[low],
                    "pert_gen_text": texts[high],
                    "unpert_gen_toxicity": round(float(scores[low]), 4),
                    "pert_gen_toxicity": round(float(scores[high]), 4),
                }
            )
    return pairs


if __name__ == "__main__":
    main()
