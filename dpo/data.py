"""Preference pairs as token ids, and batches of them. Every mask comes from lengths, none from a pad id."""

import hashlib
import random
from dataclasses import dataclass

import torch

from lib.data import Pair
from lib.errors import UserError
from lib.tokens import inner_ids, opening, plain_text


@dataclass(frozen=True)
class TokenPair:
    """Ids of a prompt with each of its responses; `*_start` is where the response begins."""

    chosen: list[int]
    chosen_start: int
    rejected: list[int]
    rejected_start: int
    spanning: bool = False  # whether a token spans prompt and response, so that a response begins before its text does


def tokenize(tokenizer, pairs: list[Pair], max_prompt: int, max_response: int, append_eos: bool) -> list[TokenPair]:
    """Tokenise each prompt and response once, as one text, so that it reads as the model would meet it.

    The text gets the tokenizer's own opening token, so exactly one BOS where the model has one. A token that spans
    prompt and response belongs to the response; both sides then begin where the first of them does, so that they
    answer one prompt (`spanning`). Prompts are cut on the left to `max_prompt` tokens (the BOS
    stays), responses on the right to `max_response`. `append_eos` ends the responses that were not cut with the
    end-of-sequence token; leave it off for continuations that were cut at a length, as the papers' are: the model would
    learn to stop there.

    Raises:
        UserError: a response without a single token, naming the pair's number.
    """
    if append_eos and tokenizer.eos_token_id is None:
        raise UserError("--append-eos: the tokenizer has no end-of-sequence token.")
    first = opening(tokenizer)
    prompts = [plain_text(tokenizer, pair.prompt) for pair in pairs]
    sides = [
        inner_ids(
            tokenizer,
            [prompt + getattr(pair, name) for prompt, pair in zip(prompts, pairs, strict=True)],
            return_offsets_mapping=True,
        )
        for name in ("chosen", "rejected")
    ]

    def cut(number: int, ids: list[int], start: int) -> tuple[list[int], int]:
        head, response = ids[:start], ids[start:]
        if not response:
            raise UserError(f"pair {number}: the response has no token; give two non-empty continuations.")
        head = first + head[max(0, len(head) - max_prompt + len(first)) :]
        if append_eos and len(response) < max_response:
            response = [*response, tokenizer.eos_token_id]
        if not head:
            # Without a BOS the first token of an empty prompt would have nothing to be predicted from.
            raise UserError(f"pair {number}: the prompt has no token and the model no BOS; give a prompt.")
        return head + response[:max_response], len(head)

    token_pairs = []
    for at, prompt in enumerate(prompts):
        chosen, rejected = (side["input_ids"][at] for side in sides)
        starts = [
            next((place for place, (_, end) in enumerate(side["offset_mapping"][at]) if end > len(prompt)), len(ids))
            for side, ids in zip(sides, (chosen, rejected), strict=True)
        ]
        alike = next(
            (place for place, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b),
            min(len(chosen), len(rejected)),
        )
        start = min(*starts, alike)
        token_pairs.append(
            TokenPair(*cut(at + 1, chosen, start), *cut(at + 1, rejected, start), spanning=start < max(starts))
        )
    return token_pairs


def split(pairs: list, valid_fraction: float, seed: int) -> tuple[list, list]:
    """A seeded split into training and validation pairs; validation gets at least one pair when its share is not 0."""
    order = list(range(len(pairs)))
    random.Random(seed).shuffle(order)
    n_valid = held_out(len(pairs), valid_fraction)
    if len(pairs) - n_valid < 1:
        raise UserError(f"--pairs: {len(pairs)} pairs leave none to train on after the validation split; give more.")
    return [pairs[i] for i in order[n_valid:]], [pairs[i] for i in order[:n_valid]]


def held_out(n: int, valid_fraction: float) -> int:
    """How many of n pairs are for validation."""
    return max(1, round(valid_fraction * n)) if valid_fraction else 0


def order_of(epoch: int, n: int, seed: int) -> list[int]:
    """The order of an epoch's pairs: a function of seed and epoch alone, so that a resumed run sees the same one."""
    order = list(range(n))
    random.Random(int.from_bytes(hashlib.sha256(f"{seed} {epoch}".encode()).digest()[:8])).shuffle(order)
    return order


@dataclass(frozen=True)
class Batch:
    """Chosen rows first, then rejected rows, each `[2 * pairs, ...]`; prompts end and responses begin in one column."""

    ids: torch.Tensor  # [rows, positions]
    attention: torch.Tensor  # [rows, positions] bool
    positions: torch.Tensor  # [rows, positions] 0 at each row's first real token
    targets: torch.Tensor  # [rows, response]
    mask: torch.Tensor  # [rows, response] bool

    def to(self, device) -> "Batch":
        """The same batch on another device."""
        return Batch(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))


def collate(pairs: list[TokenPair]) -> Batch:
    """Pad prompts on the left and responses on the right, so that one slice of the logits holds all responses."""
    rows = [(p.chosen, p.chosen_start) for p in pairs] + [(p.rejected, p.rejected_start) for p in pairs]
    width = max(start for _, start in rows)
    length = max(len(ids) - start for ids, start in rows)
    ids = torch.zeros(len(rows), width + length, dtype=torch.long)
    attention = torch.zeros_like(ids, dtype=torch.bool)
    for row, (tokens, start) in enumerate(rows):
        left = width - start
        ids[row, left : left + len(tokens)] = torch.tensor(tokens)
        attention[row, left : left + len(tokens)] = True
    positions = (attention.cumsum(-1) - 1).clamp(min=0)
    return Batch(ids, attention, positions, ids[:, width:].clone(), attention[:, width:].clone())


def response_logits(model, batch: Batch, dtype: str = "float32", embedded: torch.Tensor | None = None) -> torch.Tensor:
    """Logits that predict the responses, `[rows, response, vocab]`; the vocabulary is projected there alone.

    Args:
        dtype: `bfloat16`: matrix products are computed in it, by autocast; else in the weights' own.
        embedded: the batch's input embeddings `[rows, positions, d_model]` where the caller wants their gradient.
    """
    length = batch.targets.shape[1]
    with torch.autocast(batch.ids.device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
        output = model(
            **({"input_ids": batch.ids} if embedded is None else {"inputs_embeds": embedded}),
            attention_mask=batch.attention.long(),
            position_ids=batch.positions,
            use_cache=False,
            logits_to_keep=length + 1,
        )
    return output.logits[:, :-1]
