"""Two texts that are classified together: framed as the model's own tokenizer frames them, the longer one cut."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import write_bert, write_pairs
from tokenizers import Tokenizer

from edge_ft.artifacts import Bundle, RunFolder
from edge_ft.config import EvalConfig, ExportConfig, RowsConfig, RunConfig, TuneConfig
from edge_ft.data import TextTokenizer, collate, encode_rows, find_columns, read_rows
from edge_ft.errors import DataError, UsageError
from edge_ft.evaluate import evaluate
from edge_ft.export import export
from edge_ft.progress import Silent
from edge_ft.runtime import TextClassifier, load
from edge_ft.runtime.run import answer_file, answer_one
from edge_ft.tune import tune

WORDS = st.lists(st.sampled_from(["good", "bad", "film", "the"]), max_size=12).map(" ".join)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def run(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    work = tmp_path_factory.mktemp("pairs")
    data = write_pairs(work / "pairs.jsonl")
    return tune(
        TuneConfig(
            model=str(bert), data=str(data), out=work / "run", epochs=8, learning_rate=1e-2, split=(0.6, 0.2, 0.2)
        )
    )


@pytest.fixture(scope="module")
def bundle(run: RunFolder, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    out = tmp_path_factory.mktemp("bundles") / "pairs"
    return export(str(run.path), ExportConfig(out=out, max_tax=1, min_retained=0.5, max_metric_drop=1))


@given(WORDS, WORDS, st.integers(min_value=3, max_value=30))
def test_pairs_are_framed_and_cut_as_the_models_own_tokenizer_does(
    folder: Path, first: str, second: str, max_length: int
) -> None:
    own = Tokenizer.from_file(str(folder / "tokenizer.json"))
    whole = own.encode(first, second)
    own.enable_truncation(max_length, strategy="longest_first")
    expected = own.encode(first, second)
    found = TextTokenizer.load(folder).encode_classifier(first, max_length, second)
    assert (found.ids, found.type_ids) == (expected.ids, expected.type_ids)
    assert found.cut == len(whole.ids) - len(expected.ids)


def test_a_control_token_in_a_text_stays_text(folder: Path) -> None:
    found = TextTokenizer.load(folder).encode_classifier("good", 32, "[SEP]")
    assert found.ids.count(3) == 2


@pytest.mark.parametrize(
    ("names", "config", "texts"),
    [
        (["text", "text_pair", "label"], {}, ("{text}", "{text_pair}")),
        (["question", "passage", "label"], {}, ("{question}", "{passage}")),
        (["premise", "hypothesis", "label"], {}, ("{premise}", "{hypothesis}")),
        (["sentence1", "sentence2", "label"], {}, ("{sentence1}", "{sentence2}")),
        (["a", "b", "label"], {"prompt": "{a}?", "text_pair": "{b}"}, ("{a}?", "{b}")),
        (["text", "text_pair", "label"], {"prompt": "{text}"}, ("{text}", None)),
    ],
)
def test_two_texts_are_recognised_or_named(names: list[str], config: dict[str, Any], texts: tuple[str, Any]) -> None:
    columns = find_columns(names, RowsConfig(**config), "text-classification")
    assert (columns.prompt, columns.pair) == texts


def test_a_second_text_is_for_classification() -> None:
    with pytest.raises(DataError, match="--text-pair is for text-classification"):
        find_columns(["a", "b"], RowsConfig(prompt="{a}", text_pair="{b}"), "text-generation")
    with pytest.raises(UsageError, match="--text-pair needs --prompt"):
        RowsConfig(text_pair="{b}")


def test_a_pair_is_learned_shipped_and_scored(run: RunFolder, bundle: Bundle) -> None:
    report = run.report()
    assert report["metrics"]["accuracy"]["test"]["value"] == 1
    found = bundle.manifest["verification"]
    assert found["by_accuracy_level"]["1"]["shipped_minus_last_evaluated"] < 1e-4
    assert found["nll"]["shipped"] < 0.1 * found["nll"]["base"]
    assert evaluate(str(bundle.path), EvalConfig(data=str(run.split("test"))))["metrics"]["accuracy"]["value"] == 1


def test_token_types_reach_torch_and_the_graph(run: RunFolder, bundle: Bundle) -> None:
    opened = load(bundle)
    assert isinstance(opened, TextClassifier)
    examples = encode_rows(opened.rendering, opened.tokenizer, read_rows(str(run.split("test"))))
    batch = collate(examples, opened.tokenizer.pad_id, "text-classification")
    assert batch["token_type_ids"].max() == 1
    told, _ = opened.token_nll(batch)
    del batch["token_type_ids"]
    untold, _ = opened.token_nll(batch)
    assert np.abs(told - untold).max() > 1e-4


def test_padded_pairs_answer_as_alone(bundle: Bundle) -> None:
    opened = load(bundle)
    assert isinstance(opened, TextClassifier)
    pairs = [("the film was", "not a bad"), ("the", "good"), ("the film was very very", "not a not a good")]
    for together, pair in zip(opened.classify(pairs), pairs, strict=True):
        assert together.scores == pytest.approx(opened.classify([pair])[0].scores, abs=1e-5)
    assert [found.label for found in opened.classify(pairs)] == ["blame", "praise", "praise"]


def test_a_model_of_pairs_wants_pairs(bundle: Bundle, run: RunFolder, tmp_path: Path) -> None:
    opened = load(bundle)
    with pytest.raises(UsageError, match="was trained on pairs of texts"):
        opened.classify(["the film was good"])
    with pytest.raises(UsageError, match="needs --text-pair"):
        answer_one(bundle.path, "the film", RunConfig(), None)
    assert answer_one(bundle.path, "the film was", RunConfig(text_pair="bad"), None)["label"] == "blame"
    answer_file(bundle.path, run.split("test"), tmp_path / "out.jsonl", RunConfig(), Silent())
    answers = [json.loads(line)["label"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert answers == [row.fields["label"] for row in read_rows(str(run.split("test")))]
    single = tmp_path / "single.jsonl"
    single.write_text(json.dumps({"text": "good", "label": "praise"}) + "\n")
    with pytest.raises(DataError, match="this model reads two texts"):
        evaluate(str(bundle.path), EvalConfig(data=str(single)))
