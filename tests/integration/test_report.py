"""What report.json says of a run beside its losses: over-fitting, guards, and answers before and after."""

import json
from pathlib import Path
from typing import Any

import pytest
from recorded_progress import RecordedProgress

from edge_ft.artifacts import RunFolder
from edge_ft.config import TuneConfig
from edge_ft.tune import tune


def test_train_and_validation_loss_of_the_best_weights_are_compared(llama_run: RunFolder) -> None:
    report = llama_run.report()
    found = report["overfitting"]
    assert found["validation_nll"] == report["nll"]["best"]
    assert found["gap"] == pytest.approx(found["validation_nll"] - found["train_nll"])
    assert 0 < found["train_nll"] < report["nll"]["base"] / 2
    assert found["best_step"] == report["best_step"]
    assert found["best_epoch"] == pytest.approx(report["best_step"] * 4 / report["rows"]["train"], abs=1e-3)
    assert report["guards"] == {"skipped": 0, "rate_factor": 1.0}


def test_over_fitting_is_said(llama: Path, tmp_path: Path) -> None:
    def rows(name: str, answers: list[str], start: int) -> str:
        lines = [{"prompt": f"hello {n} the", "completion": answer} for n, answer in enumerate(answers, start)]
        (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
        return str(tmp_path / name)

    # What the train rows teach is wrong for some of the validation rows.
    train = rows("train.jsonl", [" seven"] * 16, 0)
    validation = rows("validation.jsonl", [" seven"] * 14 + [" hello"] * 2, 16)
    settings: dict[str, Any] = {
        **{"epochs": 40, "learning_rate": 1e-2, "schedule": "constant", "eval_steps": 2},
        **{"split": (1, 0, 0), "compute": "fp32", "batch_size": 4},
    }
    told = RecordedProgress()
    run = tune(TuneConfig(model=str(llama), data=train, validation=validation, out=tmp_path / "run", **settings), told)
    assert any(line.startswith("over-fitted") and "a higher --dropout" in line for line in told.lines)
    assert any("the validation loss was best at epoch" in line for line in told.lines)
    report = run.report()
    assert report["overfitting"]["gap"] > 0
    assert report["nll"]["last"] > report["nll"]["best"]
    assert report["best_step"] < report["steps"]


def test_the_base_is_scored_on_the_rows_that_no_evaluation_watches_after_the_training(
    llama: Path, sums: Path, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"split": (0.4, 0.6, 0), "max_steps": 1, "compute": "fp32", "base_format": "fp32"}
    found: dict[int, float] = {}
    for rows in (4, 24):
        told = RecordedProgress()
        out = tmp_path / str(rows)
        run = tune(TuneConfig(model=str(llama), data=str(sums), out=out, eval_rows=rows, **settings), told)
        found[rows] = run.report()["nll"]["base"]
        lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
        assert lines[0]["rows"] == rows
    assert found[4] == pytest.approx(found[24], abs=1e-5)


def test_answers_of_test_rows_are_shown_before_and_after(llama_run: RunFolder) -> None:
    samples = llama_run.report()["samples"]
    rows = [json.loads(line) for line in llama_run.split("test").read_text().splitlines()]
    assert len(samples) == 3
    for sample, row in zip(samples, rows, strict=False):
        assert sample["split"] == "test"
        assert row["prompt"] in sample["prompt"]
        assert sample["reference"] == row["completion"]
    assert {sample["tuned"] for sample in samples} <= {" hello", " seven"}
    assert not {sample["base"] for sample in samples} & {" hello", " seven"}


def test_a_bounded_number_of_answers_is_scored(llama_run: RunFolder) -> None:
    report = llama_run.report()
    found = report["answers"]
    assert (found["split"], found["rows"]) == ("test", min(8, report["rows"]["test"]))
    assert found["max_new_tokens"] == 8  # right answers have 3 tokens at most
    assert found["metrics"]["exact_match"]["tuned"]["value"] > found["metrics"]["exact_match"]["base"]["value"]
    assert {"rougeL", "chrf", "eos_rate"} <= set(found["metrics"])


def test_a_classifier_writes_no_answers(bert_run: RunFolder) -> None:
    assert bert_run.report()["answers"] is None


def test_labels_are_shown_before_and_after(bert_run: RunFolder) -> None:
    report = bert_run.report()
    assert len(report["samples"]) == 3
    for sample in report["samples"]:
        assert {sample["reference"], sample["base"], sample["tuned"]} <= {"praise", "blame"}
        assert ("good" in sample["prompt"]) == (sample["reference"] == "praise")
    right = sum(sample["tuned"] == sample["reference"] for sample in report["samples"])
    assert right >= 2


def test_without_test_rows_samples_are_of_the_validation(llama: Path, sums: Path, tmp_path: Path) -> None:
    run = tune(
        TuneConfig(
            model=str(llama), data=str(sums), out=tmp_path / "run", split=(0.8, 0.2, 0.0), max_steps=1, compute="fp32"
        )
    )
    assert {sample["split"] for sample in run.report()["samples"]} == {"validation"}
    assert run.report()["nll"]["test"] is None
