"""docs/checkpoints.md, from what tests of real-world checkpoints found: `make checkpoints`."""

import json
from pathlib import Path
from typing import Any

from edge_ft.bench.report import markdown_table
from edge_ft.errors import UsageError
from edge_ft.files import write_text

__all__ = ["render"]

PARTS = {
    "weights": "Weights",
    "GGUF": "GGUF files",
    "adapters": "Adapters",
    "tokenizers": "Tokenizers",
}
"""By part, the heading of its table, in their order."""
COLUMNS = {
    "kind": "what is odd",
    "outcome": "opened?",
    "fp32": "fp32: difference to transformers",
    "int4": "int4: difference to the dequantized codes",
    "int8": "int8: difference to the dequantized codes",
    "said": "what edge-ft says",
}

HEAD = """# Checkpoints

`make checkpoints` writes this page from the tests of oddities that published checkpoints have. Do not edit it by hand.

Every checkpoint is made in its test by a script, from a tiny model with random weights. Where it is opened, its logits
are compared with those of plain transformers: in `fp32` with the same model; in `int4` and `int8` with the transformers
model whose weights were rounded to the codes and dequantized. A difference is the largest of any logit. What is refused
is refused before anything is trained or written, with exit code 2.
"""


def render(rows: list[dict[str, Any]]) -> str:
    """Write the page; each of `rows` is what `record_checkpoint` of the tests wrote."""
    parts = [HEAD]
    for part, title in PARTS.items():
        found = sorted((row for row in rows if row["part"] == part), key=lambda row: str(row["kind"]).lower())
        if not found:
            continue
        cells = [row | {"outcome": "refused" if "refused" in row else "opened", "said": _said(row)} for row in found]
        used = [name for name in COLUMNS if any(name in row for row in cells)]
        table = [[_cell(row.get(name, "–")) for name in used] for row in cells]
        tests = sorted({f"`{row['test']}`" for row in found})
        parts.append(f"\n## {title}\n\n{markdown_table([COLUMNS[name] for name in used], table)}")
        parts.append(f"\nFrom {', '.join(tests)}.\n")
    return "".join(parts)


def _said(row: dict[str, Any]) -> str:
    return str(row.get("refused") or row.get("said") or "–")


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", r"\|").replace("<", r"\<")


def main(results: Path, out: Path) -> None:
    """Write the page.

    Args:
        results: The folder that the tests wrote to.
        out: docs/checkpoints.md.

    Raises:
        UsageError: the folder holds no results.
    """
    files = sorted(results.glob("*.json"))
    if not files:
        raise UsageError(f"{results} holds no results: run make checkpoints")
    write_text(out, render([json.loads(file.read_text(encoding="utf-8")) for file in files]))
