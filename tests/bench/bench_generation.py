"""Patched generation in an nnsight trace against raw PyTorch hooks around `generate`, in one process, in turn.

Both clamp half of all neurons in every layer at every position, on the same prompts, and must give the same ids. Then
`--batches` batches of a tiny model, whose memory must not grow; and the floor: what the matrix products and the reading
of the weights would take at this machine's measured rates.

    python tests/bench/bench_generation.py            # about two minutes on two CPU cores
    python tests/bench/bench_generation.py --rounds 1 --batches 1000
"""

import importlib.util
import sys
from pathlib import Path

import click

from lib.cli import options

ROOT = Path(__file__).parents[2]


@click.command(help=__doc__.split("\n")[0])
@options("model", "device", "dtype")
@click.option("--batch-size", type=click.IntRange(1), default=48, show_default=True, help="Prompts.")
@click.option("--rounds", type=click.IntRange(1), default=4, show_default=True, help="Timed batches of each.")
@click.option("--batches", type=click.IntRange(100), default=200, show_default=True, help="Of the tiny model.")
def main(model, device, dtype, batch_size, rounds, batches):
    import rival
    import torch
    from timing import in_turn, machine, medians, paired, row, say

    from lib.generation import NEW_TOKENS, greedy
    from lib.models import load, resolve

    script = patch_script()
    traced = load(resolve(model), device, dtype)
    plain, _ = rival.load(resolve(model).path, traced.device, traced.dtype)
    batch, edit = make_inputs(traced, batch_size)
    width, everywhere = batch["input_ids"].shape[1], slice(None)

    def raw() -> torch.Tensor:
        with rival.hooked(plain, rival.clamping(edit, everywhere, plain.device)), torch.no_grad():
            return plain.generate(**batch, **greedy())[:, width:]

    def ours() -> torch.Tensor:
        return script.generate(traced, batch, edit, everywhere)

    alike = float((raw() == ours()).all(1).float().mean())  # all but near ties of two tokens
    if alike < 0.9:
        raise SystemExit(f"only {100 * alike:.0f} % of the rows are the same")
    seconds = in_turn({"raw hooks": raw, "ours": ours}, rounds, warm=0)
    least = floor(traced, batch_size, width, NEW_TOKENS, machine(traced.device.type))
    tokens = batch_size * NEW_TOKENS
    growth = grown(script, batches)
    say(
        row(
            "patched generation",
            "raw PyTorch hooks",
            paired(seconds, "raw hooks"),
            ">= 0.95",
            unit="of its tokens per second",
            tokens_per_second={name: round(tokens / value, 1) for name, value in medians(seconds).items()},
            neurons_edited=edit.n_neurons,
            batch_size=batch_size,
            prompt_positions=width,
            rows_alike=alike,
            floor_tokens_per_second=round(tokens / least, 1),
            times_the_floor=round(medians(seconds)["ours"] / least, 2),
        ),
        row(
            f"memory after {batches} batches of patched generation",
            "after a quarter of them",
            growth,
            "<= 2",
            unit="MB more",
        ),
        model=model,
    )


def patch_script():
    """experiments/patch_four_groups.py, as a module."""
    spec = importlib.util.spec_from_file_location("patch", ROOT / "experiments" / "patch_four_groups.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def make_inputs(model, batch_size: int) -> tuple[dict, object]:
    """A batch of prompts, and a clamp of half of all neurons."""
    import torch

    from lib import data, interventions
    from lib.families import d_mlp, n_layers
    from lib.generation import batches

    prompts = (data.prompts().items * (1 + batch_size // 64))[:batch_size]
    (batch,) = batches(model.tokenizer, prompts, batch_size, model.device)
    generator = torch.Generator().manual_seed(0)
    shape = (n_layers(model), d_mlp(model))
    mask, value = torch.rand(shape, generator=generator) < 0.5, 0.01 * torch.randn(shape, generator=generator)
    return batch, interventions.clamp(mask, torch.zeros(shape), value).edit()


def floor(model, rows: int, width: int, new: int, rates: dict[str, float]) -> float:
    """Seconds that a batch takes at least: every weight is read once a step; the embedding, here the head too, is
    multiplied once a row and new token, every other weight once a position.
    """
    embedding = model._module.get_input_embeddings().weight.numel()
    inner = sum(p.numel() for p in model._module.parameters()) - embedding
    steps = [(inner * width + embedding) * rows] + [(inner + embedding) * rows] * (new - 1)
    size = (inner + embedding) * model.dtype.itemsize
    return sum(max(2 * products / rates["flops"], size / rates["bytes"]) for products in steps)


def grown(script, batches: int) -> float:
    """MB by which memory grew from a quarter of the batches on, on a tiny random model."""
    import tempfile

    import psutil

    from lib.models import load, resolve

    sys.path.insert(0, str(ROOT / "tests"))
    from tiny_models import build_model, build_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        tokenizer = build_tokenizer(bos=True)
        build_model("llama", len(tokenizer)).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        model = load(resolve(folder))
        batch, edit = make_inputs(model, 4)
        for at in range(batches):
            script.generate(model, batch, edit, slice(None))
            if at == batches // 4:
                before = psutil.Process().memory_info().rss
        return (psutil.Process().memory_info().rss - before) / 1e6


if __name__ == "__main__":
    main()
