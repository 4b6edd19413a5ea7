"""Text from outside is UTF-8, or one error says where it is not."""

import io
import re
from pathlib import Path

import pytest
import yaml
from in_process import run_cli
from tiny_bundle import write_decoder

from edge_ft.artifacts import Bundle, RunFolder
from edge_ft.data import read_rows
from edge_ft.data.tokenizer import TextTokenizer
from edge_ft.errors import DataError, UsageError
from edge_ft.utf8 import decode_utf8, lines_of, read_json, read_utf8

LATIN_1 = "a line\nthe café".encode("latin-1")


def test_the_message_names_the_line() -> None:
    with pytest.raises(DataError, match="notes line 2 is not UTF-8"):
        decode_utf8(LATIN_1, "notes", DataError)


def test_a_byte_order_mark_is_no_part_of_a_text(tmp_path: Path) -> None:
    file = tmp_path / "text"
    file.write_bytes(b"\xef\xbb\xbfhello")
    assert read_utf8(file) == "hello"
    assert list(lines_of(io.StringIO("\ufeffhello\n\ufeff"))) == ["hello\n", "\ufeff"]


def test_a_file_that_cannot_be_opened_or_parsed_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"missing\.json cannot be read: No such file"):
        read_json(tmp_path / "missing.json")
    for content in ("{", "[" * 100_000):
        (tmp_path / "torn.json").write_text(content)
        with pytest.raises(UsageError, match=r"torn\.json is not JSON .*: write it again"):
            read_json(tmp_path / "torn.json", advice="write it again")


@pytest.mark.parametrize("arguments", [(), ("-i",)])
def test_standard_input_that_is_not_utf8_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]
) -> None:
    bundle = write_decoder(tmp_path / "bundle", chat=True)
    code, _ = run_cli(monkeypatch, "run", str(bundle), *arguments, stdin=LATIN_1)
    assert code == 2
    assert "standard input is not UTF-8" in capsys.readouterr().err


def test_standard_input_in_the_encoding_of_the_terminal_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = str(write_decoder(tmp_path / "bundle"))
    flags = ("--max-new-tokens", "2", "--json", "-")
    read = [
        run_cli(monkeypatch, "run", bundle, *flags, stdin="Is it 0:".encode(encoding), encoding=encoding)[0]
        for encoding in ("latin-1", "utf-8")
    ]
    assert read == [0, 0]


def test_an_empty_standard_input_is_no_prompt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = write_decoder(tmp_path / "bundle")
    assert run_cli(monkeypatch, "run", str(bundle), stdin=b"\n")[0] == 2
    assert "there is no prompt" in capsys.readouterr().err


def test_an_argument_that_is_not_utf8_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = write_decoder(tmp_path / "bundle")
    assert run_cli(monkeypatch, "run", str(bundle), LATIN_1.decode("utf-8", "surrogateescape"))[0] == 2
    assert "is not UTF-8" in capsys.readouterr().err


def test_what_a_console_cannot_show_is_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ("tune", "--print-config", "--model", "m", "--data", "d", "--out", "o", "--prompt", "→ {q}")
    monkeypatch.setattr(yaml, "safe_dump", lambda settings, sort_keys: settings["prompt"])
    assert run_cli(monkeypatch, *arguments, encoding="cp1252") == (0, rb"\u2192 {q}")


def test_half_a_surrogate_pair_in_rows_is_refused_with_its_line(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "\\ud83d\\ude00"}\n{"text": "a", "note": "\\ud83d"}\n')
    with pytest.raises(DataError, match="line 2 holds half of a surrogate pair"):
        read_rows(str(rows))


def test_files_of_models_runs_and_bundles_are_read_by_it(tmp_path: Path) -> None:
    bundle = write_decoder(tmp_path / "bundle", chat=True)
    opened = Bundle.open(bundle)
    tokenizer = next(file.parent for file in bundle.rglob("tokenizer.json"))
    (tokenizer / "chat_template.jinja").write_bytes(LATIN_1)
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    for name in ("config.yaml", "report.json", "base.json", "rendering.json"):
        (run.path / name).write_bytes(LATIN_1)
    (opened.path / "manifest.json").write_bytes(LATIN_1)
    for read, name in (
        (lambda: TextTokenizer.load(tokenizer), "chat_template.jinja"),
        (run.settings, "config.yaml"),
        (run.report, "report.json"),
        (run.base, "base.json"),
        (run.rendering, "rendering.json"),
        (lambda: Bundle.open(bundle), "manifest.json"),
    ):
        with pytest.raises(UsageError, match=re.escape(name) + " line 2 is not UTF-8"):
            read()
