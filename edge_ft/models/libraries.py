"""The import of torch, transformers and what else a command needs of the train extra."""

import sys
from contextlib import nullcontext
from types import ModuleType

from edge_ft.errors import require
from edge_ft.progress import Progress, heartbeat

__all__ = ["import_libraries"]


def import_libraries(progress: Progress, *others: str) -> ModuleType:
    """Import torch, transformers and `others`, without the notices that they print.

    Args:
        progress: Receives that it takes seconds, unless torch is imported already.
        others: Further packages of the train extra, by their import names.

    Returns:
        The module torch.

    Raises:
        MissingExtra: one of them is not installed.
    """
    with heartbeat(progress, "loading torch and transformers") if "torch" not in sys.modules else nullcontext():
        torch = require("torch", "train")
        from edge_ft.models.logging import silence_libraries

        with silence_libraries():
            for module in others:
                require(module, "train")
    return torch
