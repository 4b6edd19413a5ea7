"""ONNX Runtime sessions on the CPU, with options for small devices."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as states

from edge_ft.errors import BundleError
from edge_ft.system import default_threads

__all__ = ["open_session", "output_size", "running"]

_ERRORS_ONLY = 3
_ORT_ERRORS: tuple[type[Exception], ...] = (
    *(kind for kind in vars(states).values() if isinstance(kind, type) and issubclass(kind, Exception)),
    RuntimeError,
    ValueError,
)
"""What ONNX Runtime raises: a class for each of its status codes, and what pybind makes of C++ exceptions."""


def open_session(graph: Path, threads: int | None = None, *, shares_memory: bool = False) -> ort.InferenceSession:
    """Open an ONNX file; its external data is memory-mapped.

    Args:
        graph: The `.onnx` file.
        threads: CPU threads of one run; by default `edge_ft.system.default_threads`.
        shares_memory: Reuse what other such sessions of this process have freed.

    Returns:
        A session of the CPU execution provider.

    Raises:
        BundleError: this onnxruntime cannot run the graph.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or default_threads()
    options.log_severity_level = _ERRORS_ONLY
    # Shapes differ from token to token: a memory plan per shape would be used only once.
    options.enable_mem_pattern = False
    # Long enough for a thread to be awake for the next operator. The default spins far longer, which slows decoding
    # when another process uses the core (SmolLM2, two threads, one of two cores busy: 76 instead of 122 tokens/s).
    options.add_session_config_entry("session.intra_op.spin_duration_us", "20")
    if shares_memory:
        _make_arena()
        options.add_session_config_entry("session.use_env_allocators", "1")
    try:
        return ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    except _ORT_ERRORS as error:
        raise BundleError(
            f"onnxruntime {ort.__version__} cannot open {graph} ({error}): install a newer onnxruntime, or export the "
            "model again"
        ) from error


@cache
def _make_arena() -> None:
    """Make the allocator of sessions that share memory, once in a process; it grows by what is asked for."""
    memory = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    ort.create_and_register_allocator(memory, ort.OrtArenaCfg({"arena_extend_strategy": 1}))


@contextmanager
def running(session: ort.InferenceSession) -> Iterator[None]:
    """A block that runs a session, whose graph may be of any origin.

    Raises:
        BundleError: ONNX Runtime cannot run it.
    """
    try:
        yield
    except _ORT_ERRORS as error:
        raise BundleError(
            f"onnxruntime {ort.__version__} cannot run {_path(session)} ({error}): export the model again"
        ) from error


def output_size(session: ort.InferenceSession, name: str) -> int:
    """Return the size of the last dimension of a graph's output, such as the vocabulary of `logits`.

    Raises:
        BundleError: there is no such output, or the graph does not say its size.
    """
    size = next((output.shape[-1] for output in session.get_outputs() if output.name == name and output.shape), None)
    if not isinstance(size, int) or not 0 < size < 2**31:
        raise BundleError(f"{_path(session)} has no output {name!r} of a known size: export the model again")
    return size


def _path(session: ort.InferenceSession) -> str:
    return str(getattr(session, "_model_path", None) or "the bundle's graph")
