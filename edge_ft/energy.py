"""Energy that the processor has taken, where the machine counts it (RAPL, through Linux's powercap)."""

from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["Energy"]

POWERCAP = Path("/sys/class/powercap")


@dataclass
class Energy:
    """Joules of all processor packages since this object was made: whatever ran on them, not this process alone.

    A counter starts again at 0 once it has reached its range, after some ten minutes at the earliest: `read` must be
    called more often than that. Many systems let only root read it.
    """

    root: Path = POWERCAP
    _joules: float = field(default=0.0, init=False)
    _before: dict[Path, int] = field(default_factory=dict, init=False)
    """The last value of each counter, in microjoules."""

    def __post_init__(self) -> None:
        """Find the counters of the packages; a core or a memory zone lies inside one or beside it."""
        for zone in sorted(self.root.glob("intel-rapl:*")) if self.root.is_dir() else ():
            value = _number(zone / "energy_uj")
            if value is not None and _text(zone / "name").startswith("package"):
                self._before[zone] = value

    def read(self) -> float | None:
        """Return the joules so far; None where no counter can be read."""
        for zone, before in self._before.items():
            now = _number(zone / "energy_uj")
            if now is None:
                continue
            range_uj = _number(zone / "max_energy_range_uj") or 0
            self._joules += (now - before + (range_uj if now < before else 0)) / 1e6
            self._before[zone] = now
        return self._joules if self._before else None


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="ascii", errors="replace").strip()
    except OSError:  # only root may read it, or it is gone
        return ""


def _number(file: Path) -> int | None:
    text = _text(file)
    return int(text) if text.isdigit() else None
