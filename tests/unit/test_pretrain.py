"""The pretraining of a small GPT-2 on real text, with GPT-2's own tokens."""

from pathlib import Path

import pytest

from edge_ft.bench.studies.pretrain import pretrained, split_passages, write_gpt2_tokenizer
from edge_ft.data import TextTokenizer
from edge_ft.errors import UsageError
from edge_ft.progress import Silent


def test_the_tokenizer_is_gpt2s(tmp_path: Path) -> None:
    write_gpt2_tokenizer(tmp_path)
    tokenizer = TextTokenizer.load(tmp_path)
    assert tokenizer.encode("Hello world, don't panic!") == [15496, 995, 11, 836, 470, 13619, 0]
    assert tokenizer.stop_ids == {50256}


def test_a_tokenizer_of_the_first_tokens(tmp_path: Path) -> None:
    write_gpt2_tokenizer(tmp_path, 1024)
    tokenizer = TextTokenizer.load(tmp_path)
    ids = tokenizer.encode("Hello world, don't panic!")
    assert max(ids) < 1023
    assert tokenizer.decode(ids) == "Hello world, don't panic!"
    assert tokenizer.stop_ids == {1023}


def test_held_out_text_is_not_trained_on() -> None:
    train, held_out = split_passages()
    assert len(held_out) == 400
    assert not set(train) & set(held_out)


def test_a_model_without_a_recipe_is_refused() -> None:
    with pytest.raises(UsageError, match="no recipe for 'gpt5'"):
        pretrained("gpt5", Silent())
