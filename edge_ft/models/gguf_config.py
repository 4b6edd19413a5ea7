"""The transformers config of the model in a GGUF file, from the metadata of its header.

A size that the header lacks is never replaced by a default of the family. Where llama.cpp has rules of its own (the
scale of Gemma's attention, the layers of SmolLM3 without positions), they are followed: the file has nothing else.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from edge_ft.errors import ModelError
from edge_ft.models.gguf_header import GgufHeader
from edge_ft.models.gguf_names import architecture_of
from edge_ft.models.gguf_rope import rope_parameters
from edge_ft.models.gguf_settings import Settings

__all__ = ["config_settings"]

GEMMA_27B_LAYERS = {"gemma2": 46, "gemma3": 62}
"""Layers by which llama.cpp recognises the models whose attention is scaled by hidden size / heads."""
GEMMA3_PATTERN = 6
"""Every sixth layer attends to the whole text."""
NEUTRAL: dict[str, tuple[Any, ...]] = {
    ".expert_count": (0,),
    ".attention.causal": (True,),
    ".attention.scale": (0.0,),
    ".attention.clamp_kqv": (0.0,),
    ".attention.max_alibi_bias": (0.0,),
    ".attention.temperature_scale": (0.0, 1.0),
    ".attention.temperature_length": (0,),
    ".attn_logit_softcapping": (0.0,),
    ".final_logit_softcapping": (0.0,),
    ".attention.sliding_window": (0,),
    ".attention.sliding_window_pattern": (),
    ".logit_scale": (0.0, 1.0),
    ".residual_scale": (0.0, 1.0),
    ".embedding_scale": (0.0, 1.0),
    ".nextn_predict_layers": (0,),
    ".use_parallel_residual": (True,),
}
"""Keys that change what a model computes, and the values that change nothing; an architecture may read some."""
READ = {
    "gemma2": {".attention.scale", ".attn_logit_softcapping", ".final_logit_softcapping", ".attention.sliding_window"},
    "gemma3": {
        *(".attention.scale", ".final_logit_softcapping"),
        *(".attention.sliding_window", ".attention.sliding_window_pattern"),
    },
    "phi3": {".attention.sliding_window"},
    "llama": {".attention.sliding_window"},
    "gptneox": {".use_parallel_residual"},
}
"""Of `NEUTRAL`, what is read for an architecture."""


def config_settings(header: GgufHeader) -> tuple[str, dict[str, Any]]:
    """Describe the model by the settings of transformers.

    Returns:
        The model type, and the settings of its config.

    Raises:
        ModelError: the architecture or a part of the model is not supported, or the header lacks a size.
    """
    found = Settings(header)
    architecture = architecture_of(header.architecture, header.file)
    _refuse_changes(header)
    hidden, heads, layers = found.size(".embedding_length"), found.size(".attention.head_count"), _layers(found)
    key_length = found.size(".attention.key_length", max(hidden // heads, 1))
    if found.size(".attention.value_length", key_length) != key_length:
        raise ModelError(f"{header.file}: its keys and values have heads of different sizes, which is not supported")
    context = found.size(".context_length")
    tokens = header.tensors["token_embd.weight"].shape[0] if "token_embd.weight" in header.tensors else 0
    if not tokens:
        raise ModelError(f"{header.file} lacks the tensor token_embd.weight: take a file that is complete")
    names: dict[str, Any] = {
        "vocab_size": tokens,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": context,
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "bos_token_id": found.token("bos_token_id", tokens),
        "eos_token_id": found.token("eos_token_id", tokens),
        "pad_token_id": found.token("padding_token_id", tokens),
    }
    width = found.size(".feed_forward_length")
    if architecture.name == "gpt2":
        return "gpt2", names | {"n_inner": width, "layer_norm_epsilon": found.number(".attention.layer_norm_epsilon")}
    settings = names | {"intermediate_size": width}
    settings["rope_parameters"] = rope_parameters(found, key_length, context)
    if architecture.name == "gptneox":
        return "gpt_neox", settings | {
            "layer_norm_eps": found.number(".attention.layer_norm_epsilon"),
            "use_parallel_residual": bool(header.get(".use_parallel_residual", True)),
        }
    settings |= {
        "rms_norm_eps": found.number(".attention.layer_norm_rms_epsilon"),
        "num_key_value_heads": found.size(".attention.head_count_kv", heads),
    }
    if key_length * heads != hidden or architecture.name in ("llama", "qwen3", "gemma2", "gemma3"):
        settings["head_dim"] = key_length
    if architecture.name == "llama" and header.get(".attention.sliding_window"):
        return "mistral", settings | {"sliding_window": found.size(".attention.sliding_window")}
    return architecture.model_type, settings | _special(found, settings, key_length)


def _layers(found: Settings) -> int:
    """Number of layers, which cannot be more than the file has tensors."""
    layers = found.size(".block_count")
    if layers > len(found.header.tensors):
        raise ModelError(
            f"{found.header.file}: its header names {layers} layers, but the file has {len(found.header.tensors)} "
            "tensors: take a file that is complete"
        )
    return layers


def _refuse_changes(header: GgufHeader) -> None:
    """Refuse what the families here do not compute.

    Raises:
        ModelError: a key of `NEUTRAL` has a value that changes something.
    """
    if header.get(".expert_count"):
        raise ModelError(f"{header.file} holds a mixture of experts, which is not supported")
    for key, neutral in NEUTRAL.items():
        value = header.get(key)
        if value is None or key in READ.get(header.architecture, ()):
            continue
        if isinstance(value, np.ndarray) or value not in neutral:
            raise ModelError(
                f"{header.file}: {header.architecture}{key} is {value}, which models of this architecture do not have "
                "here: give the checkpoint folder that it was converted from, if its family is supported"
            )


def _special(found: Settings, settings: dict[str, Any], head_dim: int) -> dict[str, Any]:
    """Settings of the architectures with norms of root mean squares that not all of them have."""
    header, name = found.header, found.header.architecture
    window = header.get(".attention.sliding_window", 0)
    if name in ("llama", "smollm3"):
        return {
            "attention_bias": "blk.0.attn_q.bias" in header.tensors,
            "mlp_bias": "blk.0.ffn_up.bias" in header.tensors,
        }
    if name == "qwen3":
        return {"attention_bias": "blk.0.attn_q.bias" in header.tensors}
    if name == "phi3":
        rope = settings["rope_parameters"]
        original = rope.get("original_max_position_embeddings", settings["max_position_embeddings"])
        return {
            "sliding_window": found.size(".attention.sliding_window") if window else None,
            "original_max_position_embeddings": original,
        }
    if name == "gemma2":
        local = {"sliding_window": found.size(".attention.sliding_window", 4096)}
        caps = {
            "attn_logit_softcapping": found.number(".attn_logit_softcapping", 50.0) or None,
            "final_logit_softcapping": found.number(".final_logit_softcapping", 30.0) or None,
        }
        return local | caps | _gemma_scale(found, settings, head_dim)
    if name == "gemma3":
        cap = {"final_logit_softcapping": found.number(".final_logit_softcapping", 0.0) or None}
        return cap | _gemma3_layers(found, settings) | _gemma_scale(found, settings, head_dim)
    return {}


def _gemma_scale(found: Settings, settings: dict[str, Any], head_dim: int) -> dict[str, Any]:
    """The number whose inverse root scales the attention of Gemma 2 and 3."""
    scale = found.number(".attention.scale", 0.0)
    if scale:
        scalar = 1 / scale**2
        if abs(scalar - round(scalar)) > 1e-3 * scalar:
            raise found.wrong(".attention.scale", scale)
        return {"query_pre_attn_scalar": round(scalar)}
    whole = settings["num_hidden_layers"] == GEMMA_27B_LAYERS[found.header.architecture]
    return {"query_pre_attn_scalar": settings["hidden_size"] // settings["num_attention_heads"] if whole else head_dim}


def _gemma3_layers(found: Settings, settings: dict[str, Any]) -> dict[str, Any]:
    """The window of Gemma 3, the layers that have one, and their own rotation."""
    layers, full = settings["num_hidden_layers"], settings["rope_parameters"]
    window = found.header.get(".attention.sliding_window", 0)
    pattern = found.header.get(".attention.sliding_window_pattern", GEMMA3_PATTERN)
    if isinstance(pattern, int) and pattern > 0:
        local = [(layer + 1) % pattern != 0 for layer in range(layers)]
    elif isinstance(pattern, Sequence | np.ndarray) and len(pattern) == layers:
        local = [bool(value) for value in pattern]
    else:
        raise found.wrong(".attention.sliding_window_pattern", pattern)
    theta = found.number(".rope.freq_base_swa", 10000.0)
    return {
        "sliding_window": found.size(".attention.sliding_window") if window else settings["max_position_embeddings"],
        "layer_types": ["sliding_attention" if here and window else "full_attention" for here in local],
        "rope_parameters": {
            "full_attention": full,
            "sliding_attention": {"rope_type": "default", "rope_theta": theta},
        },
    }
