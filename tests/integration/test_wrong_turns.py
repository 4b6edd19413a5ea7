"""What newcomers get wrong: each answer is one sentence that says the right way, with the documented exit code."""

import errno
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from in_process import run_cli

from edge_ft.artifacts import Bundle, RunFolder
from edge_ft.config import PlanConfig
from edge_ft.errors import MissingExtra
from edge_ft.tune.plan import plan


@dataclass(frozen=True)
class Places:
    """What a command line may name: `{model}`, `{run}`, `{bundle}`; files are in the current folder."""

    model: Path
    run: Path
    bundle: Path


@pytest.fixture
def places(
    llama: Path, llama_run: RunFolder, llama_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Places:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name, rows in ROWS.items():
        Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, data in FILES.items():
        Path(name).write_bytes(data)
    Path("empty-folder").mkdir()
    return Places(llama, llama_run.path, llama_bundle.path)


def rows_of(row: Callable[[int], dict[str, Any]], count: int = 40) -> list[dict[str, Any]]:
    return [row(n) for n in range(count)]


ROWS = {
    "rows.jsonl": rows_of(lambda n: {"prompt": f"hello {n} the answer", "completion": " seven"}),
    "asked.jsonl": rows_of(lambda n: {"question": f"what is {n}", "answer": f"it is {n}"}),
    "preferences.jsonl": rows_of(lambda n: {"prompt": f"hello {n}", "chosen": "yes", "rejected": "no"}),
    "none.jsonl": [],
    "one.jsonl": rows_of(lambda n: {"prompt": "hello", "completion": " seven"}, 1),
}
FILES = {
    "broken.jsonl": b'{"prompt": "a", "completion": "b"}\n{"prompt": "a", "compl\n',
    "semicolons.csv": b"prompt;completion\nhello;seven\n",
    "latin.csv": "prompt,completion\ncafé,ja\n".encode("latin-1"),
    "rows.xlsx": b"PK",
    "weights.bin": b"0" * 64,
    "not.gguf": b"0" * 64,
    "settings.yaml": b"model: m\nepoch: 3\n",
}
TUNE = "tune --model {model} --out new"
TURNS = [
    # rows
    (f"{TUNE} --data asked.jsonl", 2, "the columns are question, answer: name yours with --prompt and --completion"),
    (f"{TUNE} --data asked.jsonl --prompt {{{{qestion}}}} --completion {{{{answer}}}}", 2, "did you mean 'question'?"),
    (f"{TUNE} --data asked.jsonl --prompt {{{{question}}}}", 2, "has no answer to learn: give --completion"),
    (f"{TUNE} --data rwos.jsonl", 2, "does not exist (did you mean 'rows.jsonl'?)"),
    (f"{TUNE} --data broken.jsonl", 2, "broken.jsonl line 2 is not JSON"),
    (f"{TUNE} --data semicolons.csv", 2, "separates its columns by ';', not by commas: save it with commas"),
    (f"{TUNE} --data latin.csv", 2, "latin.csv line 2 is not UTF-8 (invalid continuation byte): save it as UTF-8"),
    (f"{TUNE} --data rows.xlsx", 2, "has an unknown format: give a file that ends in .jsonl"),
    (f"{TUNE} --data preferences.jsonl", 2, 'give --prompt "{prompt}" --completion "{chosen}"'),
    (f"{TUNE} --data none.jsonl", 2, "holds no rows: give a file with at least one"),
    (f"{TUNE} --data one.jsonl", 2, "leave none for validation; give more rows or another --split"),
    (f"{TUNE} --data rows.jsonl --validation rows.jsonl", 5, "remove them from one of the two"),
    (f"{TUNE} --data rows.jsonl --split 80 10 10", 2, "must be three shares that sum to 1, as 0.8 0.1 0.1"),
    ("eval {bundle} --data asked.jsonl", 2, "name yours with --prompt and --completion"),
    # models and folders
    ("tune --model HuggingFaceTB/SmolLM2-Instrct --data rows.jsonl --out new", 2, "check the name and the network"),
    ("tune --model empty-folder --data rows.jsonl --out new", 2, "it holds neither config.json nor a GGUF file"),
    ("tune --model weights.bin --data rows.jsonl --out new", 2, "name the folder of the model"),
    ("tune --model not.gguf --data rows.jsonl --out new", 2, "is not a GGUF file"),
    ("tune --model {run} --data rows.jsonl --out new", 2, "is a run folder, not a model: name the model that it was"),
    (f"{TUNE} --data rows.jsonl --task token-classification", 2, "leave out --task, or take a model that does (an enc"),
    (f"{TUNE} --data rows.jsonl --task classification", 2, 'Did you mean "text-classification"?'),
    ("tune --model {model} --data rows.jsonl --out {run}", 2, "exists already: give another --out or remove it"),
    (f"{TUNE} --data rows.jsonl --max-length 100000", 2, "is beyond the model's 256 positions: give at most that"),
    ("run {run} hello", 2, "is a run folder, not a bundle: edge-ft export"),
    ("run {model} hello", 2, "is a model, not a bundle: edge-ft export"),
    ("run bundel hello", 2, "bundel does not exist: give a bundle folder (edge-ft export makes one)"),
    ("run {bundle}", 2, "there is no prompt: write it after the bundle, or pipe it in"),
    ("run {bundle} --jsonl rows.jsonl", 2, "--jsonl IN and --out OUT go together"),
    ("export {bundle} --out new", 2, "is already a bundle: export takes a run folder or a model"),
    ("export {model} --adapter empty-folder --out new", 2, "it has no adapter_config.json"),
    ("export {model} --adapter rows.jsonl --out new", 2, "is a file: name its folder, which holds adapter_config.json"),
    # the command line
    ("train --model {model} --data rows.jsonl", 2, "train is called tune here: see edge-ft --help"),
    ("tunes --model {model} --data rows.jsonl", 2, 'Did you mean "tune"?'),
    (f"{TUNE} --data rows.jsonl --lr 3", 2, "--lr is called --learning-rate here: see edge-ft tune --help"),
    (f"{TUNE} --data rows.jsonl --epoch 3", 2, "Did you mean --epochs?"),
    ("tune --model {model} --data rows.jsonl", 2, "--out is required: see edge-ft tune --help"),
    ("tune --config settings.yaml --data rows.jsonl --out new", 2, "unknown setting 'epoch' (did you mean 'epochs'?)"),
    ("bench {bundle} --peers llamacpp", 2, "did you mean 'llama.cpp'?"),
    ("bench", 2, "name at least one bundle, run folder or model to measure"),
    ("tune --model {model} --data rows.jsonl --out /proc/none/run", 2, "name another place, or mend this one"),
]
"""The command line, its exit code, and what its answer says."""


def answer_of(
    line: str, places: Places, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[int, str]:
    """The exit code, and the one line of the answer."""
    words = [
        word.format(model=places.model, run=places.run, bundle=places.bundle).replace("{{", "{").replace("}}", "}")
        for word in line.split()
    ]
    code, _ = run_cli(monkeypatch, *words)
    told = capsys.readouterr().err
    assert "Traceback" not in told
    answers = [part for part in told.splitlines() if part.startswith("edge-ft: ")]
    assert len(answers) == 1, told
    return code, answers[0].removeprefix("edge-ft: ")


@pytest.mark.parametrize(("line", "code", "way"), TURNS, ids=[line for line, _, _ in TURNS])
def test_a_wrong_turn_is_answered_with_the_right_way(
    line: str, code: int, way: str, places: Places, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found, answer = answer_of(line, places, monkeypatch, capsys)
    assert (found, way in answer) == (code, True), answer
    assert not Path("new").exists()


def test_a_missing_extra_is_answered_with_its_pip_command(
    places: Places, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(*_: object) -> None:
        raise MissingExtra("this needs the package 'peft': pip install 'edge-ft[train]'")

    monkeypatch.setattr("edge_ft.export.import_libraries", missing)
    code, answer = answer_of("export {run} --out new", places, monkeypatch, capsys)
    assert (code, "pip install 'edge-ft[train]'" in answer) == (2, True)


def test_a_full_disk_is_answered_with_what_to_free(
    places: Places, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "new")

    monkeypatch.setattr("edge_ft.export.import_libraries", full)
    code, answer = answer_of("export {run} --out new", places, monkeypatch, capsys)
    assert (code, "the disk is full: new; free some space" in answer) == (4, True)


def test_twelve_rows_are_trained_on_and_said_to_be_few(places: Places) -> None:
    Path("few.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS["rows.jsonl"][:12]))
    found = plan(PlanConfig(model=str(places.model), data="few.jsonl", compute="fp32"))["findings"]
    assert [finding["code"] for finding in found] == ["few-rows"]
