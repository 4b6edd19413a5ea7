"""CoNLL files: a word and its tag per line, sentences separated by blank lines."""

import re
from collections import Counter
from dataclasses import dataclass
from itertools import chain, groupby

from edge_ft.errors import DataError

__all__ = ["Sentence", "read_sentences"]

DOCUMENT = "-DOCSTART-"


@dataclass(frozen=True)
class Sentence:
    """The words and tags between two blank lines."""

    line: int
    """Where it starts, from 1."""
    words: list[str]
    tags: list[str]


@dataclass(frozen=True)
class _Line:
    number: int
    text: str
    parts: list[str]

    @property
    def is_marked(self) -> bool:
        """Whether it may be a comment: `#` may also be a word, or begin one."""
        return self.text.startswith("#")


def read_sentences(text: str, name: str) -> tuple[list[Sentence], list[int]]:
    """Read the sentences of a file: per line a word, other columns, and its tag.

    Columns are separated by tabs if every line has one, so that words may hold spaces; else by spaces and tabs. A line
    that begins with `#` is a comment before the first word of a sentence, unless it ends with a tag that other lines
    have too; and within a sentence if it has not as many columns as other lines.

    Args:
        text: Content of the file.
        name: Of the file, for messages.

    Returns:
        The sentences, and the numbers of the comment lines.

    Raises:
        DataError: a line has only one column or not as many as others, or the first column does not hold the words.
    """
    lines = _split(text)
    words = [line for line in lines if line.parts and not line.is_marked and line.parts[0] != DOCUMENT]
    columns = Counter(len(line.parts) for line in words)
    usual = columns.most_common(1)[0][0] if columns else 0
    tags = {line.parts[-1] for line in words}
    sentences, comments = [], list[int]()
    for is_break, group in groupby(lines, lambda line: line.parts[:1] in ([], [DOCUMENT])):
        sentence: list[_Line] = []
        for line in () if is_break else group:
            fits = len(line.parts) == usual
            if line.is_marked and not (fits and (sentence or line.parts[-1] in tags)):
                comments.append(line.number)
            else:
                sentence.append(line)
        if sentence:
            sentences.append(sentence)
    _check(sentences, usual, name)
    found = [
        Sentence(lines[0].number, [line.parts[0] for line in lines], [line.parts[-1] for line in lines])
        for lines in sentences
    ]
    return found, comments


def _split(text: str) -> list[_Line]:
    numbered = [(number, line.rstrip(" \t\r")) for number, line in enumerate(text.split("\n"), start=1)]
    filled = [line for _, line in numbered if line and not line.startswith("#") and not line.startswith(DOCUMENT)]
    separator = r"\t+" if filled and all("\t" in line for line in filled) else r"[ \t]+"
    return [
        _Line(number, line, [part.strip() for part in re.split(separator, line)] if line.strip() else [])
        for number, line in numbered
    ]


def _check(sentences: list[list[_Line]], usual: int, name: str) -> None:
    """Refuse lines of which word or tag would be another column.

    Raises:
        DataError: there are such lines.
    """
    lines = list(chain.from_iterable(sentences))
    for line in lines:
        if len(line.parts) < 2 or not line.parts[0]:
            raise DataError(
                f"{name} line {line.number} holds only {line.text.strip()!r}: write a word and its tag on each line, "
                "with a tab or spaces between them"
            )
        if len(line.parts) != usual:
            raise DataError(
                f"{name} line {line.number} has {len(line.parts)} columns and other lines have {usual}: "
                "separate the columns by tabs, in all lines, if a word holds spaces"
            )
    advice = "the first column must hold the words and the last their tags: write only these two"
    first = [[line.parts[0] for line in sentence] for sentence in sentences]
    if usual > 2 and all(
        words[0] == "1" and all(re.fullmatch(r"\d[\d.-]*", word) for word in words) for words in first
    ):
        raise DataError(f"{name} numbers its words in the first column, as CoNLL-U and GermEval do: {advice}")
    if usual > 3 and len(lines) > 3 and len({line.parts[0] for line in lines}) == 1:
        raise DataError(f"{name} has {lines[0].parts[0]!r} in the first column of every line: {advice}")
