"""Mean activations from the generation's own trace against generating and then reading everything again.

python tests/bench/bench_mean_activations.py      # about two minutes on two CPU cores
"""

import click

from lib.cli import options


@click.command(help=__doc__.split("\n")[0])
@options("model", "device", "dtype")
@click.option("--batch-size", type=click.IntRange(1), default=48, show_default=True, help="Prompts.")
@click.option("--rounds", type=click.IntRange(1), default=2, show_default=True, help="Timed batches of each.")
def main(model, device, dtype, batch_size, rounds):
    import rival
    import torch
    from timing import in_turn, medians, paired, row, say

    from lib import data
    from lib.models import load, resolve
    from lib.neurons import mean_activations

    traced = load(resolve(model), device, dtype)
    plain, tokenizer = rival.load(resolve(model).path, traced.device, traced.dtype)
    prompts = data.prompts().items[:batch_size]
    found = {}

    def ours():
        *_, found["ours"] = mean_activations(traced, prompts, batch_size)

    def theirs():
        found["theirs"] = rival.generate_then_read(plain, tokenizer, prompts, batch_size)

    seconds = in_turn({"rival": theirs, "ours": ours}, rounds)
    torch.testing.assert_close(found["ours"].activation, found["theirs"], rtol=1e-3, atol=1e-5)
    say(
        row(
            "mean activations",
            "generate, then forward again",
            paired(seconds, "rival"),
            ">= 1.8",
            unit="times as fast",
            seconds=medians(seconds),
            prompts=batch_size,
        ),
        model=model,
    )


if __name__ == "__main__":
    main()
