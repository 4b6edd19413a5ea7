"""The pretraining of a small GPT-2."""

import json
from pathlib import Path

import pytest

from edge_ft.bench.studies import pretrain
from edge_ft.bench.studies.pretrain import Recipe, pretrained
from edge_ft.models.base_model import find_base
from edge_ft.models.loading import ModelSpec, load_model
from edge_ft.progress import Silent

SMALL = Recipe(width=64, layers=2, heads=4, vocabulary=512, length=32, batch=2, steps=3)


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
