"""The control of the study of shipped losses: a decoder that was fine-tuned in float on other text."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from tiny_models import write_llama
from transformers import LlamaForCausalLM

from edge_ft.bench.studies import off_grid
from edge_ft.bench.studies.off_grid import Recipe, off_grid_model, scale_channels
from edge_ft.models.base_model import find_base
from edge_ft.models.loading import ModelSpec, load_model
from edge_ft.progress import Silent

SMALL = Recipe(length=8, batch=2, steps=40, learning_rate=3e-3)


def test_every_matrix_moves_and_the_model_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGE_FT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(off_grid, "encyclopedia_passages", lambda: [f"a few words of text, {n}" for n in range(200)])
    source = write_llama(tmp_path / "base")
    folder = off_grid_model(Silent(), SMALL, str(source))
    figures = json.loads((folder / "off-grid.json").read_text())
    assert figures["held_out_perplexity"] < figures["held_out_perplexity_before"]
    assert figures["tokens"] == 40 * 2 * 8
    before, after = (load_file(str(path / "model.safetensors")) for path in (source, folder))
    assert before.keys() == after.keys()
    assert all(np.abs(after[name] - before[name]).max() > 0 for name in before if before[name].ndim == 2)
    load_model(ModelSpec(find_base(str(folder)), "text-generation", "int4"))
    monkeypatch.setattr(off_grid, "fit", None)  # not called again
    assert off_grid_model(Silent(), SMALL, str(source)) == folder


def test_scaled_channels_change_the_weights_and_no_output(tmp_path: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(write_llama(tmp_path))
    ids, before = torch.arange(12)[None], {name: weight.clone() for name, weight in model.named_parameters()}
    with torch.no_grad():
        logits = model(ids).logits
        scale_channels(model, 0.1, 0)
        torch.testing.assert_close(model(ids).logits, logits, atol=1e-4, rtol=1e-4)
    changed = [name for name, weight in model.named_parameters() if (weight / before[name] - 1).abs().max() > 0.05]
    assert len(changed) == 2 * 9, "every matrix and norm of a layer"
