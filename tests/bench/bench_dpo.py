"""DPO training against TRL's DPOTrainer with equal settings, each in a process of its own, and the loss itself.

Both train float32 weights by RMSprop on the same tokens in the same order, 20 updates of 4 pairs, the reference's
log-probabilities taken before the first (TRL: `precompute_ref_log_probs`); TRL runs without its gradient checkpointing,
which is slower. Time runs from the model in memory to the last update; the losses of all updates must agree.

    python tests/bench/bench_dpo.py --model smollm2 --rounds 3
"""

import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click

from lib.cli import options

STEPS, PAIRS, RATE = 20, 4, 5e-6


@click.command(help=__doc__.split("\n")[0])
@options("model", "device")
@click.option("--rounds", type=click.IntRange(1), default=1, show_default=True, help="Runs of each.")
@click.option("--side", type=click.Choice(["ours", "trl"]), hidden=True)
def main(model, device, rounds, side):
    if side:
        print(json.dumps(ours(model, device) if side == "ours" else trl(model, device)))
        return
    import torch
    from timing import machine, row, say

    from lib.models import pick_device

    found = {"trl": [], "ours": []}
    for turn in range(rounds):
        for name in found if turn % 2 else reversed(found):
            command = [sys.executable, __file__, "--model", model, "--device", device, "--side", name]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(done.stderr[-3000:])
            found[name].append(json.loads(done.stdout.splitlines()[-1]))
    both = list(zip(found["trl"], found["ours"], strict=True))
    losses = max(abs(a - b) for t, o in both for a, b in zip(t["losses"], o["losses"], strict=True))
    seconds = {name: statistics.median(run["seconds"] for run in runs) for name, runs in found.items()}
    memory = {name: max(run["peak"] for run in runs) for name, runs in found.items()}
    step = found["ours"][0]["flops"] / machine(pick_device(device))["flops"]
    say(
        row(
            f"DPO step, {model}",
            "TRL's DPOTrainer",
            statistics.median(t["seconds"] / o["seconds"] for t, o in both),
            ">= 1.2",
            unit="times its pairs per second",
            pairs_per_second={name: round(STEPS * PAIRS / value, 3) for name, value in seconds.items()},
            floor_seconds=round(step, 3),
            times_the_floor=round(seconds["ours"] / STEPS / step, 2),
            rounds=rounds,
        ),
        row(
            f"  peak memory, {model}",
            "TRL's",
            memory["ours"] / memory["trl"],
            "<= 0.8",
            unit="of its peak",
            gigabytes={name: round(value / 1e9, 2) for name, value in memory.items()},
        ),
        row(f"  losses over {STEPS} updates, {model}", "TRL's", losses, "<= 1e-4", unit="nats apart at most"),
        *(loss_rows() if model == "smollm2" else []),
        torch=torch.__version__,
    )


def prepared(name: str, device: str):
    """Model, tokenizer, pairs in the order in which they are trained on, and the configuration."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from dpo.config import make_config
    from lib import data
    from lib.models import pick_device, resolve

    folder = resolve(name).path
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(pick_device(device))
    config = make_config(
        "embedded",
        name,
        batch_size=PAIRS,
        steps=STEPS,
        warmup=0,
        learning_rate=RATE,
        valid_fraction=0.0,
        save_every=1000,
    )
    return model, AutoTokenizer.from_pretrained(folder), data.pairs().items, config


def peak() -> int:
    """The most memory that this process has held so far, in bytes; on a GPU, of the GPU's."""
    import torch
    from timing import peak_memory

    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak_memory()


def ours(name: str, device: str) -> dict:
    """Train by `dpo.train`."""
    from dpo.train import train

    model, tokenizer, pairs, config = prepared(name, device)
    losses, ended = [], []

    def progress(done: int, of: int, record: dict) -> None:
        losses.append(record["loss"])
        ended.append((time.monotonic(), peak()))  # before the checkpoint is written, which TRL is spared

    flops = floor(model, tokenizer, pairs, config)
    with tempfile.TemporaryDirectory() as folder:
        started = time.monotonic()
        train(model, tokenizer, pairs, config, Path(folder), {}, progress)
    return {"losses": losses, "seconds": ended[-1][0] - started, "peak": ended[-1][1], "flops": flops}


def floor(model, tokenizer, pairs: list, config) -> float:
    """Operations of one update's matrix products, on average: forward once for the reference, once for the policy, and
    twice as much backward; the head at the responses alone.
    """
    from dpo.data import split, tokenize

    tokens, _ = split(tokenize(tokenizer, pairs, config.max_prompt, config.max_response, False), 0, config.seed)
    embedding = model.get_input_embeddings().weight.numel()
    inner = sum(p.numel() for p in model.parameters()) - embedding
    total = responses = 0
    for pair in tokens:
        for ids, start in ((pair.chosen, pair.chosen_start), (pair.rejected, pair.rejected_start)):
            total, responses = total + len(ids), responses + len(ids) - start
    return PAIRS / len(tokens) * (2 + 6) * (inner * total + embedding * responses)


def trl(name: str, device: str) -> dict:
    """Train by TRL."""
    import datasets
    import torch
    from trl import DPOConfig, DPOTrainer

    from dpo.data import split, tokenize
    from dpo.train import update_pairs

    model, tokenizer, pairs, config = prepared(name, device)
    tokens, _ = split(tokenize(tokenizer, pairs, config.max_prompt, config.max_response, False), 0, config.seed)
    rows = []
    for step in range(STEPS):
        for at in update_pairs(step, PAIRS, len(tokens), config.seed):
            one = tokens[at]
            assert one.chosen[: one.chosen_start] == one.rejected[: one.rejected_start]
            rows.append({
                "prompt_ids": one.chosen[: one.chosen_start],
                "chosen_ids": one.chosen[one.chosen_start :],
                "rejected_ids": one.rejected[one.rejected_start :],
            })  # fmt: skip
    losses = []

    class Trainer(DPOTrainer):
        def _prepare_dataset(self, dataset, *args):  # the tokens are given
            return dataset

        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            losses.append(float(loss.detach()))
            return loss

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        started = time.monotonic()
        optimizer = torch.optim.RMSprop(model.parameters(), lr=RATE)
        arguments = DPOConfig(
            output_dir=folder,
            per_device_train_batch_size=PAIRS,
            max_steps=STEPS,
            beta=config.beta,
            bf16=False,
            max_grad_norm=config.max_grad_norm,
            gradient_checkpointing=False,
            precompute_ref_log_probs=True,
            train_sampling_strategy="sequential",
            report_to=[],
            save_strategy="no",
            logging_steps=1,
            max_length=None,
            use_cpu=device != "cuda" and not torch.cuda.is_available(),
            disable_tqdm=True,
        )
        trainer = Trainer(
            model,
            args=arguments,
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=tokenizer,
            optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)),
        )
        trainer.train()
        return {"losses": losses, "seconds": time.monotonic() - started, "peak": peak()}


def loss_rows() -> list[dict]:
    """The loss against Rafailov et al.'s formula, and against TRL's on a tiny model that has moved."""
    import copy

    import datasets
    import torch
    from timing import row
    from trl import DPOConfig, DPOTrainer

    from dpo.data import TokenPair, collate, response_logits
    from dpo.loss import dpo_loss, response_log_probs

    sys.path.insert(0, str(Path(__file__).parents[1]))
    from tiny_models import build_model, build_tokenizer

    generator = torch.Generator().manual_seed(0)
    sums = -50 * torch.rand(4, 1000, generator=generator)
    found = dpo_loss(*sums, 0.1)[0]
    policy, reference = sums[0] - sums[1], sums[2] - sums[3]
    formula = -torch.nn.functional.logsigmoid(0.1 * (policy - reference))

    tokenizer = build_tokenizer(bos=True)
    model, reference = build_model("llama", len(tokenizer)), build_model("llama", len(tokenizer), seed=1)
    ids = torch.randint(3, 400, (3, 4, 9), generator=generator).tolist()
    rows = [{"prompt_ids": p, "chosen_ids": c, "rejected_ids": r[:5]} for p, c, r in zip(*ids, strict=True)]

    class Trainer(DPOTrainer):
        def _prepare_dataset(self, dataset, *args):
            return dataset

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        arguments = DPOConfig(
            output_dir=folder,
            per_device_train_batch_size=4,
            bf16=False,
            gradient_checkpointing=False,
            report_to=[],
            max_length=None,
            use_cpu=True,
            beta=0.1,
            disable_tqdm=True,
        )
        trainer = Trainer(
            copy.deepcopy(model),
            ref_model=copy.deepcopy(reference),
            args=arguments,
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=tokenizer,
        )
        trainer.model.eval()
        theirs = float(trainer.compute_loss(trainer.model, trainer.data_collator(rows)).detach())
    width = len(rows[0]["prompt_ids"])
    pairs = [
        TokenPair(r["prompt_ids"] + r["chosen_ids"], width, r["prompt_ids"] + r["rejected_ids"], width) for r in rows
    ]
    batch = collate(pairs)
    with torch.no_grad():
        both = [
            response_log_probs(response_logits(m, batch), batch.targets, batch.mask).chunk(2)
            for m in (model, reference)
        ]
    mine = float(dpo_loss(*both[0], *both[1], 0.1)[0].mean())
    return [
        row(
            "DPO loss",
            "the reference implementation's formula",
            float((found - formula).abs().max()),
            "<= 1e-6",
            unit="nats apart at most",
        ),
        row(
            "DPO loss of a model that has moved",
            "TRL's trainer",
            abs(mine - theirs),
            "<= 1e-6",
            unit="nats apart",
            loss=mine,
        ),
    ]


if __name__ == "__main__":
    main()
