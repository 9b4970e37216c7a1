"""How numbers are computed: as the papers' released code did (`faithful`), or so that the claim holds (`sound`).

Every choice that changes a number is one field. docs/AUDIT.md tells, field by field, what the released code does and
what difference it makes; `run.json` repeats the record.
"""

from dataclasses import dataclass, fields, replace


@dataclass(frozen=True)
class Protocol:
    """One way to compute everything. Behind each field: the sound choice / the released one."""

    edit_positions: str  # `all` positions are edited while generating / the `last` one
    perplexity_edit: str  # the perplexity that is compared has `all` positions edited / the `first` one alone
    edit_kind: str  # section 6's edit: `scale` each token's own activation (its equation) / `clamp` to a constant
    probe_features: str  # mean over real `tokens` before the final norm / over 128 `padded` positions after it
    steer_at: str  # the vector is subtracted from the `residual` stream / from the last `mlp` output
    padding: str  # `masked` for every model / Gemma's is `attended`
    prompt_removal: str  # continuations are the new `ids` / the text with the prompt's `text` replaced by nothing
    f1_prediction: str  # the `continuation` / `prompt+continuation`
    perplexity_windows: str  # a BOS in each `passage`, n - 1 terms by n - 1 / one `stream` cut at 1,024, n - 1 by n
    means_over: str  # `generated` tokens, greedy, prompts cut to 32 / the `last20` positions of prompt and sample
    delta: str  # `pre - post` in both: above 0 means that DPO reduced the toxic projection
    value_vectors: str  # as the residual stream sees them: `written` through Gemma's norm / the weight's `raw` rows
    lens: str  # nearest tokens of value vectors from `both` the vector and the normed one / the `normed` one
    beta_order: str  # section 6 takes the most `aligned` of every group / the most aligned of TP and AN, the least
    # aligned of AP and TN (`released`)
    contrast_rows: str  # word vectors from `both` the unembedding and the input embedding / the `lm_head` alone
    neuron_index: str  # `corrected` in both: a flat index is divided by d_mlp


SOUND = Protocol(
    edit_positions="all",
    perplexity_edit="all",
    edit_kind="scale",
    probe_features="tokens",
    steer_at="residual",
    padding="masked",
    prompt_removal="ids",
    f1_prediction="continuation",
    perplexity_windows="passage",
    means_over="generated",
    delta="pre - post",
    value_vectors="written",
    lens="both",
    beta_order="aligned",
    contrast_rows="both",
    neuron_index="corrected",
)
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
    delta="pre - post",
    value_vectors="raw",
    lens="normed",
    beta_order="released",
    contrast_rows="lm_head",
    neuron_index="corrected",
)
PROTOCOLS = {"sound": SOUND, "faithful": FAITHFUL}


def with_released(*names: str) -> Protocol:
    """The sound protocol with the named fields as released: what one choice changes, all else being equal."""
    return replace(SOUND, **{name: getattr(FAITHFUL, name) for name in names})


def differences() -> list[str]:
    """The fields in which the two protocols differ."""
    return [field.name for field in fields(Protocol) if getattr(SOUND, field.name) != getattr(FAITHFUL, field.name)]
