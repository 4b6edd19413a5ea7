"""The weights in huge pages, where Linux has them.

A generated token reads every weight once. In pages of 4 kB the processor must look up the place of each of 20,000 pages
for it, in pages of 2 MB of some forty. Moving copies them once, so it is done after an answer and not before the first
token.
"""

import ctypes
import re
from contextlib import suppress
from pathlib import Path

__all__ = ["use_huge_pages"]

_PAGE = 2 << 20
_SMALLEST = 4 << 20
"""Smaller blocks of memory stay as they are."""
_HUGEPAGE, _COLLAPSE = 14, 25
"""Linux's MADV_HUGEPAGE and MADV_COLLAPSE; kernels before 6.1 refuse the latter, and move nothing."""
_ALLOWED = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_MAPS = Path("/proc/self/smaps")
_RANGE = re.compile(r"([0-9a-f]+)-([0-9a-f]+) rw-p 00000000 00:00 0 +(\[heap\])?$")


def use_huge_pages(most: int) -> int:
    """Move the large blocks of this process's memory to huge pages; their content stays the same.

    Args:
        most: Bytes; where there is more memory, of the program that uses this library, nothing is moved.

    Returns:
        Bytes of the blocks; 0 where the system has no huge pages or does not allow them.
    """
    with suppress(OSError, AttributeError, ValueError):
        if "[never]" in _ALLOWED.read_text():
            return 0
        blocks = _blocks(_MAPS.read_text())
        size = sum(end - start for start, end in blocks)
        if size > most:
            return 0
        madvise = ctypes.CDLL(None).madvise
        madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        for start, end in blocks:
            # The return codes say that some page could not be moved, which then stays as it is.
            madvise(start, end - start, _HUGEPAGE)
            madvise(start, end - start, _COLLAPSE)
        return size
    return 0


def _blocks(maps: str) -> list[tuple[int, int]]:
    """Return start and end of private blocks without a file that are in memory and not in huge pages, in whole pages.

    Args:
        maps: Content of `/proc/self/smaps`.
    """
    found: list[tuple[int, int]] = []
    place, resident = None, 0
    for line in maps.splitlines():
        name, _, value = line.partition(":")
        if name == "Rss":
            resident = int(value.split()[0]) * 1024
        elif name == "AnonHugePages" and place is not None:
            huge = int(value.split()[0]) * 1024
            start, end = -(-place[0] // _PAGE) * _PAGE, place[1] // _PAGE * _PAGE
            if resident >= _SMALLEST and huge < resident / 2 and end > start:
                found.append((start, end))
        elif "-" in name:
            match = _RANGE.match(line)
            place = None if match is None else (int(match[1], 16), int(match[2], 16))
    return found
