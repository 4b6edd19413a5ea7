"""The standard suite: SmolLM2 and MiniLM as `make claims` exported them, each beside other engines."""

import json
import time
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from edge_ft.bench import bench
from edge_ft.bench.page import page_of
from edge_ft.bench.report import format_value, markdown_table, table
from edge_ft.bench.studies.claim_cases import CASES
from edge_ft.bench.studies.models import replace_between
from edge_ft.config import BenchConfig
from edge_ft.errors import EdgeFTError, UsageError
from edge_ft.files import write_json, write_text
from edge_ft.progress import Lines

__all__ = ["main"]

SUITE = ("smollm2-main", "minilm-main")
"""Cases of `claim_cases`, whose bundles are measured."""
MINUTES = 20
"""After so many no further bundle is begun; the next call goes on."""
PEERS = {
    "torch": ("torch", tuple(SUITE)),
    "openvino": ("openvino", ("smollm2-main", "minilm-main")),
    "genai": ("onnxruntime_genai", ("smollm2-main",)),
    "llama.cpp": ("xllamacpp", ("smollm2-main",)),
}
"""By engine: its package, and the cases that it is measured on."""
BEGIN, END = "<!-- from here to the next such line: make bench -->", "<!-- make bench, until here -->"
HEAD = """# The standard suite

`make bench` writes this page from bundles that `make claims` exported: each bundle beside its float base in torch
(eager), and beside the other engines that are installed. [bench.md](bench.md) says how it is measured. Do not edit it
by hand.
"""
SHOWN = {
    "size_bytes": "size MB",
    "peak_rss_bytes": "peak memory MB",
    "load_s": "open s",
    "prefill_tps": "prefill tok/s",
    "decode_tps": "decode tok/s",
    "latency_s": "one text ms",
    "rows_per_s": "rows/s in batches of 8",
}
"""Metrics of the short table, without the length of texts, and their titles."""


def main(
    *,
    bundles: Path = Path("out/claims"),
    out: Path = Path("out/bench"),
    write: Path | None = None,
    into: Path | None = None,
    repeats: int = 3,
    prompt_tokens: int = 128,
    new_tokens: int = 32,
) -> None:
    """Measure the bundles of the standard suite that are there; those that were measured before are not again.

    Args:
        bundles: The folder --out of `claims`.
        out: Folder for records and pages; remove a record to measure its bundle again.
        write: File for the whole tables; default suite.md in --out.
        into: A Markdown file whose lines `make bench` are put around the short table, which is replaced.
        repeats: Fresh processes for each subject.
        prompt_tokens: Length of the prompt, or of the text to classify.
        new_tokens: Tokens to generate.

    Raises:
        UsageError: none of the bundles is there, or --into has no place for the table.
    """
    started = time.monotonic()
    found = {name: bundles / name / CASES[name].weights[0] for name in SUITE}
    found = {name: folder for name, folder in found.items() if (folder / "manifest.json").is_file()}
    if not found:
        raise UsageError(f"{bundles} has no bundle of {', '.join(SUITE)}: run make claims first, or give --bundles")
    if into is not None:
        replace_between(into.read_text(encoding="utf-8"), "", into.name, BEGIN, END)  # a place for the table
    measured: dict[str, list[dict[str, Any]]] = {}
    # Pages are written after each case, and one that cannot be measured does not stop the others.
    for name, folder in found.items():
        kept, passed = out / f"{name}.json", (time.monotonic() - started) / 60
        if not kept.is_file():
            if passed >= MINUTES:
                print(f"{passed:.0f} minutes have passed: {name} is left to the next call", flush=True)
                continue
            print(f"\n== {name}, {passed:.0f} min so far", flush=True)
            config = BenchConfig(
                peers=_peers(name),
                repeats=repeats,
                prompt_tokens=prompt_tokens,
                new_tokens=new_tokens,
                html=out / f"{name}.html",
            )
            try:
                write_json(kept, bench([str(folder)], config, Lines()))
            except EdgeFTError as error:
                print(f"{name} is left out: {error}", flush=True)
                continue
        measured[name] = json.loads(kept.read_text(encoding="utf-8"))
        write_text(out / f"{name}.html", page_of(measured[name]))
        write_text(write or out / "suite.md", HEAD + "".join(_whole(*pair) for pair in measured.items()))
        if into is not None:
            write_text(into, replace_between(into.read_text(encoding="utf-8"), _short(measured), into.name, BEGIN, END))
    print(_short(measured))


def _peers(name: str) -> tuple[str, ...]:
    """The engines that are installed and measure this case."""
    return tuple(peer for peer, (package, cases) in PEERS.items() if name in cases and find_spec(package) is not None)


def _where(records: Iterable[dict[str, Any]]) -> str:
    where = next(iter(records))["environment"]
    return f"{where['cpu']}, {where['threads']} threads"


def _whole(name: str, records: list[dict[str, Any]]) -> str:
    """All metrics of a case."""
    header, *rows = table(records)
    return f"\n## {name.removesuffix('-main')}\n\n{_where(records)}.\n\n{markdown_table(header, rows)}"


def _short(measured: dict[str, list[dict[str, Any]]]) -> str:
    """A table of each kind of model: a row for each engine over each bundle."""
    parts = []
    for texts in (True, False):
        rows: list[list[str]] = []
        named: list[str] = []
        machines: dict[str, None] = {}
        for name, records in measured.items():
            length = f"_{records[0]['environment']['prompt_tokens']}"
            values = {(r["subject"], r["variant"], r["metric"].removesuffix(length)): r["value"] for r in records}
            if any("decode_tps" in key for key in values) != texts:
                continue
            named = named or [metric for metric in SHOWN if any(key[2] == metric for key in values)]
            for engine, variant in dict.fromkeys(key[:2] for key in values):
                cells = (_cell(metric, values.get((engine, variant, metric))) for metric in named)
                rows.append([name.removesuffix("-main"), f"{engine} {variant}", *cells])
            machines |= {_where(records): None}
        if rows:
            header = ["model", "engine", *(SHOWN[metric] for metric in named)]
            parts.append(f"{'; '.join(machines)}:\n\n{markdown_table(header, rows)}")
    return "\n".join(parts)


def _cell(metric: str, value: float | None) -> str:
    if value is None:
        return "–"
    return format_value(value * (1e-6 if metric.endswith("_bytes") else 1e3 if metric.startswith("latency") else 1))
