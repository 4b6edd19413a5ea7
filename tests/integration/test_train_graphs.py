"""The graphs with which a bundle learns: gradients against torch, for every family."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from once import once
from tiny_models import DECODERS, write_decoder
from torch.nn.functional import cross_entropy
from trainable_bundles import SCALING, random_adapter, tokens, torch_model, torch_parameter, trainable_bundle

from edge_ft.artifacts import Bundle, RunFolder
from edge_ft.config import ExportConfig
from edge_ft.errors import UsageError
from edge_ft.evaluate.loading import open_run_model
from edge_ft.export import export
from edge_ft.quant.sensitivity import finer_layers
from edge_ft.tune.block_model import BlockModel, Targets

SIZES = [(3, 20), (1, 11), (2, 3)]
"""Rows and tokens of a batch: with padding, a single row, odd lengths."""
LARGEST_ERROR = 1e-4
"""Difference of a gradient, relative to the largest entry of its matrix."""


@pytest.mark.parametrize("name", DECODERS)
def test_gradients_are_those_of_torch(name: str, work: Path) -> None:
    folder = once(work / f"learning-{name}", lambda path: write_decoder(path, name))
    bundle = Bundle.open(once(work / f"learning-{name}.bundle", lambda out: trainable_bundle(folder, out)))
    model = BlockModel(bundle, 1)
    adapter = random_adapter(model)
    tuned = torch_model(folder, adapter)
    values = model.adapter_values(adapter, SCALING)
    for rows, length in SIZES:
        ids, mask, labels = tokens(rows, length, tuned.config.vocab_size)
        at = np.zeros(ids.shape, np.bool_)
        at[:, :-1] = labels[:, 1:] != -100
        wanted = labels[:, 1:][at[:, :-1]]
        tuned.zero_grad()
        logits = tuned(input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask)).logits
        loss = cross_entropy(logits[torch.from_numpy(at)], torch.from_numpy(wanted), reduction="sum") / len(wanted)
        loss.backward()
        largest = max(float(p.grad.abs().max()) for p in tuned.parameters() if p.grad is not None)
        for recompute in (False, True):
            found = {module: (np.zeros_like(a), np.zeros_like(b)) for module, (a, b) in adapter.items()}
            targets = Targets(at, wanted, 1 / len(wanted))
            assert model.gradient((ids, mask), targets, values, found, recompute=recompute) == pytest.approx(
                loss.item(), abs=1e-5
            )
            for module, pair in found.items():
                for side, array in zip("AB", pair, strict=True):
                    expected = torch_parameter(tuned, module, side).grad.numpy()
                    # Of a gradient a hundred times smaller than others, float32 leaves fewer digits.
                    scale = max(float(np.abs(expected).max()), 0.01 * largest)
                    assert np.abs(array - expected).max() <= LARGEST_ERROR * scale, (module, side, rows, length)
        nll, predicted = model.score(model.hidden(ids, mask, values)[at], wanted)
        assert nll.sum() / len(wanted) == pytest.approx(loss.item(), abs=1e-5)
        assert (predicted == logits[torch.from_numpy(at)].argmax(-1).numpy()).all()


def test_layers_with_further_bits_are_read_whole(llama_run: RunFolder, llama_adapter_bundle: Bundle) -> None:
    base, _ = open_run_model(llama_run, adapter=False)
    assert finer_layers(base)
    model = BlockModel(llama_adapter_bundle, 1)
    values = model.adapter_values({module: (a, 0 * b) for module, (a, b) in random_adapter(model).items()}, SCALING)
    ids, mask, _ = tokens(1, 30, base.config.vocab_size)
    with torch.no_grad():
        logits = base(input_ids=torch.from_numpy(ids)).logits[0, :-1]
    nll, _ = model.score(model.hidden(ids, mask, values)[0, :-1], ids[0, 1:])
    expected = cross_entropy(logits, torch.from_numpy(ids[0, 1:]), reduction="none").numpy()
    np.testing.assert_allclose(nll.ravel(), expected, atol=1e-4)


@pytest.fixture(scope="module")
def bundle(work: Path, llama: Path) -> Bundle:
    return Bundle.open(once(work / "learning-llama-chat.bundle", lambda out: trainable_bundle(llama, out)))


def test_weights_are_the_bytes_of_the_data_file_that_ships(bundle: Bundle) -> None:
    index = json.loads((bundle.path / bundle.manifest["train"]["index"]).read_text())
    places = index["tensors"].values()
    assert {place["file"] for place in places} == {"onnx/model_q4.onnx_data", "train/inline.safetensors"}
    large = sum(int(np.prod(place["shape"])) for place in places if "offset" in place)
    assert large > 50_000
    size = sum(file.stat().st_size for file in (bundle.path / "train").iterdir())
    assert size < 250_000  # whatever the depth: no weights


def test_the_graphs_do_not_grow_with_the_depth(work: Path, tmp_path: Path) -> None:
    folder = write_decoder(tmp_path / "deep", "llama", num_hidden_layers=6)
    deep = trainable_bundle(folder, tmp_path / "deep.bundle")
    index = json.loads((deep.path / deep.manifest["train"]["index"]).read_text())
    assert (len(index["blocks"]), len(index["layers"])) == (1, 6)


def test_a_bundle_that_cannot_learn_says_why(whole: Any, llama: Path, t5: Any, tmp_path: Path) -> None:
    loose: dict[str, Any] = {"min_retained": -9, "max_tax": 9, "max_metric_drop": 1}
    merged = export(str(whole.path), ExportConfig(out=tmp_path / "merged", threads=1, **loose))
    assert "merged into the weights" in merged.manifest["train"]["reason"]
    assert not (merged.path / "train").exists()
    settings: dict[str, Any] = {"trainable": True, "threads": 1}
    with pytest.raises(UsageError, match=r"--trainable: .* cannot learn as a bundle: .* task text2text-generation"):
        export(str(t5("t5, relu, tied")), ExportConfig(out=tmp_path / "t5", **settings))
    without = export(str(llama), ExportConfig(out=tmp_path / "without", trainable=False, threads=1))
    assert without.manifest["train"] == {"reason": "it was exported with --no-trainable"}
