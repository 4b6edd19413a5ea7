"""Energy is counted over processor packages, past the end of their counters, and is absent where none can be read."""

from pathlib import Path

import pytest

from edge_ft.energy import Energy


def zone(root: Path, number: str, name: str, energy_uj: int, range_uj: int = 1_000_000_000) -> Path:
    folder = root / f"intel-rapl:{number}"
    folder.mkdir()
    (folder / "name").write_text(f"{name}\n")
    (folder / "energy_uj").write_text(f"{energy_uj}\n")
    (folder / "max_energy_range_uj").write_text(f"{range_uj}\n")
    return folder / "energy_uj"


def test_packages_are_summed_and_their_parts_are_not_counted_again(tmp_path: Path) -> None:
    first, second = zone(tmp_path, "0", "package-0", 5_000_000), zone(tmp_path, "1", "package-1", 0)
    core, platform = zone(tmp_path, "0:0", "core", 1_000_000), zone(tmp_path, "2", "psys", 1_000_000)
    energy = Energy(tmp_path)
    assert energy.read() == 0
    first.write_text("7500000")
    second.write_text("1000000")
    for part in (core, platform):
        part.write_text("9000000")
    assert energy.read() == pytest.approx(3.5)
    assert energy.read() == pytest.approx(3.5)


def test_a_counter_that_begins_again_goes_on(tmp_path: Path) -> None:
    counter = zone(tmp_path, "0", "package-0", 999_000_000)
    energy = Energy(tmp_path)
    counter.write_text("2000000")
    assert energy.read() == pytest.approx(3)


def test_without_a_readable_counter_there_is_no_figure(tmp_path: Path) -> None:
    assert Energy(tmp_path / "none").read() is None
    zone(tmp_path, "0", "package-0", 1).unlink()
    assert Energy(tmp_path).read() is None
