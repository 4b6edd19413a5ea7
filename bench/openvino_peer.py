"""OpenVINO as a peer of classifiers: its ONNX frontend opens the bundle's own graph."""

from pathlib import Path

import numpy as np
import openvino
from numpy.typing import NDArray

from edge_ft.artifacts import Bundle
from edge_ft.data import TextTokenizer
from edge_ft.errors import UsageError

__all__ = ["OpenVINOClassifier"]


class OpenVINOClassifier:
    """A classifier with the calls of `edge_ft.runtime.TextClassifier`, and OpenVINO's defaults for latency.

    Raises:
        UsageError: OpenVINO cannot read the graph.
    """

    def __init__(self, bundle: Path, accuracy_level: int | None, threads: int) -> None:
        self.tokenizer = TextTokenizer.of_bundle(bundle)
        graph = Bundle.open(bundle).graph(accuracy_level)
        settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
        try:
            self._compiled = openvino.Core().compile_model(str(graph), "CPU", settings)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]
            raise UsageError(f"OpenVINO {openvino.__version__} cannot open {graph}: {reason}") from error
        self._names = {name for port in self._compiled.inputs for name in port.names}

    def logits(self, input_ids: NDArray[np.int64], attention_mask: NDArray[np.int64]) -> NDArray[np.float32]:
        """Logits [batch, num_labels] of ids and mask, both [batch, seq]."""
        feed = {"input_ids": input_ids, "attention_mask": attention_mask}
        if "token_type_ids" in self._names:
            feed["token_type_ids"] = np.zeros_like(input_ids)
        logits: NDArray[np.float32] = self._compiled(feed)["logits"]
        return logits
