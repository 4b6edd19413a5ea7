"""The commands of the README and of the pages have the flags that they are shown with."""

import re
from pathlib import Path

import pytest

from edge_ft.cli import commands

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "docs" / "tutorials").glob("*.sh"))]
TEXT = "\n".join(page.read_text(encoding="utf-8") for page in PAGES).replace("\\\n", " ")
COMMANDS = ("plan", "tune", "export", "verify", "eval", "run", "bench")


def flags_of(command: str) -> set[str]:
    """The flags that a command knows, without their dashes."""
    names = {name for app in (commands.app[command], commands.app.meta) for name in _names(app)}
    return {name.removeprefix("--") for name in names if name.startswith("--")} | {"help"}


def _names(app: commands.App) -> list[str]:
    return [name for argument in app.assemble_argument_collection() for name in argument.names]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_of_a_command_in_the_pages_exists(command: str) -> None:
    shown = re.findall(rf"edge-ft {command}\b([^\n`#]*)", TEXT)
    used = {flag for line in shown for flag in re.findall(r"--([a-z][a-z-]*)", line.split(" edge-ft ")[0])}
    assert used or command == "verify", f"no page shows no flag of {command}"
    assert used <= flags_of(command)


def test_a_flag_of_another_command_would_be_found() -> None:
    assert "lane" in flags_of("export")
    assert "lane" not in flags_of("tune")
    assert {"config", "json", "rank", "print-config"} <= flags_of("tune")
