"""The rendering follows from the user's settings, the columns of the rows and the files of the model."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edge_ft.config import RowsConfig
from edge_ft.data import Row, TextTokenizer, encode_rows, longest_sequence, plain_rendering, trained_rendering
from edge_ft.errors import DataError
from edge_ft.models.base_model import Base, find_base

CLASSES = [Row(1, {"text": "good", "label": "praise"})]
PAIRS = [Row(1, {"prompt": "hello", "completion": " seven"})]


@pytest.fixture
def base(llama: Path) -> Base:
    return find_base(str(llama))


@pytest.fixture
def tokenizer(llama: Path) -> TextTokenizer:
    return TextTokenizer.load(llama)


def test_the_longest_sequence_is_the_models_limit_and_1024_at_most_unless_requested() -> None:
    lengths = [longest_sequence(requested, limit) for requested, limit in ((None, 256), (None, 8192), (2000, 8192))]
    assert lengths == [256, 1024, 2000]
    with pytest.raises(DataError, match="beyond the model's 256 positions"):
        longest_sequence(257, 256)


@pytest.mark.parametrize(("requested", "longest"), [(None, 1024), (3000, 3000)])
def test_a_plain_model_reads_1024_tokens_unless_more_are_requested(
    requested: int | None, longest: int, base: Base, tokenizer: TextTokenizer
) -> None:
    long = replace(base, config={**base.config, "max_position_embeddings": 4096})
    config = RowsConfig(max_length=requested)
    assert plain_rendering(long, config, PAIRS, tokenizer).max_length == longest


@pytest.mark.parametrize(
    ("labels", "given", "expected"),
    [
        (("1", "2", "3"), ["1", "2"], ("1", "2", "3")),
        (("blame", "praise"), ["0", "1"], ("blame", "praise")),
        (("blame", "praise"), ["blame", "praise"], ("blame", "praise")),
    ],
)
def test_classes_are_matched_by_name_before_they_are_matched_by_index(
    labels: tuple[str, ...], given: list[str], expected: tuple[str, ...], bert: Path
) -> None:
    rows = [Row(number, {"text": "good", "label": label}) for number, label in enumerate(given, 1)]
    tokenizer = TextTokenizer.load(bert)
    found = plain_rendering(find_base(str(bert)), RowsConfig(), rows, tokenizer, "text-classification", labels)
    assert found.labels == expected
    assert [example.labels for example in encode_rows(found, tokenizer, rows)] == [[0], [1]]


def test_a_classifier_without_classes_is_refused(bert: Path) -> None:
    base, tokenizer = find_base(str(bert)), TextTokenizer.load(bert)
    with pytest.raises(DataError, match="no class names of its own"):
        plain_rendering(base, RowsConfig(), CLASSES, tokenizer, "text-classification", ())


def test_without_rows_a_model_has_the_default_columns_of_its_task(bert: Path) -> None:
    base, tokenizer = find_base(str(bert)), TextTokenizer.load(bert)
    found = plain_rendering(base, RowsConfig(), [], tokenizer, "text-classification", ("no", "yes"))
    assert (found.columns.prompt, found.columns.label, found.labels) == ("{text}", "label", ("no", "yes"))
    assert found.problem_type == "single_label_classification"


def test_a_trained_model_renders_as_in_training_unless_settings_or_columns_differ(
    base: Base, tokenizer: TextTokenizer
) -> None:
    own = replace(plain_rendering(base, RowsConfig(), PAIRS, tokenizer), answers=(" seven",))
    assert trained_rendering(own, RowsConfig(), PAIRS, tokenizer, 256) == own
    assert trained_rendering(own, RowsConfig(max_length=40), PAIRS, tokenizer, 256) == replace(own, max_length=40)
    renamed = [Row(1, {"instruction": "hello", "output": " seven"})]
    mapped = trained_rendering(own, RowsConfig(), renamed, tokenizer, 256)
    assert mapped == replace(own, columns=mapped.columns)
    assert mapped.columns.kind == "instruction"
    plain = trained_rendering(own, RowsConfig(chat_template="none"), PAIRS, tokenizer, 256)
    assert own.chat_template is not None
    assert plain.chat_template is None
    assert plain.answers == own.answers


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_length": 9999}, "beyond the model's 256 positions"),
        ({"pooling": "cls"}, "--pooling cls: this model was made with none"),
        ({"problem_type": "regression"}, "--problem-type regression: this model learned text-generation"),
    ],
)
def test_settings_that_contradict_the_training_are_refused(
    settings: dict[str, Any], message: str, base: Base, tokenizer: TextTokenizer
) -> None:
    own = plain_rendering(base, RowsConfig(), PAIRS, tokenizer)
    with pytest.raises(DataError, match=message):
        trained_rendering(own, RowsConfig(**settings), PAIRS, tokenizer, 256)


def test_a_rendering_survives_json(base: Base, tokenizer: TextTokenizer) -> None:
    own = plain_rendering(base, RowsConfig(), PAIRS, tokenizer)
    assert type(own).from_dict(json.loads(json.dumps(own.to_dict()))) == own
