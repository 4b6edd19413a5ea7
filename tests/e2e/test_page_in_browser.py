"""The pages of a bench, a run and an export, as a browser shows them on a phone and a desktop, in light and dark."""

import html
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from recorded_benches import classifiers, decoders
from recorded_runs import LOG, PLAN, manifest, report

from edge_ft.bench.page import page_of
from edge_ft.export.page import page_of_export
from edge_ft.tune.page import page_of_run

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed (on Debian: apt install chromium)")
WIDTHS = (390, 1280)


PAGES = {
    "bench": lambda: page_of([*decoders(), *classifiers()]),
    "tune": lambda: page_of_run(report(), LOG, PLAN, with_samples=True),
    "export": lambda: page_of_export("bundle", manifest(), None),
}


@pytest.fixture(scope="module", params=PAGES)
def page(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    pytest.importorskip("matplotlib")
    file = tmp_path_factory.mktemp("page") / "report.html"
    file.write_text(PAGES[request.param](), encoding="utf-8")
    return file


def chromium(folder: Path, *options: str) -> str:
    assert CHROMIUM is not None
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        f"--user-data-dir={folder}",
    ]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=True, timeout=60, cwd=folder)
    return done.stdout


def test_the_page_is_never_wider_than_the_screen(page: Path, tmp_path: Path) -> None:
    """Only tables are, each in a box of its own that scrolls."""
    content = html.escape(page.read_text(encoding="utf-8"))
    frames = "".join(f'<iframe style="width:{w}px;border:0" srcdoc="{content}"></iframe>' for w in WIDTHS)
    measure = """<script>onload = () => {
        document.title = [...document.querySelectorAll("iframe")].map(frame => {
            const shown = frame.contentDocument;
            const right = [...shown.querySelectorAll("h1, h2, p, figure, svg, .table")].map(
                element => element.getBoundingClientRect().right);
            return [shown.documentElement.scrollWidth, Math.ceil(Math.max(...right))].join();
        }).join();
    }</script>"""
    (tmp_path / "frames.html").write_text(f"<!doctype html><title></title>{frames}{measure}", encoding="utf-8")
    shown = chromium(tmp_path, "--dump-dom", (tmp_path / "frames.html").as_uri())
    found = re.search("<title>([0-9,]+)</title>", shown)
    assert found is not None, shown[:500]
    widths = [int(number) for number in found[1].split(",")]
    for width, (scrolled, right) in zip(WIDTHS, (widths[:2], widths[2:]), strict=True):
        assert scrolled <= width
        assert right <= width


@pytest.mark.parametrize("width", WIDTHS)
def test_it_is_drawn_in_light_and_dark(page: Path, tmp_path: Path, width: int) -> None:
    light, dark = (screenshot(page, tmp_path, width, scheme) for scheme in (1, 0))
    for image in (light, dark):
        assert image.shape[1] == width
        assert len(np.unique((image.reshape(-1, 3) * 255).astype(int), axis=0)) > 50  # text and plots, not one colour
    assert light.mean() > 0.8 > 0.3 > dark.mean()
    # Names and lines in the plots stand out from both papers.
    for image, series in ((light, (0x0B, 0x5F, 0xB8)), (dark, (0x74, 0xB9, 0xFF))):
        assert (np.abs(image * 255 - np.array(series)).max(axis=-1) < 2).sum() > 20


def screenshot(page: Path, folder: Path, width: int, scheme: int) -> NDArray[np.float32]:
    """What Chromium draws, [height, width, 3], each 0 to 1; scheme 0 is dark."""
    from matplotlib.image import imread

    file = folder / f"{width}-{scheme}.png"
    size, colours = f"--window-size={width},3000", f"--blink-settings=preferredColorScheme={scheme}"
    chromium(folder, size, colours, f"--screenshot={file}", page.as_uri())
    return np.asarray(imread(file)[..., :3], np.float32)
