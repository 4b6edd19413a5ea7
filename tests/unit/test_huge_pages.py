"""Memory in huge pages: which blocks, and when none."""

import sys
from pathlib import Path

import numpy as np
import pytest

from edge_ft.runtime import huge_pages
from edge_ft.runtime.huge_pages import use_huge_pages

SMAPS = """\
{start:x}-{end:x} {kind}
Size:              {size} kB
Rss:               {resident} kB
AnonHugePages:     {huge} kB
VmFlags: rd wr mr mw me ac
"""
HEAP, PLAIN = "rw-p 00000000 00:00 0                          [heap]", "rw-p 00000000 00:00 0 "
MB = 1 << 20


def smaps(kind: str, resident: int = 64, huge: int = 0, start: int = 3 * MB) -> str:
    """A block of 64 MB, of which `resident` are in memory and `huge` in huge pages."""
    sizes = {"size": 65536, "resident": resident * 1024, "huge": huge * 1024}
    return SMAPS.format(start=start, end=start + 64 * MB, kind=kind, **sizes)


@pytest.mark.parametrize(
    ("maps", "found"),
    [
        (smaps(HEAP), [(4 * MB, 66 * MB)]),
        (smaps(PLAIN), [(4 * MB, 66 * MB)]),
        (smaps(PLAIN, resident=2), []),
        (smaps(PLAIN, huge=60), []),
        (smaps("r--p 00000000 fe:00 260386                     /usr/lib/model.onnx_data"), []),
        (smaps("rw-p 00000000 00:00 0                          [stack]"), []),
    ],
)
def test_large_private_blocks_in_memory_are_moved(maps: str, found: list[tuple[int, int]]) -> None:
    assert huge_pages._blocks(maps) == found


def test_nothing_is_moved_where_it_is_not_allowed_or_too_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    allowed, maps = tmp_path / "enabled", tmp_path / "smaps"
    monkeypatch.setattr(huge_pages, "_ALLOWED", allowed)
    monkeypatch.setattr(huge_pages, "_MAPS", maps)
    maps.write_text(smaps(PLAIN))
    assert use_huge_pages(100 * MB) == 0  # no such file: another system
    allowed.write_text("always madvise [never]\n")
    assert use_huge_pages(100 * MB) == 0
    allowed.write_text("always [madvise] never\n")
    assert use_huge_pages(61 * MB) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="huge pages are Linux's")
def test_the_content_of_moved_memory_stays() -> None:
    block = np.arange(2 * MB, dtype=np.int64)
    use_huge_pages(1 << 40)
    assert np.array_equal(block, np.arange(2 * MB))
