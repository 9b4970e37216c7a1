"""The training loop: one readable function, resumable to the bit, in one process or several (`dpo.sharding`)."""

import copy
import json
import math
import os
import shutil
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from torch.utils.checkpoint import checkpoint

from dpo.checkpoint import load_state, save_state
from dpo.config import Config
from dpo.data import TokenPair, collate, order_of, response_logits, split, tokenize
from dpo.loss import dpo_loss, kl_from_reference, response_log_probs
from dpo.sharding import rank, said_by_first, save_pretrained, shard, shared, summed, whole, world
from dpo.trainable import choose, layers_of
from lib.data import Pair
from lib.errors import UserError


def train(model, tokenizer, pairs: list[Pair], config: Config, folder: Path, about: dict, progress=None) -> dict:
    """Train a transformers model on preference pairs and leave the best checkpoint in `folder`.

    `folder` may hold what a killed run of the same configuration left: training goes on from its last state and ends
    with the weights that an uninterrupted run ends with.

    Args:
        model: a causal language model, changed in place; dropout off.
        about: goes into training.json beside the configuration (where model and pairs came from, versions).
        progress: called as `progress(updates done, updates in all, last log record)`.

    Returns: what training.json says.

    Raises:
        UserError: too few pairs, a response without tokens, a loss that is not finite, no such part to train, an update
            that cannot be dealt out to all processes.
    """
    torch.manual_seed(config.seed)
    model, masks = choose(model, config.trainable)
    prepare(model)
    if narrow := {p.dtype for p in model.parameters() if p.requires_grad} - {torch.float32, torch.float64}:
        raise UserError(f"training of {narrow} weights would round most steps away; load them in float32.")
    entries = trained_entries(model, masks)
    device = next(model.parameters()).device
    tokens = tokenize(tokenizer, pairs, config.max_prompt, config.max_response, config.append_eos)
    train_pairs, valid_pairs = split(tokens, config.valid_fraction, config.seed)
    per_update = config.batch_size * config.accumulate
    if per_update % world():
        raise UserError(
            f"--batch-size {config.batch_size} times --accumulate {config.accumulate} is {per_update} pairs an update, "
            f"which cannot be dealt out to {world()} processes; give a multiple of their number."
        )
    n_updates = config.updates(len(train_pairs))
    updates = [update_pairs(step, per_update, len(train_pairs), config.seed) for step in range(n_updates)]
    reference = copy.deepcopy(model).requires_grad_(False) if config.kl_weight else None
    masks, skeleton = shard(model, masks)
    if reference is not None:
        shard(reference, {})
        train_reference = valid_reference = None
    else:
        # The reference model is the policy before its first update: its log-probabilities are computed now, once,
        # for the pairs that will be seen, and no second model is kept.
        seen = sorted({index for update in updates for index in update})
        train_reference = dict(zip(seen, _log_probs(model, [train_pairs[i] for i in seen], config), strict=True))
        valid_reference = dict(enumerate(_log_probs(model, valid_pairs, config)))

    optimizer = _optimizer(model, config)
    folder.mkdir(parents=True, exist_ok=True)
    state = load_state(folder / "state", model, optimizer) or {
        "step": 0,
        "best_loss": math.inf,
        "best_step": None,
        "waited": 0,
    }
    log = folder / "log.jsonl"
    if rank() == 0:
        _keep_lines(log, state["step"])
    stopped = "steps"
    for step in range(state["step"], n_updates):
        started = time.monotonic()
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * min(1.0, (step + 1) / (config.warmup + 1))
        chosen = updates[step]
        each = per_update // world()
        parts = [chosen[at : at + each] for at in range(0, per_update, each)]
        dealt = [[part[at : at + config.batch_size] for at in range(0, each, config.batch_size)] for part in parts]
        record = objective(
            model, reference, train_pairs, train_reference, sum(dealt, []), config, device, len(dealt[0])
        )
        for parameter, mask in masks.items():
            parameter.grad.mul_(mask)
        norm = whole(torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm))
        if not (math.isfinite(record["loss"]) and norm.isfinite()):
            raise UserError(
                f"training diverged at update {step + 1} (loss {record['loss']}, gradient norm {norm:.3g}); "
                "lower --learning-rate, or check the pairs."
            )
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        record = {
            "step": step + 1,
            **record,
            "grad_norm": float(norm),
            "learning_rate": optimizer.param_groups[0]["lr"],
        }
        record["seconds"] = round(time.monotonic() - started, 3)
        last = step + 1 == n_updates
        if valid_pairs and ((step + 1) % config.valid_every == 0 or last):
            # In every process: where the models are in shards, all have to take part.
            valid = said_by_first(evaluate(model, reference, valid_pairs, valid_reference, config, device))
            record |= {f"valid_{key}": value for key, value in valid.items()}
            if valid["loss"] < state["best_loss"]:
                state |= {"best_loss": valid["loss"], "best_step": step + 1, "waited": 0}
                _save_best(folder / "best", model, skeleton, tokenizer)
            else:
                state["waited"] += 1
        if rank() == 0:
            with log.open("a") as file:
                file.write(json.dumps(record) + "\n")
        if progress:
            progress(step + 1, n_updates, record)
        if valid_pairs and state["waited"] >= config.patience:
            stopped = "patience"
            break
        if (step + 1) % config.save_every == 0 and not last:
            save_state(folder / "state", model, optimizer, state | {"step": step + 1})
    if not valid_pairs:
        _save_best(folder / "best", model, skeleton, tokenizer)
        state |= {"best_step": n_updates, "best_loss": None}

    summary = {
        **about,
        "config": asdict(config),
        "trained_entries": entries,
        "processes": world(),
        "train_pairs": len(train_pairs),
        "valid_pairs": len(valid_pairs),
        "spanning_pairs": sum(pair.spanning for pair in tokens),  # whose responses begin before their text does
        "best_step": state["best_step"],
        "best_valid_loss": state["best_loss"],
        "stopped_by": stopped,
    }
    if rank():
        return summary
    (folder / "training.json").write_text(json.dumps(summary, indent=1) + "\n")
    for file in (folder / "best").iterdir():
        os.replace(file, folder / file.name)
    for left in ("best", "state", "state.old", "state.new"):
        shutil.rmtree(folder / left, ignore_errors=True)
    return summary


def prepare(model) -> None:
    """Make a model ready for training, in place."""
    model.eval()  # dropout off, as in the papers; gradients flow all the same
    embedding = model.get_input_embeddings()
    # Where the head shares the embedding's weight, its gradient is dense and the embedding's touches the batch's tokens
    # alone: added in place (see `objective`) instead of as a second dense [vocab, d_model] tensor, which took a third
    # of the backward pass on a 262,144-token vocabulary.
    tied = embedding.weight is model.get_output_embeddings().weight
    embedding.sparse = tied and embedding.weight.requires_grad and world() == 1
    for layer in layers_of(model):
        # What a layer computes inside is computed again for its gradient, not kept: less memory for more time.
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


def trained_entries(model, masks: dict) -> int:
    """How many numbers training may change."""
    unmasked = sum(p.numel() for p in model.parameters() if p.requires_grad and p not in masks)
    return unmasked + sum(int(mask.sum()) for mask in masks.values())


def evaluate(model, reference, pairs: list[TokenPair], log_probs, config: Config, device) -> dict[str, float]:
    """The training objective and its parts on held-out pairs."""
    batches = [
        list(range(at, min(at + config.batch_size, len(pairs)))) for at in range(0, len(pairs), config.batch_size)
    ]
    with torch.no_grad():
        return objective(model, reference, pairs, log_probs, batches, config, device)


def objective(
    model, reference, pairs, log_probs, batches: list[list[int]], config, device, own: int | None = None
) -> dict[str, float]:
    """The training objective over several batches as if they were one; gradients add up where they are enabled.

    Args:
        reference: the reference model when the KL term needs it, else None.
        log_probs: pair index -> the reference's summed log-probabilities (chosen, rejected); unused with `reference`.
        batches: indices into `pairs`.
        own: how many of the batches are a process's share, when they are dealt out; None: every process takes all.

    Returns: `loss`, `accuracy` (share of pairs whose chosen reward is the larger), `margin` of the rewards, `kl`.
    """
    collated = [collate([pairs[i] for i in indices]) for indices in batches]
    n_pairs = sum(map(len, batches))
    # Means over the whole update, so that 4 batches of 1 pair give what 1 batch of 4 pairs gives.
    n_tokens = [sum(int(batch.mask.chunk(2)[side].sum()) for batch in collated) for side in (0, 1)]
    totals = {"loss": 0.0, "accuracy": 0.0, "margin": 0.0, "kl": 0.0}
    mine = slice(None) if own is None else slice(rank() * own, (rank() + 1) * own)
    for indices, batch in zip(batches[mine], collated[mine], strict=True):
        batch = batch.to(device)
        embedded = leaf = None
        if world() == 1:
            embedded = model.get_input_embeddings()(batch.ids)
            leaf = embedded.detach().requires_grad_(embedded.requires_grad)
        logits = response_logits(model, batch, config.dtype, leaf)
        policy = response_log_probs(logits, batch.targets, batch.mask).chunk(2)
        kl = torch.zeros((), device=device)
        if reference is None:
            known = torch.tensor([log_probs[i] for i in indices], device=device).T
        else:
            with torch.no_grad():
                reference_logits = response_logits(reference, batch, config.dtype)
                known = response_log_probs(reference_logits, batch.targets, batch.mask).chunk(2)
            for side, mask in enumerate(batch.mask.chunk(2)):
                part = slice(side * len(indices), (side + 1) * len(indices))
                share = mask.sum() / n_tokens[side]
                kl = kl + share * kl_from_reference(logits[part], reference_logits[part], mask)
        losses, chosen, rejected = dpo_loss(*policy, *known, config.beta)
        loss = losses.sum() / n_pairs + config.kl_weight * kl
        if torch.is_grad_enabled():
            (world() * loss).backward()  # gradients are averaged over the processes, and this loss is a part of a sum
            if embedded is not None and embedded.requires_grad:
                # Apart and last: autograd then adds a sparse gradient to the head's in place.
                embedded.backward(leaf.grad)
        totals["loss"] += float(loss.detach())
        totals["accuracy"] += float((chosen > rejected).sum()) / n_pairs
        totals["margin"] += float((chosen - rejected).sum()) / n_pairs
        totals["kl"] += float(kl.detach())
    return totals if own is None else summed(totals)


def _log_probs(model, pairs: list[TokenPair], config: Config) -> list[tuple[float, float]]:
    """Summed log-probabilities of both responses of each pair."""
    device = next(model.parameters()).device
    filled = pairs + pairs[-1:] * (-len(pairs) % world())  # every process takes as many
    mine, log_probs = filled[rank() :: world()], []
    with torch.no_grad():
        for at in range(0, len(mine), config.batch_size):
            batch = collate(mine[at : at + config.batch_size]).to(device)
            both = response_log_probs(response_logits(model, batch, config.dtype), batch.targets, batch.mask)
            log_probs += zip(*(side.tolist() for side in both.chunk(2)), strict=True)
    return shared(log_probs)[: len(pairs)]


def update_pairs(step: int, per_update: int, n: int, seed: int) -> list[int]:
    """Indices of the pairs of one update, from a stream of freshly shuffled epochs."""
    places = range(step * per_update, (step + 1) * per_update)
    orders = {epoch: order_of(epoch, n, seed) for epoch in {place // n for place in places}}
    return [orders[place // n][place % n] for place in places]


def _optimizer(model, config: Config):
    parameters = [p for p in model.parameters() if p.requires_grad]
    kind = {"rmsprop": torch.optim.RMSprop, "adamw": torch.optim.AdamW}[config.optimizer]
    # No decay: it would move the entries that a mask leaves alone.
    return kind(parameters, lr=config.learning_rate, weight_decay=0.0)


def _save_best(folder: Path, model, skeleton, tokenizer) -> None:
    work = folder.with_name("best.new")
    if rank() == 0:
        shutil.rmtree(work, ignore_errors=True)
    save_pretrained(model, skeleton, tokenizer, work)
    if rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
        work.rename(folder)


def _keep_lines(log: Path, step: int) -> None:
    """Drop the log lines after the state that training goes on from."""
    kept = []
    for line in log.read_text().splitlines() if log.exists() else []:
        try:
            record = json.loads(line)
        except ValueError:  # the line that the kill cut off
            break
        if record["step"] <= step:
            kept.append(line + "\n")
    log.write_text("".join(kept))
