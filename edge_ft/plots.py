"""Plots as inline SVG whose colours are those of the page around them, drawn by matplotlib (`edge-ft[metrics]`)."""

import hashlib
import io
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.transforms import Bbox

__all__ = ["Axis", "Curve", "Distribution", "Point", "can_plot", "curves", "distributions", "frontier", "scatter"]

WIDTH, HEIGHT = 360, 270
"""Points, which are pixels on a phone: its text keeps its size there."""
SERIES = 6
"""Colours that the page has."""
_COLOURS = {"#010203": "var(--ink)", "#010204": "var(--faint)", "#010205": "var(--line)"} | {
    f"#0102{16 + series:02x}": f"var(--series-{series})" for series in range(SERIES)
}
"""Colours that matplotlib is given, and what they are in the page."""
_INK, _FAINT, _LINE, *_SERIES = _COLOURS
_MARKERS = "osD^vP"
_LONGEST_LABEL = 26
_SIDES = (
    *((1, 0, "left"), (-1, 0, "right"), (0, 1, "center"), (0, -1, "center")),
    *((0.7, 0.7, "left"), (0.7, -0.7, "left"), (-0.7, 0.7, "right"), (-0.7, -0.7, "right")),
)
"""Directions from a point to its name, and the alignment of the name."""


@dataclass(frozen=True)
class Axis:
    """What an axis shows."""

    label: str
    better: Literal["lower", "higher"]

    @property
    def title(self) -> str:
        """The label, with the direction that is better."""
        return f"{self.label} ({'←' if self.better == 'lower' else '→'} better)"


@dataclass(frozen=True)
class Point:
    """One subject of a scatter plot."""

    x: float
    y: float
    label: str
    series: int = 0
    """Points of a series have the same colour and marker."""


@dataclass(frozen=True)
class Distribution:
    """One subject's values."""

    values: Sequence[float]
    label: str
    series: int = 0


@dataclass(frozen=True)
class Curve:
    """One line."""

    points: Sequence[tuple[float, float]]
    label: str
    series: int = 0
    marked: bool = False
    """Whether each point has a marker: where there are few."""


def can_plot() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def frontier(points: Sequence[Point], x: Axis, y: Axis) -> list[Point]:
    """The points that no other one equals or beats on both axes (Pareto), from left to right."""

    def cost(point: Point) -> tuple[float, float]:
        return (point.x if x.better == "lower" else -point.x, point.y if y.better == "lower" else -point.y)

    best: list[Point] = []
    for point in sorted(points, key=cost):
        if not best or cost(point)[1] < cost(best[-1])[1]:
            best.append(point)
    return sorted(best, key=lambda point: point.x)


def scatter(points: Sequence[Point], x: Axis, y: Axis) -> str:
    """Draw points with their names, and a line through those of `frontier`.

    Args:
        points: At least one.
        x: The horizontal axis.
        y: The vertical axis.

    Returns:
        An `<svg>` element.
    """

    def paint(axes: "Axes") -> None:
        _scale(axes, x="log" if _is_wide([point.x for point in points]) else "linear")
        best = frontier(points, x, y)
        axes.plot([p.x for p in best], [p.y for p in best], color=_FAINT, linewidth=1, linestyle=(0, (3, 3)), zorder=1)
        for point in points:
            series = point.series % SERIES
            axes.plot(point.x, point.y, _MARKERS[series], color=_SERIES[series], markersize=7, zorder=3)
        axes.margins(0.18)
        axes.set_xlabel(x.title)
        axes.set_title(f"{y.label} ({'↓' if y.better == 'lower' else '↑'} better)", loc="left")
        _label_points(axes, points)

    return _svg(paint, HEIGHT)


def curves(lines: Sequence[Curve], x: str, y: str, ticks: Sequence[str] = ()) -> str:
    """Draw lines over a common axis, each with its name at its end.

    Args:
        lines: At least one, each with at least one point.
        x: What the horizontal axis shows.
        y: What the vertical axis shows.
        ticks: Names of 0, 1, 2 … of the horizontal axis; none: its numbers.

    Returns:
        An `<svg>` element.
    """

    def paint(axes: "Axes") -> None:
        _scale(axes, x="linear")
        if ticks:
            axes.set_xticks(range(len(ticks)), ticks)
            axes.margins(x=0.12)
        for line in lines:
            series = line.series % SERIES
            marker = _MARKERS[series] if line.marked or len(line.points) == 1 else ""
            style: dict[str, Any] = {"color": _SERIES[series], "markersize": 5}
            width = 1.8 if line.marked else 1.4
            across, up = zip(*line.points, strict=True)
            axes.plot(across, up, marker=marker, linewidth=width, label=_short(line.label), **style)
        axes.set_xlabel(x)
        axes.set_title(y, loc="left")
        axes.legend(frameon=False, fontsize=9, labelcolor=_INK)

    return _svg(paint, HEIGHT)


def distributions(subjects: Sequence[Distribution], axis: str) -> str:
    """Draw every value of each subject, with its median, middle half and 99th percentile.

    Args:
        subjects: At least one, each with at least one value above 0.
        axis: What is shown, with its unit.

    Returns:
        An `<svg>` element.
    """
    import numpy as np

    def paint(axes: "Axes") -> None:
        _scale(axes, x="log" if _is_wide([value for subject in subjects for value in subject.values]) else "linear")
        for row, subject in enumerate(subjects):
            colour = _SERIES[subject.series % SERIES]
            low, middle, high, p99 = np.percentile(subject.values, [25, 50, 75, 99])
            ticks = [(value, value, np.nan) for value in subject.values]  # one path, where markers were an element each
            heights = (row - 0.12, row + 0.12, np.nan) * len(ticks)
            axes.plot(np.ravel(ticks), heights, color=colour, alpha=0.35, linewidth=1)
            axes.plot([low, high], [row, row], color=colour, linewidth=5, alpha=0.7, solid_capstyle="butt")
            axes.plot(middle, row, "o", color=colour, markersize=7)
            axes.plot(p99, row, "D", color=colour, markersize=4)
            place: Any = ("axes fraction", "data")
            axes.annotate(_short(subject.label), (0, row), (0, 9), place, "offset points", color=_INK, parse_math=False)
        axes.set_ylim(len(subjects) - 0.5, -0.75)
        axes.set_yticks([])
        axes.set_xlabel(axis)

    return _svg(paint, 70 + 44 * len(subjects))


def _is_wide(values: Sequence[float]) -> bool:
    """Whether a logarithmic axis shows them better."""
    return min(values) > 0 and max(values) > 8 * min(values)


def _scale(axes: "Axes", x: str) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    axes.set_xscale(x)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if x == "log" else MaxNLocator(5))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _label_points(axes: "Axes", points: Sequence[Point]) -> None:
    """Write the name of each point beside it, where it covers the least of other points, names and the frame."""
    from matplotlib.transforms import Bbox

    canvas: Any = axes.figure.canvas
    canvas.draw()
    frame = axes.get_window_extent()
    marks = [axes.transData.transform((point.x, point.y)) for point in points]
    taken: list[Bbox] = [Bbox.from_bounds(x - 5, y - 5, 10, 10) for x, y in marks]
    for point in points:
        text = axes.annotate(_short(point.label), (point.x, point.y), (0, 0), "data", "offset points", parse_math=False)
        text.set_color(_SERIES[point.series % SERIES])
        text.set_in_layout(False)  # the frame stays where it is now
        tries: list[tuple[float, int, tuple[float, float], str, Bbox]] = []
        for distance in (8, 20, 32, 44, 56):
            for dx, dy, side in _SIDES:
                text.set(position=(dx * distance, dy * distance), ha=side, va="center")
                box = text.get_window_extent(canvas.get_renderer())
                covered = sum(_overlap(box, other) for other in taken)
                outside = box.width * box.height - _overlap(box, frame)
                at = (float(dx * distance), float(dy * distance))
                tries.append((covered + 4 * outside + distance / 8, len(tries), at, side, box))
        _, _, at, side, box = min(tries, key=lambda one: one[:2])
        text.set(position=at, ha=side)
        taken.append(box)


def _overlap(a: "Bbox", b: "Bbox") -> float:
    """Area that two boxes share."""
    width, height = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
    return max(width, 0) * max(height, 0)


def _short(label: str) -> str:
    return label if len(label) <= _LONGEST_LABEL else f"{label[: _LONGEST_LABEL - 9]}…{label[-8:]}"


def _svg(paint: Callable[["Axes"], None], height: int) -> str:
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    style: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": "edge-ft",  # the same drawing is the same text
        "font.size": 10,
        "axes.titlesize": 10,
        "axes.edgecolor": _LINE,
        "axes.labelcolor": _FAINT,
        "axes.titlecolor": _FAINT,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": _LINE,
        "grid.linewidth": 0.5,
        "text.color": _INK,
        "xtick.color": _LINE,
        "ytick.color": _LINE,
        "xtick.labelcolor": _FAINT,
        "ytick.labelcolor": _FAINT,
    }
    with mpl.rc_context(style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # the browser has the characters that matplotlib's font lacks
        figure = Figure((WIDTH / 72, height / 72), dpi=72, layout="constrained")
        FigureCanvasAgg(figure)
        paint(figure.add_subplot())
        found = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(found, format="svg", transparent=True, metadata=nothing)
    return _inline(found.getvalue())


def _inline(document: str) -> str:
    """An SVG document as an element of HTML: without addresses of namespaces, in the page's colours and fonts."""
    element = document[document.index("<svg") :]
    # A style of this drawing would be one of the whole page.
    element = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", element, flags=re.DOTALL)
    element = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", element).replace("xlink:href=", "href=")
    opening, rest = element.split(">", 1)
    element = re.sub(r'\s(width|height|version)="[^"]*"', "", opening) + ">" + rest
    # Names are those of parts of this drawing, and a page has several.
    names = set(re.findall(r'href="#([^"]+)"', element)) | set(re.findall(r"url\(#([^)]+)\)", element))
    element = re.sub(r'\sid="([^"]*)"', lambda found: found[0] if found[1] in names else "", element)
    element = re.sub(r"font-family: [^;\"]*", "font-family: inherit", element)
    own = f"p{hashlib.sha256(document.encode()).hexdigest()[:8]}-"
    element = re.sub(r'(\sid="|href="#|url\(#)', lambda found: found[0] + own, element)
    for given, shown in _COLOURS.items():
        element = element.replace(given, shown)
    return element.strip()
