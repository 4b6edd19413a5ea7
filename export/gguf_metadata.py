"""The metadata of a GGUF file that describe a model: the inverse of `edge_ft.models.gguf_config` and `gguf_rope`.

What a file cannot say is found by reading it back (`lost_settings`), not by a second list of rules.
"""

import math
from typing import Any

import numpy as np

from edge_ft.errors import UsageError
from edge_ft.export.gguf_file import Blocks
from edge_ft.models.dims import ModelDims
from edge_ft.models.gguf_names import ARCHITECTURES, Architecture
from edge_ft.models.gguf_rope import FREQUENCIES, LONG, PARTIAL, SHORT

__all__ = ["WRITTEN", "architecture_for", "lost_settings", "model_fields", "rope_tensors"]

WRITTEN = ("llama", "smollm3", "qwen2", "qwen3", "gemma2", "gemma3", "phi3")
"""Architectures of GGUF that are written."""
ALSO = {"mistral": "llama"}
"""Families that GGUF holds as another one's architecture."""
WITHOUT_EFFECT = {
    *("_name_or_path", "architectures", "dtype", "transformers_version", "initializer_range", "use_cache"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "attention_dropout", "embd_pdrop", "resid_pdrop"),
    *("pretraining_tp", "id2label", "label2id", "max_window_layers", "layer_types", "sliding_window", "problem_type"),
    *("original_max_position_embeddings", "no_rope_layer_interval", "no_rope_layers", "use_sliding_window", "pooling"),
    *("partial_rotary_factor", "output_attentions", "output_hidden_states", "return_dict", "hidden_activation"),
}
"""Settings that change nothing that a model computes, or that are compared in another form below."""


def architecture_for(family: str) -> Architecture:
    """Return the architecture under which GGUF holds a family.

    Raises:
        UsageError: it is not written here.
    """
    rows = {row.model_type: row for row in ARCHITECTURES.values() if row.name in WRITTEN}
    rows |= {name: ARCHITECTURES[other] for name, other in ALSO.items()}
    if family not in rows:
        raise UsageError(
            f"a {family} model cannot be exported with --format gguf: written are {', '.join(rows)}; leave the option "
            "out for a bundle"
        )
    return rows[family]


def model_fields(dims: ModelDims, architecture: Architecture) -> dict[str, Any]:
    """Return the keys that give the sizes of a model, for `write_gguf_file`."""
    config, name = dims.config, architecture.name
    rope = _rope(dims)
    fields: dict[str, Any] = {
        ".context_length": int(config.max_position_embeddings),
        ".embedding_length": dims.hidden,
        ".block_count": dims.layers,
        ".feed_forward_length": dims.intermediate,
        ".vocab_size": dims.vocabulary,
        ".attention.head_count": dims.heads,
        ".attention.head_count_kv": dims.kv_heads,
        ".attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        ".attention.key_length": dims.head_dim,
        ".attention.value_length": dims.head_dim,
        ".rope.dimension_count": dims.rotary_dim if name in PARTIAL else dims.head_dim,
        ".rope.freq_base": float(rope["rope_theta"]),
        **_scaling(rope),
    }
    window = getattr(config, "sliding_window", None)
    if name in ("gemma2", "gemma3", "phi3") or config.model_type == "mistral":
        fields[".attention.sliding_window"] = int(window) if window else 0
    if name in ("gemma2", "gemma3"):
        fields[".final_logit_softcapping"] = float(config.final_logit_softcapping or 0.0)
    if name == "gemma2":
        fields[".attn_logit_softcapping"] = float(config.attn_logit_softcapping or 0.0)
    if name == "gemma3":
        fields[".rope.freq_base_swa"] = float(config.rope_parameters["sliding_attention"]["rope_theta"])
    return fields


def _rope(dims: ModelDims) -> dict[str, Any]:
    """Return the rotation of the layers that attend to the whole text."""
    parameters = dims.config.rope_parameters
    return dict(parameters.get("full_attention", parameters))


def _scaling(rope: dict[str, Any]) -> dict[str, Any]:
    """Return the keys of a scaling; that of Llama 3 is a tensor."""
    kind = rope["rope_type"]
    original = rope.get("original_max_position_embeddings")
    if kind == "llama3":
        return {".rope.scaling.original_context_length": int(rope["original_max_position_embeddings"])}
    if kind not in ("linear", "yarn", "longrope"):
        return {}
    keys: dict[str, Any] = {".rope.scaling.type": kind}
    if kind == "linear":
        return keys | {".rope.scaling.factor": float(rope["factor"])}
    keys[".rope.scaling.original_context_length"] = int(original) if original else None
    given = rope.get("attention_factor")
    if kind == "longrope":
        return keys | {".rope.scaling.attn_factor": float(given) if given else _longrope_factor(rope)}
    usual = 1.0 + 0.1 * math.log(rope["factor"]) if rope["factor"] > 1 else 1.0
    keys |= {".rope.scaling.factor": float(rope["factor"])}
    keys |= {".rope.scaling.yarn_attn_factor": float(given) / usual if given else None}
    for end in ("beta_fast", "beta_slow"):
        keys[f".rope.scaling.yarn_{end}"] = float(rope[end]) if rope.get(end) else None
    return keys


def _longrope_factor(rope: dict[str, Any]) -> float:
    """Return what LongRoPE scales attention by where the config does not say (transformers' `_compute_longrope`)."""
    factor, original = float(rope.get("factor") or 1.0), float(rope["original_max_position_embeddings"])
    return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0


def rope_tensors(dims: ModelDims) -> dict[str, Blocks]:
    """Return the tensors of factors by which frequencies are divided; none for most models.

    Raises:
        UsageError: a scaling of Llama 3 with other bounds than llama.cpp knows.
    """
    rope = _rope(dims)
    if rope["rope_type"] == "longrope":
        pairs = ((LONG, "long_factor"), (SHORT, "short_factor"))
        return {name: Blocks(np.array(rope[key], np.float32), "F32") for name, key in pairs}
    if rope["rope_type"] != "llama3":
        return {}
    if (rope["low_freq_factor"], rope["high_freq_factor"]) != (1.0, 4.0):
        raise UsageError("its rotation is scaled as in Llama 3, but between other bounds, which a GGUF file cannot say")
    count = dims.head_dim // 2
    wavelengths = 2 * np.pi * rope["rope_theta"] ** (np.arange(count) / count)
    smooth = np.clip((rope["original_max_position_embeddings"] / wavelengths - 1.0) / 3.0, 0.0, 1.0)
    return {FREQUENCIES: Blocks((1 / ((1 - smooth) / rope["factor"] + smooth)).astype(np.float32), "F32")}


def lost_settings(config: Any, read: Any) -> list[str]:
    """Compare the config of a model with the one that its GGUF file gives.

    Args:
        config: transformers config of the model.
        read: The one that was read back.

    Returns:
        A text for each setting that differs and changes what the model computes.
    """
    ours, theirs = config.to_dict(), read.to_dict()
    found = [
        f"{key} is {ours[key]!r} and the file would be read with {theirs.get(key)!r}"
        for key in sorted(ours.keys() & theirs.keys() - WITHOUT_EFFECT - {"rope_parameters", "model_type"})
        if not _same(ours[key], theirs[key])
    ]
    for name, (mine, other) in {
        "layer windows": (_windows(config), _windows(read)),
        "layers without positions": (_rotated(config), _rotated(read)),
        "rope_parameters": (_ropes(config), _ropes(read)),
    }.items():
        if not _same(mine, other):
            found.append(f"{name}: {mine} and the file would be read with {other}")
    return found


def _windows(config: Any) -> list[int | None]:
    """Return the number of tokens that each layer attends to; None: all."""
    window = getattr(config, "sliding_window", None)
    if not getattr(config, "use_sliding_window", True):
        window = None
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return [window if kind == "sliding_attention" else None for kind in kinds]


def _rotated(config: Any) -> list[int]:
    return list(getattr(config, "no_rope_layers", None) or [1] * config.num_hidden_layers)


def _ropes(config: Any) -> list[dict[str, Any]]:
    """Return the rotations with what decides them."""
    found = []
    for rope in ModelDims(config).ropes:
        rope = {key: value for key, value in rope.items() if value is not None}
        if rope["rope_type"] == "longrope":
            rope["attention_factor"] = rope.get("attention_factor") or _longrope_factor(rope)
            rope.pop("factor", None)
        if rope["rope_type"] == "yarn":
            usual = 1.0 + 0.1 * math.log(rope["factor"]) if rope["factor"] > 1 else 1.0
            known = {"attention_factor": usual, "beta_fast": 32.0, "beta_slow": 1.0}
            known["original_max_position_embeddings"] = config.max_position_embeddings
            rope = known | {
                key: value for key, value in rope.items() if key in known or key in ("factor", "rope_theta")
            }
        rope.setdefault("partial_rotary_factor", 1.0)
        found.append(rope)
    return found


def _same(ours: Any, theirs: Any) -> bool:
    """Compare, numbers within what 32 bits hold."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        return ours.keys() == theirs.keys() and all(_same(ours[key], theirs[key]) for key in ours)
    if isinstance(ours, list) and isinstance(theirs, list):
        return len(ours) == len(theirs) and all(map(_same, ours, theirs))
    if isinstance(ours, float) or isinstance(theirs, float):
        return (
            isinstance(theirs, int | float)
            and isinstance(ours, int | float)
            and math.isclose(ours, theirs, rel_tol=1e-6)
        )
    return bool(ours == theirs)
