"""A DPO step of this project against the naive step, on the embedded model, in one process, in turn.

naive: logits of every position, prompts and padding included, and the reference model run in every step.
ours:  logits at response positions alone, the reference's log-probabilities taken once before training.

    python tests/bench/bench_dpo_step.py            # a few minutes on two CPU cores
"""

import copy
import json
import statistics
import time

import click

from lib.cli import options


@click.command(help=__doc__.split("\n")[0])
@options("model", "device")
@click.option("--batch-size", type=click.IntRange(1), default=4, show_default=True, help="Pairs.")
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True, help="Timed steps of each.")
def main(model, device, batch_size, rounds):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from dpo.config import make_config
    from dpo.data import collate, tokenize
    from dpo.loss import dpo_loss, response_log_probs
    from dpo.train import objective, prepare
    from lib import data, results
    from lib.models import pick_device, resolve

    device = pick_device(device)
    folder = resolve(model).path
    policy = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    reference = copy.deepcopy(policy).requires_grad_(False)
    config = make_config("embedded", model, batch_size=batch_size)
    pairs = data.pairs().items[: batch_size * (rounds + 1)]
    tokens = tokenize(AutoTokenizer.from_pretrained(folder), pairs, config.max_prompt, config.max_response, False)
    optimizer = torch.optim.RMSprop(policy.parameters(), lr=1e-12)  # so small that both always see one model
    known = [(0.0, 0.0)] * len(tokens)  # what is computed once is not part of the step

    def naive(indices: list[int]) -> None:
        policy.get_input_embeddings().sparse = False
        batch = collate([tokens[i] for i in indices]).to(device)
        inputs = {"input_ids": batch.ids, "attention_mask": batch.attention.long(), "position_ids": batch.positions}
        start = batch.ids.shape[1] - batch.targets.shape[1] - 1

        def log_probs(network):
            logits = network(**inputs, use_cache=False).logits  # [rows, positions, vocab]
            return response_log_probs(logits[:, start:-1], batch.targets, batch.mask).chunk(2)

        with torch.no_grad():
            fixed = log_probs(reference)
        dpo_loss(*log_probs(policy), *fixed, config.beta)[0].mean().backward()

    def ours(indices: list[int]) -> None:
        prepare(policy)
        objective(policy, None, tokens, known, [indices], config, device)

    seconds = {"naive": [], "ours": []}
    for turn in range(rounds + 1):  # the first turn warms up
        indices = list(range(turn * batch_size, (turn + 1) * batch_size))
        for name, step in (("naive", naive), ("ours", ours)):
            started = time.perf_counter()
            step(indices)
            torch.nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if device == "cuda":
                torch.cuda.synchronize()
            if turn:
                seconds[name].append(time.perf_counter() - started)
    medians = {name: round(statistics.median(values), 3) for name, values in seconds.items()}
    ratio = statistics.median(o / n for o, n in zip(seconds["ours"], seconds["naive"], strict=True))
    shape = {"model": model, "device": device, "pairs": batch_size, "rounds": rounds}
    click.echo(
        json.dumps(
            {
                **results.provenance(threads=torch.get_num_threads()),
                **shape,
                "seconds_per_step": medians,
                "ours_over_naive": round(ratio, 3),
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
