"""The pretraining of a small T5."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edge_ft.bench.studies import pretrain_t5
from edge_ft.data import TextTokenizer
from edge_ft.models.base_model import find_base
from edge_ft.progress import Silent

TASK = "text2text-generation"


def pretrained_nll(folder: Path, monkeypatch: pytest.MonkeyPatch, **recipe: Any) -> float:
    """Held-out loss after three steps over a few sentences."""
    rows = [{"transcript": f"hello world {n}", "written": f"Hello world {n}."} for n in range(40)]
    monkeypatch.setattr(pretrain_t5, "split_sentences", lambda: (rows[8:], rows[:8]))
    small = pretrain_t5.T5Recipe(width=32, layers=1, heads=2, inner=32, vocabulary=60, batch=4, steps=3)
    folder.mkdir()
    pretrain_t5.pretrain_t5(folder, replace(small, **recipe), Silent())
    found: float = json.loads((folder / "pretraining.json").read_text())["held_out_nll"]
    return found


def test_a_small_t5_is_pretrained_from_sentences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "t5"
    assert pretrained_nll(folder, monkeypatch) > 0
    assert find_base(str(folder)).task == TASK
    tokenizer = TextTokenizer.load(folder)
    assert (tokenizer.pad_id, tokenizer.eos_id) == (0, 1)
    assert tokenizer.decode(tokenizer.encode("hello world")) == "hello world"


def test_jumbled_words_are_other_rows_than_sentences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sentences, jumbled = (pretrained_nll(tmp_path / str(share), monkeypatch, jumbled=share) for share in (0.0, 1.0))
    assert sentences != jumbled
