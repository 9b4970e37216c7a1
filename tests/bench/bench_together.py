"""Several conditions of one table in one trace, an invoke each, against one after the other, in turn.

python tests/bench/bench_together.py              # about four minutes on two CPU cores
"""

import click

from lib.cli import options

CONDITIONS = 3


@click.command(help=__doc__.split("\n")[0])
@options("model", "device", "dtype")
@click.option("--rounds", type=click.IntRange(1), default=2, show_default=True, help="Timed turns.")
def main(model, device, dtype, rounds):
    import torch
    from bench_generation import make_inputs, patch_script
    from timing import in_turn, medians, paired, row, say

    from lib.families import mlp_out
    from lib.generation import NEW_TOKENS, greedy
    from lib.interventions import edited
    from lib.models import load, resolve

    script, traced = patch_script(), load(resolve(model), device, dtype)
    everywhere, rows = slice(None), []
    for prompts in (8, 16, 64):
        batch, edit = make_inputs(traced, prompts)
        found = {}

        def apart(batch=batch, edit=edit, found=found):
            found["apart"] = torch.cat([script.generate(traced, batch, edit, everywhere) for _ in range(CONDITIONS)])

        def together(batch=batch, edit=edit, found=found):
            with traced.generate(**greedy()) as tracer:
                for _ in range(CONDITIONS):
                    with tracer.invoke(batch):
                        for _ in tracer.iter[:NEW_TOKENS]:
                            for layer, index, value in edit:
                                neurons = mlp_out(traced, layer).input
                                neurons[:, everywhere, index] = edited(edit.kind, neurons[:, everywhere, index], value)
                with tracer.invoke():
                    ids = tracer.result.save()
            found["together"] = ids[:, batch["input_ids"].shape[1] :]

        seconds = in_turn({"apart": apart, "together": together}, rounds)
        alike = float((found["apart"] == found["together"]).all(1).float().mean())
        rows.append(
            row(
                f"{CONDITIONS} conditions of {prompts} prompts in one trace",
                "one after the other",
                paired(seconds, "apart", "together"),
                ">= 1",
                unit="times as fast",
                seconds=medians(seconds),
                rows_alike=alike,
            )
        )
    say(*rows, model=model)


if __name__ == "__main__":
    main()
