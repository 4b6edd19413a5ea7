"""Texts to labels."""

from pathlib import Path

import numpy as np
import pytest
from tiny_bundle import write_classifier

from edge_ft.errors import BundleError
from edge_ft.runtime import TextClassifier, load

TEXTS = ["short", "", "some longer", "yes", "éé"]


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> TextClassifier:
    opened = load(write_classifier(tmp_path_factory.mktemp("bundles") / "classifier"), threads=1)
    assert isinstance(opened, TextClassifier)
    return opened


def test_a_text_gets_the_likeliest_label_and_the_probability_of_each(classifier: TextClassifier) -> None:
    [found] = classifier.classify(["short"])
    assert list(found.scores) == ["no", "maybe", "yes"]
    assert sum(found.scores.values()) == pytest.approx(1)
    assert found.scores[found.label] == max(found.scores.values())
    ids = classifier.tokenizer.encode_framed("short", 16).ids
    [logits] = classifier.logits(np.array([ids]), np.ones((1, len(ids)), np.int64))
    assert classifier.labels[int(logits.argmax())] == found.label


def test_a_batch_of_texts_equals_single_texts_in_order(classifier: TextClassifier) -> None:
    for together, text in zip(classifier.classify(TEXTS), TEXTS, strict=True):
        [alone] = classifier.classify([text])
        assert together.scores == pytest.approx(alone.scores, abs=1e-6)
        assert together.prompt_tokens == alone.prompt_tokens == len(text.encode()) + 2


def test_different_texts_get_different_scores(classifier: TextClassifier) -> None:
    assert len({found.scores["yes"] for found in classifier.classify(TEXTS)}) == len(TEXTS)


def test_a_long_text_is_cut_and_the_result_reports_it(classifier: TextClassifier) -> None:
    cut, short = classifier.classify(["a" * 20, "a" * 14])
    assert (cut.prompt_tokens, cut.cut) == (16, 6)
    assert (short.prompt_tokens, short.cut) == (16, 0)
    assert cut.scores == pytest.approx(short.scores)


def test_no_texts_give_no_results(classifier: TextClassifier) -> None:
    assert classifier.classify([]) == []


def test_the_loss_is_the_nll_of_the_right_class(classifier: TextClassifier) -> None:
    rows = [classifier.tokenizer.encode_framed(text, 16).ids for text in ("abc", "xyz")]
    nll, predicted = classifier.token_nll(
        {
            "input_ids": np.array(rows),
            "attention_mask": np.ones((2, 5), np.int64),
            "labels": np.array([[2], [0]]),
            "rows": [1, 2],
        }
    )
    for row, found in enumerate(classifier.classify(["abc", "xyz"])):
        right = ["yes", "no"][row]
        assert nll[row, 0] == pytest.approx(-np.log(found.scores[right]), rel=1e-4)
        assert classifier.labels[predicted[row, 0]] == found.label
    assert nll.dtype == np.float32


def test_a_bundle_without_classes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="has no class names"):
        load(write_classifier(tmp_path / "classifier", labels=()))
