"""Patched generation in an nnsight trace against raw PyTorch hooks around `generate`, in one process, in turn.

Both clamp half of all neurons in every layer at every position, on the same prompts, and must give the same ids.

    python tests/bench/bench_generation.py            # about two minutes on two CPU cores
"""

import importlib.util
import json
import statistics
import time
from pathlib import Path

import click

from lib.cli import options

SCRIPT = Path(__file__).parents[2] / "experiments" / "patch_four_groups.py"


@click.command(help=__doc__.split("\n")[0])
@options("model", "device", "dtype")
@click.option("--batch-size", type=click.IntRange(1), default=48, show_default=True, help="Prompts.")
@click.option("--rounds", type=click.IntRange(1), default=4, show_default=True, help="Timed batches of each.")
def main(model, device, dtype, batch_size, rounds):
    import torch

    from lib import data, interventions, results
    from lib.generation import NEW_TOKENS, batches, greedy
    from lib.models import d_mlp, load, mlp_out, n_layers, resolve

    spec = importlib.util.spec_from_file_location("patch_four_groups", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    traced = load(resolve(model), device, dtype)
    (batch,) = batches(traced.tokenizer, data.prompts().items[:batch_size], batch_size, traced.device)
    torch.manual_seed(0)
    shape = (n_layers(traced), d_mlp(traced))
    edit = interventions.clamp(torch.rand(shape) < 0.5, torch.zeros(shape), 0.01 * torch.randn(shape)).edit()
    everywhere = slice(None)

    def raw() -> torch.Tensor:
        handles = []
        for layer, index, value in edit:
            index, value = index.to(traced.device), value.to(traced.device, traced.dtype)

            def hook(module, args, index=index, value=value):
                args[0][:, everywhere, index] = value

            handles.append(mlp_out(traced, layer)._module.register_forward_pre_hook(hook))
        try:
            with torch.no_grad():
                return traced._module.generate(**batch, **greedy())[:, batch["input_ids"].shape[1] :]
        finally:
            for handle in handles:
                handle.remove()

    def ours() -> torch.Tensor:
        return script.generate(traced, batch, edit, everywhere)

    if not torch.equal(raw(), ours()):
        raise SystemExit("the two gave different ids")
    seconds = {"raw hooks": [], "nnsight": []}
    for turn in range(rounds):
        order = [("raw hooks", raw), ("nnsight", ours)]
        for name, run in order if turn % 2 else reversed(order):
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    tokens = batch_size * NEW_TOKENS
    rates = {name: round(tokens / statistics.median(values), 1) for name, values in seconds.items()}
    ratio = statistics.median(r / n for r, n in zip(seconds["raw hooks"], seconds["nnsight"], strict=True))
    about = {"model": model, "batch_size": batch_size, "neurons_edited": edit.n_neurons, "rounds": rounds}
    click.echo(
        json.dumps(
            {
                **results.provenance(threads=torch.get_num_threads()),
                **about,
                "tokens_per_second": rates,
                "nnsight_over_raw": round(ratio, 3),
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
