"""A GPU that is not there: PyTorch's fake tensors know devices, dtypes and shapes and compute nothing.

Every function that takes a model or its tensors runs on weights that are said to be on CUDA, in bfloat16. A tensor that
stays on one device and meets one of the other ends the test. What depends on values cannot be faked (the loop of
generate ends when its ids say so); of those the forward pass with the edit is.
"""

import copy
from contextlib import contextmanager

import device_work
import pytest
import torch
from conftest import FAMILIES, LAYERS, NEURONS, WIDTH
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from lib import controls, neurons
from lib.protocol import FAITHFUL, SOUND

EDIT = device_work.edit
# What these do with values after the trace: the trace itself has run by then.
VALUES = (DataDependentOutputException, DynamicOutputShapeException)
GENERATING = {
    "edited generation", "steered generation", "scaled keys, generation", "mean activations", "released means",
    "attribution", "sets of neurons", "pplm",
}  # fmt: skip


@contextmanager
def on_cuda(*models):
    """The nnsight models with fake CUDA weights in bfloat16, inside the mode."""
    before = []
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        for model in models:
            for module in model._module.modules():
                for table in (module._parameters, module._buffers):
                    for name, tensor in table.items():
                        if tensor is None:
                            continue
                        before.append((table, name, tensor))
                        dtype = torch.bfloat16 if tensor.is_floating_point() and table is module._parameters else tensor.dtype
                        fake = torch.empty(tensor.shape, device="cuda", dtype=dtype)
                        table[name] = torch.nn.Parameter(fake, requires_grad=False) if table is module._parameters else fake
        try:
            yield mode
        finally:
            for table, name, tensor in before:
                table[name] = tensor


@pytest.fixture
def pair(tiny):
    from lib.models import load, resolve

    return lambda family: [load(resolve(str(tiny(family, at))), "cpu") for at in (0, 1)]


@pytest.mark.parametrize("name", [name for name in device_work.WORK if name not in GENERATING and "dpo" not in name])
@pytest.mark.parametrize("family", FAMILIES)
def test_no_tensor_is_on_the_wrong_device(pair, family, name):
    base, post = pair(family)
    with on_cuda(base, post):
        assert next(base._module.parameters()).device.type == "cuda"
        try:
            device_work.WORK[name](base, post)
        except VALUES:
            pass
