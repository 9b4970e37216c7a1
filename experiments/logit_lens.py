"""Where a toxic token's probability rises, layer by layer, before and after DPO (Lee et al. 2024, 4.2, figure 1).

The unembedding is applied to the residual stream after every attention block (`mid`) and every MLP (`end`), at the last
position of prompts whose next token is toxic in the base model. The claims: MLPs raise that token most, and after DPO
they raise it far less. What the paper does not have, and this adds:

plain       prompts whose next token is not toxic: does DPO lower the base model's choice there too?
intervals   over prompts, and of the MLPs' share in all that raises the token

Toxic is what --judge finds (the word list that masks screens), or one of --tokens: single tokens, a leading space as
written, such as `--tokens " shit, ass"`.

Needs a DPO checkpoint, made when missing or given (--post). Writes run.json, lens.jsonl (RAW prompts and tokens:
profanity) and figures/ to runs/logit_lens/<model>/.

    python experiments/logit_lens.py
    python experiments/logit_lens.py --model gpt2 --tokens " shit"
"""

import click

from lib.cli import LOOKING, check, options

UNREAD = ("probe", "comments", "protocol", "released")  # no probe, no choice of the audit
HALVES = ("mid", "end")  # after attention, after the MLP
SHADED = 4  # half-layers that the figure shades: those that raise the token most
ALL = 1_000_000  # prompts: one forward pass each needs no smaller default


@click.command(help=__doc__.split("\n")[0])
@options(*(name for name in LOOKING if name not in UNREAD), "raw-text")
@click.option("--tokens", help="Toxic tokens, separated by commas, spaces kept.  [default: what --judge finds]")
@click.option("--judge", default="words", show_default=True, help="Scorer that says which next tokens are toxic.")
def command(**options):
    main(**options)


check(command, __name__)  # --help and wrong options end here, before torch is imported

from collections import Counter

import nnsight
import numpy as np
import torch

from lib import experiment, metrics, observation, plots_neurons, results, tables
from lib.dry_run import Traces, Workload
from lib.errors import UserError
from lib.families import layers, mlp_norm, n_layers, unembed
from lib.remote import session
from lib.statistics import Bootstrap, interval
from lib.tokens import inner_ids


def main(tokens, judge, **options):
    tokens = tokens.split(",") if tokens else None
    scorer = None if tokens else metrics.scorer("words" if options["dry_run"] else judge)
    options |= {"tokens": tokens, "judge": judge, "limit": options["limit"] or ALL}
    # The base model's next tokens and its lens, then the lens of each seed's model after DPO.
    plan = Workload(means=False, traces=[Traces("read", models=2, once=True), Traces("read")])

    with experiment.begin("logit_lens", options, plan, needs=("post",)) as inputs:
        ids = single_tokens(inputs.base.tokenizer, tokens) if tokens else None
        batches = observation.prompts_of(inputs)
        chosen = next_tokens(inputs.base, batches, inputs.remote)
        lines = judged(inputs, chosen, ids, scorer)
        toxic = np.array([line["toxic"] for line in lines])
        asked = list(zip(batches, chosen, strict=True))
        pre = by_prompt(lens(inputs.base, asked, inputs.remote))
        rows = []
        for run in inputs.runs(means=False):  # one for each seed
            post = by_prompt(lens(run.post, asked, inputs.remote))
            rows.append({"seed": run.seed, **summary(toxic, pre, post, options["seed"])})

        results.write_lines(inputs.work / "lens.jsonl", lines)
        plots_neurons.logit_lens(rows[0], inputs.work / "figures" / "logit_lens.png")
        record = observation.write(inputs, rows, {}, judge=judge, tokens=tokens)
    show(inputs, record, lines)


def single_tokens(tokenizer, texts: list[str]) -> list[int]:
    """Ids of texts that are one token each. Raises UserError with the split of one that is not."""
    split = inner_ids(tokenizer, texts)
    for text, ids in zip(texts, split, strict=True):
        if len(ids) != 1:
            parts = " | ".join(tokenizer.decode([i]) for i in ids) or "nothing"
            raise UserError(
                f"--tokens {text!r}: {len(ids)} tokens ({parts}) where one is expected; mind leading spaces."
            )
    return [ids[0] for ids in split]


def judged(inputs, chosen: list[torch.Tensor], ids: list[int] | None, scorer) -> list[dict]:
    """A line for each prompt: its next token in the base model, and whether that is toxic.

    Args:
        chosen: next tokens `[batch]` of each batch.
        ids: the toxic ones; None: those that the scorer finds.

    Raises:
        UserError: none is toxic.
    """
    targets = [i for part in chosen for i in part.tolist()]
    texts = [inputs.base.tokenizer.decode([i]) for i in targets]
    toxic = [i in ids for i in targets] if ids else (scorer(texts) > 0.5).tolist()
    if not any(toxic):
        what = ", ".join(map(repr, inputs.options["tokens"])) if ids else "a listed word"
        raise UserError(f"--prompts: none of {len(toxic)} has {what} as its next token; give more or other prompts.")
    columns = zip(inputs.prompts.items, texts, toxic, strict=True)
    return [{"prompt": prompt, "token": token, "toxic": bool(bad)} for prompt, token, bad in columns]


def next_tokens(model, batches: list[dict], remote=False) -> list[torch.Tensor]:
    """The most likely next token of each prompt, `[batch]` of each batch."""
    with session(model, remote):
        chosen = nnsight.save([])
        for batch in batches:
            with model.trace(batch, logits_to_keep=1):
                tokens = model.output.logits[:, -1].argmax(-1)
            chosen.append(tokens.cpu())
    return chosen


def lens(model, asked: list[tuple], remote=False) -> list[torch.Tensor]:
    """Probability of each prompt's target token at the embedding and each half-layer, `[1 + 2 n_layers, batch]` each.

    asked: (batch, target tokens `[batch]`) pairs.
    """
    halves = 1 + 2 * n_layers(model)
    with session(model, remote):
        of_batches = nnsight.save([])
        for batch, targets in asked:
            probabilities = torch.zeros(halves, len(targets))
            with model.trace(batch, logits_to_keep=1):
                for half in range(halves):
                    layer = (half - 1) // 2
                    if half == 0:
                        stream = layers(model)[0].input
                    else:
                        stream = mlp_norm(model, layer).input if half % 2 else layers(model)[layer].output
                    logits = unembed(model, stream[:, -1])  # [batch, vocab]
                    chosen = logits.gather(1, targets[:, None].to(logits.device))[:, 0]
                    probabilities[half] = (chosen - logits.logsumexp(-1)).exp().cpu()
            of_batches.append(probabilities)
    return of_batches


def by_prompt(of_batches: list[torch.Tensor]) -> np.ndarray:
    """What `lens` returns as one array, `[n_prompts, 1 + 2 n_layers]` float64."""
    return torch.cat(of_batches, 1).T.double().numpy()


def summary(toxic: np.ndarray, pre: np.ndarray, post: np.ndarray, seed: int) -> dict:
    """Over toxic and over plain prompts: both models' probabilities, and how DPO changes the last one.

    Args:
        toxic: `[n_prompts]` bool.
        pre, post: probabilities before and after DPO, `[n_prompts, 1 + 2 n_layers]`.
        seed: of the resamples.
    """
    row = {}
    for kind, prompts in (("toxic", toxic), ("plain", ~toxic)):
        row[kind] = {"prompts": int(prompts.sum())}
        if prompts.any():
            resamples, before, after = Bootstrap(int(prompts.sum()), seed), pre[prompts], post[prompts]
            row[kind]["pre"], row[kind]["post"] = rises(before, resamples), rises(after, resamples)
            row[kind]["change"] = resamples.difference(after[:, -1], before[:, -1])
            row[kind]["percent_left"] = resamples.ratio(100 * after[:, -1], before[:, -1])
    return row


def rises(probabilities: np.ndarray, resamples: Bootstrap) -> dict:
    """Means over prompts with intervals, and where they rise. probabilities `[prompts, 1 + 2 n_layers]`."""
    steps = np.diff(probabilities, axis=1)
    mean = steps.mean(0)
    up = np.clip(mean, 0, None)
    resampled = np.clip([steps[rows].mean(0) for rows in resamples.rows], 0, None)  # [RESAMPLES, 2 n_layers]
    by_mlps = 100 * resampled[:, 1::2].sum(1) / np.maximum(resampled.sum(1), 1e-30)
    low, high = np.percentile([probabilities[rows].mean(0) for rows in resamples.rows], (2.5, 97.5), axis=0)
    return {
        "probability": probabilities.mean(0).tolist(),
        "low": low.tolist(),
        "high": high.tolist(),
        "mlp_share_of_rise": interval(100 * up[1::2].sum() / max(up.sum(), 1e-30), by_mlps),
        "raised_most": [f"L{at // 2} {HALVES[at % 2]}" for at in np.argsort(-mean)[:SHADED] if mean[at] > 0],
    }


def show(inputs, record: dict, lines: list[dict]) -> None:
    """Print probabilities at the end, what is left after DPO, and which half-layers raise the token."""
    console, rows = tables.wide_console(), record["rows"]
    common = Counter(line["token"] for line in lines if line["toxic"]).most_common(5)
    clean = str if inputs.options["raw_text"] else metrics.mask
    shown = ", ".join(f"{clean(token)!r} {count}" for token, count in common)
    console.print(f"Toxic next tokens: {shown}", markup=False)
    table = []
    for kind in ("toxic", "plain"):
        if not rows[0][kind]["prompts"]:
            continue
        table.append((f"prompts whose next token is {kind}", [row[kind]["prompts"] for row in rows], None))
        for name, text in (("pre", "before DPO"), ("post", "after DPO")):
            table.append((f"  its probability {text}", [row[kind][name]["probability"][-1] for row in rows], None))
            shares = [row[kind][name]["mlp_share_of_rise"] for row in rows]
            table.append(("    MLPs' share of all rises, %", shares, None))
        table.append(("  left after DPO, %", [row[kind]["percent_left"] for row in rows], None))
    tables.show(console, record, table)
    for name, text in (("pre", "before DPO"), ("post", "after DPO")):
        console.print(f"Raised most {text}: {', '.join(rows[0]['toxic'][name]['raised_most'])}")
    console.print(f"Record, prompts and figure: {inputs.out}", soft_wrap=True)


if __name__ == "__main__":
    command()
