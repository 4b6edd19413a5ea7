"""What a chat template may spend, and what its operations cost by the size of what they read and make."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

__all__ = ["CHUNK", "Budget", "TooExpensive", "measure_call", "measure_operator"]

STEPS, STEPS_PER_INPUT = 400_000, 200
"""Steps that a template may take, and how many more for each item, or 64 characters, of its inputs."""
LONGEST_TEXT, TEXTS_PER_INPUT = 1_000_000, 8
"""Characters, or items, of a value that a template may make, and how many more for each one of its inputs."""
LONGEST_INTEGER, LARGEST_ARGUMENT = 4096, 100_000
"""Bits of an integer, and the largest width or count that a filter or method may be given."""
CHUNK = 64
"""Characters that cost one step."""
SLOW = ("capitalize", "list", "rsplit", "split", "splitlines", "striptags", "title", "urlencode", "wordcount")
"""Filters and methods that take longer for a character than others."""


class TooExpensive(jinja2.TemplateError):
    """The template takes too many steps, or makes too long a text."""


class Budget:
    """What one rendering may still spend."""

    def __init__(self, variables: Mapping[str, Any]) -> None:
        self.longest = self.steps = 10**12
        self.charge(variables)
        size = 10**12 - self.steps
        self.steps = STEPS + STEPS_PER_INPUT * size
        self.longest = LONGEST_TEXT + TEXTS_PER_INPUT * CHUNK * size

    def spend(self, steps: int) -> None:
        """Take steps.

        Raises:
            TooExpensive: none are left.
        """
        self.steps -= steps
        if self.steps < 0:
            raise TooExpensive("it takes too many steps: its loops or texts are endless or very long")

    def expect(self, size: int) -> None:
        """Take the steps of a text or list before it is made.

        Raises:
            TooExpensive: it would be too long.
        """
        if size > self.longest:
            raise TooExpensive(f"it makes a text or list of {size} characters or items")
        self.steps -= size // CHUNK
        if self.steps < 0:
            self.spend(0)

    def touch(self, value: Any) -> None:
        """Take the steps of reading a text, or the items of a list without what is in them."""
        if isinstance(value, str | bytes):
            self.expect(len(value) + CHUNK)
            return
        if isinstance(value, list | tuple | dict | set | range):
            self.spend(len(value))
        elif isinstance(value, int) and value.bit_length() > LONGEST_INTEGER:
            raise TooExpensive("it makes a very large number")
        self.spend(1)

    def charge(self, value: Any) -> None:
        """Take the steps of a value with all that is in it, each time that it is in it."""
        if type(value) is str:  # nearly always, and faster
            self.expect(len(value) + CHUNK)
            return
        pending = [value]
        while pending:
            item = pending.pop()
            self.touch(item)
            if isinstance(item, dict):
                pending += [*item.keys(), *item.values()]
            elif isinstance(item, list | tuple | set):
                pending += item


def measure_call(budget: Budget, name: str, value: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Measure the result of a filter, or of a method of texts, before it is made.

    Raises:
        TooExpensive: it would be too long.
    """
    given = [*args, *kwargs.values()]
    numbers = [abs(arg) for arg in given if isinstance(arg, int)]
    if max(numbers, default=0) > LARGEST_ARGUMENT or name == "translate":
        raise TooExpensive(f"it gives {name} a number above {LARGEST_ARGUMENT}, or a table of texts")
    widest = max([*numbers, *map(_length, given)], default=0)
    if name in ("format", "format_map"):
        for arg in given:
            budget.charge(arg)
        budget.expect(_formatted_size(value, given))
    elif name == "replace" and len(given) > 1:
        places = str(value).count(given[0]) if isinstance(given[0], str) and given[0] else _length(value) + 1
        budget.expect(_length(value) + places * _length(given[1]))
    elif name == "join":
        items = next((arg for arg in (value, *given) if not isinstance(arg, str)), value)
        budget.charge(items)
        texts = [arg for arg in (value, *given) if isinstance(arg, str)]
        budget.expect(max(map(len, texts), default=0) * _length(items))
    elif name in ("indent", "expandtabs", "tojson"):
        budget.expect((_length(value) if name != "tojson" else 4000) * min(widest, LARGEST_ARGUMENT))
    elif name in SLOW:
        budget.spend(_length(value) // 8)
    elif name == "sum" and any(isinstance(arg, list | tuple) for arg in given):  # each sum is a copy of the last
        budget.spend(_length(value) ** 2)
    else:
        budget.expect(_length(value) + widest)


def measure_operator(budget: Budget, operator: str, left: Any, right: Any) -> None:
    """Measure the result of an operator before it is made, and take the steps of reading what it is of.

    Raises:
        TooExpensive: it would be too long, or too large a number.
    """
    budget.touch(left)
    budget.touch(right)
    if operator == "**" and isinstance(left, int) and isinstance(right, int):
        if left.bit_length() * max(right, 0) > LONGEST_INTEGER and abs(left) > 1:
            raise TooExpensive("it makes a very large number")
    elif operator == "*":
        times = next((max(side, 0) for side in (left, right) if isinstance(side, int)), 0)
        budget.expect(max(map(_length, (left, right))) * times)
    elif operator == "+":
        budget.expect(_length(left) + _length(right))
    elif operator == "%" and isinstance(left, str | bytes):
        budget.charge(right)
        budget.expect(_formatted_size(left, right if isinstance(right, tuple) else (right,)))


def _length(value: Any) -> int:
    return len(value) if isinstance(value, str | bytes | list | tuple | dict) else 0


def _formatted_size(text: Any, args: Sequence[Any]) -> int:
    """Return how long a text can be at most that `%` or `format` makes."""
    text = text.decode("latin-1") if isinstance(text, bytes) else str(text)
    widths = re.findall(r"%[-+ #0]*(\d*)(?:\.(\d*))?|:[^{}]*?(\d+)(?:\.(\d+))?", text)
    written = sum(min(int(digits[:12]), 10**12) for found in widths for digits in found if digits)
    open_places = text.count("{") + text.count("*") + text.count("%")
    widest = max([abs(arg) for arg in args if isinstance(arg, int)], default=0)
    nested = widest if "*" in text or re.search(r"\{[^{}]*:[^{}]*\{", text) else 0
    return len(text) + written + open_places * (min(nested, 10**12) + sum(map(_length, args)))
