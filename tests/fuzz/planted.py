"""Faults that are put into edge-ft one at a time: a fuzzer that finds each of them can find something."""

import contextlib
import ctypes
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fuzz.session import fuzz

__all__ = ["FAULTS", "Fault", "find_planted"]

MOST_CASES = 1500
"""Cases of the fault's kinds after which it counts as not found."""


@dataclass(frozen=True)
class Fault:
    """A fault, and where the fuzzer should look for it."""

    what: str
    kinds: tuple[str, ...]
    plant: Callable[[], None]
    """Changes the imported edge-ft; called in each worker."""
    verdicts: tuple[str, ...]
    """Which properties it breaks."""


def _swap(place: Any, name: str, value: Any) -> Any:
    """Replace an attribute that must be there, so that a fault cannot miss its place; returns the old value."""
    old = getattr(place, name)
    setattr(place, name, value)
    return old


class _Anything(str):
    """A text that is equal to every other."""

    __slots__ = ()
    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        return True

    def __ne__(self, other: object) -> bool:
        return False


def _reader_passes_over_bad_lines() -> None:
    from edge_ft.data import readers
    from edge_ft.errors import DataError

    def read(path: Path) -> Any:
        rows = []
        for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
            with contextlib.suppress(DataError, UnicodeDecodeError):
                rows.append(readers._row(number, readers._parse(line.decode(), "a line", ""), "a line"))
        return rows

    readers.READERS[".jsonl"] = readers.READERS[".ndjson"] = read


def _hashes_are_not_compared() -> None:
    from edge_ft.artifacts import bundle, run_folder

    for module in (bundle, run_folder):
        _swap(module, "file_sha256", lambda _: _Anything("0" * 64))


def _templates_have_no_limits() -> None:
    from edge_ft.data.template_budget import Budget

    for name in ("spend", "expect", "touch", "charge"):
        _swap(Budget, name, lambda *_: None)


def _sandbox_is_open() -> None:
    from jinja2.sandbox import SandboxedEnvironment

    _swap(SandboxedEnvironment, "is_safe_attribute", lambda *_: True)
    _swap(SandboxedEnvironment, "is_safe_callable", lambda *_: True)


def _manifest_is_not_checked() -> None:
    from edge_ft.artifacts import bundle

    _swap(bundle, "find_misfit", lambda _: None)


def _gguf_sizes_are_believed() -> None:
    from edge_ft.models.gguf_header import _Reader

    def take(self: Any, size: int, what: str) -> int:
        start = int(self.position)
        self.position = start + size
        return start

    _swap(_Reader, "_take", take)
    _swap(_Reader, "_at_most", lambda self, count, bytes_each, key: count)


def _bytes_are_decoded_without_a_net() -> None:
    from edge_ft import utf8

    _swap(utf8, "decode_utf8", lambda content, where, error=None: content.decode("utf-8-sig"))


def _settings_run_code() -> None:
    import yaml

    _swap(yaml, "safe_load", yaml.unsafe_load)


def _missing_keys_are_not_expected() -> None:
    from edge_ft.runtime.cache import CacheShape

    _swap(CacheShape, "of", classmethod(lambda kind, bundle: kind(**bundle.manifest["cache"])))


def _an_empty_text_never_ends() -> None:
    from edge_ft.data.tokenizer import TextTokenizer

    def encode(self: Any, text: str) -> Any:
        while not text.strip():
            pass
        return before(self, text)

    before = _swap(TextTokenizer, "encode", encode)


def _a_copy_is_left_beside_the_rows() -> None:
    from edge_ft.data import readers

    def left(read: Callable[[Path], Any]) -> Callable[[Path], Any]:
        def reader(path: Path) -> Any:
            path.with_suffix(".bak").write_bytes(path.read_bytes())
            return read(path)

        return reader

    readers.READERS.update({name: left(read) for name, read in readers.READERS.items()})


def _a_character_ends_the_process() -> None:
    from edge_ft.data.tokenizer import TextTokenizer

    def encode(self: Any, text: str) -> Any:
        if "\x1b" in text:
            ctypes.string_at(0)
        return before(self, text)

    before = _swap(TextTokenizer, "encode", encode)


def _answers_are_written_in_place() -> None:
    from edge_ft.runtime import run

    @contextlib.contextmanager
    def file(path: Path) -> Iterator[Path]:
        yield path

    _swap(run, "atomic_file", file)


def _sizes_of_tensors_are_believed() -> None:
    """A reader of safetensors that takes what the header says, and zeros where the file has ended."""
    import struct

    import safetensors.numpy

    from fuzz.mutations import safetensors_parts

    kinds = {"F32": "<f4", "F16": "<f2", "F64": "<f8", "I64": "<i8", "U8": "u1", "I32": "<i4", "BOOL": "?"}

    def load(path: Any) -> Any:
        import numpy as np

        with contextlib.suppress(ValueError, struct.error):
            header, values = safetensors_parts(Path(path).read_bytes())
            return {
                name: np.resize(np.frombuffer(values[: len(values) // 8 * 8], kinds[entry["dtype"]]), entry["shape"])
                for name, entry in header.items()
                if name != "__metadata__"
            }
        return {}

    from edge_ft.artifacts import run_folder
    from edge_ft.tune import checkpoint

    _swap(safetensors.numpy, "load_file", load)
    _swap(checkpoint, "load_file", load)
    _swap(run_folder, "file_sha256", lambda _: _Anything("0" * 64))
    _swap(checkpoint, "file_sha256", lambda _: _Anything("0" * 64))


FAULTS = (
    Fault("a reader passes over bad lines", ("rows",), _reader_passes_over_bad_lines, ("accepted",)),
    Fault("hashes are not compared", ("manifests",), _hashes_are_not_compared, ("accepted",)),
    Fault("the manifest is not checked", ("manifests",), _manifest_is_not_checked, ("accepted", "internal error")),
    Fault("a missing key is not expected", ("manifests",), _missing_keys_are_not_expected, ("internal error",)),
    Fault("templates have no limits", ("templates",), _templates_have_no_limits, ("hang", "memory", "accepted")),
    Fault("templates have no sandbox", ("templates",), _sandbox_is_open, ("write",)),
    Fault("sizes in a GGUF header are believed", ("gguf",), _gguf_sizes_are_believed, ("internal error", "memory")),
    Fault("a checkpoint is read without its hash and bounds", ("safetensors",), _sizes_of_tensors_are_believed, ()),
    Fault("UTF-8 errors are not caught", ("rows", "templates"), _bytes_are_decoded_without_a_net, ("internal error",)),
    Fault("YAML may build objects", ("configs",), _settings_run_code, ("write", "internal error", "accepted")),
    Fault("an empty text never ends", ("prompts",), _an_empty_text_never_ends, ("hang",)),
    Fault("a copy is left beside the rows", ("rows",), _a_copy_is_left_beside_the_rows, ("write", "changed")),
    Fault("a character ends the process", ("prompts",), _a_character_ends_the_process, ("crash",)),
    Fault("answers are written in place", ("rows",), _answers_are_written_in_place, ("half an output",)),
)


def find_planted(seed: int, seeds: Path, out: Path, workers: int) -> int:
    """Plant each fault and look for it, after a run without any fault that must find nothing with its signature.

    Args:
        seed: Of the cases.
        seeds: What `write_seeds` wrote.
        out: Folder for the reports.
        workers: Processes.

    Returns:
        Exit code: 0 if every fault was found.
    """
    missed = []
    for at, fault in enumerate(FAULTS):
        started = time.monotonic()
        place = (out / str(at)).absolute()
        found = fuzz(
            MOST_CASES, seed, list(fault.kinds), seeds, place, workers, plant=fault.plant, stop_at=fault.verdicts
        )
        failures = [each for each in found["failures"] if not fault.verdicts or each["verdict"] in fault.verdicts]
        if not failures:
            missed.append(fault.what)
        how = f"{failures[0]['verdict']}: {failures[0]['what'][:60]}" if failures else "NOT FOUND"
        kinds = ", ".join(fault.kinds)
        print(
            f"{fault.what:48} {kinds:18} after {found['cases']:4} cases, {time.monotonic() - started:3.0f} s: {how}",
            flush=True,
        )
    print(f"{len(FAULTS) - len(missed)} of {len(FAULTS)} planted faults were found, seed {seed}")
    return 1 if missed else 0
