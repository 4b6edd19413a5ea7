"""Builds the wheel and the sdist, tries both in fresh environments, and writes what the release changes."""

import re
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import zipfile
from pathlib import Path

from edge_ft.errors import EdgeFTError, UsageError
from edge_ft.files import write_text

__all__ = ["main", "release_notes"]

ROOT = Path(__file__).resolve().parents[2]
VERSIONS = {
    "edge_ft/__init__.py": r'__version__ = "(.*)"',
    "CITATION.cff": r"(?m)^version: (.*)$",
}
"""Where the version of pyproject.toml stands once more."""
IN_SDIST = ("LICENSE", "README.md", "edge_ft/py.typed", "export/__init__.py", "bench/__init__.py")


def main(*, out: Path = Path("dist"), unreleased: bool = False) -> None:
    """Build, check and describe a release.

    Args:
        out: Folder for the wheel, the sdist and notes.md.
        unreleased: Build although CHANGELOG.md has no section for the version, and write no notes.

    Raises:
        UsageError: the version or the changelog is not ready.
        EdgeFTError: a package cannot be built, installed or started.
    """
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    for file, pattern in VERSIONS.items():
        found = re.search(pattern, (ROOT / file).read_text(encoding="utf-8"))
        if found is None or found[1] != version:
            raise UsageError(f"{file} has the version {found and found[1]}, pyproject.toml {version}: make them equal")
    notes = None if unreleased else release_notes((ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), version)
    _run(sys.executable, "-m", "build", "--outdir", str(out), str(ROOT))
    wheel = out / f"edge_ft-{version}-py3-none-any.whl"
    sdist = out / f"edge_ft-{version}.tar.gz"
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    if missing := sorted(set(IN_SDIST) - names):
        raise EdgeFTError(f"{sdist} lacks {', '.join(missing)}")
    with zipfile.ZipFile(wheel) as packed:
        tops = {name.split("/")[0] for name in packed.namelist()}
        if foreign := sorted(tops - {"edge_ft", f"edge_ft-{version}.dist-info"}):
            raise EdgeFTError(f"{wheel} would install {', '.join(foreign)} beside edge_ft")
    for package in (wheel, sdist):
        _try(package.resolve(), version)
    if notes is not None:
        write_text(out / "notes.md", notes)
    print(
        f"{wheel} and {sdist} install and start" + ("" if notes is None else f"; {out / 'notes.md'} says what is new")
    )


def release_notes(changelog: str, version: str) -> str:
    """Return the section of a version.

    Args:
        changelog: In the format of Keep a Changelog.
        version: Without brackets.

    Returns:
        What stands below its heading.

    Raises:
        UsageError: there is no dated section, or something is listed as unreleased.
    """
    sections = re.split(r"(?m)^## ", changelog)[1:]
    bodies = {section.partition("\n")[0]: section.partition("\n")[2].strip() for section in sections}
    if bodies.get("[Unreleased]"):
        raise UsageError(
            f"CHANGELOG.md lists changes as unreleased: name that section [X.Y.Z] - DATE, and give the version X.Y.Z "
            f"instead of {version} in pyproject.toml, {', '.join(VERSIONS)}"
        )
    for heading, body in bodies.items():
        if re.fullmatch(rf"\[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d", heading) and body:
            return body + "\n"
    raise UsageError(f"CHANGELOG.md has no section [{version}] - YYYY-MM-DD: write what this version changes")


def _try(package: Path, version: str) -> None:
    """Install a package into a fresh environment, and start its command from elsewhere."""
    with tempfile.TemporaryDirectory() as folder:
        _run(sys.executable, "-m", "venv", folder)
        _run(f"{folder}/bin/pip", "install", "--quiet", str(package))
        shown = _run(f"{folder}/bin/edge-ft", "--version", cwd=folder)
        if shown.strip().split()[-1] != version:
            raise EdgeFTError(f"{package.name}: edge-ft --version prints {shown.strip()}, not {version}")
        _run(f"{folder}/bin/edge-ft", "run", "--help", cwd=folder)
        rooms = "import edge_ft.runtime, edge_ft.bench, edge_ft.export, edge_ft.tune"
        _run(f"{folder}/bin/python", "-c", rooms, cwd=folder)


def _run(*command: str, cwd: str | None = None) -> str:
    print("$", *command, flush=True)
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False)
    if done.returncode:
        raise EdgeFTError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout
