"""One HTML page from texts, tables and plots, in one file: no script, and nothing that a browser would fetch."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jinja2

__all__ = ["NO_PLOTS", "Plot", "Section", "Table", "html_page", "interval"]

NO_PLOTS = "The plots need matplotlib: pip install 'edge-ft[metrics]'."
"""What a page says where it would have plots."""


@dataclass(frozen=True)
class Table:
    """A table, which scrolls in its own box where it is wider than the page."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    """A cell for each column; the first is the title of the row."""
    kind: Literal["figures", "texts"] = "figures"
    """figures: cells of one line. texts: cells that wrap."""
    best: frozenset[tuple[int, int]] = frozenset()
    """Row and column, from 0, of the cells that are shown as the best of their row."""
    note: str = ""


@dataclass(frozen=True)
class Plot:
    """A drawing with its caption."""

    svg: str
    """As `edge_ft.plots` draws it: the only text that is put into the page without being escaped."""
    caption: str


@dataclass(frozen=True)
class Section:
    """A heading, and below it the texts, the plots side by side, and the tables."""

    title: str
    texts: Sequence[str] = ()
    plots: Sequence[Plot] = ()
    tables: Sequence[Table] = ()


def interval(value: dict[str, Any] | None) -> str:
    """A metric with its 95% interval; – where it is undefined."""
    if value is None or value["value"] is None:
        return "–"
    return f"{value['value']:.4f} [{value['low']:.4f}, {value['high']:.4f}]"


def html_page(title: str, lead: str, sections: Sequence[Section]) -> str:
    """Write a page that is read in a light or dark browser, on a phone or a desktop.

    Args:
        title: Its heading.
        lead: A sentence below the heading.
        sections: What follows; texts from outside are escaped.

    Returns:
        The HTML.
    """
    source = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, keep_trailing_newline=True
    )
    return environment.from_string(source).render(title=title, lead=lead, sections=sections)
