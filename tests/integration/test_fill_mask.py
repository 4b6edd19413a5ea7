"""Hidden tokens: the same ones whenever a row is read, learned over the checkpoint's own head, and found again."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import write_bert, write_tagged
from transformers import BertForMaskedLM

from edge_ft.artifacts import Bundle, RunFolder
from edge_ft.config import ExportConfig, RunConfig, TuneConfig
from edge_ft.data import collate, encode_rows, read_rows
from edge_ft.data.encoders import mask_tokens
from edge_ft.errors import ModelError, UsageError
from edge_ft.export import export
from edge_ft.runtime import MaskFiller, load
from edge_ft.runtime.run import run_text
from edge_ft.tune import tune


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("texts")
    rows = read_rows(str(write_tagged(work / "tagged.jsonl")))
    path = work / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": " ".join(row.fields["tokens"])}) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def run(bert: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    work = tmp_path_factory.mktemp("fill")
    headed = write_bert(work / "headed")
    BertForMaskedLM.from_pretrained(bert).save_pretrained(headed)
    return tune(
        TuneConfig(model=str(headed), data=str(texts), out=work / "run", epochs=12, learning_rate=1e-2, compute="fp32")
    )


@pytest.fixture(scope="module")
def bundle(run: RunFolder, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    out = tmp_path_factory.mktemp("bundles") / "fill"
    return export(str(run.path), ExportConfig(out=out, max_tax=1, min_retained=0.5, max_metric_drop=1))


@pytest.fixture(scope="module")
def filler(bundle: Bundle) -> MaskFiller:
    opened = load(bundle, engine="exact")
    assert isinstance(opened, MaskFiller)
    return opened


@given(st.lists(st.integers(min_value=4, max_value=30_000), max_size=80))
def test_fifteen_percent_of_a_texts_tokens_are_masked(body: list[int]) -> None:
    ids = [2, *body, 3]
    masked, labels = mask_tokens(ids, 1, 1 + len(body), 1)
    assert (masked, labels) == mask_tokens(ids, 1, 1 + len(body), 1), "whenever the row is read"
    places = [place for place, label in enumerate(labels) if label != -100]
    assert len(places) == (max(1, round(0.15 * len(body))) if body else 0)
    assert all(0 < place <= len(body) for place in places)
    for place, (token, hidden, label) in enumerate(zip(ids, masked, labels, strict=True)):
        assert (hidden, label) == ((1, token) if place in places else (token, -100))


def test_a_mask_filler_is_trained_and_exported(run: RunFolder, bundle: Bundle) -> None:
    report = run.report()
    assert report["nll"]["best"] < 0.7 * report["nll"]["base"]
    found = bundle.manifest["verification"]
    assert found["by_accuracy_level"]["1"]["shipped_minus_last_evaluated"] < 1e-4


def test_the_adapter_lane_ships_too(run: RunFolder, tmp_path: Path) -> None:
    shipped = export(str(run.path), ExportConfig(out=tmp_path / "b", lane="adapter"))
    assert shipped.manifest["verification"]["quantization_tax"] == pytest.approx(0, abs=1e-4)


def test_a_checkpoint_without_a_head_is_refused_before_training(bert: Path, texts: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="it has no head for fill-mask, take a checkpoint that was saved with one"):
        tune(TuneConfig(model=str(bert), data=str(texts), out=tmp_path / "run"))


def test_fill_returns_the_likeliest_tokens_of_each_mask(filler: MaskFiller) -> None:
    one, two = filler.fill(["the [MASK] was good", "the [MASK] was [MASK]"], top_k=3)
    assert one.fills[0][0].token == "film"
    assert one.text == "the film was good"
    scores = [fill.score for fill in one.fills[0]]
    assert len(scores) == 3
    assert scores == sorted(scores, reverse=True)
    assert [len(fills) for fills in two.fills] == [3, 3]


def test_a_padded_batch_is_filled_as_single_rows(filler: MaskFiller, run: RunFolder) -> None:
    examples = encode_rows(filler.rendering, filler.tokenizer, read_rows(str(run.split("train"))))[:8]
    together, _ = filler.token_nll(collate(examples, filler.tokenizer.pad_id, "fill-mask"))
    for row, example in enumerate(examples):
        alone, _ = filler.token_nll(collate([example], filler.tokenizer.pad_id, "fill-mask"))
        np.testing.assert_allclose(together[row, : alone.shape[1]], alone[0], atol=1e-4)


@pytest.mark.parametrize(("text", "why"), [("the film", "is missing"), ("a " * 80 + "[MASK]", "beyond the")])
def test_a_text_needs_a_mask_within_max_length(filler: MaskFiller, text: str, why: str) -> None:
    with pytest.raises(UsageError, match=why):
        filler.fill([text])


def test_run_prints_tokens(bundle: Bundle, capsys: Any) -> None:
    run_text(bundle.path, "the [MASK] was good", RunConfig(top_k=2), sys.stdout)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert lines[0].endswith("film")
    assert lines[-1] == "the film was good"
