"""What all open bundles have in common."""

from typing import NoReturn

from edge_ft.artifacts import Bundle
from edge_ft.data import Rendering, TextTokenizer
from edge_ft.errors import UsageError

__all__ = ["OpenBundle"]

METHOD_TASKS = {
    "generate": ("text-generation", "text2text-generation"),
    "stream": ("text-generation", "text2text-generation"),
    "chat": ("text-generation",),
    "classify": ("text-classification", "text-generation"),
    "tag": ("token-classification",),
    "fill": ("fill-mask",),
    "embed": ("feature-extraction",),
}
"""The tasks whose bundles have each method."""


class OpenBundle:
    """A bundle, its tokenizer and its rendering; a method of another task raises UsageError."""

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle
        self.tokenizer = TextTokenizer.load(bundle.path)
        self.rendering = Rendering.from_dict(bundle.manifest["rendering"])

    def __getattr__(self, name: str) -> NoReturn:
        if name in METHOD_TASKS:
            raise UsageError(
                f"{self.bundle.path} is a {self.bundle.task} bundle: {name} needs a bundle for "
                f"{' or '.join(METHOD_TASKS[name])}"
            )
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
