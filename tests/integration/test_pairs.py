"""Text pairs: trained, exported and scored."""

import json
from pathlib import Path

import numpy as np
import pytest
from tiny_models import write_pairs

from edge_ft.artifacts import Bundle, RunFolder
from edge_ft.config import EvalConfig, ExportConfig, RunConfig, TuneConfig
from edge_ft.data import collate, encode_rows, read_rows
from edge_ft.errors import DataError, UsageError
from edge_ft.evaluate import evaluate
from edge_ft.export import export
from edge_ft.progress import Silent
from edge_ft.runtime import TextClassifier, load
from edge_ft.runtime.run import run_file, run_text
from edge_ft.tune import tune


@pytest.fixture(scope="module")
def run(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    work = tmp_path_factory.mktemp("pairs")
    data = write_pairs(work / "pairs.jsonl")
    return tune(
        TuneConfig(
            model=str(bert),
            data=str(data),
            out=work / "run",
            epochs=8,
            learning_rate=1e-2,
            split=(0.6, 0.2, 0.2),
            compute="fp32",
        )
    )


@pytest.fixture(scope="module")
def bundle(run: RunFolder, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    out = tmp_path_factory.mktemp("bundles") / "pairs"
    return export(str(run.path), ExportConfig(out=out, max_tax=1, min_retained=0.5, max_metric_drop=1))


def test_a_pair_classifier_is_trained_exported_and_scored(run: RunFolder, bundle: Bundle) -> None:
    report = run.report()
    assert report["metrics"]["accuracy"]["test"]["value"] == 1
    found = bundle.manifest["verification"]
    assert found["by_accuracy_level"]["1"]["shipped_minus_last_evaluated"] < 1e-4
    assert found["nll"]["shipped"] < 0.1 * found["nll"]["base"]
    assert evaluate(str(bundle.path), EvalConfig(data=str(run.split("test"))))["metrics"]["accuracy"]["value"] == 1


def test_token_types_reach_torch_and_the_graph(run: RunFolder, bundle: Bundle) -> None:
    opened = load(bundle, engine="exact")
    assert isinstance(opened, TextClassifier)
    examples = encode_rows(opened.rendering, opened.tokenizer, read_rows(str(run.split("test"))))
    batch = collate(examples, opened.tokenizer.pad_id, "text-classification")
    assert batch["token_type_ids"].max() == 1
    told, _ = opened.token_nll(batch)
    del batch["token_type_ids"]
    untold, _ = opened.token_nll(batch)
    assert np.abs(told - untold).max() > 1e-4


def test_a_padded_batch_of_pairs_equals_single_pairs(bundle: Bundle) -> None:
    opened = load(bundle, engine="exact")
    assert isinstance(opened, TextClassifier)
    pairs = [("the film was", "not a bad"), ("the", "good"), ("the film was very very", "not a not a good")]
    for together, pair in zip(opened.classify(pairs), pairs, strict=True):
        assert together.scores == pytest.approx(opened.classify([pair])[0].scores, abs=1e-5)
    assert [found.label for found in opened.classify(pairs)] == ["blame", "praise", "praise"]


def test_a_model_trained_on_pairs_requires_pairs(bundle: Bundle, run: RunFolder, tmp_path: Path) -> None:
    opened = load(bundle, engine="exact")
    with pytest.raises(UsageError, match="was trained on pairs of texts"):
        opened.classify(["the film was good"])
    with pytest.raises(UsageError, match="reads two texts: give --text-pair"):
        run_text(bundle.path, "the film", RunConfig(), None)
    assert run_text(bundle.path, "the film was", RunConfig(text_pair="bad"), None)["label"] == "blame"
    run_file(bundle.path, run.split("test"), tmp_path / "out.jsonl", RunConfig(), Silent())
    answers = [json.loads(line)["label"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert answers == [row.fields["label"] for row in read_rows(str(run.split("test")))]
    single = tmp_path / "single.jsonl"
    single.write_text(json.dumps({"text": "good", "label": "praise"}) + "\n")
    with pytest.raises(DataError, match="this model reads two texts"):
        evaluate(str(bundle.path), EvalConfig(data=str(single)))
