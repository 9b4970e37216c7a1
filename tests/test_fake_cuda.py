"""A GPU that is not there: PyTorch's fake tensors know devices, dtypes and shapes and compute nothing.

What reads weights runs on weights that are said to be on CUDA, in bfloat16: a tensor that stays there and meets one of
the CPU ends the test. A build of PyTorch without CUDA cannot slice fake CUDA tensors inside a trace, and loops that
depend on values cannot be faked: those run on the device of `second_device`.
"""

from contextlib import contextmanager

import device_work
import pytest
import torch
from conftest import FAMILIES, LAYERS, NEURONS, WIDTH
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from lib import neurons
from lib.models import load, resolve

# What a function does with values at its end: its work on tensors has passed by then.
VALUES = (DataDependentOutputException, DynamicOutputShapeException)
READING_WEIGHTS = (
    "value projections", "value vectors", "directions", "nearest tokens", "moved value vectors", "changed weights",
    "subspace",
)  # fmt: skip


@contextmanager
def on_cuda(*models):
    """The models with fake CUDA weights in bfloat16, inside the mode."""
    before = []
    with FakeTensorMode(allow_non_fake_inputs=True):
        for model in models:
            for module in model._module.modules():
                for name, weight in module._parameters.items():
                    if weight is not None:
                        fake = torch.empty(weight.shape, device="cuda", dtype=torch.bfloat16)
                        before.append((module._parameters, name, weight))
                        module._parameters[name] = torch.nn.Parameter(fake, requires_grad=False)
                for name, buffer in module._buffers.items():
                    if buffer is not None:
                        before.append((module._buffers, name, buffer))
                        module._buffers[name] = torch.empty(buffer.shape, device="cuda", dtype=buffer.dtype)
        try:
            yield
        finally:
            for table, name, tensor in before:
                table[name] = tensor


@pytest.fixture
def pair(tiny):
    return lambda family: [load(resolve(str(tiny(family, at))), "cpu") for at in (0, 1)]


@pytest.mark.parametrize("name", READING_WEIGHTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_no_tensor_is_on_the_wrong_device(pair, family, name):
    base, post = pair(family)
    with on_cuda(base, post):
        assert next(base._module.parameters()).device.type == "cuda"
        try:
            found = device_work.WORK[name](base, post)
        except VALUES:
            return
        for part in device_work.tensors(found):
            assert part.device.type == "cpu"


@pytest.mark.parametrize("family", FAMILIES)
def test_groups_and_attribution_meet_means_of_the_cpu(pair, family):
    """What every script about neurons does first: projections of weights on CUDA, means as the cache gives them."""
    (base, _) = pair(family)
    with on_cuda(base):
        direction = torch.empty(WIDTH, dtype=torch.float64)
        mean = torch.empty(LAYERS, NEURONS, dtype=torch.float64)
        projection, cosine = neurons.value_projections(base, direction, True)
        delta = neurons.attribution(mean, projection, mean, projection)
        for mask in neurons.groups(cosine, mean, delta).values():
            assert mask.device.type == "cpu"
