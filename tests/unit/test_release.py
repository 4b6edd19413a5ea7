"""What a release needs: a dated section of the changelog, one version everywhere, versions to test with."""

import re
import tomllib
from pathlib import Path

import pytest

from edge_ft.bench.studies.release import VERSIONS, release_notes
from edge_ft.errors import UsageError

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
READY = """# Changelog

## [Unreleased]

## [0.2.0] - 2026-12-01

### Added

- A thing.

## [0.1.0] - 2026-11-24

- Old.
"""


def test_the_notes_are_the_section_of_the_version() -> None:
    assert release_notes(READY, "0.2.0") == "### Added\n\n- A thing.\n"


@pytest.mark.parametrize(
    ("changelog", "why"),
    [
        (READY.replace("## [Unreleased]\n", "## [Unreleased]\n\n- More.\n"), "lists changes as unreleased"),
        (READY.replace(" - 2026-12-01", ""), "has no section [0.2.0] - YYYY-MM-DD"),
        (READY.replace("0.2.0", "0.3.0"), "has no section [0.2.0]"),
    ],
)
def test_a_changelog_that_is_not_ready_is_refused(changelog: str, why: str) -> None:
    with pytest.raises(UsageError, match=re.escape(why)):
        release_notes(changelog, "0.2.0")


def test_the_changelog_keeps_the_sections_of_keep_a_changelog() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    versions = re.findall(r"(?m)^## (.*)$", changelog)
    assert versions[0] == "[Unreleased]"
    assert all(re.fullmatch(r"\[\d+\.\d+\.\d+\] - \d{4}-\d\d-\d\d", version) for version in versions[1:])
    kinds = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert set(re.findall(r"(?m)^### (.*)$", changelog)) <= kinds


@pytest.mark.parametrize("file", VERSIONS)
def test_the_version_is_the_same_everywhere(file: str) -> None:
    found = re.search(VERSIONS[file], (ROOT / file).read_text(encoding="utf-8"))
    assert found is not None and found[1] == PROJECT["version"]


def test_the_constraints_are_versions_and_fit_the_requirements() -> None:
    from packaging.requirements import Requirement

    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines if not line.startswith("#"))  # no addresses
    required = [*PROJECT["dependencies"], *(r for extra in PROJECT["optional-dependencies"].values() for r in extra)]
    for requirement in map(Requirement, required):
        if requirement.name == "ctranslate2":
            continue  # not installed where the constraints were taken
        assert requirement.specifier.contains(pins[requirement.name.lower()]), requirement
