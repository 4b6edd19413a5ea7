"""A stopped report resumes: the training is not repeated, and what was scored is not scored again."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from resumed_runs import adapter, lines, settings

from edge_ft.artifacts import RunFolder
from edge_ft.errors import Interrupted
from edge_ft.evaluate.generation import Answer
from edge_ft.models.scorer import TorchScorer
from edge_ft.tune import report as reports
from edge_ft.tune import tune
from edge_ft.tune.checkpoint import REPORT_PARTS
from edge_ft.tune.torch_backend import TorchBackend

FOUND = ("nll", "metrics", "best_step", "steps", "overfitting", "answers", "samples")


class StopsAt:
    """Progress that is interrupted in a stage."""

    def __init__(self, stage: str, done: int) -> None:
        self.stage, self.done = stage, done

    def say(self, text: str) -> None:
        pass

    def advance(self, stage: str, done: int, total: int, detail: str = "") -> None:
        if (stage, done) == (self.stage, self.done):
            raise KeyboardInterrupt


def stopped_report(config: Any, stage: str, done: int = 1) -> Path:
    with pytest.raises(Interrupted, match=r"training is finished.*from step 12: edge-ft tune --config .* --resume"):
        tune(config, StopsAt(stage, done))
    return Path(config.out)


def refusing(what: str) -> Callable[..., Any]:
    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError(what)

    return refuse


def same_report(run: RunFolder, whole: RunFolder) -> bool:
    return all(run.report()[name] == whole.report()[name] for name in FOUND)


@pytest.mark.parametrize(("stage", "done"), [("test rows, base", 1), ("answers, tuned", 0)])
def test_a_report_that_was_stopped_is_that_of_a_run_that_was_not(
    llama: Path, sums: Path, tmp_path: Path, whole: RunFolder, stage: str, done: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(llama, sums, tmp_path / "run")
    run = stopped_report(config, stage, done)
    assert list((run / REPORT_PARTS).iterdir())
    monkeypatch.setattr(TorchBackend, "update", refusing("the training is repeated"))
    finished = tune(replace(config, resume=True))
    assert (adapter(finished), lines(finished)) == (adapter(whole), lines(whole))
    assert same_report(finished, whole)
    assert not (run / REPORT_PARTS).exists()


def test_what_was_scored_and_answered_is_not_done_again(
    llama: Path, sums: Path, tmp_path: Path, whole: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(llama, sums, tmp_path / "run")
    stopped_report(config, "answers, tuned", 0)
    asked: list[str] = []
    generate = reports.generate_answers

    def recorded(*arguments: Any) -> list[Answer]:
        asked.append(arguments[-1])
        return generate(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(reports, "generate_answers", recorded)
        finished = tune(replace(config, resume=True))
    assert asked == ["answers, tuned"]
    assert same_report(finished, whole)


def test_half_of_the_test_rows_is_scored_once(
    llama: Path, sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(llama, sums, tmp_path / "run")
    monkeypatch.setattr("edge_ft.tune.prepare.SCORED_ROWS", 1)  # as many rows at a time as a step takes
    stopped_report(config, "test rows, tuned", 2)
    batches: list[int] = []
    token_nll = TorchScorer.token_nll

    def counted(self: TorchScorer, batch: Any) -> Any:
        batches.append(len(batch["rows"]))
        return token_nll(self, batch)

    monkeypatch.setattr(TorchScorer, "token_nll", counted)
    tune(replace(config, resume=True))
    # 8 test rows, by two: the first two batches of the tuned model are known
    assert sum(batches) == 2 * 2


@pytest.mark.parametrize("damage", ["bit", "other-weights"])
def test_parts_that_are_damaged_or_of_other_weights_are_made_again(
    llama: Path, sums: Path, tmp_path: Path, whole: RunFolder, damage: str
) -> None:
    config = settings(llama, sums, tmp_path / "run")
    run = stopped_report(config, "answers, tuned", 0)
    for part in (run / REPORT_PARTS).iterdir():
        content = bytearray(part.read_bytes())
        if damage == "bit":
            content[-9] ^= 1
        elif part.suffix == ".json":
            document = json.loads(content)
            content = bytearray(json.dumps({**document, "key": "0", "value": []}).encode())
        else:
            continue
        part.write_bytes(content)
    assert same_report(tune(replace(config, resume=True)), whole)


def test_a_run_that_was_stopped_without_its_parts_scores_all(
    llama: Path, sums: Path, tmp_path: Path, whole: RunFolder
) -> None:
    config = settings(llama, sums, tmp_path / "run", checkpoint_steps=None, checkpoint_minutes=0)
    shutil.rmtree(stopped_report(config, "train rows") / REPORT_PARTS)
    assert same_report(tune(replace(config, resume=True)), whole)
