"""Text templates: `{column}` stands for a column's value, `{{` and `}}` are braces."""

import re
from collections.abc import Callable, Sequence

from edge_ft.data.tokenizer import Filled
from edge_ft.errors import DataError, did_you_mean

__all__ = ["check_template", "columns_in", "fill_template", "match_template", "unescape"]

# A template's parts: a doubled brace, a column in braces, a brace that belongs to neither.
_PART = re.compile(r"(\{\{|\}\}|\{[^{}]*\}|[{}])")


def unescape(template: str) -> str:
    """Return the template with `\\n`, `\\t` and `\\\\` read as newline, tab and backslash."""
    return re.sub(r"\\([nt\\])", lambda match: {"n": "\n", "t": "\t", "\\": "\\"}[match[1]], template)


def check_template(template: str | None, flag: str, names: Sequence[str]) -> None:
    """Check that a template, given with `flag`, names only columns that exist.

    Raises:
        DataError: an unknown column or a single brace.
    """
    for part in _PART.findall(template or ""):
        if part in ("{", "}"):
            raise DataError(f"{flag} has a lone {part}: write {{{{ and }}}} for braces that are text")
        if part not in ("{{", "}}") and part[1:-1] not in names:
            raise DataError(
                f"{flag} names no column with {part}{did_you_mean(part[1:-1], list(names))}: "
                f"the columns are {', '.join(names)}; write {{{{ and }}}} for braces that are text"
            )


def columns_in(template: str | None) -> set[str]:
    """Return the columns that a template names; none for None."""
    return {part[1:-1] for part in _PART.findall(template or "") if part not in ("{{", "}}")}


def fill_template(template: str, value_of: Callable[[str], str]) -> Filled:
    """Return the template with each column replaced by `value_of` its name."""
    parts = _split(template)
    parts[1::2] = map(value_of, parts[1::2])
    return Filled(parts)


def match_template(template: str, text: str) -> tuple[str, ...] | None:
    """Return the value of each column in a text that `template` could have produced; None for any other text."""
    found = re.fullmatch("(.*)".join(map(re.escape, _split(template)[::2])), text, re.DOTALL)
    return None if found is None else found.groups()


def _split(template: str) -> list[str]:
    """Return the template's literal texts and its column names in turn, a literal text first and last."""
    parts = [""]
    for index, part in enumerate(_PART.split(template)):
        if index % 2 and part not in ("{{", "}}"):
            parts += [part[1:-1], ""]
        else:
            parts[-1] += part[0] if index % 2 else part
    return parts
