"""Regression and multi-label classification: trained, exported and scored."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from foreign_adapters import save_foreign
from tiny_bundle import reseal

from edge_ft.config import ExportConfig, TuneConfig, VerifyConfig
from edge_ft.data import collate, encode_rows, read_rows
from edge_ft.errors import GateRefused
from edge_ft.evaluate.verify import verify
from edge_ft.export import export
from edge_ft.runtime import TextClassifier, load
from edge_ft.tune import tune


def write(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def shipped(model: Path, data: Path, out: Path, **settings: Any) -> tuple[TextClassifier, dict[str, Any], Path]:
    """What is learned of rows, opened, with the run's report."""
    chosen: dict[str, Any] = {"epochs": 10, "learning_rate": 1e-2, "split": (0.6, 0.2, 0.2), "compute": "fp32"}
    run = tune(TuneConfig(model=str(model), data=str(data), out=out / "run", **chosen | settings))
    bundle = export(str(run.path), ExportConfig(out=out / "b", max_tax=1, min_retained=0.3, max_metric_drop=1))
    assert bundle.manifest["verification"]["by_accuracy_level"]["1"]["shipped_minus_last_evaluated"] < 1e-4
    opened = load(bundle, engine="exact")
    assert isinstance(opened, TextClassifier)
    said = json.loads((bundle.path / "config.json").read_text())
    assert said["problem_type"] == opened.problem, "config.json says it to other runtimes too"
    return opened, run.report(), run.split("test")


def test_a_regression_is_trained_and_exported(bert: Path, tmp_path: Path) -> None:
    lines = [
        {
            "text": " ".join(["the film was", *["very"] * (n % 4), ["good", "bad"][n // 4 % 2], *["a"] * (n // 8)]),
            "stars": (0.5 + n % 4 / 2) * [1, -1][n // 4 % 2],
        }
        for n in range(64)
    ]
    rows = write(tmp_path / "rows.jsonl", lines)
    opened, report, test = shipped(bert, rows, tmp_path, label="stars", epochs=20, learning_rate=3e-3)
    assert report["nll"]["test"] < 0.3 * report["nll"]["test_base"]
    assert report["metrics"]["spearman"]["test"]["value"] > 0.8
    tested = read_rows(str(test))
    found = opened.classify([row.fields["text"] for row in tested])
    assert list(found[0].scores) == ["stars"]
    assert [one.label for one in found] == [one.scores["stars"] for one in found]
    examples = encode_rows(opened.rendering, opened.tokenizer, tested)
    nll, numbers = opened.token_nll(collate(examples, opened.tokenizer.pad_id, "text-classification"))
    gold = np.array([row.fields["stars"] for row in tested])
    assert nll[:, 0] == pytest.approx((numbers[:, 0] - gold) ** 2 / 2, rel=1e-4), "half the squared error"


@pytest.mark.parametrize("scale", [0.003, 2000.0])
def test_numbers_of_any_size_are_compared_by_their_size(bert: Path, tmp_path: Path, scale: float) -> None:
    from safetensors.numpy import load_file, save_file

    adapter = save_foreign(bert, tmp_path / "adapter", "SEQ_CLS", target_modules=["query", "value"], num_labels=1)
    weights = load_file(file := adapter / "adapter_model.safetensors")
    head = {name: scale * value for name, value in weights.items() if ".classifier." in name}
    save_file({**weights, **head}, file, {"format": "pt"})
    bundle = export(str(bert), ExportConfig(out=tmp_path / "bundle", adapter=adapter, weights="fp32"))
    found = bundle.manifest["verification"]
    assert found["refused"] == []
    assert found["adapter_changes_logits"]
    verify(bundle.path, VerifyConfig())

    def elsewhere(manifest: dict[str, Any]) -> None:
        level = manifest["verification"]["by_accuracy_level"]["1"]
        level["probe_nll"] = [1.02 * nll for nll in level["probe_nll"]]

    reseal(bundle.path, elsewhere)
    with pytest.raises(GateRefused, match="level 1 scores the probe texts"):
        verify(bundle.path, VerifyConfig())


def test_a_multi_label_classifier_is_trained_and_exported(bert: Path, tmp_path: Path) -> None:
    lines = [
        {
            "text": " ".join(["the", *["good"] * (n % 2), *["bad"] * (n // 2 % 2), *["was"] * (n // 4)]),
            "label": [*["praise"] * (n % 2), *["blame"] * (n // 2 % 2)],
        }
        for n in range(64)
    ]
    opened, report, _ = shipped(bert, write(tmp_path / "rows.jsonl", lines), tmp_path)
    assert report["metrics"]["micro_f1"]["test"]["value"] > 0.8
    neither, both = opened.classify(["the was", "the good bad was"])
    assert neither.label == []
    assert both.label == ["blame", "praise"]
    assert all(0 <= score <= 1 for score in both.scores.values())


def test_the_option_overrides_the_values(bert: Path, tmp_path: Path) -> None:
    lines = [{"text": f"the film {'very ' * (n // 2)}{['good', 'bad'][n % 2]}", "label": n % 2} for n in range(40)]
    data = write(tmp_path / "rows.jsonl", lines)
    run = tune(
        TuneConfig(
            model=str(bert),
            data=str(data),
            out=tmp_path / "run",
            max_steps=2,
            problem_type="regression",
            compute="fp32",
        )
    )
    assert set(run.report()["metrics"]) == {"mse", "pearson", "spearman"}
