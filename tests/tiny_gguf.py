"""GGUF files of tiny models, written with gguf-py as llama.cpp's conversion scripts write them."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from numpy.typing import NDArray
from safetensors.numpy import load_file
from tokenizers import Tokenizer

ARCHITECTURES = {"gemma3_text": "gemma3", "gpt_neox": "gptneox"}
"""`general.architecture` where it is not the model type."""
SETTINGS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"use_sliding_window": False},
    "qwen3": {},
    # llama.cpp takes the width of a head where the original has a number of its own
    "gemma2": {"query_pre_attn_scalar": 16},
    "gemma3_text": {
        "query_pre_attn_scalar": 16,
        "num_hidden_layers": 6,
        "layer_types": [*["sliding_attention"] * 5, "full_attention"],
    },
    "phi3": {},
    "smollm3": {"no_rope_layer_interval": 4, "num_hidden_layers": 4},
    "gpt2": {"n_inner": 96},
    "gpt_neox": {},
}
"""Settings of a tiny model of each family that GGUF can hold; llama.cpp's rules fix some."""


SCALES = {
    "Q2_K": ((80, 82), 3e-3),
    "Q3_K": ((108,), 1e-3),
    "Q4_K": ((0, 2), 1e-4),
    "Q5_K": ((0, 2), 5e-5),
    "Q6_K": ((208,), 1.5e-5),
}
"""Where the 16-bit scales of a block of a K type lie, and numbers for weights around 0.1."""


def write_gguf(
    folder: Path,
    file: Path,
    kind: str = "F32",
    *,
    tensors: dict[str, NDArray[Any]] | None = None,
    fields: dict[str, Any] | None = None,
    raw: dict[str, tuple[NDArray[np.uint8], GGMLQuantizationType]] | None = None,
    without: tuple[str, ...] = (),
    **writer: Any,
) -> Path:
    """Write a transformers folder as a GGUF file.

    Args:
        folder: Holds config.json, model.safetensors and tokenizer.json.
        file: What is written; with `split_max_tensors` the name of the parts begins as it does.
        kind: Type of the matrices; the K types get random blocks.
        tensors: Further tensors.
        fields: Further or other keys of the header.
        raw: Tensors to replace by blocks.
        without: Tensors and keys to leave out.
        writer: For `GGUFWriter`.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    name = ARCHITECTURES.get(config["model_type"], config["model_type"])
    out = GGUFWriter(str(file), name, **writer)
    header = {**sizes(config, name), **tokenizer_fields(folder, config), **(fields or {})}
    for key, value in header.items():
        full = f"{name}{key}" if key.startswith(".") else key
        if value is None or key in without:
            continue
        if full in ("general.alignment",):
            out.add_custom_alignment(value)
        else:
            out.add_key_value(full, value, *value_type(value))
    weights = gguf_tensors(load_file(folder / "model.safetensors"), config, name) | (tensors or {})
    for key, values in weights.items():
        if key not in without:
            data, stored = (raw or {}).get(key) or encode(values, kind, key)
            out.add_tensor(key, data, raw_dtype=stored)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return file


def value_type(value: Any) -> tuple[Any, ...]:
    """gguf-py's type of a value, and of the items of an array."""
    kinds = gguf.GGUFValueType
    if isinstance(value, bool):
        return (kinds.BOOL,)
    if isinstance(value, int):
        return (kinds.UINT32,)
    if isinstance(value, float):
        return (kinds.FLOAT32,)
    if isinstance(value, str):
        return (kinds.STRING,)
    return kinds.ARRAY, value_type(value[0])[0] if not isinstance(value[0], int) else kinds.INT32


def sizes(config: dict[str, Any], name: str) -> dict[str, Any]:
    """The keys of the architecture."""
    get = config.get
    heads = get("num_attention_heads") or config["n_head"]
    hidden = get("hidden_size") or config["n_embd"]
    found: dict[str, Any] = {
        ".context_length": get("max_position_embeddings") or config["n_positions"],
        ".embedding_length": hidden,
        ".block_count": get("num_hidden_layers") or config["n_layer"],
        ".feed_forward_length": get("intermediate_size") or config["n_inner"],
        ".attention.head_count": heads,
    }
    if name in ("gpt2", "gptneox"):
        found[".attention.layer_norm_epsilon"] = get("layer_norm_epsilon") or config["layer_norm_eps"]
    else:
        found[".attention.layer_norm_rms_epsilon"] = config["rms_norm_eps"]
        found[".attention.head_count_kv"] = config["num_key_value_heads"]
    if name == "gpt2":
        return found
    rope = config["rope_parameters"].get("full_attention", config["rope_parameters"])
    head_dim = get("head_dim") or hidden // heads
    found |= {
        ".rope.freq_base": float(rope["rope_theta"]),
        ".rope.dimension_count": int(head_dim * rope.get("partial_rotary_factor", 1.0)),
    }
    if name == "gptneox":
        return found | {".use_parallel_residual": config["use_parallel_residual"]}
    if "head_dim" in config:
        found |= {".attention.key_length": head_dim, ".attention.value_length": head_dim}
    if rope["rope_type"] in ("linear", "yarn"):
        found |= {".rope.scaling.type": rope["rope_type"], ".rope.scaling.factor": float(rope["factor"])}
    if rope["rope_type"] in ("yarn", "longrope"):
        found[".rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
    if name in ("gemma2", "gemma3", "phi3"):
        found[".attention.sliding_window"] = config["sliding_window"] or 0
    if name == "gemma2":
        found[".attn_logit_softcapping"] = float(config["attn_logit_softcapping"])
        found[".final_logit_softcapping"] = float(config["final_logit_softcapping"])
    return found


def tokenizer_fields(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """The keys of a byte-level BPE tokenizer."""
    saved = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokens = [tokenizer.id_to_token(index) for index in range(tokenizer.get_vocab_size())]
    special = {token["content"] for token in saved["added_tokens"]}
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in saved["model"]["merges"]]
    template = folder / "chat_template.jinja"
    return {
        "general.type": "model",
        "general.license": "apache-2.0",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in special else 1 for token in tokens],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": config["bos_token_id"],
        "tokenizer.ggml.eos_token_id": config["eos_token_id"],
        "tokenizer.chat_template": template.read_text(encoding="utf-8") if template.is_file() else None,
    }


def gguf_tensors(weights: dict[str, NDArray[Any]], config: dict[str, Any], name: str) -> dict[str, NDArray[Any]]:
    """The weights with their names and in their order in a GGUF file."""
    kind = next(kind for kind, other in gguf.MODEL_ARCH_NAMES.items() if other == name)
    layers = config.get("num_hidden_layers") or config["n_layer"]
    names = gguf.get_tensor_name_map(kind, layers)
    heads = config.get("num_attention_heads") or config["n_head"]
    found = {}
    for key, value in weights.items():
        if name in ("llama", "smollm3") and ".q_proj." in key:
            value = pairs(value, heads)
        if name in ("llama", "smollm3") and ".k_proj." in key:
            value = pairs(value, config["num_key_value_heads"])
        if name.startswith("gemma") and key.endswith("norm.weight"):
            value = value + 1
        if name == "gpt2" and key.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight")):
            value = value.T
        if name == "gptneox" and "query_key_value" in key:
            split = value.reshape(heads, 3, -1, *value.shape[1:])
            value = np.concatenate([split[:, part].reshape(-1, *value.shape[1:]) for part in range(3)])
        found[str(names.get_name(key, try_suffixes=(".weight", ".bias")))] = value
    return found


def pairs(weights: NDArray[Any], heads: int) -> NDArray[Any]:
    """`LlamaModel.permute` of llama.cpp."""
    split = weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
    return split.swapaxes(1, 2).reshape(weights.shape)


def encode(weights: NDArray[Any], kind: str, key: str) -> tuple[NDArray[Any], GGMLQuantizationType]:
    """A tensor in a type of GGUF: vectors and rows that no block fits into stay float32."""
    wanted = GGMLQuantizationType[kind]
    weights = np.ascontiguousarray(weights, np.float32)
    block = gguf.GGML_QUANT_SIZES[wanted][0]
    if weights.ndim == 1 or weights.shape[-1] % block or kind == "F32":
        return weights, GGMLQuantizationType.F32
    if kind.endswith("_K"):
        return random_blocks(weights.shape, wanted, key), wanted
    return gguf.quants.quantize(weights, wanted), wanted


def random_blocks(shape: tuple[int, ...], kind: GGMLQuantizationType, key: str) -> NDArray[np.uint8]:
    """Valid blocks with random codes [rows, bytes]: their 16-bit scales are small numbers, all else is any byte."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    random = np.random.default_rng(len(key) + sum(key.encode()))
    blocks = random.integers(0, 256, (shape[0] * shape[1] // block, size), np.uint8)
    places, scale = SCALES[kind.name]
    for place in places:
        numbers = random.uniform(scale, 2 * scale, (len(blocks), 1)).astype(np.float16)
        blocks[:, place : place + 2] = numbers.view(np.uint8)
    return blocks.reshape(shape[0], -1)
