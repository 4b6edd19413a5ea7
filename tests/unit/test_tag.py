"""Tags of words: aligned to first tokens, learned, shipped, and given back with the words that a user wrote."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import write_bert

from edge_ft.config import RowsConfig
from edge_ft.data import (
    Columns,
    Rendering,
    Row,
    TextTokenizer,
    encode_rows,
    encode_words,
    find_columns,
    guess_task,
    read_rows,
    split_words,
)
from edge_ft.errors import DataError
from edge_ft.evaluate.metrics import span_metrics

TAGS = ("B-work", "O")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    return TextTokenizer.load(write_bert(tmp_path_factory.mktemp("bert")))


def tagging(max_length: int = 64) -> Rendering:
    return Rendering(
        "token-classification", None, Columns("tokens", "{tokens}", None, "tags"), TAGS, max_length, None, None
    )


@given(
    st.lists(st.text("ab good[].é\u200b ", max_size=8), max_size=12),
    st.integers(min_value=2, max_value=24),
    st.randoms(use_true_random=False),
)
def test_each_tag_is_only_at_its_words_first_token(
    tokenizer: TextTokenizer, words: list[str], max_length: int, random: Any
) -> None:
    tags = [random.choice(TAGS) for _ in words]
    [example] = encode_rows(tagging(max_length), tokenizer, [Row(1, {"tokens": words, "tags": tags})])
    own = [tokenizer.encode(f" {word}" if at else word) for at, word in enumerate(words)]
    body = [token for ids in own for token in ids]
    kept = min(len(body), max_length - 2)
    assert example.input_ids == [2, *body[:kept], 3]
    assert example.cut == len(body) - kept
    expected = [-100] * len(example.input_ids)
    place = 1
    for ids, tag in zip(own, tags, strict=True):
        if ids and place <= kept:
            expected[place] = TAGS.index(tag)
        place += len(ids)
    assert example.labels == expected


def test_a_word_without_tokens_or_beyond_max_length_has_no_position(tokenizer: TextTokenizer) -> None:
    framed, starts = encode_words(tokenizer, ["good", "\u200b", "film", "was"], 4)
    assert starts == [1, None, 2, None]
    assert framed.cut == 1


def test_a_text_is_split_as_annotators_do() -> None:
    text = "U.S. oil rose 3.5% (o'clock-ish), didn't it?"
    assert [text[start:end] for start, end in split_words(text)] == [
        *("U.S", ".", "oil", "rose", "3.5", "%", "(", "o'clock-ish", ")", ",", "didn't", "it", "?")
    ]


@pytest.mark.parametrize("fields", [{"tokens": ["a"], "tags": ["O"]}, {"words": ["a"], "ner_tags": [1], "id": 3}])
def test_columns_of_words_and_tags_are_recognised(fields: dict[str, Any]) -> None:
    names = list(fields)
    assert guess_task(names, RowsConfig(), "encoder") == "token-classification"
    columns = find_columns(names, RowsConfig(), "token-classification")
    assert (columns.prompt, columns.label) == ("{" + names[0] + "}", names[1])


def test_columns_of_words_and_tags_may_be_named() -> None:
    config = RowsConfig(prompt="{sentence}", label="marks")
    columns = find_columns(["sentence", "marks"], config, "token-classification")
    assert (columns.prompt, columns.label) == ("{sentence}", "marks")
    with pytest.raises(DataError, match="only the column that holds the list of words"):
        find_columns(["sentence", "marks"], RowsConfig(prompt="S: {sentence}", label="marks"), "token-classification")
    with pytest.raises(DataError, match="call the words tokens"):
        find_columns(["sentence", "marks"], RowsConfig(), "token-classification")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tokens": ["a", "b"], "tags": ["O"]}, "row 5 has 2 words in 'tokens' and 1 in 'tags'"),
        ({"tokens": "a b", "tags": ["O"]}, "row 5: column 'tokens' must be a list"),
        ({"tokens": ["a"], "tags": ["X"]}, "row 5: 'X' is none of the tags"),
        ({"tokens": ["a"], "tags": None}, "row 5: column 'tags' is null"),
    ],
)
def test_rows_without_valid_words_and_tags_are_reported(
    tokenizer: TextTokenizer, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        encode_rows(tagging(), tokenizer, [Row(5, fields)])


def test_conll_files_are_read_sentence_by_sentence(tmp_path: Path) -> None:
    file = tmp_path / "a.conll"
    file.write_text("-DOCSTART- -X- -X- O\n\nEU NNP B-NP B-ORG\nrejects VBZ B-VP O\n\n\nPeter NNP B-NP B-PER")
    assert read_rows(str(file)) == [
        Row(3, {"tokens": ["EU", "rejects"], "tags": ["B-ORG", "O"]}),
        Row(7, {"tokens": ["Peter"], "tags": ["B-PER"]}),
    ]
    file.write_text("EU B-ORG\nrejects\n")
    with pytest.raises(DataError, match=r"a\.conll line 2 holds only 'rejects'"):
        read_rows(str(file))


def test_span_f1_equals_seqevals() -> None:
    from seqeval.metrics import f1_score

    gold = [["B-a", "I-a", "O"], ["B-b", "O", "B-a"], ["O", "O", "O"]]
    ours = [["B-a", "I-a", "O"], ["B-a", "O", "B-a"], ["O", "B-b", "O"]]
    found = span_metrics(ours, gold)["span_f1"]
    assert found["value"] == pytest.approx(f1_score(gold, ours))
    assert found["low"] <= found["value"] <= found["high"]
    assert span_metrics([["N", "V"]], [["N", "N"]]) == {}, "tags of no spans have none"
