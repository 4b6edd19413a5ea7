"""Heads, labels and failures of loading, through tune."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import write_bert
from transformers import AutoConfig, BertForSequenceClassification

from edge_ft.config import EvalConfig, ExportConfig, TuneConfig
from edge_ft.errors import DataError, ModelError
from edge_ft.evaluate import evaluate
from edge_ft.export import export
from edge_ft.models.base_model import find_base
from edge_ft.models.loading import ModelSpec, load_model
from edge_ft.runtime import TextClassifier, load
from edge_ft.tune import tune


def write_headed(folder: Path, names: tuple[str, ...]) -> Path:
    """A BERT with a classification head, its classes in this order."""
    write_bert(folder)
    config = AutoConfig.from_pretrained(folder, num_labels=len(names), id2label=dict(enumerate(names)))
    torch.manual_seed(3)
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder


def test_a_head_keeps_the_order_of_its_classes(tmp_path: Path, reviews: Path) -> None:
    folder = write_headed(tmp_path / "model", ("praise", "blame"))
    run = tune(TuneConfig(model=str(folder), data=str(reviews), out=tmp_path / "run", max_steps=1, compute="fp32"))
    assert run.rendering()["labels"] == ["praise", "blame"]
    kept = load_model(ModelSpec(find_base(str(folder)), "text-classification", labels=("praise", "blame")))
    torch.testing.assert_close(kept.classifier.weight, load_file(folder / "model.safetensors")["classifier.weight"])


@pytest.mark.parametrize(("own", "given"), [(("praise", "blame"), ()), (("LABEL_0", "LABEL_1"), ("praise", "blame"))])
def test_a_head_keeps_its_names_for_rows_with_numbers(
    own: tuple[str, ...], given: tuple[str, ...], tmp_path: Path
) -> None:
    folder, names = write_headed(tmp_path / "model", own), {"0": "praise", "1": "blame"}
    lines = [{"text": f"the film was {'very ' * (n // 2)}{['good', 'bad'][n % 2]}", "label": n % 2} for n in range(20)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings: dict[str, Any] = {"max_steps": 30, "learning_rate": 1e-2, "compute": "fp32", "class_names": given}
    run = tune(TuneConfig(model=str(folder), data=str(tmp_path / "rows.jsonl"), out=tmp_path / "run", **settings))
    assert run.rendering()["labels"] == ["praise", "blame"]
    assert {sample["reference"] for sample in run.report()["samples"]} <= {"praise", "blame"}
    bundle = export(str(run.path), ExportConfig(out=tmp_path / "b", max_tax=9, min_retained=-9, max_metric_drop=1))
    assert bundle.manifest["rendering"]["labels"] == ["praise", "blame"]
    assert json.loads((bundle.path / "config.json").read_text())["id2label"] == names
    bases = run.report()["nll"]["base"], bundle.manifest["verification"]["nll"]["base"]
    assert bases[0] == pytest.approx(bases[1], abs=1e-3), "the base is the model with its own head"
    opened = load(bundle, engine="exact")
    assert isinstance(opened, TextClassifier)
    (found,) = opened.classify(["the film was very good"])
    assert found.label == "praise"
    assert list(found.scores) == ["praise", "blame"]
    if given:
        plain = export(str(folder), ExportConfig(out=tmp_path / "plain", class_names=given, weights="fp32"))
        ours = load(plain, engine="exact")
        assert isinstance(ours, TextClassifier)
        theirs = BertForSequenceClassification.from_pretrained(folder).eval()
        ids = torch.tensor([ours.tokenizer.encode_framed("the film was good", 64).ids])
        expected = theirs(ids).logits.softmax(-1)[0].tolist()
        (said,) = ours.classify(["the film was good"])
        assert said.scores == pytest.approx(dict(zip(given, expected, strict=True)), abs=1e-4)
    for source in (run.path, bundle.path):
        assert evaluate(str(source), EvalConfig(data=str(tmp_path / "rows.jsonl")))["rows"] == 20


def test_a_head_for_other_classes_is_initialised(tmp_path: Path, reviews: Path) -> None:
    folder = write_headed(tmp_path / "model", ("cat", "dog"))
    run = tune(TuneConfig(model=str(folder), data=str(reviews), out=tmp_path / "run", max_steps=1, compute="fp32"))
    assert run.rendering()["labels"] == ["blame", "praise"]
    fresh = load_model(ModelSpec(find_base(str(folder)), "text-classification", labels=("blame", "praise")))
    assert not torch.equal(fresh.classifier.weight, load_file(folder / "model.safetensors")["classifier.weight"])


def test_a_rare_class_does_not_stop_a_run(bert: Path, reviews: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(reviews.read_text() + '{"text": "the film was a [ film", "label": "rare"}\n')
    for seed in range(3):
        run = tune(
            TuneConfig(
                model=str(bert), data=str(rows), out=tmp_path / str(seed), max_steps=1, compute="fp32", seed=seed
            )
        )
        assert run.rendering()["labels"] == ["blame", "praise", "rare"]


def test_a_decoder_is_refused_for_classification(llama: Path, reviews: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="text-generation here, not text-classification"):
        tune(TuneConfig(model=str(llama), data=str(reviews), out=tmp_path / "run", label="label"))
    with pytest.raises(DataError):
        tune(TuneConfig(model=str(llama), data=str(reviews), out=tmp_path / "run", label="lable"))


def test_python_values_are_accepted(llama: Path, sums: Path, tmp_path: Path) -> None:
    settings = {"model": llama, "data": sums, "out": str(tmp_path / "run"), "target_modules": ["q_proj,v_proj"]}
    run = tune(TuneConfig(**settings, max_steps=1, compute="fp32"))  # type: ignore[arg-type]
    assert run.path == tmp_path / "run"


def test_a_run_that_fails_at_once_leaves_no_folder(llama: Path, sums: Path, tmp_path: Path) -> None:
    with pytest.raises(Exception, match="not a number"):
        tune(
            TuneConfig(
                model=str(llama), data=str(sums), out=tmp_path / "run", learning_rate=1e30, warmup=0.0, max_steps=9
            )
        )
    assert not (tmp_path / "run").exists()
