"""Everything that is computed on a model's device, on one that is not the CPU (`second_device`): as there, to rounding.

The device is real enough for loops that depend on values, such as generation; a tensor that stayed on the CPU and meets
one of the model's ends the test, as on a GPU.
"""

import pytest
import torch
from device_work import WORK, tensors
from second_device import SECOND, Held, Second, moved

FAMILIES = ["gpt2", "llama", "gemma2"]  # one of each shape: rows or columns, with a norm after the MLP or without


@pytest.fixture(scope="module")
def pairs(tiny):
    """(family, dtype, whether on the second device) -> a base model and one of the same shape."""
    from lib.models import load, resolve

    loaded = {}

    def pair(family: str, dtype: str, second: bool):
        if (family, dtype, second) not in loaded:
            models = [load(resolve(str(tiny(family, at))), "cpu", dtype) for at in (0, 1)]
            for model in models if second else ():
                moved(model._module)
                model.pipeline.device = SECOND
            loaded[family, dtype, second] = models
        return loaded[family, dtype, second]

    return pair


def test_devices_do_not_mix():
    """The device itself: it computes, and refuses what CUDA refuses."""
    here, there = torch.ones(3), Held(torch.arange(3.0))
    with Second():
        assert (there + 1).device == SECOND and (there + 1).cpu().tolist() == [1, 2, 3]
        assert torch.zeros(2, device=SECOND).device == SECOND and there[torch.tensor([0, 2])].tolist() == [0, 2]
        assert there.to("cpu").device.type == "cpu" and type(there.cpu()) is torch.Tensor
        for mixed in (lambda: here + there, lambda: torch.stack([here, there]), lambda: there @ here):
            with pytest.raises(RuntimeError, match="same device"):
                mixed()
        with pytest.raises((RuntimeError, TypeError)):
            there.numpy()


@pytest.mark.parametrize("name", WORK)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_as_on_the_cpu(pairs, family, name):
    expected = tensors(WORK[name](*pairs(family, "float32", False)))
    with Second():
        found = [part.cpu() for part in tensors(WORK[name](*pairs(family, "float32", True)))]
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs.double(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "name", ["mean activations", "value projections", "attribution", "value vectors", "directions"]
)
def test_what_leaves_lib_is_on_the_cpu(pairs, name):
    """All that is [n_layers, d_mlp] or [d_model] is float64 there, whatever the model's device and dtype."""
    with Second():
        for part in tensors(WORK[name](*pairs("gemma3_text", "bfloat16", True))):
            assert type(part) is torch.Tensor and part.device.type == "cpu"
            assert part.dtype == torch.float64 or name == "directions"
