"""Runs, checkpoints and bundles that an earlier release wrote open as they did then.

`tests/fixtures/format_1.tar.gz` was written by revision 6090d27 from two tiny models (hidden size 32): a finished
decoder run and a stopped one, an encoder run, and three bundles. `scores.json` in it holds the losses seen there.
"""

import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from edge_ft.artifacts import Bundle, RunFolder
from edge_ft.config import EvalConfig, ExportConfig, VerifyConfig
from edge_ft.evaluate import evaluate
from edge_ft.evaluate.verify import verify
from edge_ft.export import export
from edge_ft.runtime import load

ARCHIVE = Path(__file__).resolve().parents[1] / "fixtures" / "format_1.tar.gz"
ROWS = {"run": "sums.jsonl", "merged": "sums.jsonl", "adapter": "sums.jsonl"} | {
    "bert-run": "reviews.jsonl",
    "bert-bundle": "reviews.jsonl",
}


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The unpacked archive, as the current folder: its paths are relative."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("source", ROWS)
def test_a_run_and_a_bundle_score_as_they_did(old: Path, source: str) -> None:
    scores = json.loads((old / "scores.json").read_text(encoding="utf-8"))
    found = evaluate(source, EvalConfig(data=ROWS[source], generate=False, threads=1))
    assert found["nll"] == pytest.approx(scores[source], abs=1e-3)


def test_a_bundle_verifies_and_answers(old: Path) -> None:
    assert verify(old / "merged", VerifyConfig())["probe_difference"]["1"] < 1e-3
    assert load(Bundle.open(old / "adapter"), threads=1, engine="exact").generate("hello 1 the answer").text


def test_a_run_exports(old: Path) -> None:
    limits = {"max_tax": 1.0, "min_retained": 0.0, "max_metric_drop": 1.0}
    bundle = export("run", ExportConfig(out=old / "again", lane="adapter", **limits))
    then = Bundle.open(old / "adapter").manifest["verification"]["nll"]
    assert bundle.manifest["verification"]["nll"]["shipped"] == pytest.approx(then["shipped"], abs=1e-3)


def resume() -> subprocess.CompletedProcess[str]:
    """Run the command that the stopped run gave its user."""
    command = [sys.executable, "-m", "edge_ft", "tune", "--config", "stopped/config.yaml", "--resume", "--quiet"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_stopped_run_resumes_from_its_checkpoint_to_the_end(old: Path) -> None:
    assert resume().returncode == 0
    run = RunFolder.open(old / "stopped")
    assert (run.report()["resumed_from_step"], run.report()["steps"]) == (7, 24)
    steps = [json.loads(line)["step"] for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert [step for step in dict.fromkeys(steps) if step] == list(range(1, 25))


def test_a_stopped_run_without_its_checkpoint_starts_again(old: Path) -> None:
    shutil.rmtree(old / "stopped" / "checkpoint")
    assert resume().returncode == 0
    assert RunFolder.open(old / "stopped").report()["resumed_from_step"] == 0


def test_a_retired_option_that_was_used_is_refused_by_name(old: Path) -> None:
    settings = old / "stopped" / "config.yaml"
    text = settings.read_text(encoding="utf-8")
    settings.write_text(text.replace("loraplus_lr_ratio: 1.0", "loraplus_lr_ratio: 8.0"), encoding="utf-8")
    refused = resume()
    assert refused.returncode == 2
    assert "loraplus" in refused.stderr
