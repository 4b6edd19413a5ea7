"""An ONNX Runtime session on the CPU, opened for one model on a small device."""

import os
from pathlib import Path

import onnxruntime as ort
from onnxruntime.capi.onnxruntime_pybind11_state import Fail, InvalidGraph, InvalidProtobuf, NotImplemented

from edge_ft.errors import BundleError

__all__ = ["open_session"]

_ERRORS_ONLY = 3


def open_session(graph: Path, threads: int | None = None) -> ort.InferenceSession:
    """Open an ONNX file; its external data is memory-mapped.

    Args:
        graph: The `.onnx` file.
        threads: CPU threads of one run; default all cores.

    Raises:
        BundleError: this onnxruntime cannot run the graph.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or os.cpu_count() or 1
    options.log_severity_level = _ERRORS_ONLY
    # Every token has shapes of its own: a memory plan per shape would be made once and never used again.
    options.enable_mem_pattern = False
    # Long enough for a thread to be there for the next operator; the default spins far longer, which
    # costs where a neighbour wants the core (SmolLM2, two threads, one of two cores taken: 76 tokens a second
    # against 122).
    options.add_session_config_entry("session.intra_op.spin_duration_us", "20")
    try:
        return ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    except (Fail, InvalidGraph, InvalidProtobuf, NotImplemented) as error:
        raise BundleError(
            f"onnxruntime {ort.__version__} cannot open {graph} ({error}): install a newer onnxruntime"
        ) from error
