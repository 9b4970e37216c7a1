"""The DPO loss and its parts, as pure functions of tensors."""

import torch
import torch.nn.functional as F


def response_log_probs(logits: torch.Tensor, targets: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Summed log-probability of each response.

    Args:
        logits: `[batch, response, vocab]`; position t predicts `targets[:, t]`.
        targets: `[batch, response]` token ids (any valid id where the mask is False).
        mask: `[batch, response]` bool, True at response tokens.

    Returns: `[batch]`, float32, in nats.
    """
    logits = logits.float()
    chosen = logits.gather(-1, targets[..., None])[..., 0]
    return ((chosen - logits.logsumexp(-1)) * mask).sum(-1)


def dpo_loss(
    policy_chosen: torch.Tensor,
    policy_rejected: torch.Tensor,
    reference_chosen: torch.Tensor,
    reference_rejected: torch.Tensor,
    beta: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rafailov et al. 2023, eq. 7; Yang section 2.

    Args:
        policy_chosen, policy_rejected, reference_chosen, reference_rejected: summed log-probabilities of the
            preferred and the rejected responses under the policy and the reference model, `[batch]` each.
        beta: strength of the pull to the reference model; 0.1 in both papers.

    Returns: per-pair losses `-log sigmoid(beta * (r_chosen - r_rejected))` with r = log(policy / reference), and the
        implicit rewards `beta * r` of both sides (detached), `[batch]` each.
    """
    chosen = beta * (policy_chosen - reference_chosen)
    rejected = beta * (policy_rejected - reference_rejected)
    return -F.logsigmoid(chosen - rejected), chosen.detach(), rejected.detach()


def kl_from_reference(policy_logits: torch.Tensor, reference_logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """KL(reference || policy), averaged over the tokens that `mask` marks (Yang appendix C; its released code).

    Args:
        policy_logits, reference_logits: `[batch, positions, vocab]`.
        mask: `[batch, positions]` bool.

    Returns: a scalar, in nats per token.
    """
    policy = policy_logits.float().log_softmax(-1)
    reference = reference_logits.float().log_softmax(-1)
    divergence = (reference.exp() * (reference - policy)).sum(-1)
    return (divergence * mask).sum() / mask.sum()
