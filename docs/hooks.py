"""What mkdocs asks for while it builds the site: pages that are written from the program, and names of files."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

DOCS = Path(__file__).parent
ROOT = DOCS.parent


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add to the navigation what it does not name: every decision, and pages of studies that were written later."""
    named = set(re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text(encoding="utf-8")))
    later = sorted(file.name for file in DOCS.glob("*.md") if file.name not in named)
    for section in config.nav or ():
        if "Results" in section:
            section["Results"] += later
    decisions: list[Any] = [f"decisions/{file.name}" for file in sorted((DOCS / "decisions").glob("*.md"))]
    assert config.nav is not None
    config.nav.append({"Decisions": decisions})
    return config


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the page of the command line and those of the tutorials."""
    files.append(File.generated(config, "cli.md", content=command_line()))
    for script in sorted((DOCS / "tutorials").glob("*.sh")):
        page = tutorial(script.read_text(encoding="utf-8"))
        files.append(File.generated(config, f"tutorials/{script.stem}.md", content=page))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Lead from a tutorial's script, which a reader of the repository opens, to its page."""
    return re.sub(r"\]\(((?:\.\./)?tutorials/[\w-]+)\.sh\)", r"](\1.md)", markdown)


def command_line() -> str:
    """Write the reference of the commands from what --help says."""
    from edge_ft.cli.commands import app

    sys.argv = ["edge-ft"]  # the lines of usage name the program

    text = app.generate_docs(output_format="markdown")
    head, _, rest = text.partition("## Table of Contents")
    body = rest[rest.index("**Commands**") :]
    return head.replace("# edge-ft", "# Command line", 1) + body


def tutorial(script: str) -> str:
    """Turn a shell script into a page: its comments are the text, its commands the code."""
    return "\n".join(_blocks(script.splitlines()[1:])) + "\n"


def _blocks(lines: list[str]) -> Iterator[str]:
    code: list[str] = []
    for line in [*lines, "#"]:
        if line.startswith("#"):
            if any(code):
                yield "\n```bash\n" + "\n".join(code).strip("\n") + "\n```\n"
            code = []
            yield line.removeprefix("#").removeprefix(" ")
        elif line != "set -euo pipefail":
            code.append(line)
