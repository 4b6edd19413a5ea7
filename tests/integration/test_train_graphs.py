"""The graphs with which a bundle learns: gradients against torch, for every family."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from once import once
from tiny_models import (
    DECODERS,
    ENCODERS,
    T5_SHAPES,
    WORDS,
    tiny_encoder_config,
    write_decoder,
    write_encoder,
    write_t5,
)
from torch.nn.functional import cross_entropy
from trainable_bundles import SCALING, random_adapter, tokens, torch_model, torch_parameter, trainable_bundle

from edge_ft.artifacts import Bundle, RunFolder
from edge_ft.config import ExportConfig, Task
from edge_ft.data import Batch, TextTokenizer
from edge_ft.errors import UsageError
from edge_ft.evaluate.loading import open_run_model
from edge_ft.export import export
from edge_ft.models.scorer import LOSSES
from edge_ft.quant.sensitivity import finer_layers
from edge_ft.tune.block_model import BlockModel, Pair, Tokens
from edge_ft.tune.bundle_heads import VocabularyHead

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
        batch: Batch = {"input_ids": ids, "attention_mask": mask, "labels": labels, "rows": []}
        at = np.zeros(ids.shape, np.bool_)
        at[:, :-1] = labels[:, 1:] != -100
        wanted = labels[:, 1:][at[:, :-1]]
        tuned.zero_grad()
        logits = tuned(input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask)).logits
        loss = cross_entropy(logits[torch.from_numpy(at)], torch.from_numpy(wanted), reduction="sum") / len(wanted)
        loss.backward()
        compare_gradients(model, adapter, tuned, batch, loss.item() * len(wanted), len(wanted))
        nll, predicted = model.head.token_nll(*model.forward(model.tokens(batch), values), batch, {})
        assert nll.sum() / len(wanted) == pytest.approx(loss.item(), abs=1e-5)
        assert (predicted[:, 1:][at[:, :-1]] == logits[torch.from_numpy(at)].argmax(-1).numpy()).all()


def compare_gradients(
    model: BlockModel, adapter: dict[str, Pair], tuned: Any, batch: Batch, loss: float, targets: int
) -> None:
    """Compare the gradients of `loss` / `targets` with those that torch has left in `tuned`."""
    largest = max(float(p.grad.abs().max()) for p in tuned.parameters() if p.grad is not None)
    values, parameters = model.adapter_values(adapter, SCALING), model.head.parameters
    for recompute in (False, True):
        pairs = {module: (np.zeros_like(a), np.zeros_like(b)) for module, (a, b) in adapter.items()}
        head = {name: np.zeros_like(array) for name, array in parameters.items()}
        of_batch = model.head.loss(batch, 1 / targets, model.head.values(parameters), head)
        found = model.gradient(model.tokens(batch), of_batch, values, pairs, recompute=recompute)
        assert found == pytest.approx(loss / targets, abs=1e-5)
        by_name = {
            (module, side): part for module, pair in pairs.items() for side, part in zip("AB", pair, strict=True)
        }
        expected = {key: torch_parameter(tuned, *key) for key in by_name}
        by_name |= {(name, ""): array for name, array in head.items()}
        expected |= {(name, ""): head_parameter(tuned, name) for name in head}
        for key, array in by_name.items():
            wanted = expected[key].grad.numpy()
            # Of a gradient a hundred times smaller than others, float32 leaves fewer digits.
            scale = max(float(np.abs(wanted).max()), 0.01 * largest)
            assert np.abs(array - wanted).max() <= LARGEST_ERROR * scale, (*key, batch["input_ids"].shape)


CLASSIFYING = [name for name in ENCODERS if name != "xlm-roberta"]  # which is as RoBERTa
LABELS = ("red", "green", "blue")


def head_parameter(tuned: Any, name: str) -> Any:
    """A parameter of a head that PEFT trains as a whole, by its name in the model."""
    return next(
        parameter
        for key, parameter in tuned.named_parameters()
        if ".modules_to_save.default" in key
        and key.replace(".modules_to_save.default", "").removeprefix("base_model.model.") == name
    )


@pytest.mark.parametrize(
    ("name", "task"),
    [*((name, "text-classification") for name in CLASSIFYING), ("bert", "token-classification")],
)
def test_gradients_of_a_classifier_and_its_head_are_those_of_torch(name: str, task: Task, work: Path) -> None:
    folder = once(work / f"learning-{name}", lambda path: write_encoder(path, tiny_encoder_config(name)))
    settings: dict[str, Any] = {"task": task, "class_names": LABELS}
    bundle = Bundle.open(once(work / f"{task}-{name}", lambda out: trainable_bundle(folder, out, **settings)))
    model = BlockModel(bundle, 1)
    adapter, random = random_adapter(model), np.random.default_rng(2)
    tuned = torch_model(folder, adapter, task, LABELS)
    for parameter_name, array in model.head.parameters.items():
        array[...] = random.normal(0, 0.3, array.shape)
        head_parameter(tuned, parameter_name).data.copy_(torch.from_numpy(array))
    for rows, length in SIZES:
        ids, mask, labels = tokens(rows, length, len(WORDS))
        if task == "text-classification":
            labels = np.arange(rows)[:, None] % len(LABELS)
        else:
            labels = np.where(labels == -100, -100, labels % len(LABELS))
        ids = np.where(mask == 1, ids, bundle_pad(bundle))
        batch: Batch = {"input_ids": ids, "attention_mask": mask, "labels": labels, "rows": []}
        tuned.zero_grad()
        nll, predicted = LOSSES[task](tuned, batch, torch.device("cpu"))
        (nll.sum() / len(nll)).backward()
        compare_gradients(model, adapter, tuned, batch, nll.sum().item(), len(nll))
        values = model.adapter_values(adapter, SCALING), model.head.values(model.head.parameters)
        found = model.head.token_nll(*model.forward(model.tokens(batch), values[0]), batch, values[1])
        at = labels != -100
        np.testing.assert_allclose(found[0][at], nll.detach().numpy(), atol=1e-5)
        assert (found[1][at] == predicted.numpy()).all()


@pytest.mark.parametrize("shape", T5_SHAPES)
def test_gradients_of_an_encoder_decoder_are_those_of_torch(shape: str, work: Path) -> None:
    """The decoder attends to the encoder, whose adapter gets its gradient through that alone."""
    name = f"learning-{shape.replace(', ', '-')}"
    folder = once(work / name, lambda path: write_t5(path, **T5_SHAPES[shape]))
    bundle = Bundle.open(once(work / f"{name}.bundle", lambda out: trainable_bundle(folder, out)))
    model = BlockModel(bundle, 1)
    adapter = random_adapter(model)
    tuned = torch_model(folder, adapter, "text2text-generation")
    for rows, length in SIZES:
        ids, mask, _ = tokens(rows, length, tuned.config.vocab_size)
        labels = np.random.default_rng(3).integers(3, tuned.config.vocab_size, (rows, length // 2 + 2))
        labels[1:, -2:] = -100
        batch: Batch = {"input_ids": ids, "attention_mask": mask, "labels": labels, "rows": []}
        given = [torch.from_numpy(array) for array in (ids, mask, labels)]
        tuned.zero_grad()
        logits = tuned(input_ids=given[0], attention_mask=given[1], labels=given[2]).logits
        loss = cross_entropy(logits.transpose(1, 2), given[2], reduction="sum")
        targets = int((labels != -100).sum())
        (loss / targets).backward()
        compare_gradients(model, adapter, tuned, batch, loss.item(), targets)
        x, shared = model.forward(model.tokens(batch), model.adapter_values(adapter, SCALING))
        nll, predicted = model.head.token_nll(x, shared, batch, {})
        assert nll.sum() == pytest.approx(loss.item(), abs=1e-4)
        at = labels != -100
        assert (predicted[at] == logits.argmax(-1).numpy()[at]).all()


def bundle_pad(bundle: Bundle) -> int:
    return TextTokenizer.of_bundle(bundle.path).pad_id


def test_layers_with_further_bits_are_read_whole(llama_run: RunFolder, llama_adapter_bundle: Bundle) -> None:
    base, _ = open_run_model(llama_run, adapter=False)
    assert finer_layers(base)
    model = BlockModel(llama_adapter_bundle, 1)
    values = model.adapter_values({module: (a, 0 * b) for module, (a, b) in random_adapter(model).items()}, SCALING)
    ids, mask, _ = tokens(1, 30, base.config.vocab_size)
    with torch.no_grad():
        logits = base(input_ids=torch.from_numpy(ids)).logits[0, :-1]
    assert isinstance(model.head, VocabularyHead)
    nll, _ = model.head.score(model.hidden(Tokens(ids, mask), values)[0, :-1], ids[0, 1:])
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


def test_a_bundle_that_cannot_learn_says_why(whole: Any, llama: Path, bert: Path, tmp_path: Path) -> None:
    loose: dict[str, Any] = {"min_retained": -9, "max_tax": 9, "max_metric_drop": 1}
    merged = export(str(whole.path), ExportConfig(out=tmp_path / "merged", threads=1, **loose))
    assert "merged into the weights" in merged.manifest["train"]["reason"]
    assert not (merged.path / "train").exists()
    settings: dict[str, Any] = {"trainable": True, "threads": 1}
    with pytest.raises(UsageError, match=r"--trainable: .* cannot learn as a bundle: .* task feature-extraction"):
        export(str(bert), ExportConfig(out=tmp_path / "bert", task="feature-extraction", **settings))
    without = export(str(llama), ExportConfig(out=tmp_path / "without", trainable=False, threads=1))
    assert without.manifest["train"] == {"reason": "it was exported with --no-trainable"}
