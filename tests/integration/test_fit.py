"""Every command refuses a tokenizer that gives ids for which the model has no embedding, before any work."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from recorded_progress import RecordedProgress
from small_tokenizers import add_token
from tiny_bundle import reseal

from edge_ft.artifacts import Bundle, RunFolder
from edge_ft.config import EvalConfig, ExportConfig, PlanConfig, RunConfig, TuneConfig, VerifyConfig
from edge_ft.errors import ModelError
from edge_ft.evaluate import evaluate
from edge_ft.evaluate.verify import verify
from edge_ft.export import export
from edge_ft.runtime.run import run_file, run_text
from edge_ft.tune import tune
from edge_ft.tune.plan import plan

OVER_MODELS: dict[str, Callable[[str, str, Path], object]] = {
    "plan": lambda model, rows, out: plan(PlanConfig(model=model, data=rows)),
    "tune": lambda model, rows, out: tune(TuneConfig(model=model, data=rows, out=out)),
    "eval": lambda model, rows, out: evaluate(model, EvalConfig(data=rows)),
    "export": lambda model, rows, out: export(model, ExportConfig(out=out)),
    "export with rows": lambda model, rows, out: export(model, ExportConfig(out=out, data=rows)),
}
OVER_BUNDLES: dict[str, Callable[[Path, str, Path], object]] = {
    "run": lambda bundle, rows, out: run_text(bundle, "hello", RunConfig(), None),
    "run --labels": lambda bundle, rows, out: run_text(bundle, "hello", RunConfig(labels=("a", "<new>")), None),
    "run --jsonl": lambda bundle, rows, out: run_file(bundle, Path(rows), out, RunConfig(), RecordedProgress()),
    "verify": lambda bundle, rows, out: verify(bundle, VerifyConfig()),
    "verify --data": lambda bundle, rows, out: verify(bundle, VerifyConfig(data=rows)),
    "eval": lambda bundle, rows, out: evaluate(str(bundle), EvalConfig(data=rows)),
}


@pytest.mark.parametrize("command", OVER_MODELS)
def test_over_a_model(command: str, llama: Path, sums: Path, tmp_path: Path) -> None:
    shutil.copytree(llama, tmp_path / "model")
    add_token(tmp_path / "model", "<new>", special=False)
    with pytest.raises(ModelError, match="'<new>'"):
        OVER_MODELS[command](str(tmp_path / "model"), str(sums), tmp_path / "out")


@pytest.mark.parametrize("command", ["eval", "export"])
def test_over_a_run(command: str, llama_run: RunFolder, sums: Path, tmp_path: Path) -> None:
    shutil.copytree(llama_run.path, tmp_path / "run")
    add_token(tmp_path / "run" / "tokenizer", "<new>", special=False)
    (tmp_path / "run" / "files.json").unlink()  # of a run that was made before there was one
    with pytest.raises(ModelError, match="'<new>'"):
        OVER_MODELS[command](str(tmp_path / "run"), str(sums), tmp_path / "out")


@pytest.mark.parametrize("command", OVER_BUNDLES)
def test_over_a_bundle(command: str, llama_bundle: Bundle, sums: Path, tmp_path: Path) -> None:
    shutil.copytree(llama_bundle.path, tmp_path / "bundle")
    add_token(tmp_path / "bundle", "<new>", special=False)
    reseal(tmp_path / "bundle")
    with pytest.raises(ModelError, match="'<new>'"):
        OVER_BUNDLES[command](tmp_path / "bundle", str(sums), tmp_path / "out")
