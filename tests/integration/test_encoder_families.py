"""Every encoder family is tuned, exported and run alike; what differs between them is known."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from models_table import record
from tiny_models import ENCODERS, tiny_encoder_config, write_encoder, write_reviews
from torch import nn
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification

from edge_ft.artifacts import RunFolder
from edge_ft.config import ExportConfig, Task, TuneConfig
from edge_ft.data import Batch, collate, encode_rows, read_rows
from edge_ft.errors import DataError, ModelError, UsageError
from edge_ft.evaluate.loading import open_run_model
from edge_ft.export import export
from edge_ft.export.lowering import lower
from edge_ft.export.trace import trace
from edge_ft.models.base_model import find_base
from edge_ft.models.loading import ModelSpec, load_model
from edge_ft.models.lora import add_lora
from edge_ft.runtime import TextClassifier, load
from edge_ft.tune import tune
from edge_ft.tune.torch_backend import TorchBackend

LOOSE: dict[str, Any] = {"max_tax": 9.0, "min_retained": -9.0, "max_metric_drop": 1.0}


@pytest.fixture(scope="module")
def run_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], RunFolder]:
    """A run of each family that has learned something, made once."""
    runs: dict[str, RunFolder] = {}

    def made(name: str) -> RunFolder:
        if name not in runs:
            folder = tmp_path_factory.mktemp(name)
            model = write_encoder(folder / "model", tiny_encoder_config(name))
            rows = write_reviews(folder / "rows.jsonl")
            settings = TuneConfig(
                model=str(model),
                data=str(rows),
                out=folder / "run",
                max_steps=60 if name == "albert" else 24,
                learning_rate=1e-2,
                max_length=48,
                split=(0.6, 0.3, 0.1),
                compute="fp32",
            )
            runs[name] = tune(settings)
        return runs[name]

    return made


def batch_of(classifier: TextClassifier, run: RunFolder) -> Batch:
    """Rows of different lengths, some longer than ModernBERT's local window, in one padded batch."""
    examples = encode_rows(classifier.rendering, classifier.tokenizer, read_rows(str(run.split("train"))))[::3]
    assert len({len(example.input_ids) for example in examples}) > 3
    assert max(len(example.input_ids) for example in examples) > 12
    return collate(examples, classifier.tokenizer.pad_id, "text-classification")


@pytest.mark.parametrize("name", ENCODERS)
def test_the_adapter_lane_equals_torch_with_and_without_padding(
    name: str, run_of: Callable[[str], RunFolder], tmp_path: Path
) -> None:
    run = run_of(name)
    export(str(run.path), ExportConfig(out=tmp_path / "bundle", lane="adapter"))
    classifier = load(tmp_path / "bundle", accuracy_level=1)
    assert isinstance(classifier, TextClassifier)
    batch = batch_of(classifier, run)
    logits = classifier.logits(batch["input_ids"], batch["attention_mask"])
    model, _ = open_run_model(run)
    with torch.inference_mode():
        ids, mask = torch.from_numpy(batch["input_ids"]), torch.from_numpy(batch["attention_mask"])
        expected = model(input_ids=ids, attention_mask=mask).logits.numpy()
    np.testing.assert_allclose(logits, expected, atol=1e-3)
    assert np.ptp(logits, axis=0).max() > 0.1
    worst = 0.0
    for row, mask in enumerate(batch["attention_mask"]):
        length = int(mask.sum())
        alone = classifier.logits(
            batch["input_ids"][row : row + 1, :length], batch["attention_mask"][row : row + 1, :length]
        )
        np.testing.assert_allclose(alone[0], logits[row], atol=1e-3)
        worst = max(worst, float(np.abs(alone[0] - logits[row]).max()))
    nll = run.report()["nll"]
    record(name, tune=f"{nll['base']:.2f} → {nll['best']:.2f}", padded=f"{worst:.0e}")
    record(name, logits=f"{np.abs(logits - expected).max():.0e}")


@pytest.mark.parametrize("name", [name for name in ENCODERS if name not in ("xlm-roberta", "electra")])
def test_the_merged_lane_ships_the_graph_that_was_scored(
    name: str, run_of: Callable[[str], RunFolder], tmp_path: Path
) -> None:
    bundle = export(str(run_of(name).path), ExportConfig(out=tmp_path / "bundle", **LOOSE))
    found = bundle.manifest["verification"]
    assert found["by_accuracy_level"]["1"]["shipped_minus_last_evaluated"] < 1e-3
    assert found["nll"]["shipped"] < found["nll"]["base"]
    record(name, shipped=f"{found['by_accuracy_level']['1']['shipped_minus_last_evaluated']:.0e}")
    names = {node.name for node in load(bundle, engine="exact")._session.get_inputs()}
    assert ("token_type_ids" in names) == (name in ("albert", "bert"))


@pytest.mark.parametrize("name", ENCODERS)
def test_a_step_has_the_gradient_of_plain_peft(name: str, tmp_path: Path) -> None:
    folder = write_encoder(tmp_path / "model", tiny_encoder_config(name))
    base = find_base(str(folder))
    settings = TuneConfig(model="", data="", out=Path("unused"), compute="fp32", memory="low")
    words = np.random.default_rng(0).integers(4, 15, (3, 24))
    attention_mask = np.ones_like(words)
    attention_mask[1, 7:] = 0
    words[1, 7:] = base.config["pad_token_id"]
    batch = Batch(input_ids=words, attention_mask=attention_mask, labels=np.array([[0], [1], [1]]), rows=[0, 1, 2])

    def adapted(model: Any) -> Any:
        peft_model = add_lora(model, base.family, "text-classification", settings)
        torch.manual_seed(1)
        for parameter in [p for key, p in peft_model.named_parameters() if "lora_B" in key]:
            nn.init.normal_(parameter, std=0.1)
        return peft_model

    ours = load_model(ModelSpec(base, "text-classification", "fp32", labels=("a", "b")))
    plain = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2, dtype=torch.float32)
    plain.load_state_dict(ours.state_dict())
    plain = adapted(plain.requires_grad_(False)).eval()
    ids, mask, labels = (torch.from_numpy(batch[key]) for key in ("input_ids", "attention_mask", "labels"))  # type: ignore[literal-required]
    nn.functional.cross_entropy(
        plain(input_ids=ids, attention_mask=mask).logits, labels[:, 0], reduction="sum"
    ).backward()

    for module in ours.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    backend = TorchBackend(adapted(ours), base.family, "text-classification", settings)
    backend.gradient(batch, 1)
    found = dict(backend.model.named_parameters())
    trained = {key: p for key, p in plain.named_parameters() if p.requires_grad}
    assert len(trained) > 15
    for key, parameter in trained.items():
        torch.testing.assert_close(
            found[key].grad, parameter.grad, rtol=1e-3, atol=1e-4, msg=lambda text, key=key: f"{key}: {text}"
        )


def test_unused_positions_do_not_count_as_length(tmp_path: Path) -> None:
    """RoBERTa and MPNet number positions from the pad token's id + 1 on."""
    for name, length in (("roberta", 62), ("mpnet", 62), ("distilbert", 64)):
        folder = write_encoder(tmp_path / name, tiny_encoder_config(name))
        assert find_base(str(folder)).max_length == length
    rows = write_reviews(tmp_path / "rows.jsonl")
    with pytest.raises(DataError, match="--max-length 64 is beyond the model's 62 positions"):
        tune(TuneConfig(model=str(tmp_path / "roberta"), data=str(rows), out=tmp_path / "run", max_length=64))


def test_layers_last_k_is_refused_for_shared_layers(tmp_path: Path) -> None:
    folder = write_encoder(tmp_path / "albert", tiny_encoder_config("albert"))
    rows = write_reviews(tmp_path / "rows.jsonl")
    with pytest.raises(UsageError, match=r"--layers last:1: this model calls the same 1 layer\(s\) 3 times"):
        tune(TuneConfig(model=str(folder), data=str(rows), out=tmp_path / "run", layers="last:1"))


def test_an_encoder_configured_as_a_decoder_is_refused(tmp_path: Path) -> None:
    config = tiny_encoder_config("roberta")
    config.is_decoder = True
    with pytest.raises(ModelError, match="with is_decoder set"):
        find_base(str(write_encoder(tmp_path / "model", config)))


def test_a_head_of_two_layers_has_class_names_and_can_be_replaced(tmp_path: Path) -> None:
    """RoBERTa's has the classes in its last layer, `classifier.out_proj`."""
    folder = write_encoder(tmp_path / "model", tiny_encoder_config("roberta"))
    own = {0: "low", 1: "middle", 2: "high"}
    AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3, id2label=own).save_pretrained(folder)
    base = find_base(str(folder))
    assert base.labels("text-classification") == tuple(own.values())
    kept, other = (
        load_model(ModelSpec(base, "text-classification", "int4", labels=names))
        for names in (("0", "1", "2"), ("a", "b"))
    )
    torch.testing.assert_close(kept.classifier.dense.weight, other.classifier.dense.weight)
    assert other.classifier.out_proj.weight.shape == (2, 64)
    assert other.classifier.out_proj.weight.std() > 0.01


@pytest.mark.parametrize("task", ["token-classification", "fill-mask", "feature-extraction"])
@pytest.mark.parametrize("name", ENCODERS)
def test_the_graphs_of_the_other_tasks_equal_the_model(name: str, task: Task, tmp_path: Path) -> None:
    """Over int4 codes, of which a head over the vocabulary shares the embedding's."""
    config = tiny_encoder_config(name)
    folder = write_encoder(tmp_path / "model", config)
    if task == "fill-mask":
        AutoModelForMaskedLM.from_config(config).save_pretrained(folder)
    base = find_base(str(folder), task)
    labels = ("O", "B-X", "I-X") if task == "token-classification" else ()
    model: Any = load_model(ModelSpec(base, task, "int4", labels=labels))
    graph = trace(model, base.family, task)
    lower(graph)
    ir.save(graph, tmp_path / "graph.onnx")
    ids = torch.from_numpy(np.random.default_rng(0).integers(4, 15, (2, 20)))
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    ids[1, 9:] = base.config["pad_token_id"]
    session = ort.InferenceSession(tmp_path / "graph.onnx", providers=["CPUExecutionProvider"])
    feed = {"input_ids": ids.numpy(), "attention_mask": mask.numpy(), "token_type_ids": np.zeros_like(ids.numpy())}
    found = session.run(None, {node.name: feed[node.name] for node in session.get_inputs()})[0]
    with torch.inference_mode():
        expected = model(input_ids=ids, attention_mask=mask)[0].numpy()
    np.testing.assert_allclose(found[mask == 1], expected[mask == 1], atol=1e-3)
    record(name, **{task: f"{np.abs(found - expected)[mask == 1].max():.0e}"})
