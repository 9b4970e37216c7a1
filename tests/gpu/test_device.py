"""Everything that is computed on a model's device: on a GPU as on the CPU, for every family."""

import os

import pytest
import torch
from conftest import FAMILIES
from device_work import WORK, tensors

DEVICE = os.environ.get("TEST_DEVICE", "cuda")
pytestmark = pytest.mark.skipif(
    DEVICE == "cuda" and not torch.cuda.is_available(), reason="this machine has no CUDA GPU"
)


@pytest.fixture(scope="module")
def pairs(tiny):
    """(family, device, dtype) -> a base model and one of the same shape, loaded for tracing."""
    from lib.models import load, resolve

    loaded = {}

    def pair(family: str, device: str, dtype: str = "float32"):
        if (family, device, dtype) not in loaded:
            loaded[family, device, dtype] = [load(resolve(str(tiny(family, at))), device, dtype) for at in (0, 1)]
        return loaded[family, device, dtype]

    return pair


@pytest.mark.parametrize("name", WORK)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_as_on_the_cpu(pairs, family, name):
    expected, found = (tensors(WORK[name](*pairs(family, device))) for device in ("cpu", DEVICE))
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.cpu().double(), theirs.double(), rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("name", WORK)
@pytest.mark.parametrize("family", FAMILIES)
def test_in_bfloat16(pairs, family, name):
    """Runs, and what comes out is finite."""
    for part in tensors(WORK[name](*pairs(family, DEVICE, "bfloat16"))):
        assert part.isfinite().all()


def test_results_of_all_neurons_are_on_the_cpu(pairs):
    """float64, whatever the model's device and dtype."""
    for name in ("mean activations", "means of given texts", "value projections", "attribution", "value vectors"):
        for part in tensors(WORK[name](*pairs("llama", DEVICE, "bfloat16"))):
            assert part.device.type == "cpu" and part.dtype == torch.float64, name
