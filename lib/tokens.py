"""Texts as token ids: one opening token where the tokenizer adds one, and nothing that a text can spell into being."""

from lib.errors import UserError


def opening(tokenizer) -> list[int]:
    """What the tokenizer puts before every text: its BOS, or nothing. What it would append is left out everywhere."""
    with_special = tokenizer("a")["input_ids"]
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    starts = (at for at in range(len(with_special)) if with_special[at : at + len(plain)] == plain)
    return with_special[: next(starts, 0)]


def plain_text(tokenizer, text: str) -> str:
    """The text without a BOS that it spells out at its start, as texts do that were decoded with it.

    Only where the tokenizer puts one there by itself.
    """
    return text.removeprefix(tokenizer.bos_token) if tokenizer.bos_token and opening(tokenizer) else text


def encode(tokenizer, texts: list[str], max_tokens: int | None = None) -> list[list[int]]:
    """Token ids of each text after the opening token, cut on the right to `max_tokens` in all.

    A special token that stands in a text is text like any other: it cannot make a second BOS or an end.

    Raises:
        UserError: a text without a token.
    """
    first = opening(tokenizer)
    rows = inner_ids(tokenizer, [plain_text(tokenizer, text) for text in texts])
    encoded = [(first + ids)[:max_tokens] for ids in rows]
    if [] in encoded:
        raise UserError(f"text {1 + encoded.index([])} of {len(texts)} has no token; leave it out.")
    return encoded


def inner_ids(tokenizer, texts: list[str], **more) -> list[list[int]]:
    """Token ids of each text alone; with `more` arguments of the tokenizer, all that it returns."""
    if not texts:
        return []
    encoded = tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False, **more)
    return encoded if more else encoded["input_ids"]


def filler_id(tokenizer) -> int:
    """What the released code pads with: end-of-text; 0 where there is none that the tokenizer knows."""
    end = tokenizer.eos_token_id
    return end if end is not None and end < tokenizer.vocab_size else 0


def text_vocabulary(tokenizer) -> dict[str, int]:
    """Ids of the tokens that texts can become: all but the special ones (see `encode`)."""
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return {token: i for token, i in tokenizer.get_vocab().items() if i not in special}


def check_vocabulary(tokenizer, vocabulary: int, given: str) -> None:
    """Raise UserError when texts can become ids that the model has no embedding for.

    vocabulary: rows of the embedding. given: names the model in the message.
    """
    if (first := max(opening(tokenizer), default=0)) >= vocabulary:
        raise UserError(
            f"{given}: its tokenizer begins texts with token {first}, the model's embedding has {vocabulary} rows; "
            "it is another model's tokenizer."
        )
    if beyond := [token for token, i in text_vocabulary(tokenizer).items() if i >= vocabulary]:
        raise UserError(
            f"{given}: its tokenizer has {len(beyond)} tokens, such as {beyond[0]!r}, beyond the {vocabulary} rows of "
            "the model's embedding; it is another model's tokenizer."
        )
