"""Command line of the DPO trainer.

    python -m dpo                                        the embedded model and pairs, a few minutes on two cores
    python -m dpo --model gpt2 --preset lee2024 --pairs pairs.jsonl --out checkpoints/gpt2-dpo

Without --out the checkpoint goes to the cache, where every script looks for it. A killed run goes on from its last
saved state when the same command is run again, also with another number of processes.

\b
    torchrun --nproc-per-node 4 -m dpo --model llama ... weights in shards over 4 GPUs
"""

import click

from lib import cli
from lib.cli import LARGEST_SEED, Finite, options

PROGRAM = "python -m dpo"


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
@options("preset")
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
def command(**given):
    main(**given)


cli.check(command, __name__, PROGRAM)  # --help and wrong options end here, before torch is imported

import dataclasses
import json
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dpo import sharding, trainable
from dpo.config import Config, default_preset, make_config
from dpo.data import TokenPair, held_out, split, tokenize
from dpo.train import train
from lib import artifacts, checkpoints, data, models, plots_training, results, tokens
from lib.dry_run import RUNTIME, said, seconds, sizes
from lib.embedded import EMBEDDED
from lib.errors import UserError
from lib.families import shape_of


def main(model, revision, device, dtype, pairs, preset, out, overwrite, dry_run, **changes):
    """Train, and print the checkpoint's folder; with `dry_run` print what that would take."""
    # 1. The options are checked.
    if out:
        out = artifacts.resolved(Path(out))
        artifacts.check_output(out, overwrite)
    device = models.pick_device(device)
    if changes["trainable"]:
        changes["trainable"] = trainable.read(changes["trainable"])
    changes["dtype"] = "float32" if dtype == "auto" else dtype
    config = make_config(preset or default_preset(model), model, **changes)

    # 2. The pairs are read.
    preferences = data.pairs(pairs)
    if changes["warmup"] is None:
        config = with_fitting_warmup(config, len(preferences.items))

    # 3. The model is checked, and the pairs with its tokenizer.
    source = models.resolve(model, revision)
    if source.adapter and config.trainable.startswith("lora"):
        raise UserError(f"--model {model}: is an adapter itself; merge it first, or train other parts than lora.")
    tokenizer, shape = checkpoints.read_tokenizer(source), shape_of(Path(source.path), source.name)
    tokens.check_vocabulary(tokenizer, shape.vocabulary, source.name)
    checkpoints.check(source)
    token_pairs = tokenize(tokenizer, preferences.items, config.max_prompt, config.max_response, config.append_eos)
    train_pairs, valid_pairs = split(token_pairs, config.valid_fraction, config.seed)
    trainable.check_choice(config.trainable, shape)
    # Which variants there are decides nothing about one of them.
    training_code = sorted(str(file) for file in Path(__file__).parent.glob("*.py") if file.stem != "variants")
    determinants = {
        "model": source.revision,
        "pairs": preferences.sha256,
        "config": dataclasses.asdict(config),
        "device": device,
        "code": artifacts.code_version(*training_code, *checkpoints.CODE),
        "versions": artifacts.versions("torch", "transformers", "peft"),
    }

    # 4. A dry run tells the plan and ends.
    if dry_run:
        is_cached = not out and artifacts.is_whole(artifacts.folder_of("dpo", determinants))
        click.echo(
            "The cache holds this checkpoint already."
            if is_cached
            else plan(source, len(tokenizer), train_pairs, valid_pairs, config, device)
        )
        return

    # 5. The model is trained, unless the cache holds the checkpoint.
    if checkpoint := make_checkpoint(source, preferences, config, device, determinants, out, overwrite):
        click.echo(checkpoint)


def with_fitting_warmup(config: Config, n_pairs: int) -> Config:
    """The configuration, with a shorter warm-up (and a line that says so) where the pairs make too few updates."""
    updates = config.updates(n_pairs - held_out(n_pairs, config.valid_fraction))
    if updates > config.warmup:
        return config
    shorter = dataclasses.replace(config, warmup=updates // 10)
    click.echo(
        f"{n_pairs} pairs make {updates} updates, fewer than this preset's warm-up of {config.warmup}: "
        f"the warm-up is {shorter.warmup} (bring more --pairs, or give --warmup).",
        err=True,
    )
    return shorter


def plan(
    source, vocabulary: int, train_pairs: list[TokenPair], valid_pairs: list[TokenPair], config: Config, device: str
) -> str:
    """What training would take: an estimate from the pairs' tokens and this machine's rates."""
    pairs = train_pairs + valid_pairs
    of_update = config.batch_size * config.accumulate
    updates = config.updates(len(train_pairs))
    # Means over the pairs: of all tokens, prompts counted with each response, and of the responses' alone.
    all_tokens = sum(len(pair.chosen) + len(pair.rejected) for pair in pairs) / len(pairs)
    response_tokens = all_tokens - sum(pair.chosen_start + pair.rejected_start for pair in pairs) / len(pairs)
    body, head = sizes(source.path)
    # Forward, again by layers in the backward pass, and backward twice as much; the reference's pass over all once.
    passes = [(4 * all_tokens * of_update, 3 * response_tokens * of_update)] * updates
    passes += [(all_tokens * of_update, response_tokens * of_update)] * (len(pairs) // of_update)
    duration = seconds(passes, body, head, getattr(torch, config.dtype).itemsize, device)
    kept = 4 if config.trainable == "all" else 1  # weights, gradients, the optimizer's averages and their roots
    logits = 12 * config.batch_size * response_tokens * vocabulary
    memory = 4 * kept * (body + head) + logits + RUNTIME
    lines = [
        f"{source.name}: {(body + head) / 1e6:,.0f} million parameters, {config.trainable} trained",
        f"{updates} updates of {of_update} of {len(train_pairs)} pairs, {len(valid_pairs)} held out",
        config.ends_in_warmup(updates),
        f"about {said(duration)} at most, {memory / 1e9:.0f} GB of memory, {4 * (body + head) / 1e9:.1f} GB of disk",
        "An estimate: twice the floor by this machine's measured rates. Nothing was trained or written.",
    ]
    return "\n".join(line for line in lines if line)


def make_checkpoint(
    source, preferences, config: Config, device: str, determinants: dict, out: Path | None, overwrite: bool
) -> Path | None:
    """Train into `out`, or into the cache; process 0 opens the folder and returns it, the others return None."""
    float32_bytes = 4 * sum(models.stored_entries(Path(source.path)).values())
    # The best checkpoint, the saved state's weights and averages twice, and room.
    needs_bytes = float32_bytes * (6 if config.trainable == "all" else 3)
    own_device = sharding.begin(device)

    def build(folder: Path) -> None:
        train_into(sharding.said_by_first(folder), source, preferences, config, own_device)

    try:
        if sharding.rank():
            if folder := sharding.said_by_first(None):  # none: process 0 found the checkpoint in the cache
                train_into(folder, source, preferences, config, own_device)
            return None
        if out:
            with artifacts.output(out, determinants, overwrite, needs_bytes) as folder:
                build(folder)
            return out
        is_cached = artifacts.is_whole(artifacts.folder_of("dpo", determinants))
        checkpoint = artifacts.make("dpo", determinants, build, needs_bytes, resumable=True)
        if is_cached:
            sharding.said_by_first(None)
        return checkpoint
    finally:
        sharding.end()


def train_into(folder: Path, source, preferences, config: Config, device: str) -> None:
    """Load the model and train into `folder`, showing the progress."""
    # PEFT trains adapters in float32 whatever the frozen weights are in.
    held = config.dtype if config.trainable.startswith("lora") else "float32"
    model, tokenizer = checkpoints.read_module(source, held, device), checkpoints.read_tokenizer(source)
    about = {
        "model": source.name,
        "model_revision": source.revision,
        "pairs": preferences.provenance,
        "dtype": config.dtype,
        "device": device,
        "versions": results.versions(),
    }
    columns = [
        TextColumn("DPO"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[measures]}"),
    ]
    with Progress(*columns, console=Console(stderr=True, quiet=sharding.rank() > 0)) as bar:
        task = bar.add_task("DPO", total=None, measures="reference log-probabilities")

        def progress(done: int, total: int, record: dict) -> None:
            if bar.tasks[task].total is None and (warning := config.ends_in_warmup(total)):
                bar.console.print(warning)
            measures = f"loss {record['loss']:.3f}  accuracy {record['accuracy']:.2f}  margin {record['margin']:.3f}"
            bar.update(task, completed=done, total=total, measures=measures)
            if "valid_loss" in record:
                bar.console.print(
                    f"update {done}: validation loss {record['valid_loss']:.3f}, "
                    f"accuracy {record['valid_accuracy']:.2f}, margin {record['valid_margin']:.3f}"
                )

        train(model, tokenizer, preferences.items, config, folder, about, progress)
    if sharding.rank() == 0:
        log = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
        plots_training.training([json.loads(line) for line in log], folder / "figures" / "training.png")
    adapter = folder / "adapter_config.json"
    if sharding.rank() == 0 and adapter.exists():  # PEFT wrote the folder that the base model lay in
        described = json.loads(adapter.read_text()) | base_of_adapter(source)
        adapter.write_text(json.dumps(described, indent=1) + "\n")


def base_of_adapter(source) -> dict:
    """How a LoRA checkpoint names its base model: a Hub id and commit, a folder, or an embedded model's name."""
    if Path(source.name).is_dir():
        return {"base_model_name_or_path": str(Path(source.name).resolve()), "revision": None}
    on_hub = source.name not in EMBEDDED
    return {
        "base_model_name_or_path": models.MODELS.get(source.name, source.name),
        "revision": source.revision if on_hub else None,
    }


if __name__ == "__main__":
    command(prog_name=PROGRAM)
