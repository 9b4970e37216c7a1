"""How far training moved the weights, by hand."""

import pytest
import torch

from lib.weights import changes


def test_changes_by_hand():
    def model(bias: bool):
        parts = {"mlp": torch.nn.Linear(2, 1, bias=bias), "embed": torch.nn.Linear(1, 1, bias=False)}
        return torch.nn.ModuleDict(parts)

    base, post = model(bias=False), model(bias=True)
    with torch.no_grad():
        base["mlp"].weight[:] = torch.tensor([[3.0, 4.0]])
        post["mlp"].weight[:] = torch.tensor([[3.0, 4.5]])
        post["mlp"].bias[:] = 0.5  # an added bias starts at 0
        base["embed"].weight[:] = post["embed"].weight[:] = 12.0
    found = changes(post, base)
    cosine = (9 + 18) / (5 * (9 + 4.5**2) ** 0.5)
    assert found["MLP"] == {
        "entries": 3, "changed": 2, "lowest_cosine": pytest.approx(cosine), "mean_change": pytest.approx(1 / 3),
        "relative_change": pytest.approx(0.5**0.5 / 5),
    }  # fmt: skip
    assert found["embedding"] == {
        "entries": 1, "changed": 0, "lowest_cosine": 1, "mean_change": 0, "relative_change": 0,
    }  # fmt: skip
    assert found["all"]["entries"] == 4 and found["all"]["changed"] == 2
    assert found["all"]["relative_change"] == pytest.approx(0.5**0.5 / 13)
