"""NDIF's two Ray actors on a machine without a GPU; NDIF loads them by their names, and all else is its own.

Weights are loaded on the CPU, and what NDIF asks of CUDA does nothing.
"""

import ray
import torch
from ndif.services.ray.deployments.controller.controller import _ControllerActor
from ndif.services.ray.deployments.modeling import base, util
from nnsight.modeling.mixins.remotable import Remotable


def nothing(*args, **kwargs) -> dict:
    return {}


def without_gpus() -> None:
    """Change this process; Ray ships classes by value, so each actor's process has to do it for itself."""
    torch.cuda.synchronize = torch.cuda.empty_cache = nothing
    for module in (base, util):
        for name in ("set_default_gpu", "set_process_limits", "reset_process_limits", "gpu_baselines", "gpu_peaks"):
            if hasattr(module, name):
                setattr(module, name, nothing)
    for name in ("describe_checkpoint", "max_tp_size"):
        function = getattr(Remotable, name).__func__
        if function.__name__ != "untrusting":
            setattr(Remotable, name, classmethod(_untrusting(function)))


def _untrusting(function):
    """ndif 0.1.2 gives trust_remote_code to functions of nnsight 0.8.1 that do not take it."""

    def untrusting(cls, *args, trust_remote_code=False, **kwargs):
        return function(cls, *args, **kwargs)

    return untrusting


without_gpus()


class OnCPU(base.BaseModelDeployment):
    CACHEABLE = False

    def __init__(self, *args, **kwargs):
        import actors

        actors.without_gpus()
        super().__init__(*args, **kwargs)

    def load_from_disk(self):
        model = base.HuggingFaceModel.from_model_key(
            self.model_key, dispatch=True, dtype=self.dtype_name, device="cpu", **self.kwargs
        )
        model._module.requires_grad_(False)
        return model


@ray.remote(num_cpus=0, max_restarts=-1)
class Model(OnCPU):
    pass


class Controlling(_ControllerActor):
    def __init__(self, *args, **kwargs):
        import actors

        actors.without_gpus()
        super().__init__(*args, **kwargs)


@ray.remote(num_cpus=1, num_gpus=0, max_restarts=-1, resources={"head": 1})
class Controller(Controlling):
    pass
