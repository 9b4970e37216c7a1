"""Command line of the DPO trainer.

    python -m dpo                                        the embedded model and pairs, a few minutes on two cores
    python -m dpo --model gpt2 --preset lee2024 --pairs pairs.jsonl --out checkpoints/gpt2-dpo

Without --out the checkpoint goes to the cache, where every script looks for it. A killed run goes on from its last
saved state when the same command is run again, also with another number of processes.

\b
    torchrun --nproc-per-node 4 -m dpo --model llama ... weights in shards over 4 GPUs
"""

import json
from pathlib import Path

import click

from lib.cli import LARGEST_SEED, Finite, options
from lib.embedded import EMBEDDED


@click.command(help=__doc__)
@options("model", "revision", "device")
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16"]),
    default="auto",
    show_default=True,
    help="What is computed in; auto: float32, as the papers train. With bfloat16 the weights that are trained stay "
    "float32: a step is smaller than bfloat16 can hold.",
)
@options("pairs")
@click.option(
    "--preset",
    type=click.Choice(["lee2024", "yang2025", "embedded"]),
    help="Hyperparameters; the options below change single ones.  [default: embedded for the models from PyPI, else "
    "yang2025]",
)
@click.option(
    "--trainable",
    help="all, biases, late:K, values:NEURONS, keys:NEURONS or lora:R; NEURONS: names such as L19.N770,L12.N771, or a "
    "file of them.  [default: all]",
)
@click.option("--beta", type=Finite(0, min_open=True))
@click.option("--kl-weight", type=Finite(0), help="Weight of KL(reference || policy) (Yang, table 10).")
@click.option("--optimizer", type=click.Choice(["rmsprop", "adamw"]))
@click.option("--learning-rate", type=Finite(0, min_open=True))
@click.option("--warmup", type=click.IntRange(0), help="Updates.")
@click.option("--batch-size", type=click.IntRange(1), help="Pairs in memory at once.")
@click.option("--accumulate", type=click.IntRange(1), help="Such batches per update.")
@click.option("--max-grad-norm", type=Finite(0, min_open=True))
@click.option("--epochs", type=click.IntRange(1))
@click.option("--steps", type=click.IntRange(1), help="Updates at most.")
@click.option("--max-prompt", type=click.IntRange(1), help="Tokens.")
@click.option("--max-response", type=click.IntRange(1), help="Tokens.")
@click.option("--append-eos", is_flag=True, default=None, help="End uncut responses with the end-of-sequence token.")
@click.option("--valid-fraction", type=Finite(0, 0.9))
@click.option("--valid-every", type=click.IntRange(1), help="Updates.")
@click.option("--patience", type=click.IntRange(1), help="Validations without a better loss before training stops.")
@click.option("--save-every", type=click.IntRange(1), help="Updates between saved states.")
@click.option("--seed", type=click.IntRange(0, LARGEST_SEED))
@click.option("--out", type=click.Path(file_okay=False), help="Folder of the checkpoint.  [default: the cache]")
@options("overwrite", "dry-run")
def main(model, revision, device, dtype, pairs, preset, out, overwrite, dry_run, **changes):
    import dataclasses

    from dpo.config import default_preset, make_config
    from dpo.data import held_out, split, tokenize
    from dpo.trainable import check_choice, read
    from lib import artifacts, checkpoints, data, tokens
    from lib.errors import UserError
    from lib.families import shape_of
    from lib.models import pick_device, resolve, stored_entries

    if out:
        out = artifacts.resolved(Path(out))
        artifacts.check_output(out, overwrite)
    device = pick_device(device)
    if changes["trainable"]:
        changes["trainable"] = read(changes["trainable"])
    changes["dtype"] = "float32" if dtype == "auto" else dtype
    config = make_config(preset or default_preset(model), model, **changes)
    loaded = data.pairs(pairs)
    updates = config.updates(len(loaded.items) - held_out(len(loaded.items), config.valid_fraction))
    if changes["warmup"] is None and updates <= config.warmup:
        shorter = dataclasses.replace(config, warmup=updates // 10)
        click.echo(
            f"{len(loaded.items)} pairs make {updates} updates, fewer than this preset's warm-up of {config.warmup}: "
            f"the warm-up is {shorter.warmup} (bring more --pairs, or give --warmup).",
            err=True,
        )
        config = shorter
    source = resolve(model, revision)
    if source.adapter and config.trainable.startswith("lora"):
        raise UserError(f"--model {model}: is an adapter itself; merge it first, or train other parts than lora.")
    tokenizer, shape = checkpoints.read_tokenizer(source), shape_of(Path(source.path), source.name)
    tokens.check_vocabulary(tokenizer, shape.vocabulary, source.name)
    checkpoints.check(source)
    split(tokenize(tokenizer, loaded.items, config.max_prompt, config.max_response, config.append_eos),
          config.valid_fraction, config.seed)  # fmt: skip
    check_choice(config.trainable, shape)
    fields = {
        "model": source.revision,
        "pairs": loaded.sha256,
        "config": dataclasses.asdict(config),
        "device": device,
        "code": artifacts.code_version(
            *sorted(map(str, Path(__file__).parent.glob("*.py"))), tokens.__file__, checkpoints.__file__
        ),
        "versions": artifacts.versions("torch", "transformers", "peft"),
    }

    if dry_run:
        there = not out and artifacts.is_whole(artifacts.folder_of("dpo", fields))
        click.echo("The cache holds this checkpoint already." if there else plan(source, loaded, config, device))
        return

    from dpo import sharding

    place = sharding.begin(device)

    size = 4 * sum(stored_entries(Path(source.path)).values())  # float32: the best checkpoint, and the saved state's
    needs_bytes = size * (6 if config.trainable == "all" else 3)  # the best one, weights and averages twice, room

    def build(folder: Path) -> None:
        run(source, loaded, config, place, sharding.said_by_first(folder))

    try:
        if sharding.rank():  # process 0 opens the folder, unless the checkpoint is there already
            if folder := sharding.said_by_first(None):
                run(source, loaded, config, place, folder)
        elif out:
            with artifacts.output(Path(out), fields, overwrite, needs_bytes) as folder:
                build(folder)
            click.echo(out)
        else:
            there = artifacts.is_whole(artifacts.folder_of("dpo", fields))
            made = artifacts.make("dpo", fields, build, needs_bytes, resumable=True)
            if there:
                sharding.said_by_first(None)
            click.echo(made)
    finally:
        sharding.end()


def plan(source, loaded, config, device: str) -> str:
    """What training would take: an estimate from the pairs' tokens and this machine's rates."""
    import torch

    from dpo.data import split, tokenize
    from lib import rehearsal
    from lib.checkpoints import read_tokenizer

    tokenizer = read_tokenizer(source)
    pairs = tokenize(tokenizer, loaded.items, config.max_prompt, config.max_response, config.append_eos)
    trained, valid = split(pairs, config.valid_fraction, config.seed)
    of_update = config.batch_size * config.accumulate
    updates = config.updates(len(trained))
    tokens = sum(len(pair.chosen) + len(pair.rejected) for pair in pairs) / len(pairs)
    answers = tokens - sum(pair.chosen_start + pair.rejected_start for pair in pairs) / len(pairs)
    body, head = rehearsal.sizes(source.path)
    # Forward, again by layers in the backward pass, and backward twice as much; the reference's pass over all once.
    passes = [(4 * tokens * of_update, 3 * answers * of_update)] * updates
    passes += [(tokens * of_update, answers * of_update)] * (len(pairs) // of_update)
    seconds = rehearsal.seconds(passes, body, head, getattr(torch, config.dtype).itemsize, device)
    kept = 4 if config.trainable == "all" else 1  # weights, gradients, the optimizer's averages and their roots
    logits = 12 * config.batch_size * answers * len(tokenizer)
    memory = 4 * kept * (body + head) + logits + rehearsal.RUNTIME
    lines = [
        f"{source.name}: {(body + head) / 1e6:,.0f} million parameters, {config.trainable} trained",
        f"{updates} updates of {of_update} of {len(trained)} pairs, {len(valid)} held out",
        config.ends_in_warmup(updates),
        f"about {rehearsal.said(seconds)} at most, {memory / 1e9:.0f} GB of memory, "
        f"{4 * (body + head) / 1e9:.1f} GB of disk",
        "An estimate: twice the floor by this machine's measured rates. Nothing was trained or written.",
    ]
    return "\n".join(line for line in lines if line)


def run(source, loaded, config, device: str, folder: Path) -> None:
    """Load the model and train into `folder`, showing the progress."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from dpo import sharding
    from dpo.train import train
    from lib import plots
    from lib.checkpoints import read_module, read_tokenizer
    from lib.results import versions

    # PEFT trains adapters in float32 whatever the frozen weights are in.
    held = config.dtype if config.trainable.startswith("lora") else "float32"
    model, tokenizer = read_module(source, held, device), read_tokenizer(source)
    about = {
        "model": source.name,
        "model_revision": source.revision,
        "pairs": loaded.provenance,
        "dtype": config.dtype,
        "device": device,
        "versions": versions(),
    }
    columns = [
        TextColumn("DPO"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[said]}"),
    ]
    with Progress(*columns, console=Console(stderr=True, quiet=sharding.rank() > 0)) as bar:
        task = bar.add_task("DPO", total=None, said="reference log-probabilities")

        def progress(done: int, total: int, record: dict) -> None:
            if bar.tasks[task].total is None and (warning := config.ends_in_warmup(total)):
                bar.console.print(warning)
            said = f"loss {record['loss']:.3f}  accuracy {record['accuracy']:.2f}  margin {record['margin']:.3f}"
            bar.update(task, completed=done, total=total, said=said)
            if "valid_loss" in record:
                bar.console.print(
                    f"update {done}: validation loss {record['valid_loss']:.3f}, "
                    f"accuracy {record['valid_accuracy']:.2f}, margin {record['valid_margin']:.3f}"
                )

        train(model, tokenizer, loaded.items, config, folder, about, progress)
    if sharding.rank() == 0:
        log = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
        plots.training([json.loads(line) for line in log], folder / "figures" / "training.png")
    adapter = folder / "adapter_config.json"
    if sharding.rank() == 0 and adapter.exists():  # PEFT wrote the folder that the base model lay in
        described = json.loads(adapter.read_text()) | base_of_adapter(source)
        adapter.write_text(json.dumps(described, indent=1) + "\n")


def base_of_adapter(source) -> dict:
    """How a LoRA checkpoint names its base model: a Hub id and commit, a folder, or an embedded model's name."""
    from lib.models import MODELS

    if Path(source.name).is_dir():
        return {"base_model_name_or_path": str(Path(source.name).resolve()), "revision": None}
    on_hub = source.name not in EMBEDDED
    return {
        "base_model_name_or_path": MODELS.get(source.name, source.name),
        "revision": source.revision if on_hub else None,
    }


if __name__ == "__main__":
    main(prog_name="python -m dpo")
