"""What the README shows is what happens."""

import re
from pathlib import Path

import pytest
from tiny_models import write_llama, write_sums

README = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")


def test_the_python_snippet_runs_as_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    snippet = re.search(r"```python\n(.*?)```", README, re.DOTALL)
    assert snippet is not None
    write_llama(tmp_path / "my-model")
    write_sums(tmp_path / "rows.jsonl")
    monkeypatch.chdir(tmp_path)
    exec(snippet[1], {})
    assert "decode_tps" in capsys.readouterr().out


def test_every_flag_in_the_readme_exists() -> None:
    from dataclasses import fields

    from edge_ft import cli, config

    known = {
        field.name.replace("_", "-")
        for name in config.__all__
        if name.endswith("Config")
        for field in fields(getattr(config, name))
    }
    known |= {field.name for field in fields(cli.Output)}
    known |= {"config", "preset", "print-config", "help", "version", "interactive", "jsonl", "out"}
    commands = re.findall(r"edge-ft (?:plan|tune|export|run|eval|bench|verify)[^\n`]*", README)
    assert commands
    used = {flag for command in commands for flag in re.findall(r"--([a-z][a-z-]*)", command)}
    assert used <= known
