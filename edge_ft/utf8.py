"""Text from outside, as UTF-8: one decoder for files and standard input, with one error."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from edge_ft.errors import UsageError

__all__ = ["check_characters", "decode_utf8", "lines_of", "read_json", "read_utf8"]


def decode_utf8(content: bytes, where: str, error: type[UsageError] = UsageError) -> str:
    """Decode UTF-8, without the byte order mark that some editors write first.

    Args:
        content: The bytes.
        where: What holds them, for the message.
        error: What is raised.

    Returns:
        The text.

    Raises:
        UsageError: it is not UTF-8; an `error`, with the number of the line.
    """
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as cause:
        line = content.count(b"\n", 0, cause.start) + 1
        raise error(f"{where} line {line} is not UTF-8 ({cause.reason}): save it as UTF-8") from cause


def read_utf8(path: Path, error: type[UsageError] = UsageError) -> str:
    """Read a text file by `decode_utf8`.

    Returns:
        The text.

    Raises:
        UsageError: it cannot be opened, or is not UTF-8; an `error`.
    """
    try:
        content = path.read_bytes()
    except OSError as cause:
        raise error(f"{path} cannot be read: {cause.strerror or cause}") from cause
    return decode_utf8(content, str(path), error)


def read_json(path: Path, error: type[UsageError] = UsageError, advice: str = "save or download it again") -> Any:
    """Read a JSON file.

    Args:
        path: The file.
        error: What is raised.
        advice: What to do about a file that is not JSON.

    Returns:
        Its value.

    Raises:
        UsageError: it cannot be opened, or is not JSON in UTF-8; an `error`.
    """
    text = read_utf8(path, error)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as cause:
        raise error(f"{path} is not JSON ({cause}): {advice}") from cause


def lines_of(stream: TextIO) -> Iterator[str]:
    """Read standard input.

    Yields:
        Each line with its newline.

    Raises:
        UsageError: a line is not in the encoding of the stream.
    """
    line, number = "", 0
    while True:
        try:
            line, number = stream.readline(), number + 1
        except UnicodeDecodeError as cause:
            raise UsageError(
                f"standard input is not {stream.encoding.upper()} ({cause.reason}, after line {number}): convert it"
            ) from cause
        if not line:
            return
        yield line.removeprefix("\ufeff") if number == 1 else line


def check_characters(text: str, where: str, error: type[UsageError] = UsageError) -> None:
    """Refuse half of a surrogate pair: JSON can escape one, and Python makes one of a byte that is not UTF-8.

    Args:
        text: As Python decoded it.
        where: What holds it, for the message.
        error: What is raised.

    Raises:
        UsageError: `text` has one; an `error`.
    """
    try:
        text.encode()
    except UnicodeEncodeError as cause:
        raise error(f"{where} holds half of a surrogate pair, which is not a character: remove it") from cause
