"""A classifier learns over a bundle, and its head with it; the bundle then answers with both."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from once import once
from peft import PeftModel
from tiny_models import tiny_encoder_config, write_bert, write_encoder, write_reviews
from trainable_bundles import losses_of_both, trainable_bundle

from edge_ft.artifacts import Bundle, RunFolder
from edge_ft.config import EvalConfig, ExportConfig, TuneConfig, VerifyConfig
from edge_ft.errors import UsageError
from edge_ft.evaluate import evaluate
from edge_ft.evaluate.verify import verify
from edge_ft.export import export
from edge_ft.models.base_model import find_base
from edge_ft.models.loading import ModelSpec, load_model
from edge_ft.runtime import TextClassifier, load
from edge_ft.tune import tune

STEPS = 40
CLASSES = ("blame", "praise")
WORDS = ("bad", "good")
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
"""A bundle's graph has no dropout."""


@pytest.fixture(scope="module")
def model(work: Path) -> Path:
    return once(work / "learning-bert-reviews", lambda out: write_bert(out, **STILL))


@pytest.fixture(scope="module")
def rows(work: Path) -> Path:
    return once(work / "learning-reviews.jsonl", write_reviews)


@pytest.fixture(scope="module")
def bundle(work: Path, model: Path) -> Bundle:
    settings: dict[str, Any] = {"task": "text-classification", "class_names": CLASSES}
    return Bundle.open(once(work / "learning-reviews", lambda out: trainable_bundle(model, out, **settings)))


def settings(bundle: Bundle, rows: Path, out: Path, **changes: Any) -> TuneConfig:
    chosen: dict[str, Any] = {"max_steps": 24, "learning_rate": 1e-2, "split": (0.6, 0.3, 0.1)}
    return TuneConfig(model=str(bundle.path), data=str(rows), out=out, threads=1, **{**chosen, **changes})


@pytest.fixture(scope="module")
def run(work: Path, bundle: Bundle, rows: Path) -> RunFolder:
    return RunFolder.open(once(work / "learned-reviews", lambda out: tune(settings(bundle, rows, out))))


def logits(bundle: Path, adapter: Any = None) -> Any:
    opened = load(bundle, adapter=adapter, accuracy_level=1, threads=1)
    assert isinstance(opened, TextClassifier)
    return opened.logits(np.array([[2, 7, 9, 11, 4, 3]]), np.ones((1, 6), np.int64))


def test_the_losses_are_those_of_the_torch_backend(bundle: Bundle, model: Path, rows: Path, tmp_path: Path) -> None:
    ours, theirs = losses_of_both(settings(bundle, rows, tmp_path, max_steps=STEPS, learning_rate=3e-3), model)
    assert len(ours) == STEPS and ours[-1] < ours[0] / 2
    np.testing.assert_allclose(ours, theirs, atol=5e-4)


def test_several_classes_are_learned_as_torch_learns_them(bundle: Bundle, model: Path, tmp_path: Path) -> None:
    lines = [{"text": f"the film {WORDS[n % 2]} {'very ' * (n % 5)}", "label": [n % 2, 1]} for n in range(40)]
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    given = settings(bundle, rows, tmp_path / "run", max_steps=8, problem_type="multi_label_classification")
    ours, theirs = losses_of_both(replace(given, class_names=CLASSES), model)
    np.testing.assert_allclose(ours, theirs, atol=5e-4)
    assert ours[-1] < ours[0]


def test_its_adapter_opens_in_plain_peft_and_gives_the_logits_of_torch(
    run: RunFolder, bundle: Bundle, model: Path
) -> None:
    base = load_model(ModelSpec(find_base(str(model)), "text-classification", "int4", labels=CLASSES))
    tuned = PeftModel.from_pretrained(base, str(run.adapter)).eval()
    written = json.loads((run.adapter / "adapter_config.json").read_text())
    assert (written["task_type"], written["modules_to_save"]) == ("SEQ_CLS", ["pooler", "classifier"])
    ids = torch.tensor([[2, 7, 9, 11, 4, 3]])
    with torch.no_grad():
        expected = tuned(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.numpy()
    np.testing.assert_allclose(logits(bundle.path, str(run.path)), expected, atol=1e-4)


def test_the_bundle_answers_with_what_it_learned(run: RunFolder, bundle: Bundle, tmp_path: Path) -> None:
    report = run.report()
    assert report["nll"]["best"] < report["nll"]["base"] / 4
    assert report["metrics"]["accuracy"]["validation"]["value"] == 1
    folder = Path(shutil.copytree(bundle.path, tmp_path / "bundle"))
    given = EvalConfig(data=str(run.split("validation")))
    before = logits(folder)
    assert evaluate(str(folder), replace(given, adapter=str(run.path)))["nll"] == pytest.approx(
        report["nll"]["best"], abs=1e-5
    )
    added = export(str(run.path), ExportConfig(onto=folder, name="mine"))
    found = added.manifest["verification"]["nll"]
    assert found["base"] == pytest.approx(report["nll"]["base"], abs=1e-5)
    assert found["shipped"] == pytest.approx(report["nll"]["best"], abs=1e-5)
    np.testing.assert_array_equal(logits(folder), logits(bundle.path, str(run.path)))
    np.testing.assert_array_equal(logits(folder, "none"), before)
    verify(folder, VerifyConfig(data=str(run.split("validation"))))
    again = tune(settings(added, run.path.parent / "learning-reviews.jsonl", tmp_path / "again", max_steps=1))
    assert again.report()["nll"]["base"] == pytest.approx(report["nll"]["base"], abs=1e-5)  # from the base


def test_a_bundle_of_the_adapter_lane_learns_on_from_its_head(
    run: RunFolder, model: Path, rows: Path, tmp_path: Path
) -> None:
    """The head that it had before is not in the bundle, and the values that it has now may be replaced."""
    first = tune(replace(settings(Bundle(model, {}), rows, tmp_path / "first"), compute="fp32"))
    bundle = export(str(first.path), ExportConfig(out=tmp_path / "bundle", lane="adapter", trainable=True))
    learned = tune(settings(bundle, rows, tmp_path / "learned"))
    export(str(learned.path), ExportConfig(onto=bundle.path, name="first"))
    tune(settings(Bundle.open(bundle.path), rows, tmp_path / "again", max_steps=1))
    plain = logits(bundle.path, str(learned.path))
    np.testing.assert_array_equal(logits(bundle.path), plain)


def test_other_classes_than_those_of_the_head_are_refused(bundle: Bundle, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    lines = [{"text": f"the film {n}", "label": ("a", "b", "c")[n % 3]} for n in range(30)]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    with pytest.raises(
        UsageError, match=r"has the classes a, b, c, and the head of .* has blame, praise: .*--class-names"
    ):
        tune(settings(bundle, rows, tmp_path / "run"))


def test_a_norm_of_the_head_is_kept_with_it(work: Path, rows: Path, tmp_path: Path) -> None:
    """ModernBERT's: it is an input of the graph that takes an adapter."""
    model = once(work / "learning-modernbert", lambda out: write_encoder(out, tiny_encoder_config("modernbert")))
    made = trainable_bundle(model, tmp_path / "bundle", task="text-classification", class_names=CLASSES)
    run = tune(settings(made, rows, tmp_path / "run", max_steps=8))
    base = load_model(ModelSpec(find_base(str(model)), "text-classification", "int4", labels=CLASSES))
    tuned = PeftModel.from_pretrained(base, str(run.adapter)).eval()
    norm = dict(tuned.named_parameters())["base_model.model.head.modules_to_save.default.norm.weight"]
    assert (norm - 1).abs().max() > 1e-2
    export(str(run.path), ExportConfig(onto=made.path, min_retained=-9))
    ids = torch.tensor([[2, 7, 9, 11, 4, 3]])
    with torch.no_grad():
        expected = tuned(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.numpy()
    np.testing.assert_allclose(logits(made.path), expected, atol=1e-4)
