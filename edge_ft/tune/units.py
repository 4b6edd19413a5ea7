"""Times and sizes as text."""

__all__ = ["duration", "megabytes"]


def duration(seconds: float) -> str:
    """`45 s`, `12 min` or `3.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def megabytes(size: float) -> str:
    """Bytes as `1234 MB`."""
    return f"{size / 1e6:.0f} MB"
