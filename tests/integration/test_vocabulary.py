"""`tune --vocabulary rows`: from the rows to a bundle with a smaller tokenizer, embedding and head."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from resumed_runs import stopped_at
from tiny_models import write_llama

from edge_ft.artifacts import Bundle, RunFolder
from edge_ft.cli.tables import report_lines
from edge_ft.config import EvalConfig, ExportConfig, PlanConfig, RunConfig, TuneConfig
from edge_ft.data import TextTokenizer
from edge_ft.errors import ModelError, UsageError
from edge_ft.evaluate import evaluate
from edge_ft.evaluate.loading import find_run_base
from edge_ft.export import export, export_gguf
from edge_ft.files import cache_folder
from edge_ft.models import vocabulary
from edge_ft.models.base_model import find_base
from edge_ft.progress import Silent
from edge_ft.runtime import load
from edge_ft.tune import tune
from edge_ft.tune.prepare import prepare_job

SETTINGS: dict[str, Any] = {"max_steps": 12, "learning_rate": 2e-2, "split": (0.6, 0.2, 0.2), "compute": "fp32"}
LOOSE: dict[str, Any] = {"max_tax": 1.0, "min_retained": 0.0, "max_metric_drop": 1.0}


@pytest.fixture(autouse=True, scope="module")
def few_general_tokens(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vocabulary, "GENERAL", 4)
        patch.setenv("EDGE_FT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def trained(model: Path, data: Path, out: Path, **settings: Any) -> RunFolder:
    given = {**SETTINGS, "vocabulary": "rows", "threads": 1, **settings}
    return tune(TuneConfig(model=str(model), data=str(data), out=out, **given))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("vocabulary") / "llama", tie=False)


@pytest.fixture(scope="module")
def run(model: Path, sums: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return trained(model, sums, tmp_path_factory.mktemp("run") / "run")


@pytest.fixture(scope="module")
def bundles(run: RunFolder, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    out = tmp_path_factory.mktemp("bundles")
    return {
        lane: export(str(run.path), ExportConfig(out=out / lane, lane=lane, **LOOSE))  # type: ignore[arg-type]
        for lane in ("merged", "adapter")
    }


def tokens_of(folder: Path) -> dict[str, int]:
    return TextTokenizer.load(folder).tokens()


def test_the_run_holds_a_smaller_tokenizer_and_reports_what_it_costs(
    run: RunFolder, model: Path, sums: Path, tmp_path: Path
) -> None:
    found, whole = run.report()["vocabulary"], tokens_of(model)
    assert found["of"] == len(whole) > found["kept"] == len(tokens_of(run.tokenizer))
    assert found["tokens_per_row"]["train"]["before"] == found["tokens_per_row"]["train"]["after"]
    assert tokens_of(run.tokenizer).keys() < whole.keys()
    assert found["bytes"]["after"] < found["bytes"]["before"]
    assert found["tokens_of_other_text"]["after"] > found["tokens_of_other_text"]["before"]
    assert all(nats > 0 for figures in found["nats_per_byte"].values() for nats in figures.values())
    assert set(found["nats_per_byte"]) == {"validation", "other"}
    assert f"vocabulary: {found['of']} → {found['kept']} tokens" in report_lines(run.path, run.report(), "")
    assert "cut to the rows" in run.page_path.read_text()
    other = trained(model, sums, tmp_path / "all", vocabulary="all")  # the option changes the outcome
    assert "cut to the rows" not in other.page_path.read_text()
    assert (other.report()["vocabulary"], other.vocabulary.exists()) == (None, False)
    assert tokens_of(other.tokenizer) == whole
    assert run.report()["nll"]["best"] < run.report()["nll"]["base"]


@pytest.mark.parametrize("lane", ["merged", "adapter"])
def test_a_bundle_ships_it_and_answers(lane: str, run: RunFolder, bundles: dict[str, Bundle], sums: Path) -> None:
    bundle, kept = bundles[lane], run.report()["vocabulary"]["kept"]
    assert json.loads((bundle.path / "config.json").read_text())["vocab_size"] == kept
    assert tokens_of(bundle.path) == tokens_of(run.tokenizer)
    scores = bundle.manifest["verification"]
    assert scores["nll"]["shipped"] < scores["nll"]["base"]
    answer = next(load(bundle.path, threads=1).generate_each(["hello 3 the answer"], RunConfig(max_new_tokens=2)))
    assert answer.text.strip() in ("seven", "hello")  # type: ignore[union-attr]
    given = EvalConfig(data=str(run.split("test")))
    assert evaluate(str(bundle.path), given)["nll"] == pytest.approx(evaluate(str(run.path), given)["nll"], abs=0.1)


def test_its_bundle_learns_on_the_device_and_takes_no_option_of_its_own(
    bundles: dict[str, Bundle], sums: Path, tmp_path: Path
) -> None:
    bundle = bundles["adapter"].path
    settings = {**SETTINGS, "max_steps": 2, "vocabulary": "all", "compute": "auto"}
    assert trained(bundle, sums, tmp_path / "more", **settings).report()["steps"] == 2
    with pytest.raises(UsageError, match="--vocabulary rows: a bundle is trained over the weights that it holds"):
        trained(bundle, sums, tmp_path / "again", **settings | {"vocabulary": "rows"})


def test_an_adapter_of_other_tokens_is_refused_where_ids_would_mean_others(
    bundles: dict[str, Bundle], run: RunFolder, llama_run: RunFolder, llama_adapter_bundle: Bundle
) -> None:
    for bundle, adapter in ((bundles["adapter"], llama_run), (llama_adapter_bundle, run)):
        with pytest.raises(UsageError, match="was trained with other tokens than those of"):
            load(bundle.path, threads=1, adapter=adapter.path)
        with pytest.raises(UsageError, match="was trained with other tokens than those of"):
            export(str(adapter.path), ExportConfig(onto=bundle.path))
    load(bundles["adapter"].path, threads=1, adapter=run.path)


def test_a_gguf_file_of_it_is_read_back_with_the_same_tokens(run: RunFolder, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    made = export_gguf(str(run.path), ExportConfig(out=file, format="gguf", threads=1, **LOOSE))
    assert made.manifest["verification"]["refused"] == []
    assert find_base(str(file)).dims.vocabulary == run.report()["vocabulary"]["kept"]


def test_a_stopped_run_goes_on_over_the_same_tokens(
    model: Path, sums: Path, run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    settings = {**SETTINGS, "vocabulary": "rows", "threads": 1, "checkpoint_steps": 1}
    stopped_at(TuneConfig(model=str(model), data=str(sums), out=out, **settings), 6, monkeypatch)
    file = RunFolder(out).vocabulary
    text = file.read_text()
    file.write_text(text.replace("11", "12", 1))
    with pytest.raises(UsageError, match=r"vocabulary\.json is not the file that was written"):
        trained(model, sums, out, resume=True)
    file.write_text(text)
    monkeypatch.setattr(vocabulary, "GENERAL", 30)  # a later release may keep others
    resumed = trained(model, sums, out, resume=True)
    assert resumed.report()["resumed_from_step"] == 6
    assert resumed.vocabulary.read_text() == run.vocabulary.read_text()
    weights = "adapter_model.safetensors"
    assert (resumed.adapter / weights).read_bytes() == (run.adapter / weights).read_bytes()


def test_where_the_cut_base_is_gone_it_is_cut_again_from_the_whole_one(
    run: RunFolder, model: Path, sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGE_FT_CACHE", str(tmp_path / "cache"))
    moved = RunFolder(shutil.copytree(run.path, tmp_path / "moved"))
    base = moved.base()
    (moved.path / "base.json").write_text(json.dumps({**base, "path": str(tmp_path / "gone")}))
    assert find_run_base(moved).content_sha256 == base["content_sha256"]
    assert find_run_base(moved).path.parent == tmp_path / "cache"
    other = write_llama(tmp_path / "other", seed=1)
    (moved.path / "base.json").write_text(json.dumps({**base, "path": "gone", "model": str(other)}))
    with pytest.raises(ModelError, match=r"over a part of the vocabulary of .*other, whose content has changed"):
        find_run_base(moved)
    (moved.path / "base.json").write_text(json.dumps({**base, "path": "gone", "model": str(tmp_path / "none")}))
    with pytest.raises(ModelError, match=f"there is no model at {tmp_path / 'none'}"):
        find_run_base(moved)


def test_a_plan_is_of_the_smaller_model(model: Path, sums: Path, run: RunFolder) -> None:
    job = prepare_job(PlanConfig(model=str(model), data=str(sums), vocabulary="rows", threads=1), Silent())
    assert job.base.dims.vocabulary < len(tokens_of(model))
    assert job.base.path.parent == cache_folder()
