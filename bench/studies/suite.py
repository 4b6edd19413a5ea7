"""The standard suite: SmolLM2, GPT-2, T5 and MiniLM as `make claims` exported them, each beside its float base."""

import json
import time
from pathlib import Path

from edge_ft.bench import bench
from edge_ft.bench.page import page_of
from edge_ft.bench.report import markdown_table, table
from edge_ft.bench.studies.claim_cases import CASES
from edge_ft.config import BenchConfig
from edge_ft.errors import UsageError
from edge_ft.files import write_json, write_text
from edge_ft.progress import Lines

__all__ = ["main"]

SUITE = ("smollm2-main", "gpt2-main", "t5-main", "minilm-main")
"""Cases of `claim_cases`, whose bundles are measured."""
HEAD = """# The standard suite

`make bench` writes this page from bundles that `make claims` exported: each bundle beside its float base in torch
(eager). [bench.md](bench.md) says how it is measured. Do not edit it by hand.
"""


def main(
    *,
    bundles: Path = Path("out/claims"),
    out: Path = Path("out/bench"),
    write: Path | None = None,
    repeats: int = 3,
    prompt_tokens: int = 128,
    new_tokens: int = 32,
) -> None:
    """Measure the bundles of the standard suite that are there; those that were measured before are not again.

    Args:
        bundles: The folder --out of `claims`.
        out: Folder for records and pages; remove a record to measure its bundle again.
        write: File for the tables; default suite.md in --out.
        repeats: Fresh processes for each subject.
        prompt_tokens: Length of the prompt, or of the text to classify.
        new_tokens: Tokens to generate.

    Raises:
        UsageError: none of the bundles is there.
    """
    started = time.monotonic()
    found = {name: bundles / name / CASES[name].weights[0] for name in SUITE}
    found = {name: folder for name, folder in found.items() if (folder / "manifest.json").is_file()}
    if not found:
        raise UsageError(f"{bundles} has no bundle of {', '.join(SUITE)}: run make claims first, or give --bundles")
    text = HEAD
    for name, folder in found.items():
        kept = out / f"{name}.json"
        if not kept.is_file():
            print(f"\n== {name}, {(time.monotonic() - started) / 60:.0f} min so far", flush=True)
            config = BenchConfig(
                peers=("torch",),
                repeats=repeats,
                prompt_tokens=prompt_tokens,
                new_tokens=new_tokens,
                html=out / f"{name}.html",
            )
            write_json(kept, bench([str(folder)], config, Lines()))
        records = json.loads(kept.read_text(encoding="utf-8"))
        write_text(out / f"{name}.html", page_of(records))
        where, (header, *rows) = records[0]["environment"], table(records)
        text += f"\n## {name.removesuffix('-main')}\n\n{where['cpu']}, {where['threads']} threads.\n\n"
        text += markdown_table(header, rows)
        write_text(write or out / "suite.md", text)
    print(text)
