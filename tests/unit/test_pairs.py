"""Two texts that are classified together: framed as the model's own tokenizer frames them, the longer one cut."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import write_bert
from tokenizers import Tokenizer

from edge_ft.config import RowsConfig
from edge_ft.data import TextTokenizer, find_columns
from edge_ft.errors import DataError, UsageError

WORDS = st.lists(st.sampled_from(["good", "bad", "film", "the"]), max_size=12).map(" ".join)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bert(tmp_path_factory.mktemp("bert"))


@given(WORDS, WORDS, st.integers(min_value=3, max_value=30))
def test_pairs_are_framed_and_cut_as_the_models_own_tokenizer_does(
    folder: Path, first: str, second: str, max_length: int
) -> None:
    own = Tokenizer.from_file(str(folder / "tokenizer.json"))
    whole = own.encode(first, second)
    own.enable_truncation(max_length, strategy="longest_first")
    expected = own.encode(first, second)
    found = TextTokenizer.load(folder).encode_framed(first, max_length, second)
    assert (found.ids, found.type_ids) == (expected.ids, expected.type_ids)
    assert found.cut == len(whole.ids) - len(expected.ids)


def test_a_control_token_in_a_text_stays_text(folder: Path) -> None:
    found = TextTokenizer.load(folder).encode_framed("good", 32, "[SEP]")
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
def test_columns_of_two_texts_are_recognised_or_named(
    names: list[str], config: dict[str, Any], texts: tuple[str, Any]
) -> None:
    columns = find_columns(names, RowsConfig(**config), "text-classification")
    assert (columns.prompt, columns.pair) == texts


def test_a_second_text_is_only_for_classification() -> None:
    with pytest.raises(DataError, match="--text-pair is for text-classification"):
        find_columns(["a", "b"], RowsConfig(prompt="{a}", text_pair="{b}"), "text-generation")
    with pytest.raises(UsageError, match="--text-pair needs --prompt"):
        RowsConfig(text_pair="{b}")
