"""How numbers are computed: as the papers' released code did (`faithful`), or so that the claim holds (`sound`).

Every choice that changes a number is one field. docs/AUDIT.md tells, field by field, what the released code does and
what difference it makes; `run.json` repeats the record.
"""

from dataclasses import dataclass, fields, replace

from lib.errors import UserError


@dataclass(frozen=True)
class Protocol:
    """One way to compute everything. Behind each field: the sound choice, its default / the released one."""

    edit_positions: str = "all"  # `all` positions are edited while generating / the `last` one
    perplexity_edit: str = "all"  # the perplexity that is compared has `all` positions edited / the `first` one alone
    edit_kind: str = "scale"  # section 6: `scale` each token's own activation (its equation) / `clamp` it to a constant
    probe_features: str = "tokens"  # mean over real `tokens` before the final norm / over 128 `padded` positions after
    steer_at: str = "residual"  # the vector is subtracted from the `residual` stream / from the last `mlp` output
    padding: str = "masked"  # `masked` for every model / Gemma's is `attended`
    prompt_removal: str = "ids"  # continuations are the new `ids` / the text with the prompt's `text` replaced by ""
    f1_prediction: str = "continuation"  # the `continuation` / `prompt+continuation`
    perplexity_windows: str = "passage"  # a BOS in each `passage`, n - 1 terms by n - 1 / a `stream` cut at 1,024, by n
    means_over: str = "generated"  # `generated` tokens, greedy, prompts cut to 32 / the `last20` of prompt and sample
    delta: str = "pre - post"  # in both: above 0 means that DPO reduced the toxic projection
    value_vectors: str = "written"  # as the residual stream sees them: `written` through Gemma's norm / `raw` rows
    lens: str = "both"  # nearest tokens of value vectors from `both` the vector and the normed one / the `normed` one
    beta_order: str = "aligned"  # section 6 takes every group's most `aligned` / as `released`, AP's and TN's least
    contrast_rows: str = "both"  # word vectors from `both` the unembedding and the input embedding / `lm_head` alone
    neuron_index: str = "corrected"  # in both: a flat index is divided by d_mlp


SOUND = Protocol()
FAITHFUL = Protocol(
    edit_positions="last",
    perplexity_edit="first",
    edit_kind="clamp",
    probe_features="padded",
    steer_at="mlp",
    padding="attended",
    prompt_removal="text",
    f1_prediction="prompt+continuation",
    perplexity_windows="stream",
    means_over="last20",
    value_vectors="raw",
    lens="normed",
    beta_order="released",
    contrast_rows="lm_head",
)
PROTOCOLS = {"sound": SOUND, "faithful": FAITHFUL}


def with_released(*names: str) -> Protocol:
    """The sound protocol with the named fields as released: what one choice changes, all else being equal."""
    return replace(SOUND, **{name: getattr(FAITHFUL, name) for name in names})


def differences() -> list[str]:
    """The fields in which the two protocols differ."""
    return [field.name for field in fields(Protocol) if getattr(SOUND, field.name) != getattr(FAITHFUL, field.name)]


def chosen_protocol(options: dict) -> Protocol:
    """What --protocol and --released say. Raises UserError when they contradict each other."""
    if not options["released"]:
        return PROTOCOLS[options["protocol"]]
    if options["protocol"] == "faithful":
        raise UserError(
            "--released: every choice of --protocol faithful is as released already; leave one of them out."
        )
    return with_released(*options["released"])
