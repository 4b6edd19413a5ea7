"""The command of report.json gives the settings of the run again, every resolved one of them."""

import shlex
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_ft.cli.commands import app
from edge_ft.config import TuneConfig, as_plain
from edge_ft.tune.command import reproducing_command

RESOLVED = TuneConfig(
    model="hub/model",
    data="hub/rows",
    out=Path("run"),
    task="text-classification",
    learning_rate=1e-3,
    epochs=2.5,
    max_steps=7,
    batch_size=4,
    compute="fp32",
    memory="low",
    threads=3,
    max_length=128,
    target_modules=("q_proj", "v_proj"),
    allow=("leak", "duplicates"),
    split=(0.5, 0.25, 0.25),
)


def settings_again(config: TuneConfig) -> TuneConfig:
    _, bound, _ = app.parse_args(shlex.split(reproducing_command(as_plain(config)))[1:], exit_on_error=False)
    found: Any = bound.arguments["settings"]
    return found


def test_every_setting_is_in_the_command() -> None:
    again = settings_again(RESOLVED)
    assert again == replace(RESOLVED, out=Path("run-again").absolute())
    command = reproducing_command(as_plain(RESOLVED))
    unset = {name for name, value in as_plain(RESOLVED).items() if value in (None, [])}
    named = {word[2:].partition("=")[0].replace("-", "_") for word in shlex.split(command) if word.startswith("--")}
    assert named == {field.name for field in fields(TuneConfig)} - unset - {"resume", "show", "include_samples"}


@settings(max_examples=25, deadline=None)
@given(st.text(st.characters(exclude_characters="\x00", exclude_categories=["Cs"]), min_size=1))
def test_any_text_is_quoted(text: str) -> None:
    assert settings_again(replace(RESOLVED, prompt=text, completion="-" + text)).prompt == text


def test_the_limit_of_time_is_the_number_of_steps_that_it_gave() -> None:
    assert settings_again(replace(RESOLVED, max_minutes=1.0)).max_minutes is None


def test_files_of_this_machine_have_whole_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text("")
    again = settings_again(replace(RESOLVED, data="rows.jsonl"))
    assert (again.data, again.model) == (str(tmp_path / "rows.jsonl"), "hub/model")


def test_several_processes_are_started_as_they_were() -> None:
    command = reproducing_command(as_plain(RESOLVED), processes=2)
    assert command.startswith("torchrun --nproc-per-node 2 -m edge_ft tune --")
