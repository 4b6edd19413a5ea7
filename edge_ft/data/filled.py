"""A text that knows which of its parts a template wrote, and which are a user's."""

from collections.abc import Sequence

__all__ = ["Filled"]


class Filled(str):
    """A filled text template that keeps its parts: only the template's literal text may hold control tokens."""

    parts: tuple[str, ...]
    """The template's literal texts and the values in turn; the first and the last are literal."""

    def __new__(cls, parts: Sequence[str]) -> "Filled":
        """Return the parts as one text; slices and sums of it are ordinary text again."""
        filled = super().__new__(cls, "".join(parts))
        filled.parts = tuple(parts)
        return filled

    @classmethod
    def concat(cls, texts: Sequence[str]) -> "Filled":
        """Return the texts joined; a text that is not `Filled` becomes a value."""
        joined = [""]
        for text in texts:
            first, *rest = text.parts if isinstance(text, Filled) else ("", text, "")
            joined[-1] += first
            joined += rest
        return cls(joined)

    def __getnewargs__(self) -> tuple[tuple[str, ...]]:  # type: ignore[override]  # a copy is made from the parts
        return (self.parts,)
