"""Where a command writes: progress, a table and text on the terminal, or JSON."""

import json
import os
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import cyclopts
from cyclopts import Parameter

from edge_ft.config import Group
from edge_ft.files import write_json
from edge_ft.progress import Lines, Progress, ProgressBars, Silent

__all__ = ["HEADINGS", "Output"]

HEADINGS = {group: cyclopts.Group(group.value, sort_key=at) for at, group in enumerate(Group)}


@dataclass(frozen=True, kw_only=True)
class Output:
    """Options of every command."""

    json: Annotated[str | None, Parameter(group=HEADINGS[Group.OUTPUT], allow_leading_hyphen=True)] = None
    """Write the result as JSON to this file; - is stdout, which then gets nothing else."""
    quiet: Annotated[bool, Parameter(group=HEADINGS[Group.OUTPUT])] = False
    """Do not report progress."""
    debug: Annotated[bool, Parameter(group=HEADINGS[Group.OUTPUT])] = False
    """Show the traceback of an error."""

    def progress(self) -> AbstractContextManager[Progress]:
        """Return what reports progress while a command runs."""
        if self.quiet or not sys.stderr.isatty():
            return nullcontext(Silent() if self.quiet else Lines())
        return ProgressBars()

    def show(self, result: Any, rows: Sequence[tuple[str, ...]], text: str) -> None:
        """Write the result as JSON if --json is given, and print a table and text unless JSON goes to stdout.

        Args:
            result: What --json writes.
            rows: Of a table, the header first.
            text: Printed below the table.
        """
        if os.environ.get("RANK", "0") != "0":
            return  # of several processes only the first one prints
        self.write(result)
        if self.json == "-":
            return
        if rows:
            _print_table(rows)
        if text:
            print(text)

    def write(self, result: Any) -> None:
        """Write the result as JSON if --json is given."""
        if self.json == "-":
            print(json.dumps(result, indent=2, ensure_ascii=False))
        elif self.json is not None:
            write_json(Path(self.json), result)


def _print_table(rows: Sequence[tuple[str, ...]]) -> None:
    """Print aligned columns, the first to the left; no cell is cut, however narrow the terminal is."""
    from rich.console import Console
    from rich.table import Column, Table
    from rich.text import Text

    columns = (Column(justify="right" if at else "left", no_wrap=True) for at in range(len(rows[0])))
    table = Table(*columns, box=None, show_header=False, pad_edge=False, padding=(0, 1))
    for row in rows:
        table.add_row(*map(Text, row))
    Console(width=10_000, highlight=False).print(table)
