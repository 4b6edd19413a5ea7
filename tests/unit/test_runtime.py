"""Opening a bundle."""

from pathlib import Path

import numpy as np
import pytest
from tiny_bundle import write_classifier, write_decoder

from edge_ft.artifacts import Bundle
from edge_ft.errors import BundleError, UsageError
from edge_ft.runtime import TextClassifier, TextGenerator, load

IDS = np.array([list(b"a question")])


def logits(path: Path, adapter: str | None = None) -> np.ndarray:
    generator = load(path, threads=1, adapter=adapter)
    assert isinstance(generator, TextGenerator)
    scored = generator.logits(IDS, np.ones_like(IDS))[0, -1]
    decoded = generator.open_cache().extend(IDS[0].tolist())
    np.testing.assert_allclose(decoded, scored, rtol=1e-5, atol=1e-5)  # the adapter is bound both ways
    return scored


def test_the_task_decides_what_opens(tmp_path: Path) -> None:
    assert isinstance(load(write_decoder(tmp_path / "decoder")), TextGenerator)
    assert isinstance(load(str(write_classifier(tmp_path / "classifier"))), TextClassifier)


def test_a_task_of_a_later_release_is_refused(tmp_path: Path) -> None:
    path = write_decoder(tmp_path / "decoder")
    with pytest.raises(BundleError, match="for the task text-to-speech, which this release cannot run"):
        load(Bundle(path, {"task": "text-to-speech", "model": "onnx/model.onnx"}))


def test_an_open_bundle_is_not_opened_again(tmp_path: Path) -> None:
    assert isinstance(load(Bundle.open(write_decoder(tmp_path / "decoder"))), TextGenerator)


def test_a_changed_file_is_refused(tmp_path: Path) -> None:
    path = write_decoder(tmp_path / "decoder")
    with (path / "onnx" / "model.onnx").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(BundleError, match="sha256"):
        load(path)


def test_an_accuracy_level_without_a_verified_graph_is_refused(tmp_path: Path) -> None:
    path = write_decoder(tmp_path / "decoder")
    assert isinstance(load(path, accuracy_level=1), TextGenerator)
    with pytest.raises(BundleError, match="accuracy level 4"):
        load(path, accuracy_level=4)


def test_a_graph_that_this_onnxruntime_cannot_run_is_a_bundle_error(tmp_path: Path) -> None:
    path = write_decoder(tmp_path / "decoder")
    (path / "onnx" / "model.onnx").write_bytes(b"not a graph")
    with pytest.raises(BundleError, match="cannot open"):
        load(Bundle(path, {"task": "text-generation", "model": "onnx/model.onnx"}))


def test_adapter_none_is_the_base_without_its_adapter(tmp_path: Path) -> None:
    tuned = write_decoder(tmp_path / "tuned", lane="adapter")
    zero = write_decoder(tmp_path / "zero", lane="adapter", zero_adapter=True)
    base = logits(tuned, adapter="none")
    assert np.abs(logits(tuned) - base).max() > 0.1
    np.testing.assert_array_equal(base, logits(zero))


def test_adapter_none_changes_nothing_on_a_base_bundle(tmp_path: Path) -> None:
    path = write_decoder(tmp_path / "base")
    np.testing.assert_array_equal(logits(path, adapter="none"), logits(path))


def test_adapter_none_is_refused_for_a_merged_bundle(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--lane adapter"):
        load(write_decoder(tmp_path / "merged", lane="merged"), adapter="none")


def test_an_unknown_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="did you mean 'none'"):
        load(write_decoder(tmp_path / "tuned", lane="adapter"), adapter="non")
