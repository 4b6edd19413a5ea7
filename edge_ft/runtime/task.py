"""What can be asked of an open bundle."""

from typing import NoReturn

from edge_ft.artifacts import Bundle
from edge_ft.errors import UsageError

__all__ = ["OneTask"]

CALLS = {
    "generate": ("text-generation", "text2text-generation"),
    "stream": ("text-generation", "text2text-generation"),
    "chat": ("text-generation",),
    "classify": ("text-classification", "text-generation"),
    "tag": ("token-classification",),
    "fill": ("fill-mask",),
    "embed": ("feature-extraction",),
}
"""What can be asked of a bundle, and of which task it must be."""


class OneTask:
    """An open bundle: what it was not made for is refused by the name of its task."""

    bundle: Bundle

    def __getattr__(self, name: str) -> NoReturn:
        if name in CALLS:
            raise UsageError(
                f"{self.bundle.path} is a {self.bundle.task} bundle: {name} is for {' and '.join(CALLS[name])}"
            )
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
