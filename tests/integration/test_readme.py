"""The Python of docs/python.md runs."""

import re
from pathlib import Path

import pytest
from tiny_models import write_llama, write_sums

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "python.md").read_text(encoding="utf-8")


def test_the_python_snippet_runs_as_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    snippet = re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert snippet is not None
    write_llama(tmp_path / "my-model")
    write_sums(tmp_path / "rows.jsonl")
    monkeypatch.chdir(tmp_path)
    exec(snippet[1], {})
    assert "decode_tps" in capsys.readouterr().out
