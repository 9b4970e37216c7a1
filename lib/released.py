"""What the papers' released code did where it measures a condition otherwise: one small function for each choice.

Each stands in the place of a field of `lib.evaluation.SOUND`; docs/AUDIT.md tells what difference it makes.
"""

from collections.abc import Iterator
from dataclasses import replace

from lib import generation
from lib.evaluation import F1_PROMPT, FIRST, LAST, SOUND, Choices
from lib.generation import NEW_TOKENS, left_padded
from lib.protocol import Protocol
from lib.tokens import encode

STREAM_WINDOW = 1024  # tokens
JOINED = "\n\n"  # between passages


def choices(protocol: Protocol, model_type: str) -> Choices:
    """The protocol's choices of how a condition is measured."""
    changed = {}
    if protocol.edit_positions == "last":
        changed["edited"] = LAST
    if protocol.perplexity_edit == "first":
        changed["compared"] = {"nll_first": FIRST}
    if protocol.padding == "attended" and "gemma" in model_type:
        changed["batches"] = attended_batches
    if protocol.prompt_removal == "text":
        changed["continuations"] = without_prompt_text
    if protocol.f1_prediction == "prompt+continuation":
        changed |= {"predicted": with_prompt, "f1_reference": F1_PROMPT + NEW_TOKENS}
    if protocol.perplexity_windows == "stream":
        changed |= {"windows": stream_windows, "uncounted": 0}
    return replace(SOUND, **changed)


def attended_batches(tokenizer, prompts: list, continued: list, size: int, device) -> Iterator[dict]:
    """Padding that no mask hides. What it changes depends on what stands beside it, so prompts stand alone."""
    yield from left_padded(tokenizer, prompts, size, device, attended=True)
    yield from left_padded(tokenizer, continued, size, device, attended=True)


def without_prompt_text(tokenizer, prompts: list[str], prompt_ids: list, new_ids: list) -> list[str]:
    """The whole text, from which the prompt is taken out where it is found as it was."""
    texts = generation.decode(tokenizer, [asked + new for asked, new in zip(prompt_ids, new_ids, strict=True)])
    return [text.replace(prompt, "") for text, prompt in zip(texts, prompts, strict=True)]


def with_prompt(prompt_ids: list[int], new_ids: list[int]) -> list[int]:
    """The prompt counts in F1's prediction; the reference is up to 52 tokens of the text that follows."""
    return prompt_ids + new_ids


def stream_windows(tokenizer, passages: list[str], max_positions: int) -> list[list[int]]:
    """All passages joined, cut at 1,024 tokens; n - 1 terms of a window are divided by n."""
    longest = min(STREAM_WINDOW, max_positions)
    (stream,) = encode(tokenizer, [JOINED.join(passages)])
    return [stream[at : at + longest] for at in range(0, len(stream), longest)]
