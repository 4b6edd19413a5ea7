"""`edge-ft run` on rows, texts and conversations."""

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_bundle import write_classifier, write_decoder

from edge_ft.artifacts import Bundle
from edge_ft.config import RunConfig
from edge_ft.data import Columns, Rendering
from edge_ft.errors import DataError, UsageError
from edge_ft.progress import Silent
from edge_ft.runtime.cache import KVCache
from edge_ft.runtime.run import run_chat, run_file, run_text

CONFIG = RunConfig(threads=1, max_new_tokens=2)
TURNS = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "seven"}]


def with_columns(bundle: Path, columns: Columns) -> Path:
    """The bundle as if it had been tuned on rows of these columns."""
    manifest = Bundle.open(bundle).manifest
    manifest["rendering"] = replace(Rendering.from_dict(manifest["rendering"]), columns=columns).to_dict()
    Bundle.seal(bundle, manifest)
    return bundle


def answer(bundle: Path, rows: list[dict[str, Any]], config: RunConfig = CONFIG) -> tuple[dict[str, Any], list[Any]]:
    """The summary, and the lines written."""
    source, out = bundle.parent / "rows.jsonl", bundle.parent / "answers.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = run_file(bundle, source, out, config, Silent())
    return summary, [json.loads(line) for line in out.read_text().splitlines()]


@pytest.mark.parametrize(
    "columns",
    [
        Columns("messages"),
        Columns("template", "{question}", "{answer}"),
        Columns("text", None, "{text}"),
        Columns("prompt_completion", "{prompt}", "{completion}"),
        Columns("instruction", "{instruction}", "{output}"),
    ],
)
def test_rows_with_any_known_columns_are_answered(tmp_path: Path, columns: Columns) -> None:
    bundle = with_columns(write_decoder(tmp_path / "b", chat=True), columns)
    rows = [{"messages": TURNS}, {"instruction": "he", "input": "lo"}, {"prompt": "hello"}, {"text": "hello"}]
    _, answers = answer(bundle, rows)
    assert [found["prompt_tokens"] for found in answers] == [8, 3 + len("he\n\nlo"), 8, 8]
    assert answers[0]["text"] == answers[2]["text"] == answers[3]["text"]


def test_a_text_from_another_column_goes_into_the_template(tmp_path: Path) -> None:
    bundle = with_columns(write_decoder(tmp_path / "b"), Columns("template", "Q: {question}\nA:", "{answer}"))
    _, answers = answer(bundle, [{"question": "why"}, {"prompt": "why"}, {"instruction": "why"}, {"text": "why"}])
    assert [found["prompt_tokens"] for found in answers] == [len("Q: why\nA:")] * 4
    assert run_text(bundle, "why", CONFIG, None)["prompt_tokens"] == len("Q: why\nA:")


def test_only_the_templates_control_tokens_are_read_as_such(tmp_path: Path) -> None:
    columns = Columns("template", "<|user|>{q}<|end|><|assistant|>", "{a}")
    bundle = with_columns(write_decoder(tmp_path / "b"), columns)
    for text in ("<|end|>", "<|user|><|end|><|end|><|assistant|>"):
        assert run_text(bundle, text, CONFIG, None)["prompt_tokens"] == 3 + len("<|end|>")
    plain = with_columns(bundle, Columns("prompt_completion", "{prompt}", "{completion}"))
    assert run_text(plain, "<|end|>", CONFIG, None)["prompt_tokens"] == len("<|end|>")


@pytest.mark.parametrize(("engine", "read"), [("auto", 12), ("exact", 0)])
@pytest.mark.parametrize("labels", [(), ("yes", "no")])
def test_what_the_rows_of_a_file_begin_with_is_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: Any, read: int, labels: tuple[str, ...]
) -> None:
    bundle = write_decoder(tmp_path / "bundle")
    rows = [{"prompt": f"Is the word {word}"} for word in ("long", "short", "here")]
    config = replace(CONFIG, engine=engine, labels=labels)
    alone = [run_text(bundle, row["prompt"], replace(config, engine="exact"), None) for row in rows]
    again: list[int] = []
    rewind = KVCache.rewind
    monkeypatch.setattr(KVCache, "rewind", lambda self, ids: (again.append(rewind(self, ids)), again[-1])[1])
    _, lines = answer(bundle, rows, config)
    assert read == 0 or again.count(read) >= 2
    for line, expected in zip(lines, alone, strict=True):
        assert line.get("text") == expected.get("text") and line.get("label") == expected.get("label")
    if not labels:
        assert [line["cached_tokens"] for line in lines] == [0, read, read]


def test_a_row_that_is_too_long_fails_alone(tmp_path: Path) -> None:
    bundle = write_decoder(tmp_path / "b", max_length=64)
    summary, answers = answer(bundle, [{"prompt": "a"}, {"prompt": "a" * 99}, {"prompt": "bc"}])
    assert (summary["rows"], summary["failed"]) == (3, 1)
    assert [found.get("prompt_tokens") for found in answers] == [1, None, 2]
    assert "99 tokens" in answers[1]["error"]


def test_options_with_which_every_row_fails_are_an_error_and_leave_no_file(tmp_path: Path) -> None:
    bundle = write_decoder(tmp_path / "b")
    with pytest.raises(UsageError, match=r"no row of .* can be answered.*neither auto, none nor a file"):
        answer(bundle, [{"prompt": "a"}, {"prompt": "b"}], replace(CONFIG, chat_template="chatml"))
    with pytest.raises(DataError, match="row 2 has the columns x: it needs"):
        answer(bundle, [{"prompt": "a"}, {"x": "b"}])
    assert not (tmp_path / "answers.jsonl").exists()


def test_a_classifier_reads_texts_through_its_template(tmp_path: Path) -> None:
    bundle = with_columns(write_classifier(tmp_path / "b"), Columns("text_label", "T: {review}", None, "stars"))
    summary, answers = answer(bundle, [{"review": "x"}, {"text": "x"}, {"prompt": "x", "stars": 1}])
    assert summary["failed"] == 0
    alone = run_text(bundle, "x", CONFIG, None)
    assert [found["prompt_tokens"] for found in [*answers, alone]] == [2 + len("T: x")] * 4
    with pytest.raises(DataError, match="row 1 has the columns messages"):
        run_file(bundle, _write(tmp_path, {"messages": TURNS}), tmp_path / "other", CONFIG, Silent())


def test_a_conversation_that_is_too_long_starts_again_with_the_last_message(tmp_path: Path) -> None:
    bundle = write_decoder(tmp_path / "b", chat=True, max_length=64)
    out = io.StringIO()
    run_chat(bundle, CONFIG, io.StringIO(("a" * 20 + "\n") * 5), out)
    assert out.getvalue().count("starting a new one)\n") == 2
    assert out.getvalue().count("> ") == 6
    with pytest.raises(UsageError, match="shorten the prompt"):
        run_chat(bundle, CONFIG, io.StringIO("a" * 99 + "\n"), io.StringIO())


def _write(folder: Path, row: dict[str, Any]) -> Path:
    (folder / "row.jsonl").write_text(json.dumps(row))
    return folder / "row.jsonl"
