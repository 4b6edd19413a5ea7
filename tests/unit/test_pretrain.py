"""The pretraining of a small GPT-2 on real text, with GPT-2's own tokens."""

import json
from pathlib import Path

import pytest

from edge_ft.bench.studies import pretrain
from edge_ft.bench.studies.pretrain import Recipe, pretrained, split_passages, write_gpt2_tokenizer
from edge_ft.data import TextTokenizer
from edge_ft.errors import UsageError
from edge_ft.models.base_model import find_base
from edge_ft.models.loading import ModelSpec, load_model
from edge_ft.progress import Silent

SMALL = Recipe(width=64, layers=2, heads=4, vocabulary=512, length=32, batch=2, steps=3)


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


def test_a_model_is_trained_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGE_FT_CACHE", str(tmp_path))
    monkeypatch.setitem(pretrain.PRETRAINED, "gpt2", (SMALL, pretrain.PRETRAINED["gpt2"][1]))
    monkeypatch.setattr(pretrain, "split_passages", lambda: (["a few words of text"] * 60, ["a few more words"] * 20))
    folder = pretrained("gpt2", Silent())
    figures = json.loads((folder / "pretraining.json").read_text())
    assert figures["tokens"] == 3 * 2 * 32
    assert figures["held_out_perplexity"] > 1
    base = find_base(str(folder))
    assert (base.max_length, base.dims.layers, base.dims.vocabulary) == (32, 2, 512)
    load_model(ModelSpec(base, "text-generation", "int4"))
    monkeypatch.setattr(pretrain, "PRETRAINED", {"gpt2": (SMALL, None)})  # not called again
    assert pretrained("gpt2", Silent()) == folder


def test_a_model_without_a_recipe_is_refused() -> None:
    with pytest.raises(UsageError, match="no recipe for 'gpt5'"):
        pretrained("gpt5", Silent())
