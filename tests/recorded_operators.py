"""The operators that torch runs, for tests of what is computed, how often and in which dtype."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class RecordedOperators(TorchDispatchMode):
    """Records the operators that torch runs, with the shape and dtype of their first argument."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, torch.Size, torch.dtype]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if args and isinstance(args[0], Tensor):
            self.calls.append((func.overloadpacket.__name__, args[0].shape, args[0].dtype))
        return func(*args, **(kwargs or {}))
