"""Vectors of texts: pooled as the model's files say, learned from texts that belong together."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BertModel

from edge_ft.artifacts import Bundle, RunFolder
from edge_ft.config import EvalConfig, ExportConfig, RunConfig, TuneConfig, VerifyConfig
from edge_ft.data.contrastive import duplicate_texts, in_batch_loss
from edge_ft.errors import DataError, GateRefused, ModelError, UsageError
from edge_ft.evaluate import evaluate, gate
from edge_ft.evaluate.metrics import recall
from edge_ft.evaluate.verify import verify
from edge_ft.export import export
from edge_ft.models.base_model import find_base
from edge_ft.progress import Silent
from edge_ft.runtime import TextEmbedder, load
from edge_ft.runtime.run import run_file
from edge_ft.tune import tune
from edge_ft.tune.distributed import Processes


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "pairs.jsonl"
    lines = []
    for n in range(60):
        word = ["good", "bad", "sep", "a"][n % 4]
        middle = " ".join([*["very"] * (n // 4 % 4), *["not"] * (n // 16)])
        lines.append({"question": f"the film was {middle} {word}", "answer": f"{word} {word} {middle}"})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def run(bert: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    out = tmp_path_factory.mktemp("runs") / "embed"
    return tune(
        TuneConfig(
            model=str(bert),
            data=str(rows),
            out=out,
            epochs=10,
            learning_rate=3e-3,
            compute="fp32",
            split=(0.5, 0.3, 0.2),
        )
    )


@pytest.fixture(scope="module")
def bundle(run: RunFolder, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    out = tmp_path_factory.mktemp("bundles") / "embed"
    return export(str(run.path), ExportConfig(out=out, max_tax=1, min_retained=0.3, max_metric_drop=1))


def test_an_embedder_is_trained_and_exported(run: RunFolder, bundle: Bundle) -> None:
    report = run.report()
    assert report["task"] == "feature-extraction"
    assert report["nll"]["best"] < report["nll"]["base"]
    assert set(report["metrics"]) == {"recall_at_1", "recall_at_10"}
    found = bundle.manifest["verification"]
    assert found["by_accuracy_level"]["1"]["shipped_minus_last_evaluated"] < 1e-3
    assert found["adapter_changes_logits"]
    scored = evaluate(str(bundle.path), EvalConfig(data=str(run.split("test"))))
    assert scored["perplexity"] is None
    assert scored["metrics"]["recall_at_1"] == found["test"]["metrics"]["recall_at_1"]["shipped"]


def test_the_gate_judges_vectors_and_so_does_verify(run: RunFolder, bundle: Bundle, tmp_path: Path) -> None:
    """A limit of the loss refuses no embedder; vectors that turned away do, and the message says what keeps them."""
    found = bundle.manifest["verification"]
    assert 0.5 < found["cosine"]["low"] < found["cosine"]["value"] <= 1
    assert found["metric_drop"]["metric"] == "recall_at_1"
    assert found["by_accuracy_level"]["1"]["cosine"] == found["cosine"]
    allowed = ExportConfig(out=tmp_path / "allowed", max_tax=0, min_retained=1e9, max_metric_drop=1)
    assert export(str(run.path), allowed).manifest["verification"]["refused"] == []
    verified = verify(tmp_path / "allowed", VerifyConfig(data=str(run.split("validation"))))
    assert verified["same_rows"]
    with pytest.raises(GateRefused, match=r"mean cosine of .*more than --max-metric-drop .*--weights int8"):
        export(str(run.path), ExportConfig(out=tmp_path / "refused", weights="int4", max_metric_drop=1e-9))


def test_an_embedder_gets_8_bits_where_nobody_chose_4_and_4_are_too_few(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits: list[float] = []

    def reasons(cosine: Any, _: Any) -> list[str]:
        limits.append(cosine["value"])
        return ["too far"] if len(limits) == 1 else []

    monkeypatch.setattr(gate, "cosine_reasons", reasons)
    out = tmp_path / "bundle"
    found = export(str(run.path), ExportConfig(out=out, min_retained=0, max_metric_drop=1))
    assert found.manifest["quantization"]["bits"] == 8
    assert not out.with_name("bundle.rejected").exists()


def test_a_resumed_run_ends_as_an_uninterrupted_one(
    bert: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"max_steps": 4, "eval_steps": 2, "checkpoint_steps": 1, "compute": "fp32"}
    whole = tune(TuneConfig(model=str(bert), data=str(rows), out=tmp_path / "whole", threads=1, **settings))
    config = TuneConfig(model=str(bert), data=str(rows), out=tmp_path / "run", threads=1, **settings)

    def stopped(*_: Any) -> None:
        raise ZeroDivisionError

    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr("edge_ft.tune.run.results", stopped)  # after the last step, before the report
        tune(config)
    again = tune(replace(config, resume=True))
    assert again.report()["resumed_from_step"] == 4
    assert again.report()["nll"] == whole.report()["nll"]
    assert again.report()["metrics"] == whole.report()["metrics"]


def test_rows_whose_second_texts_are_all_alike_are_refused(
    bert: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = rows.read_text().splitlines(keepends=True)
    one = tmp_path / "one.jsonl"
    one.write_text(lines[0])
    settings: dict[str, Any] = {"model": str(bert), "data": str(rows), "out": tmp_path / "run"}
    with pytest.raises(UsageError, match=r"at least 2 validation rows .* there are 1 and 8"):
        tune(TuneConfig(**settings, validation=str(one), split=(1.0, 0.0, 0.0), allow=("leak",)))
    with pytest.raises(UsageError, match=r"--batch-size 2 are needed, there are 6 and 1"):
        tune(TuneConfig(**settings, batch_size=1))
    monkeypatch.setattr(
        Processes, "from_environment", classmethod(lambda cls, progress: cls(torch.device("cpu"), 0, 2))
    )
    monkeypatch.setattr(Processes, "sum", lambda self, value: value)
    with pytest.raises(UsageError, match="in one process"):
        tune(TuneConfig(**settings))
    assert not (tmp_path / "run").exists()


def test_a_base_without_an_adapter_embeds_as_torch(bert: Path, tmp_path: Path) -> None:
    bundle = export(str(bert), ExportConfig(out=tmp_path / "b", weights="fp32"))
    assert bundle.task == "feature-extraction"
    opened = load(bundle, engine="exact")
    assert isinstance(opened, TextEmbedder)
    texts = ["the film was good", "bad", "not a very good film"]
    found = opened.embed(texts)
    assert (found.shape, found.dtype) == ((3, 64), np.float32)
    assert np.linalg.norm(found, axis=1) == pytest.approx(1, abs=1e-5)
    model = BertModel.from_pretrained(bert).eval()
    for vector, text in zip(found, texts, strict=True):
        ids = torch.tensor([opened.tokenizer.encode_framed(text, 64).ids])
        with torch.no_grad():
            mean = model(input_ids=ids).last_hidden_state[0].mean(0)
        np.testing.assert_allclose(vector, (mean / mean.norm()).numpy(), atol=1e-4)
    assert opened.embed([]).shape[0] == 0


def test_pooling_comes_from_the_models_files_unless_the_option_is_given(bert: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(bert, folder)
    assert find_base(str(folder)).pooling == ("mean", True)
    (folder / "1_Pooling").mkdir()

    def write(modes: dict[str, bool], *types: str) -> None:
        kinds = [{"type": f"sentence_transformers.models.{name}", "path": f"1_{name}"} for name in types]
        (folder / "modules.json").write_text(json.dumps(kinds))
        (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 64, **modes}))

    write({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "Transformer", "Pooling")
    assert find_base(str(folder)).pooling == ("cls", False)
    first = load(export(str(folder), ExportConfig(out=tmp_path / "cls")), engine="exact")
    mean = load(export(str(folder), ExportConfig(out=tmp_path / "mean", pooling="mean")), engine="exact")
    assert isinstance(first, TextEmbedder)
    assert isinstance(mean, TextEmbedder)
    assert np.linalg.norm(first.embed(["good"])) != pytest.approx(1, abs=1e-3)
    assert np.linalg.norm(mean.embed(["good"])) == pytest.approx(1, abs=1e-5)
    write({"pooling_mode_max_tokens": True}, "Transformer", "Pooling")
    with pytest.raises(ModelError, match="pools by pooling_mode_max_tokens"):
        export(str(folder), ExportConfig(out=tmp_path / "max"))
    write({"pooling_mode_mean_tokens": True}, "Transformer", "Pooling", "Dense")
    with pytest.raises(ModelError, match="pools by Dense"):
        export(str(folder), ExportConfig(out=tmp_path / "dense"))


def test_pooling_is_for_embedders(bert: Path, reviews: Path, bundle: Bundle, rows: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--pooling is for feature-extraction"):
        tune(TuneConfig(model=str(bert), data=str(reviews), out=tmp_path / "run", pooling="cls"))
    with pytest.raises(DataError, match="--pooling cls: this model was made with mean"):
        evaluate(str(bundle.path), EvalConfig(data=str(rows), pooling="cls"))


def test_a_batch_of_texts_equals_single_texts(bundle: Bundle) -> None:
    opened = load(bundle, engine="exact")
    assert isinstance(opened, TextEmbedder)
    texts = ["good", "the film was very very good", "not a"]
    for vector, text in zip(opened.embed(texts), texts, strict=True):
        np.testing.assert_allclose(vector, opened.embed([text])[0], atol=1e-5)


def test_run_writes_a_row_for_each_row(bundle: Bundle, rows: Path, tmp_path: Path) -> None:
    run_file(bundle.path, rows, tmp_path / "out.jsonl", RunConfig(), Silent())
    answers = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert len(answers) == 60
    assert {len(answer["embedding"]) for answer in answers} == {64}


def test_a_second_text_shared_by_two_rows_is_right_for_both() -> None:
    ids = np.array([[1, 2], [1, 3], [1, 4]])
    batch: Any = {"input_ids": ids, "pair_input_ids": np.array([[7], [7], [8]]), "rows": [1, 2, 3]}
    assert duplicate_texts(batch).tolist() == [[False, True, False], [True, False, False], [False] * 3]
    vectors = np.eye(3, dtype=np.float32)
    nll, rank = in_batch_loss(vectors, vectors[[0, 0, 2]], batch)
    assert rank.tolist() == [[0], [0], [0]]
    assert nll[0, 0] == pytest.approx(np.log1p(np.exp(-20)), abs=1e-6)


def test_recall_counts_a_repeated_text_once() -> None:
    first = np.eye(3, dtype=np.float32)
    second = np.array([[1, 0, 0], [1, 0, 0], [0, 0, 1]], np.float32)
    found = recall(first, second, ["a", "a", "c"])
    assert found["recall_at_1"]["value"] == pytest.approx(1)
    assert found["recall_at_10"]["value"] == 1
