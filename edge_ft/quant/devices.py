"""What a device multiplies fastest, and how a model with tied buffers gets there."""

from typing import Any

import torch
from torch import nn

__all__ = ["has_bf16", "product_dtype", "to_device"]


def product_dtype() -> torch.dtype:
    """Return the dtype of a CPU's fastest products: bfloat16 where it multiplies that."""
    return torch.bfloat16 if has_bf16(torch.device("cpu")) else torch.float32


def has_bf16(device: torch.device) -> bool:
    """Return whether the device multiplies bfloat16 in hardware.

    Without such hardware, bfloat16 is many times slower than float32.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    known = torch.cpu.get_capabilities()
    return any(known.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def to_device(model: Any, device: torch.device | str) -> Any:
    """Return `model` on `device`, with tied buffers still tied: `model.to` copies each buffer by itself."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                places.setdefault(id(buffer), []).append((module, name))
    model.to(device)
    for (first, name), *others in places.values():
        for module, other in others:
            module._buffers[other] = first._buffers[name]
    return model
