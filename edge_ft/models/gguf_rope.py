"""The rotary embedding of the model in a GGUF file: its base, its scaling, and factors of single frequencies."""

import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_ft.errors import ModelError
from edge_ft.models.gguf_header import GgufHeader
from edge_ft.models.gguf_settings import Settings

__all__ = ["FREQUENCIES", "LONG", "PARTIAL", "ROPE_TENSORS", "SHORT", "rope_parameters"]

FREQUENCIES, LONG, SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
ROPE_TENSORS = (FREQUENCIES, LONG, SHORT)
"""Tensors that become settings: what each frequency is divided by, everywhere or in long and in short texts."""
LLAMA3_LENGTHS = (8192, *(2**power for power in range(4, 21)))
"""Lengths of training that are tried to explain `rope_freqs.weight`; Llama 3 has the first."""
PARTIAL = ("phi3", "gptneox")
"""Architectures that rotate a part of a head."""
SCALING_KEYS = {"attn_factor", "factor", "finetuned", "original_context_length", "type"} | {
    f"yarn_{name}" for name in ("attn_factor", "beta_fast", "beta_slow", "ext_factor", "log_multiplier")
}


def rope_parameters(found: Settings, head_dim: int, context: int) -> dict[str, Any]:
    """Return `rope_parameters` of the transformers config, of the layers that attend to the whole text.

    Args:
        found: The header.
        head_dim: Width of a head.
        context: Tokens that the model can process.

    Raises:
        ModelError: a rotation that is not known, or factors for another number of frequencies.
    """
    header = found.header
    dimensions = found.size(".rope.dimension_count", head_dim)
    if dimensions > head_dim or dimensions % 2:
        raise found.wrong(".rope.dimension_count", dimensions)
    base: dict[str, Any] = {"rope_type": "default", "rope_theta": found.number(".rope.freq_base", 10000.0)}
    if base["rope_theta"] <= 0:
        raise found.wrong(".rope.freq_base", base["rope_theta"])
    if header.architecture in PARTIAL:
        base["partial_rotary_factor"] = dimensions / head_dim
    elif dimensions != head_dim:
        raise found.wrong(".rope.dimension_count", dimensions)
    if header.get(".rope.dimension_sections") is not None:
        raise ModelError(f"{header.file} rotates by sections, as models of images do, which is not supported")
    scaling = _scaling(found, context)
    factors = {name: _factors(header, name, dimensions // 2) for name in ROPE_TENSORS if name in header.tensors}
    if (LONG in factors) != (SHORT in factors):
        raise ModelError(f"{header.file} lacks {SHORT if LONG in factors else LONG}: take a file that is complete")
    if scaling["rope_type"] == "longrope" and not factors:
        raise ModelError(f"{header.file} names a scaling by {LONG} and {SHORT} and has neither")
    if not factors:
        return base | scaling
    if scaling["rope_type"] not in ("default", "longrope"):
        raise ModelError(f"{header.file} has both {next(iter(factors))} and a scaling, which is not supported")
    if LONG in factors and FREQUENCIES in factors:
        raise ModelError(f"{header.file} has both {FREQUENCIES} and {LONG}, which is not supported")
    if LONG in factors:
        return base | _longrope(found, factors[SHORT], factors[LONG], context)
    return base | _llama3(found, factors[FREQUENCIES], base["rope_theta"], context)


def _scaling(found: Settings, context: int) -> dict[str, Any]:
    """The scaling that the header's numbers describe."""
    header = found.header
    prefix = f"{header.architecture}.rope.scaling."
    own = {key.removeprefix(header.architecture) for key in header.fields}
    unknown = sorted({key.removeprefix(prefix) for key in header.fields if key.startswith(prefix)} - SCALING_KEYS)
    if unknown:
        raise ModelError(f"{header.file}: {prefix}{unknown[0]} is not known: the rotation would be another")
    kind = header.get(".rope.scaling.type", "linear" if ".rope.scale_linear" in own else "none")
    factor = found.number(".rope.scaling.factor", found.number(".rope.scale_linear", 1.0))
    if factor <= 0:
        raise found.wrong(".rope.scaling.factor", factor)
    if kind == "none" or (kind == "linear" and factor == 1.0):
        return {"rope_type": "default"}
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind == "longrope":
        return {"rope_type": "longrope"}
    if kind != "yarn":
        raise found.wrong(".rope.scaling.type", kind)
    if found.number(".rope.scaling.yarn_ext_factor", 1.0) != 1.0:
        raise found.wrong(".rope.scaling.yarn_ext_factor", header.get(".rope.scaling.yarn_ext_factor"))
    if found.number(".rope.scaling.yarn_log_multiplier", 0.0) != 0.0:
        raise found.wrong(".rope.scaling.yarn_log_multiplier", header.get(".rope.scaling.yarn_log_multiplier"))
    further = found.number(".rope.scaling.yarn_attn_factor", found.number(".rope.scaling.attn_factor", 1.0))
    return {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": found.size(".rope.scaling.original_context_length", context),
        "attention_factor": further * (1.0 + 0.1 * math.log(factor) if factor > 1 else 1.0),
        "beta_fast": found.number(".rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": found.number(".rope.scaling.yarn_beta_slow", 1.0),
    }


def _factors(header: GgufHeader, name: str, frequencies: int) -> NDArray[np.float32]:
    info = header.tensors[name]
    if info.type.name != "F32" or info.shape != (frequencies,):
        raise ModelError(
            f"{header.file}: {name} has shape {list(info.shape)} and type {info.type.name}, not {frequencies} numbers "
            "of type F32"
        )
    values = _read(info.file, info.start, frequencies)
    if not np.isfinite(values).all() or (values <= 0).any():
        raise ModelError(f"{header.file}: {name} has values that are not positive numbers")
    return values


def _read(file: Path, start: int, count: int) -> NDArray[np.float32]:
    return np.fromfile(file, "<f4", count, offset=start)


def _longrope(found: Settings, short: NDArray[np.float32], long: NDArray[np.float32], context: int) -> dict[str, Any]:
    original = found.size(".rope.scaling.original_context_length", context)
    # llama.cpp's scripts always write it: without it the attention would be scaled by guess.
    factor = found.number(".rope.scaling.attn_factor", None if context > original else 1.0)
    return {
        "rope_type": "longrope",
        "short_factor": short.tolist(),
        "long_factor": long.tolist(),
        "original_max_position_embeddings": original,
        "factor": context / original,
        "attention_factor": factor,
    }


def _llama3(found: Settings, factors: NDArray[np.float32], theta: float, context: int) -> dict[str, Any]:
    """The scaling of Llama 3 that has these factors; where none has, the factors themselves (as LongRoPE's)."""
    if (factors == 1).all():
        return {"rope_type": "default"}
    stated = found.header.get(".rope.scaling.original_context_length")
    wavelengths = 2 * np.pi * theta ** (np.arange(len(factors)) / len(factors))
    scale = float(factors.max())
    for length in (*((stated,) if stated else ()), *LLAMA3_LENGTHS):
        smooth = np.clip((length / wavelengths - 1.0) / 3.0, 0.0, 1.0)
        if np.allclose(1 / ((1 - smooth) / scale + smooth), factors, rtol=1e-5, atol=0):
            return {
                "rope_type": "llama3",
                "factor": scale,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": int(length),
            }
    same = factors.tolist()
    lengths = {"original_max_position_embeddings": context, "factor": 1.0, "attention_factor": 1.0}
    return {"rope_type": "longrope", "short_factor": same, "long_factor": same} | lengths
