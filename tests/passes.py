"""Forward passes of a real run, counted by a hook: what a dry run's arithmetic is compared with."""

from contextlib import contextmanager

import torch


class Passes:
    """(tokens through the layers, tokens through the head) of each forward pass."""

    def __init__(self):
        self.every: list[tuple[int, int]] = []

    @contextmanager
    def counted(self, vocabulary: int):
        """Count every pass of models with this vocabulary inside the block."""

        def hook(module, given):
            if isinstance(module, torch.nn.Embedding) and module.num_embeddings == vocabulary:
                self.every.append((given[0].numel(), 0))
            elif isinstance(module, torch.nn.Linear) and module.out_features == vocabulary and self.every:
                self.every[-1] = (self.every[-1][0], given[0].shape[:-1].numel())

        handle = torch.nn.modules.module.register_module_forward_pre_hook(hook)
        try:
            yield
        finally:
            handle.remove()
