"""The command line, run in the process of the tests."""

import io
import sys

import pytest

from edge_ft.cli import main


def run_cli(
    monkeypatch: pytest.MonkeyPatch, *arguments: str, stdin: bytes = b"", encoding: str = "utf-8"
) -> tuple[int, bytes]:
    """Exit code and stdout of a command."""
    written = io.BytesIO()
    monkeypatch.setattr(sys, "argv", ["edge-ft", *arguments])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding, errors="surrogateescape"))
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding, errors="strict", write_through=True))
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0), written.getvalue()
    return 0, written.getvalue()
