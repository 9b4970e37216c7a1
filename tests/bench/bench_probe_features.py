"""Probe features of 2,000 comments against one text at a time, padded to 128 tokens, as the papers' code takes them.

The rival takes a sample of the same comments and its rate counts; both must give the same features (means over the real
tokens before the final norm).

    python tests/bench/bench_probe_features.py        # about two minutes on two CPU cores
"""

import time

import click

from lib.cli import options

COMMENTS, SAMPLE = 2000, 32


@click.command(help=__doc__.split("\n")[0])
@options("model", "device", "dtype")
def main(model, device, dtype):
    import numpy as np
    import rival
    import torch
    from timing import row, say

    from lib import data
    from lib.families import FAMILIES, reach
    from lib.models import load, resolve
    from lib.probes import PADDED_LENGTH, mean_residuals

    traced = load(resolve(model), device, dtype)
    embedded = [text for text, _ in data.comments().items]
    texts = (embedded * -(-COMMENTS // len(embedded)))[:COMMENTS]
    network, tokenizer = rival.load(resolve(model).path, traced.device, traced.dtype)
    sample = texts[:: COMMENTS // SAMPLE][:SAMPLE]

    last = {}

    def keep(module, args, output):  # the last of transformers' hidden states has passed the final norm
        last["residual"] = output[0] if isinstance(output, tuple) else output

    def one_at_a_time(**given) -> tuple[np.ndarray, float]:
        found, started = [], time.perf_counter()
        for text in sample:
            batch = tokenizer(
                text, padding="max_length", padding_side="left", truncation=True, max_length=PADDED_LENGTH,
                return_tensors="pt", return_special_tokens_mask=True, return_token_type_ids=False,
            ).to(traced.device)  # fmt: skip
            real = (batch["attention_mask"].bool() & ~batch.pop("special_tokens_mask").bool())[0]
            with torch.no_grad():
                network(**batch, **given)
            found.append(last["residual"][0, real].float().mean(0).cpu().numpy())
        return np.stack(found), (time.perf_counter() - started) / SAMPLE

    handle = reach(network, FAMILIES[network.config.model_type].layers)[-1].register_forward_hook(keep)
    theirs, theirs_seconds = one_at_a_time(output_hidden_states=True)
    _, lean = one_at_a_time(logits_to_keep=1)
    handle.remove()
    mean_residuals(traced, texts[:32], 32, "tokens")  # warm
    started = time.perf_counter()
    features = mean_residuals(traced, texts, 32, "tokens")
    ours = (time.perf_counter() - started) / COMMENTS
    mine = features[:: COMMENTS // SAMPLE][:SAMPLE]
    difference = float(np.abs(mine - theirs).max() / np.abs(theirs).max())
    if difference > 1e-4:
        raise SystemExit(f"the features differ by {difference:.1e} of the largest")
    say(
        row(
            "probe features of 2,000 comments",
            "one text at a time, padded to 128",
            theirs_seconds / ours,
            ">= 8",
            unit="times as fast",
            seconds_per_comment={"rival": theirs_seconds, "rival without logits": lean, "ours": ours},
            difference=difference,
        ),
        model=model,
    )


if __name__ == "__main__":
    main()
