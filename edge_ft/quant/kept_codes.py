"""int4 codes that were chosen before, kept in the user's cache: choosing them takes longer than loading the model.

An entry is the file of `write_codes` and beside it the file's hash and the seconds that choosing took, written last:
one that is damaged, or half there, is no entry. The newest entries are kept.
"""

import json
import platform
from contextlib import suppress
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError

from edge_ft.data import Batch
from edge_ft.files import cache_folder, file_sha256, write_text
from edge_ft.quant import blockwise, calibration, sensitivity
from edge_ft.quant.devices import has_bf16
from edge_ft.quant.serialization import write_codes

__all__ = ["codes_key", "find_codes", "keep_codes"]

KEPT, KEPT_BYTES = 8, 4 * 2**30
"""Most entries, and most bytes of them together."""
_METHOD = (blockwise, calibration, sensitivity)
"""Modules that decide which codes the same rows and weights get: with other sources, kept codes are others'."""


def codes_key(settings: dict[str, Any], batch: Batch) -> str:
    """Name the codes that are chosen over a batch on this machine.

    Args:
        settings: The hash of the weights and all that codes depend on besides, as JSON values.
        batch: The rows.

    Returns:
        Letters and digits, for a file's name: other rows, settings, libraries, threads or processors have others.
    """
    digest = sha256()
    for name, values in sorted(batch.items()):
        array = np.asarray(values)
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    products = torch.get_float32_matmul_precision()  # by which library: their last digits differ
    machine = [platform.machine(), torch.backends.cpu.get_cpu_capability(), has_bf16(torch.device("cpu")), products]
    versions = [version(name) for name in ("torch", "numpy", "transformers")]
    method = [file_sha256(Path(str(module.__file__))) for module in _METHOD]
    known = [method, settings, digest.hexdigest(), machine, torch.get_num_threads(), versions]
    return sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:32]


def find_codes(key: str) -> tuple[Path, float] | None:
    """Return the file of kept codes, whose content is whole, and the seconds of `keep_codes`; None where it is not."""
    file = _folder() / f"{key}.safetensors"
    with suppress(OSError, ValueError):
        digest, _, seconds = _hash_of(file).read_text(encoding="utf-8").partition(" ")
        if file_sha256(file) == digest.strip():
            file.touch()
            return file, float(seconds or 0)
    return None


def keep_codes(key: str, model: torch.nn.Module, seconds: float) -> None:
    """Keep the codes of a model, and remove the entries that were not used for longest; without room keep nothing.

    Args:
        key: Of `codes_key`.
        model: Its codes are kept.
        seconds: What choosing them took.
    """
    file = _folder() / f"{key}.safetensors"
    with suppress(OSError, SafetensorError):  # a read-only or full cache: chosen again next time
        write_codes(file, model)
        write_text(_hash_of(file), f"{file_sha256(file)} {seconds:.2f}\n")
    with suppress(OSError):
        kept = sorted(_folder().glob("*.safetensors"), key=lambda entry: entry.stat().st_mtime, reverse=True)
        size = 0
        for number, entry in enumerate(kept):
            size += entry.stat().st_size
            if number >= KEPT or size > KEPT_BYTES:
                _hash_of(entry).unlink(missing_ok=True)
                entry.unlink(missing_ok=True)


def _folder() -> Path:
    return cache_folder() / "codes"


def _hash_of(file: Path) -> Path:
    return file.with_suffix(".sha256")
