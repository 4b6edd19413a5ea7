"""OpenVINO as a peer of classifiers and decoders: its ONNX frontend opens the bundle's own graph.

It is set up as its users would for latency. Its precision is its default: bfloat16 where the processor has it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import openvino
from numpy.typing import NDArray
from openvino.passes import MakeStateful, Manager

from edge_ft.artifacts import Bundle
from edge_ft.bench.meters import DecodeTimings
from edge_ft.data import TextTokenizer
from edge_ft.errors import UsageError

__all__ = ["OpenVINOClassifier", "OpenVINODecoder"]


class OpenVINOClassifier:
    """A classifier with the calls of `edge_ft.runtime.TextClassifier`.

    Raises:
        UsageError: OpenVINO cannot read the graph.
    """

    def __init__(self, bundle: Path, accuracy_level: int | None, threads: int) -> None:
        self.tokenizer = TextTokenizer.of_bundle(bundle)
        graph = Bundle.open(bundle).graph(accuracy_level)
        self._compiled = _compile(_read(graph), graph, threads)
        self._names = {name for port in self._compiled.inputs for name in port.names}

    def logits(self, input_ids: NDArray[np.int64], attention_mask: NDArray[np.int64]) -> NDArray[np.float32]:
        """Logits [batch, num_labels] of ids and mask, both [batch, seq]."""
        feed = {"input_ids": input_ids, "attention_mask": attention_mask}
        if "token_type_ids" in self._names:
            feed["token_type_ids"] = np.zeros_like(input_ids)
        logits: NDArray[np.float32] = self._compiled(feed)["logits"]
        return logits


class OpenVINODecoder:
    """A decoder with the calls of `edge_ft.runtime.TextGenerator`, whose keys and values stay in OpenVINO's memory.

    Raises:
        UsageError: OpenVINO cannot read the graph.
    """

    def __init__(self, bundle: Path, accuracy_level: int | None, threads: int) -> None:
        self.tokenizer = TextTokenizer.of_bundle(bundle)
        opened = Bundle.open(bundle)
        graph, cache = opened.graph(accuracy_level), opened.manifest["cache"]
        model = _read(graph)
        past = [port.any_name for port in model.inputs if port.any_name.startswith("past_key_values.")]
        # A state begins with 0 in every dimension that is not known: the batch must be.
        known = {"input_ids": [1, -1], "attention_mask": [1, -1], "position_ids": [1, -1]}
        known |= {name: [1, cache["kv_heads"], -1, cache["head_dim"]] for name in past}
        model.reshape({name: shape for name, shape in known.items() if name in _names(model.inputs)})
        manager = Manager()
        manager.register_pass(MakeStateful({name: name.replace("past_key_values", "present") for name in past}))
        manager.run_passes(model)
        compiled = _compile(model, graph, threads)
        self._request = compiled.create_infer_request()
        self._names = _names(compiled.inputs)
        self.last_logits: NDArray[np.float32] = np.zeros(0, np.float32)
        """[vocab], of the last token."""

    def time_decode(self, prompt_ids: list[int], new_tokens: int) -> DecodeTimings:
        """Decode exactly `new_tokens` greedily, past any stop token."""
        self._request.reset_state()
        marks = [perf_counter()]
        tokens, length = prompt_ids, 0
        for _ in range(new_tokens):
            positions = np.arange(length, length + len(tokens))[None]
            length += len(tokens)
            feed = {
                "input_ids": np.array([tokens], np.int64),
                "attention_mask": np.ones((1, length), np.int64),
                "position_ids": positions,
                "num_logits_to_keep": np.array(1, np.int64),
            }
            found = self._request.infer({name: feed[name] for name in self._names}, share_inputs=True)
            self.last_logits = found["logits"][0, -1]
            tokens = [int(self.last_logits.argmax())]
            marks.append(perf_counter())
        return DecodeTimings.between(marks)


def _read(graph: Path) -> Any:
    with _refused(graph):
        return openvino.Core().read_model(str(graph))


def _compile(model: Any, graph: Path, threads: int) -> Any:
    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    with _refused(graph):
        return openvino.Core().compile_model(model, "CPU", settings)


@contextmanager
def _refused(graph: Path) -> Iterator[None]:
    """Report OpenVINO's error as a sentence.

    Raises:
        UsageError: OpenVINO cannot read or compile the graph.
    """
    try:
        yield
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise UsageError(f"OpenVINO {openvino.__version__} cannot open {graph}: {reason}") from error


def _names(ports: Any) -> set[str]:
    return {name for port in ports for name in port.names}
