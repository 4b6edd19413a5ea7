"""The import of torch, transformers and what else a command needs of the train extra."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import ModuleType
from typing import Any

from edge_ft.errors import require
from edge_ft.progress import Progress, heartbeat

__all__ = ["import_libraries", "without_bitsandbytes"]


def import_libraries(progress: Progress, *others: str) -> ModuleType:
    """Import torch, transformers and `others`, without the notices that they print, and set what computes products.

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
        from edge_ft.models.products import choose_library

        choose_library(torch)
        with silence_libraries(), without_bitsandbytes():
            for module in others:
                require(module, "train")
    return torch


@contextmanager
def without_bitsandbytes() -> Iterator[None]:
    """Hide bitsandbytes inside this block, unless it is imported already.

    PEFT imports it, which takes a second, to see whether a layer is one of its layers: none here is.
    """
    if "bitsandbytes" in sys.modules:
        yield
        return
    modules: dict[str, Any] = sys.modules
    modules["bitsandbytes"] = None  # an import fails, and importlib finds nothing
    try:
        yield
    finally:
        del modules["bitsandbytes"]
        peft = modules.get("peft.import_utils")
        for name in ("is_bnb_available", "is_bnb_4bit_available"):  # they remember their answer
            forget = getattr(getattr(peft, name, None), "cache_clear", None)
            if forget is not None:
                forget()
