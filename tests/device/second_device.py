"""A second device on this processor: tensors that say they are elsewhere, are computed on the CPU, and do not mix.

PyTorch's PrivateUse1 key stands for a backend outside its tree. Here it is one in Python: a tensor of the device
`second` holds one of the CPU, every operation runs on what they hold, and one that meets tensors of both devices raises
as CUDA does. Exceptions are CUDA's too: numbers without dimensions, indices, and copies.
"""

import warnings

import torch
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map, tree_map_only
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend


class Backend(_DummyBackendModule):
    """What PyTorch asks a backend's module."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    _setup_privateuseone_for_python_backend("second", Backend())
SECOND = torch.device("second", 0)
aten = torch.ops.aten
MIXING = {aten.copy_.default, aten._to_copy.default}
INDEXING = {
    aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default,
    aten._unsafe_index.Tensor, aten._unsafe_index_put.default,
}  # fmt: skip


class Held(torch.Tensor):
    """A tensor of the second device; `inner` is the CPU's."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device=SECOND, requires_grad=False,
        )  # fmt: skip

    def __init__(self, inner: torch.Tensor):
        self.inner = inner

    def __repr__(self, **_):
        return f"Held({self.inner})"

    def tolist(self):
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return computed(func, args, kwargs or {})


class Second(TorchDispatchMode):
    """Inside, tensors can be made on the second device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return computed(func, args, kwargs or {})


def computed(func, args, kwargs):
    """What an operation returns, on the device that its arguments are on or that it was asked for."""
    tensors = [part for part in tree_flatten((args, kwargs))[0] if isinstance(part, torch.Tensor)]
    there = [part for part in tensors if isinstance(part, Held)]
    asked = kwargs.get("device")
    asked = None if asked is None else torch.device(asked)
    if there and func not in MIXING and asked is None:
        subject = tensors[:1] if func in INDEXING else tensors
        values = [args[2]] if func in INDEXING and len(args) > 2 else []
        for part in [*subject, *values]:
            if not isinstance(part, Held) and part.dim():
                raise RuntimeError(f"Expected all tensors to be on the same device: {func} of second:0 and cpu.")
    if not there and (asked is None or asked.type != SECOND.type):
        return func(*args, **kwargs)
    inner_args, inner_kwargs = tree_map_only(Held, lambda part: part.inner, (args, kwargs))
    if asked is not None:
        inner_kwargs["device"] = torch.device("cpu")
    on_cpu = func is aten._to_copy.default and asked is not None and asked.type == "cpu"
    if func is aten.copy_.default and not isinstance(args[0], Held):
        func(*inner_args, **inner_kwargs)
        return args[0]
    result = func(*inner_args, **inner_kwargs)
    if on_cpu:
        return result.clone() if any(result is part.inner for part in there) else result
    wrapped = tree_map(lambda part: Held(part) if type(part) is torch.Tensor else part, result)
    return return_and_correct_aliasing(func, args, kwargs, wrapped)


def moved(module: torch.nn.Module) -> torch.nn.Module:
    """The module with its parameters and buffers on the second device, in place; what is tied stays tied."""
    held = {}

    def once(tensor: torch.Tensor):
        if id(tensor) not in held:
            held[id(tensor)] = (tensor, Held(tensor.detach().clone()))
        return held[id(tensor)][1]

    parameters = {}
    for part in module.modules():
        for name, weight in part._parameters.items():
            if weight is not None:
                if id(weight) not in parameters:
                    parameters[id(weight)] = (weight, torch.nn.Parameter(once(weight), weight.requires_grad))
                part._parameters[name] = parameters[id(weight)][1]
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = once(buffer)
    return module


# torch.tensor(..., device="second") makes a tensor of the CPU and copies it below all modes.
below = torch.library.Library("aten", "IMPL")


def _empty_strided(size, stride, *, dtype=None, layout=None, device=None, pin_memory=None):
    return Held(torch.empty_strided(size, stride, dtype=dtype))


def _copy_from(source, target, non_blocking=False):
    (target.inner if isinstance(target, Held) else target).copy_(source.inner if isinstance(source, Held) else source)
    return target


below.impl("empty_strided", _empty_strided, "PrivateUse1")
below.impl("_copy_from", _copy_from, "PrivateUse1")
