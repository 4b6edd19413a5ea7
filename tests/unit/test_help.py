"""--help is grouped, complete and fast; tables are whole in a pipe."""

import io
import re
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import fields
from typing import Any, get_type_hints

import pytest

from edge_ft import config
from edge_ft.cli.commands import app
from edge_ft.cli.output import Output
from edge_ft.cli.tables import _unit
from edge_ft.config import Group

SETTINGS = {
    "tune": config.TuneConfig,
    "plan": config.PlanConfig,
    "export": config.ExportConfig,
    "verify": config.VerifyConfig,
    "eval": config.EvalConfig,
    "run": config.RunConfig,
    "bench": config.BenchConfig,
}


def help_of(command: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """What `edge-ft COMMAND --help` prints, 100 columns wide."""
    monkeypatch.setenv("COLUMNS", "100")
    printed = io.StringIO()
    with redirect_stdout(printed):
        app.meta([command, "--help"], exit_on_error=False, result_action="return_value")
    return printed.getvalue()


@pytest.mark.parametrize("command", SETTINGS)
def test_every_option_stands_under_the_heading_that_its_field_names(
    command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sections = dict(panels(help_of(command, monkeypatch)))
    hints = get_type_hints(SETTINGS[command], include_extras=True)
    for field in fields(SETTINGS[command]):
        heading = next(value for value in hints[field.name].__metadata__ if isinstance(value, Group))
        assert re.search(rf"--{field.name.replace('_', '-')} ", sections[heading.value]), field.name
    known = [group.value for group in Group]
    order = [known.index(title) for title in sections if title not in ("Arguments", "Commands")]
    assert order == sorted(order)
    assert next(iter(sections)) in ("Arguments", "Commands", "Model and data")
    assert "Parameters" not in sections


def panels(text: str) -> Iterator[tuple[str, str]]:
    for panel in re.split(r"(?m)^╭─ ", text)[1:]:
        title, _, body = panel.partition(" ─")
        yield title, body


@pytest.mark.parametrize("command", ["tune", "export"])
def test_required_options_come_first(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = help_of(command, monkeypatch)
    flags = re.findall(r"│ (\*| )  (--[a-z-]+|SOURCE)", text)
    required = [mark == "*" for mark, _ in flags]
    assert any(required)
    assert required == sorted(required, reverse=True)


@pytest.mark.parametrize("command", SETTINGS)
def test_an_option_is_explained_in_one_sentence(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for _, body in panels(help_of(command, monkeypatch)):
        for option in re.split(r"(?m)^│ [* ]*--", body)[1:]:
            text = " ".join(line.strip("│ ").strip() for line in option.splitlines() if "│" in line)
            assert len(re.findall(r"[a-z)]\. (?!\[)[A-Z]", text)) == 0, text
            assert "default: None" not in text


def test_help_imports_no_library_that_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("torch", "numpy", "onnxruntime", "transformers", "tokenizers"):
        monkeypatch.setitem(sys.modules, module, None)
    assert "--rank" in help_of("tune", monkeypatch)


def test_a_table_in_a_pipe_is_not_cut(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    rows: list[tuple[str, ...]] = [
        ("", "base", "tuned"),
        ("loss [95%] " + "x" * 200, "1.25", "[red]" * 30),
        ("f1", "-", "0"),
    ]
    Output().show({}, rows, "done")
    header, first, second, last = capsys.readouterr().out.splitlines()
    assert first == f"{rows[1][0]}  1.25  {rows[1][2]}"
    assert len(header) == len(first) == len(second)
    assert (header.index("base"), header.index("tuned")) == (first.index("1.25"), len(first) - 5)
    assert last == "done"


def test_the_loss_of_a_classifier_is_not_said_to_be_of_tokens() -> None:
    assert [_unit(task) for task in ("text-generation", "text-classification")] == ["nats/token", "nats/target"]


def test_json_on_stdout_stands_there_alone(capsys: pytest.CaptureFixture[str]) -> None:
    result: dict[str, Any] = {"rows": 1}
    Output(json="-").show(result, [("a", "b")], "done")
    assert capsys.readouterr().out == '{\n  "rows": 1\n}\n'
