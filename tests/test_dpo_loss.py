"""Losses against values worked out by hand."""

import math

import pytest
import torch

from dpo.loss import dpo_loss, kl_from_reference, response_log_probs


def test_loss_by_hand():
    """beta 0.1; r_chosen = -10 - -12 = 2, r_rejected = -9 - -8 = -1: logit 0.3, loss log(1 + e^-0.3)."""
    loss, chosen, rejected = dpo_loss(*(torch.tensor([x]) for x in (-10.0, -9.0, -12.0, -8.0)), beta=0.1)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-0.3)), rel=1e-6)
    assert loss.item() == pytest.approx(0.5543552, abs=1e-6)
    assert (chosen.item(), rejected.item()) == (pytest.approx(0.2), pytest.approx(-0.1))


def test_loss_where_policy_is_reference():
    """Before the first update both rewards are 0 and the loss is log 2."""
    values = torch.tensor([-3.0, -70.0])
    loss, chosen, rejected = dpo_loss(values, values - 1, values, values - 1, beta=0.5)
    torch.testing.assert_close(loss, torch.full((2,), math.log(2)))
    assert not chosen.any() and not rejected.any()


def test_gradient_by_hand():
    """dL/d(policy chosen) = -beta sigmoid(-logit), and the opposite for the rejected side (Rafailov et al., sec. 4)."""
    chosen = torch.tensor([-10.0], requires_grad=True)
    rejected = torch.tensor([-9.0], requires_grad=True)
    dpo_loss(chosen, rejected, torch.tensor([-12.0]), torch.tensor([-8.0]), beta=0.1)[0].sum().backward()
    weight = 0.1 / (1 + math.exp(0.3))
    assert chosen.grad.item() == pytest.approx(-weight, rel=1e-5)
    assert rejected.grad.item() == pytest.approx(weight, rel=1e-5)


def test_loss_stays_finite_far_out():
    loss, _, _ = dpo_loss(torch.tensor([-5e4]), torch.tensor([0.0]), torch.tensor([0.0]), torch.tensor([0.0]), beta=1.0)
    assert loss.item() == pytest.approx(5e4)


def test_response_log_probs_by_hand():
    """Two tokens of a vocabulary of two: log(e^1/(e^1+e^0)) + log(1/2); the masked third position adds nothing."""
    logits = torch.tensor([[[1.0, 0.0], [0.0, 0.0], [9.0, -9.0]]])
    found = response_log_probs(logits, torch.tensor([[0, 1, 1]]), torch.tensor([[True, True, False]]))
    assert found.item() == pytest.approx(math.log(math.e / (math.e + 1)) + math.log(0.5), rel=1e-6)


def test_kl_by_hand():
    """KL((3/4, 1/4) || (1/2, 1/2)) at one position, 0 at another, a masked third: half the first."""
    reference = torch.tensor([[[math.log(3.0), 0.0], [0.0, 0.0], [5.0, 0.0]]])
    policy = torch.tensor([[[0.0, 0.0], [0.0, 0.0], [0.0, 5.0]]], requires_grad=True)
    found = kl_from_reference(policy, reference, torch.tensor([[True, True, False]]))
    expected = (0.75 * math.log(1.5) + 0.25 * math.log(0.5)) / 2
    assert found.item() == pytest.approx(expected, rel=1e-6)
    found.backward()  # d KL / d logit_k = policy_k - reference_k, divided by the 2 counted tokens
    torch.testing.assert_close(policy.grad[0, 0], torch.tensor([-0.125, 0.125]))
    assert not policy.grad[0, 2].any()
