"""Cases of rows files: every format, with values, columns, lines and bytes that are not as they should be."""

import csv
import io
import json
from random import Random
from typing import Any

from fuzz.child import Box, Case
from fuzz.mutations import dump_json, mutate_bytes, mutate_json, odd_text, odd_value

__all__ = ["agreement_case", "rows_case"]

SOURCES: dict[str, tuple[str, str]] = {
    "sums": ("llama", "bundle"),
    "chats": ("llama", "bundle"),
    "reviews": ("bert", "classifier"),
    "tagged": ("bert", "classifier"),
    "pairs": ("bert", "classifier"),
}
"""Rows, and the model and bundle that read them."""
FORMATS = ("jsonl", "jsonl", "jsonl", "ndjson", "json", "csv", "csv", "tsv", "conll", "parquet", "txt")


def rows_case(random: Random, box: Box) -> Case:
    """Rows, mutated as values, as text or as bytes, through a command that reads them."""
    source = random.choice(list(SOURCES))
    lines = (box.seeds / f"{source}.jsonl").read_text(encoding="utf-8").splitlines()[: random.choice([1, 2, 9, 12])]
    rows: Any = [json.loads(line) for line in lines]
    form = random.choice(FORMATS)
    name = random.choice([f"rows.{form}"] * 8 + [f"Rows é {form}.{form}", f"-x.{form}", f"rows.{form.upper()}"])
    what, broken = "nothing", False
    kind = random.random()
    if kind < 0.55:
        what, rows = "values", mutate_json(random, rows)
    elif kind < 0.65:
        what, rows = "columns", [_with_columns(random, row) for row in rows]
    content = _write(form, random, rows)
    if kind >= 0.65 and kind < 0.93:
        what, content = "bytes", mutate_bytes(random, content)
    elif kind >= 0.93 and form in ("jsonl", "ndjson", "csv") and len(rows) > 2:
        what, content, broken = "a broken line", _break_line(random, content, form), True
    (box.work / name).write_bytes(content)
    model, bundle = SOURCES[source]
    argv = _command(random, box, model, bundle, f"./{name}")
    return Case("rows", argv, f"{source}.{form}: {what}", expect="refused" if broken else "any")


def agreement_case(random: Random, box: Box) -> Case:
    """Rows through plan and tune, which must find the same in them."""
    source = random.choice(["sums", "chats", "reviews", "tagged"])
    lines = (box.seeds / f"{source}.jsonl").read_text(encoding="utf-8").splitlines()[:12]
    rows: Any = [json.loads(line) for line in lines]
    for _ in range(random.choice([0, 1, 3])):
        row = rows[random.randrange(len(rows))]
        name = random.choice(list(row))
        row[name] = random.choice(["", rows[0].get(name), odd_text(random), None])
    (box.work / "rows.jsonl").write_bytes(_jsonl(random, rows))
    model = box.copy(SOURCES[source][0]).name
    common = ["--model", model, "--data", "rows.jsonl", "--compute", "fp32", "--calibration-rows", "0", "--quiet"]
    common += ["--batch-size", "2", "--max-steps", "1", *random.choice([[], ["--split", "0.8", "0.2", "0"]])]
    plan = ["plan", *common, "--json", "out-1.json"]
    return Case("agreement", plan, source, agrees=["tune", *common, "--out", "out", "--json", "out-2.json"])


def _command(random: Random, box: Box, model: str, bundle: str, rows: str) -> list[str]:
    """A command that reads the rows; those that take longer are rarer."""
    what = random.random()
    if what < 0.4:
        box.copy(bundle)
        return ["run", bundle, "--jsonl", rows, "--out", "out.jsonl", "--max-new-tokens", "2"]
    if what < 0.75:
        box.copy(bundle)
        return ["eval", bundle, "--data", rows, "--no-generate", *random.choice([[], [], ["--json", "out.json"]])]
    if what < 0.83:
        box.copy(bundle)
        return ["verify", bundle, "--data", rows]
    box.copy(model)
    return ["plan", "--model", model, "--data", rows, "--compute", "fp32", "--show", "1", "--calibration-rows", "0"]


def _with_columns(random: Random, row: Any) -> Any:
    extra = {random.choice(["summary", "tools", "id", "", "label", "text", odd_text(random)]): odd_value(random)}
    return {**row, **extra} if isinstance(row, dict) and random.random() < 0.7 else row


def _break_line(random: Random, content: bytes, form: str) -> bytes:
    """Make one line after the first unreadable, in a way that no reader may pass over."""
    lines = content.split(b"\n")
    at = random.randrange(1, len(lines) - 1)
    bad = {"csv": [b"a,b,c,d,e,f", b'"never closed', b"\xff\xfe,x"]}.get(
        form, [b"{", b'{"prompt": "a"', b"[1, 2]", b"text", b'{"a": "\xff"}', lines[at][:-2], b"7"]
    )
    lines[at] = random.choice(bad)
    return b"\n".join(lines)


def _write(form: str, random: Random, rows: Any) -> bytes:
    if form in ("csv", "tsv"):
        return _csv(random, rows, "," if form == "csv" else "\t")
    return {"conll": _conll, "parquet": _parquet, "json": dump_json}.get(form, _jsonl)(random, rows)


def _jsonl(random: Random, rows: Any) -> bytes:
    return b"\n".join(json.dumps(row).encode() for row in _listed(rows)) + b"\n"


def _listed(rows: Any) -> list[Any]:
    return rows if isinstance(rows, list) else [rows]


def _cells(rows: Any) -> tuple[list[str], list[dict[str, Any]]]:
    """Column names, and the rows that are objects."""
    found = [row for row in _listed(rows) if isinstance(row, dict)]
    return list(dict.fromkeys(name for row in found for name in row)), found


def _csv(random: Random, rows: Any, delimiter: str) -> bytes:
    names, found = _cells(rows)
    file = io.StringIO()
    writer = csv.writer(
        file,
        delimiter=delimiter,
        lineterminator=random.choice(["\n", "\r\n"]),
        quoting=random.choice([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
    )
    writer.writerow(names)
    for row in found:
        writer.writerow([row.get(name, "") for name in names])
    return file.getvalue().encode("utf-8", "surrogatepass")


def _conll(random: Random, rows: Any) -> bytes:
    lines = []
    for row in _cells(rows)[1]:
        words, tags = row.get("tokens", ["the", "film"]), row.get("tags", ["O", "O"])
        if isinstance(words, list) and isinstance(tags, list):
            middle = random.choice(["\t", " ", " NN ", "\u00a0"])
            lines += [f"{word}{middle}{tag}" for word, tag in zip(words, tags, strict=False)]
        lines.append(random.choice(["", "", "-DOCSTART- -X- O O", "# id 7"]))
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def _parquet(random: Random, rows: Any) -> bytes:
    import pyarrow
    from pyarrow import parquet

    file = io.BytesIO()
    try:
        table = pyarrow.Table.from_pylist(_cells(rows)[1])
        parquet.write_table(table, file, compression=random.choice(["NONE", "snappy"]))
    except (pyarrow.ArrowException, OverflowError, TypeError, ValueError):  # values of several types in a column
        return _jsonl(random, rows)
    return file.getvalue()
