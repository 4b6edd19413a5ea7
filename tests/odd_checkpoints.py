"""Real-world oddities of model folders, each made from a tiny model by a script."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

__all__ = [
    "Tensors",
    "edit_config",
    "edit_tensors",
    "int8_channels",
    "read_tensors",
    "to_bitsandbytes",
    "to_fp8",
    "write_shards",
    "write_tensors",
]

Tensors = dict[str, Tensor]
FP8_MAX = torch.finfo(torch.float8_e4m3fn).max


def edit_config(folder: Path, **changes: Any) -> Path:
    """Change keys of config.json; None removes one."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8")) | changes
    kept = {key: value for key, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(kept), encoding="utf-8")
    return folder


def read_tensors(folder: Path) -> Tensors:
    return load_file(folder / "model.safetensors")


def write_tensors(folder: Path, tensors: Tensors, name: str = "model.safetensors") -> Path:
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / name, {"format": "pt"})
    return folder


def edit_tensors(source: Path, folder: Path, edit: Callable[[Tensors], Tensors]) -> Path:
    """Copy a model folder, its tensors as `edit` returns them."""
    shutil.copytree(source, folder)
    return write_tensors(folder, edit(read_tensors(source)))


def write_shards(folder: Path, tensors: Tensors, count: int = 2, index: bool = True) -> Path:
    """Replace model.safetensors by `count` shards, with an index that names them."""
    (folder / "model.safetensors").unlink(missing_ok=True)
    where = {}
    for number in range(count):
        name = f"model-{number + 1:05}-of-{count:05}.safetensors"
        keys = sorted(tensors)[number::count]
        write_tensors(folder, {key: tensors[key] for key in keys}, name)
        where |= dict.fromkeys(keys, name)
    if index:
        content = {"metadata": {"total_size": 0}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def _is_linear(key: str, value: Tensor) -> bool:
    return value.ndim == 2 and any(part in key for part in ("proj", "dense", "query", "key", "value"))


def to_fp8(
    tensors: Tensors, block: tuple[int, int] | None, scale: str = "weight_scale_inv", shape: tuple[int, ...] = ()
) -> tuple[Tensors, Tensors]:
    """Round the linear layers to FP8.

    Args:
        tensors: Of a model.
        block: Rows and columns with one scale; None: all of a weight, or each of its rows.
        scale: Last name of the scale.
        shape: Of a scale without blocks; (-1, 1): one for each row.

    Returns:
        The tensors as DeepSeek-V3 and Qwen3-FP8 (blocks) or compressed-tensors (none) store them; and the same model in
        float32, dequantized here without edge-ft.
    """
    stored, plain = dict(tensors), dict(tensors)
    for key, value in tensors.items():
        if not _is_linear(key, value):
            continue
        height, width = value.shape
        rows, columns = block or ((1, width) if shape == (-1, 1) else (height, width))
        codes, floats = torch.empty(value.shape, dtype=torch.float8_e4m3fn), torch.empty(value.shape)
        scales = torch.empty(-(-height // rows), -(-width // columns))
        for i in range(scales.shape[0]):
            for j in range(scales.shape[1]):
                part = slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns)
                scales[i, j] = value[part].abs().max().clamp(min=1e-6) / FP8_MAX
                codes[part] = (value[part] / scales[i, j]).to(torch.float8_e4m3fn)
                floats[part] = codes[part].float() * scales[i, j]
        stored[key], plain[key] = codes, floats
        stored[f"{key.removesuffix('weight')}{scale}"] = scales if block or shape else scales.reshape(())
    return stored, plain


def int8_channels(tensors: Tensors) -> tuple[Tensors, Tensors]:
    """The linear layers as int8 with a scale for each row (compressed-tensors' int-quantized), and in float32."""
    stored, plain = dict(tensors), dict(tensors)
    for key, value in tensors.items():
        if _is_linear(key, value):
            scale = value.abs().amax(dim=1, keepdim=True) / 127
            stored[key] = (value / scale).round().to(torch.int8)
            stored[f"{key}_scale"] = scale
            plain[key] = stored[key].float() * scale
    return stored, plain


def to_bitsandbytes(tensors: Tensors, quant_type: str, nested: bool = False) -> tuple[Tensors, Tensors]:
    """The linear layers as bitsandbytes stores them, `nf4`, `fp4` or `int8`; and in float32."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    stored, plain = dict(tensors), dict(tensors)
    for key, value in tensors.items():
        if not _is_linear(key, value):
            continue
        if quant_type == "int8":
            scale = value.abs().amax(dim=1)
            stored[key] = (value / scale[:, None] * 127).round().to(torch.int8)
            stored[key.removesuffix("weight") + "SCB"] = scale
            stored[key.removesuffix("weight") + "weight_format"] = torch.tensor(0, dtype=torch.uint8)
            plain[key] = stored[key].float() * scale[:, None] * (1 / 127)
            continue
        # As on a GPU, where blocks run over the ends of rows: the CPU kernel gives each row blocks of its own.
        flat = value.reshape(-1, 64)
        codes, state = quantize_4bit(flat, blocksize=64, quant_type=quant_type, compress_statistics=nested)
        plain[key] = dequantize_4bit(codes, state).view(value.shape)
        state.shape = value.shape
        stored[key] = codes
        stored |= {f"{key}.{name}": part for name, part in state.as_dict(packed=True).items()}
    return stored, plain
