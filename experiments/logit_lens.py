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

from lib.cli import options
from lib.families import layers, mlp_norm, n_layers, unembed
from lib.observation import OPTIONS

HALVES = ("mid", "end")  # after attention, after the MLP
SHADED = 4  # half-layers that the figure shades: those that raise the token most
ALL = 1_000_000  # prompts: one forward pass each needs no smaller default
UNREAD = {
    "probe": None,
    "comments": "embedded",
    "protocol": "sound",
    "released": [],
}  # no probe, no choice of the audit


@click.command(help=__doc__.split("\n")[0])
@options(*(name for name in OPTIONS if name not in UNREAD), "raw-text")
@click.option("--tokens", help="Toxic tokens, separated by commas, spaces kept.  [default: what --judge finds]")
@click.option("--judge", default="words", show_default=True, help="Scorer that says which next tokens are toxic.")
def main(tokens, judge, **options):
    from lib import metrics, observation

    verdict = None if tokens else metrics.scorer(judge)
    options["limit"] = options["limit"] or ALL
    given = tokens.split(",") if tokens else None
    with observation.begin("logit_lens", {**options, **UNREAD, "judge": judge, "tokens": given}, ("post",)) as run:
        ids = single_tokens(run.base.tokenizer, given) if given else None
        rows, lines = [], []
        for stage in run.stages(means=False):
            measured = measure(run, stage, verdict, ids)
            rows.append(summary(run, stage.seed, *measured))
            lines = lines or measured[0]
        record = write(run, rows, lines)
    report(run, record, lines)


def single_tokens(tokenizer, given: list[str]) -> list[int]:
    """Ids of texts that are one token each. Raises UserError with the split of one that is not."""
    from lib.errors import UserError
    from lib.tokens import inner_ids

    found = []
    for text, ids in zip(given, inner_ids(tokenizer, given), strict=True):
        if len(ids) != 1:
            parts = " | ".join(tokenizer.decode([i]) for i in ids) or "nothing"
            raise UserError(
                f"--tokens {text!r}: {len(ids)} tokens ({parts}) where one is expected; mind leading spaces."
            )
        found += ids
    return found


def measure(run, stage, verdict, ids: list[int] | None) -> tuple:
    """What each prompt's next token is, and its probability after each half-layer of both models.

    Returns: a line for each prompt, and `{"pre", "post"}` of `[n_prompts, 1 + 2 n_layers]`.
    """
    import torch

    from lib import observation
    from lib.errors import UserError

    base, asked = run.base, observation.prompts_of(run)
    chosen = next_tokens(base, asked, run.remote)
    models = {"pre": base, "post": stage.post}
    parts = {name: lens(model, list(zip(asked, chosen, strict=True)), run.remote) for name, model in models.items()}
    targets = [i for part in chosen for i in part.tolist()]
    texts = [base.tokenizer.decode([i]) for i in targets]
    toxic = [i in ids for i in targets] if ids else (verdict(texts) > 0.5).tolist()
    if not any(toxic):
        what = ", ".join(map(repr, run.options["tokens"])) if ids else "a listed word"
        raise UserError(f"--prompts: none of {len(toxic)} has {what} as its next token; give more or other prompts.")
    lines = [
        {"prompt": prompt, "token": token, "toxic": bool(bad)}
        for prompt, token, bad in zip(run.prompts.items, texts, toxic, strict=True)
    ]
    return lines, {name: torch.cat(found, 1).T.double().numpy() for name, found in parts.items()}


def next_tokens(model, batches: list[dict], remote=False) -> list:
    """The most likely next token of each prompt, `[batch]` of each batch."""
    import nnsight

    from lib.remote import session

    with session(model, remote):
        found = nnsight.save([])
        for batch in batches:
            with model.trace(batch, logits_to_keep=1):
                tokens = model.output.logits[:, -1].argmax(-1)
            found.append(tokens.cpu())
    return found


def lens(model, asked: list[tuple], remote=False) -> list:
    """Probability of each prompt's target token at the embedding and each half-layer, `[1 + 2 n_layers, batch]` each.

    asked: (batch, target tokens `[batch]`) pairs.
    """
    import nnsight
    import torch

    from lib.remote import session

    halves = 1 + 2 * n_layers(model)
    with session(model, remote):
        every = nnsight.save([])
        for batch, targets in asked:
            found = torch.zeros(halves, len(targets))
            with model.trace(batch, logits_to_keep=1):
                for half in range(halves):
                    layer = (half - 1) // 2
                    if half == 0:
                        stream = layers(model)[0].input
                    else:
                        stream = mlp_norm(model, layer).input if half % 2 else layers(model)[layer].output
                    logits = unembed(model, stream[:, -1])  # [batch, vocab]
                    chosen = logits.gather(1, targets[:, None].to(logits.device))[:, 0]
                    found[half] = (chosen - logits.logsumexp(-1)).exp().cpu()
            every.append(found)
    return every


def summary(run, seed: int, lines: list[dict], probabilities: dict) -> dict:
    """One seed's row: means with intervals over toxic and over plain prompts, and where the probability rises."""
    import numpy as np

    from lib.statistics import Bootstrap, interval

    toxic = np.array([line["toxic"] for line in lines])
    row = {"seed": seed}
    for kind, chosen in (("toxic", toxic), ("plain", ~toxic)):
        row[kind] = {"prompts": int(chosen.sum())}
        if not chosen.any():
            continue
        resamples = Bootstrap(int(chosen.sum()), run.options["seed"])
        last = {}
        for name in ("pre", "post"):
            values = probabilities[name][chosen]  # [prompts, 1 + 2 * n_layers]
            steps = np.diff(values, axis=1)
            mean = steps.mean(0)
            rises = np.clip([steps[rows].mean(0) for rows in resamples.rows], 0, None)  # [RESAMPLES, 2 * n_layers]
            by_mlp = 100 * rises[:, 1::2].sum(1) / np.maximum(rises.sum(1), 1e-30)
            up = np.clip(mean, 0, None)
            low, high = np.percentile([values[rows].mean(0) for rows in resamples.rows], (2.5, 97.5), axis=0)
            row[kind][name] = {
                "probability": values.mean(0).tolist(),
                "low": low.tolist(),
                "high": high.tolist(),
                "mlp_share_of_rise": interval(100 * up[1::2].sum() / max(up.sum(), 1e-30), by_mlp),
                "raised_most": [f"L{at // 2} {HALVES[at % 2]}" for at in np.argsort(-mean)[:SHADED] if mean[at] > 0],
            }
            last[name] = values[:, -1]
        row[kind]["change"] = resamples.difference(last["post"], last["pre"])
        row[kind]["percent_left"] = resamples.ratio(100 * last["post"], last["pre"])
    return row


def write(run, rows: list[dict], lines: list[dict]) -> dict:
    """The record of all seeds, prompts and figure of the first."""
    from lib import observation, plots, results

    results.write_lines(run.work / "lens.jsonl", lines)
    plots.logit_lens(rows[0], run.work / "figures" / "logit_lens.png")
    return observation.write(run, rows, {}, judge=run.options["judge"], tokens=run.options["tokens"])


def report(run, record: dict, lines: list[dict]) -> None:
    """Print probabilities at the end, what is left after DPO, and which half-layers raise the token."""
    from collections import Counter

    from lib.metrics import mask
    from lib.tables import show, wide_console

    console, rows = wide_console(), record["rows"]
    common = Counter(line["token"] for line in lines if line["toxic"]).most_common(5)
    shown = ", ".join(f"{token if run.options['raw_text'] else mask(token)!r} {count}" for token, count in common)
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
    show(console, record, table)
    for name, text in (("pre", "before DPO"), ("post", "after DPO")):
        console.print(f"Raised most {text}: {', '.join(rows[0]['toxic'][name]['raised_most'])}")
    console.print(f"Record, prompts and figure: {run.out}", soft_wrap=True)


if __name__ == "__main__":
    main()
