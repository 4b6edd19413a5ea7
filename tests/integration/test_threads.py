"""--threads of commands that open a bundle after they made or loaded it."""

from pathlib import Path
from typing import Any

import onnxruntime as ort
import pytest
import torch

from edge_ft.artifacts import Bundle, RunFolder
from edge_ft.config import ExportConfig, VerifyConfig
from edge_ft.evaluate.verify import verify
from edge_ft.export import export


def test_the_calibration_of_int8_static_uses_as_many_threads(
    bert_run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime's own calibrator opens sessions too, by default with a thread for each core of the machine."""
    seen: list[int] = []
    open_session = ort.InferenceSession

    def opened(graph: str, sess_options: Any, **settings: Any) -> Any:
        seen.append(sess_options.intra_op_num_threads)
        return open_session(graph, sess_options, **settings)

    monkeypatch.setattr(ort, "InferenceSession", opened)
    loose = {"max_tax": 9.0, "min_retained": 0.0, "max_metric_drop": 1.0}
    export(str(bert_run.path), ExportConfig(out=tmp_path / "bundle", threads=1, weights="int8-static", **loose))  # type: ignore[arg-type]
    assert set(seen) == {1}


def test_export_and_verify_use_as_many_threads(
    llama_run: RunFolder, llama_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    open_session, before = ort.InferenceSession, torch.get_num_threads()

    def opened(graph: str, options: Any, **settings: Any) -> Any:
        seen.append(options.intra_op_num_threads)
        return open_session(graph, options, **settings)

    monkeypatch.setattr(ort, "InferenceSession", opened)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    try:
        loose = {"max_tax": 9.0, "min_retained": 0.0, "max_metric_drop": 1.0}
        export(str(llama_run.path), ExportConfig(out=tmp_path / "bundle", threads=2, **loose))  # type: ignore[arg-type]
        assert set(seen) == {2} == {torch.get_num_threads()}
    finally:
        torch.set_num_threads(before)
    for given in (None, 2):
        seen.clear()
        verify(llama_bundle.path, VerifyConfig(threads=given))
        assert set(seen) == {given or 1}
