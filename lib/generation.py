"""Batches of prompts, what a generation's ids say (which tokens are new, which come after the end), and likelihoods."""

import itertools
from collections.abc import Iterator

import psutil
import torch

from lib.tokens import encode, filler_id

MAX_PROMPT_TOKENS = 32  # both papers' code cuts prompts here
NEW_TOKENS = 20  # Yang 3.2; both papers' code


def batches(
    tokenizer, prompts: list[str], size: int, device="cpu", max_tokens: int = MAX_PROMPT_TOKENS
) -> Iterator[dict[str, torch.Tensor]]:
    """Yield `{"input_ids", "attention_mask"}`, `[batch, positions]`, padded on the left, one BOS if the model has one.

    Left padding with a mask: transformers' `generate` derives position ids from the mask, so that a row's tokens do
    not depend on the batch it stands in.
    """
    yield from left_padded(tokenizer, prompt_ids(tokenizer, prompts, max_tokens), size, device)


def prompt_ids(tokenizer, prompts: list[str], max_tokens: int = MAX_PROMPT_TOKENS) -> list[list[int]]:
    """Token ids of each prompt, cut to `max_tokens`."""
    return encode(tokenizer, prompts, max_tokens)


def left_padded(
    tokenizer, rows: list[list[int]], size: int, device="cpu", attended: bool = False
) -> Iterator[dict[str, torch.Tensor]]:
    """As `batches`, of token ids.

    attended: the padding is end-of-text tokens that no mask hides, as in Yang's released evaluation of Gemma.
    """
    return padded(rows, size, device, left=True, filler=filler_id(tokenizer) if attended else 0, attended=attended)


def right_padded(rows: list[list[int]], size: int, device="cpu") -> Iterator[dict[str, torch.Tensor]]:
    """Yield `{"input_ids", "attention_mask"}` `[batch, positions]` with position 0 at each row's first token.

    In a causal model the padding on the right changes nothing to its left, so positions need no correction.
    """
    return padded(rows, size, device, left=False)


def padded(
    rows: list[list[int]], size: int, device, left: bool, filler: int = 0, attended: bool = False, width: int = 0
) -> Iterator[dict[str, torch.Tensor]]:
    """Yield batches of rows filled up with `filler` to the longest of a batch, and to `width` at least."""
    for start in range(0, len(rows), size):
        batch = rows[start : start + size]
        width_here = max(width, *map(len, batch))
        ids = torch.full((len(batch), width_here), filler)
        mask = torch.full_like(ids, int(attended))
        for at, row in enumerate(batch):
            place = slice(width_here - len(row), None) if left else slice(len(row))
            ids[at, place] = torch.tensor(row)
            mask[at, place] = 1
        yield {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


# What a checkpoint's generation_config.json may ask for that would choose another token than the likeliest, or take
# another number of steps. None is "not at all" for each of them.
UNASKED = (
    "min_length", "min_new_tokens", "max_length", "max_time", "stop_strings", "early_stopping", "cache_implementation",
    "temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "repetition_penalty",
    "encoder_repetition_penalty", "length_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size",
    "bad_words_ids", "renormalize_logits", "forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values",
    "exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens", "sequence_bias", "token_healing",
    "guidance_scale", "watermarking_config", "prompt_lookup_num_tokens", "assistant_early_exit", "penalty_alpha",
    "dola_layers", "num_beam_groups", "diversity_penalty", "constraints", "force_words_ids", "prefill_chunk_size",
)  # fmt: skip


def greedy(new_tokens: int = NEW_TOKENS) -> dict:
    """Arguments of `model.generate` for plain greedy decoding of `new_tokens` steps, whatever the checkpoint asks for.

    Without an end-of-sequence id a batch never stops early, so that `tracer.iter[:new_tokens]` sees every step;
    `until_end` cuts each row afterwards, which gives the ids that stopping there would have given.
    """
    asked = {"max_new_tokens": new_tokens, "do_sample": False, "num_beams": 1, "num_return_sequences": 1}
    asked |= {"use_cache": True, "eos_token_id": None, "return_dict_in_generate": False}
    return dict.fromkeys(UNASKED) | asked


def gumbel(seed: int, rows: int, new_tokens: int, top_k: int) -> torch.Tensor:
    """Noise `[rows, new_tokens, top_k]`: the largest of log-probabilities plus it is a draw from them.

    transformers' own sampling draws from all 262,144 tokens by torch.multinomial, which takes as long as the forward
    pass on a CPU.
    """
    generator = torch.Generator().manual_seed(seed)
    steps = [torch.empty(rows, top_k).exponential_(generator=generator) for _ in range(new_tokens)]
    return -torch.stack(steps, 1).log()


def end_ids(model) -> set[int]:
    """Ids that end a text, from the model's generation configuration. `model`: nnsight."""
    eos = model._module.generation_config.eos_token_id
    return set(eos if isinstance(eos, list) else [] if eos is None else [eos])


def until_end(new_ids: torch.Tensor, ends: set[int]) -> list[list[int]]:
    """Each row of `[batch, new_tokens]` up to its first end token, which is left out."""
    return [list(itertools.takewhile(lambda token: token not in ends, row)) for row in new_ids.tolist()]


def decode(tokenizer, rows: list[list[int]]) -> list[str]:
    """Texts of continuations. Only new ids are decoded: cutting the prompt's text off fails on re-spaced text."""
    return tokenizer.batch_decode(rows, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def windows(tokenizer, passages: list[str], length: int, at_least: int) -> list[list[int]]:
    """The first `length` ids of each passage (one BOS where the model has one); shorter than `at_least`: left out."""
    return [row for row in encode(tokenizer, passages, length) if len(row) >= at_least]


def log_probabilities(model, batch: dict):
    """A model's predictions at all positions but the last, `[batch, positions - 1, vocab]` float16: `token_losses`."""
    with model.trace(batch):
        predicted = model.output.logits[:, :-1].log_softmax(-1, dtype=torch.float32).clamp(min=-6e4).half().save()
    return predicted


def token_losses(logits: torch.Tensor, batch: dict, base: torch.Tensor | None = None) -> torch.Tensor:
    """Each row's summed negative log-likelihood of its tokens but the first, and its summed KL(base || logits).

    Args:
        logits: `[batch, positions, vocab]`.
        batch: `input_ids` and `attention_mask` (1: a token, 0: padding), `[batch, positions]`.
        base: the base model's `log_probabilities`; None: no KL, which is 0 then.

    Returns: `[2, batch]` float64 on the CPU, nats.
    """
    ids, counted = batch["input_ids"].to(logits.device), batch["attention_mask"][:, 1:].bool().cpu()
    sums = torch.zeros(2, len(ids), dtype=torch.float64)
    for row in range(len(ids)):  # one row at a time: a float32 copy of all logits would double the memory
        predicted = logits[row, :-1].float()
        log_sum = predicted.logsumexp(-1)
        nll = log_sum - predicted.gather(-1, ids[row, 1:, None])[:, 0]
        sums[0, row] = nll.cpu().double()[counted[row]].sum()
        if base is not None:
            log_p = base[row].to(predicted)
            p = log_p.exp()
            mass = p.sum(-1)  # 1 but for float16's rounding
            kl = (p * (log_p - predicted)).sum(-1) / mass - mass.log() + log_sum
            sums[1, row] = kl.cpu().double()[counted[row]].sum()
    return sums


def fitting_batch_size(model) -> int:
    """How many prompts at once take half of the memory that is free on the model's device. `model`: nnsight.

    A row needs its key-value cache, the widest layer's activations and two copies of one position's logits, in bytes of
    the model's dtype; what is left pays for fragmentation and for what else the process holds.
    """
    config, size = model._module.config, model.dtype.itemsize
    positions, width = MAX_PROMPT_TOKENS + NEW_TOKENS, config.hidden_size
    cache = 2 * config.num_hidden_layers * width * positions * size
    activations = 3 * max(getattr(config, "intermediate_size", 0), 4 * width) * positions * size
    row = cache + activations + 2 * config.vocab_size * max(size, 4)
    on_gpu = model.device.type == "cuda"
    free = torch.cuda.mem_get_info(model.device)[0] if on_gpu else psutil.virtual_memory().available
    return max(1, int(free / 2 // row))


def out_of_memory(error: RuntimeError) -> bool:
    """Whether torch ran out of memory, on a GPU or on the CPU."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
