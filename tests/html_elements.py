"""What the tests of pages read of them."""

from html.parser import HTMLParser

import pytest

from edge_ft.plots import can_plot

__all__ = ["Elements", "needs_matplotlib"]

needs_matplotlib = pytest.mark.skipif(not can_plot(), reason="matplotlib is not installed (edge-ft[metrics])")


class Elements(HTMLParser):
    """Tags, attributes and texts of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.texts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
