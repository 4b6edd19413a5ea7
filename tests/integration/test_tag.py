"""Token classification: trained, exported, scored and run."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import write_tagged

from edge_ft.artifacts import Bundle, RunFolder
from edge_ft.config import EvalConfig, ExportConfig, RunConfig, TuneConfig, VerifyConfig
from edge_ft.data import (
    collate,
    encode_rows,
    read_rows,
)
from edge_ft.errors import AuditRefused, UsageError
from edge_ft.evaluate import evaluate
from edge_ft.evaluate.verify import verify
from edge_ft.export import export
from edge_ft.progress import Silent
from edge_ft.runtime import TextTagger, load
from edge_ft.runtime.run import run_file, run_text
from edge_ft.tune import tune


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tagged(tmp_path_factory.mktemp("rows") / "tagged.jsonl")


@pytest.fixture(scope="module")
def run(bert: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    out = tmp_path_factory.mktemp("runs") / "tags"
    return tune(
        TuneConfig(
            model=str(bert),
            data=str(rows),
            out=out,
            epochs=8,
            learning_rate=1e-2,
            compute="fp32",
            split=(0.6, 0.2, 0.2),
        )
    )


@pytest.fixture(scope="module")
def bundle(run: RunFolder, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    out = tmp_path_factory.mktemp("bundles") / "tags"
    return export(str(run.path), ExportConfig(out=out, max_tax=1, min_retained=0.5, max_metric_drop=1))


@pytest.fixture(scope="module")
def tagger(bundle: Bundle) -> TextTagger:
    opened = load(bundle, engine="exact")
    assert isinstance(opened, TextTagger)
    return opened


def test_rows_with_a_single_tag_are_refused(bert: Path, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    lines = [{"tokens": ["the", "film", *["very"] * n], "tags": ["O", "O", *["O"] * n]} for n in range(20)]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(AuditRefused, match="a classifier needs at least two"):
        tune(TuneConfig(model=str(bert), data=str(data), out=tmp_path / "run"))
    held = tmp_path / "held.jsonl"
    held.write_text(json.dumps({"tokens": ["good"], "tags": ["B-praise"]}) + "\n")
    with pytest.raises(AuditRefused, match="one class 'O'"):
        tune(TuneConfig(model=str(bert), data=str(data), validation=str(held), out=tmp_path / "run"))


def test_a_tagger_learns_and_reports_span_f1(run: RunFolder) -> None:
    report = run.report()
    assert report["task"] == "token-classification"
    assert report["nll"]["test"] < 0.1 * report["nll"]["test_base"]
    assert report["metrics"]["span_f1"]["test"]["value"] == report["metrics"]["accuracy"]["test"]["value"] == 1
    assert report["samples"][0]["tuned"] == report["samples"][0]["reference"]


@pytest.mark.parametrize(("lane", "weights"), [("merged", "fp32"), ("adapter", "int4"), ("merged", "int8")])
def test_a_tagger_can_be_exported_in_every_lane(run: RunFolder, lane: Any, weights: Any, tmp_path: Path) -> None:
    config = ExportConfig(out=tmp_path / "b", lane=lane, weights=weights, max_tax=1, min_retained=0.5)
    shipped = export(str(run.path), config).manifest
    assert shipped["verification"]["by_accuracy_level"]["1"]["shipped_minus_last_evaluated"] < 1e-4
    assert shipped["verification"]["test"]["metrics"]["span_f1"]["shipped"]["value"] == 1


def test_eval_and_verify_need_only_the_bundle(bundle: Bundle, run: RunFolder) -> None:
    found = evaluate(str(bundle.path), EvalConfig(data=str(run.split("test"))))
    assert found["metrics"]["span_f1"]["value"] == 1
    assert verify(bundle.path, VerifyConfig(data=str(run.split("validation"))))["same_rows"]


def test_a_padded_batch_is_tagged_as_single_rows(tagger: TextTagger, run: RunFolder) -> None:
    examples = encode_rows(tagger.rendering, tagger.tokenizer, read_rows(str(run.split("train"))))[:8]
    assert len({len(example.input_ids) for example in examples}) > 1
    together, _ = tagger.token_nll(collate(examples, tagger.tokenizer.pad_id, "token-classification"))
    for row, example in enumerate(examples):
        alone, _ = tagger.token_nll(collate([example], tagger.tokenizer.pad_id, "token-classification"))
        np.testing.assert_allclose(together[row, : alone.shape[1]], alone[0], atol=1e-4)


def test_each_word_has_its_position_tag_and_score(tagger: TextTagger) -> None:
    text = "the film, was bad"
    [found] = tagger.tag([text])
    assert [text[word.start : word.end] for word in found.words] == [word.text for word in found.words]
    assert found.tags == ["O", "B-work", "O", "O", "B-blame"]
    assert all(word.score is not None and 0.5 < word.score <= 1 for word in found.words if word.text != ",")
    [listed] = tagger.tag([["the", "film", "was", "bad"]])
    assert listed.tags == ["O", "B-work", "O", "B-blame"]
    assert [(word.start, word.end) for word in listed.words] == [(0, 3), (4, 8), (9, 12), (13, 16)]


def test_words_beyond_max_length_are_reported_and_have_no_tag(tagger: TextTagger) -> None:
    [found] = tagger.tag([["good"] * 100])
    assert (found.prompt_tokens, found.cut) == (64, 38)
    assert found.tags[61] is not None
    assert found.tags[62:] == [None] * 38


def test_methods_of_other_tasks_are_refused(tagger: TextTagger) -> None:
    for call in ("classify", "generate", "embed", "fill"):
        with pytest.raises(UsageError, match="is a token-classification bundle"):
            getattr(tagger, call)(["the film"])


def test_run_prints_words_and_writes_tags(bundle: Bundle, run: RunFolder, tmp_path: Path, capsys: Any) -> None:
    run_text(bundle.path, "the film was good", RunConfig(), sys.stdout)
    assert [line.split("\t")[:2] for line in capsys.readouterr().out.splitlines()] == [
        ["the", "O"],
        ["film", "B-work"],
        ["was", "O"],
        ["good", "B-praise"],
    ]
    run_file(bundle.path, run.split("test"), tmp_path / "out.jsonl", RunConfig(), Silent())
    answers = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [answer["tags"] for answer in answers] == [row.fields["tags"] for row in read_rows(str(run.split("test")))]
    with pytest.raises(UsageError, match="leave --text-pair out"):
        run_text(bundle.path, "film", RunConfig(text_pair="x"), None)
