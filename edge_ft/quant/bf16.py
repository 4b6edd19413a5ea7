"""A base in bfloat16: half of float32's memory, and exact where the checkpoint was published in it, as most are."""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edge_ft.quant.layers import FrozenLinear, embedding_scale, is_within

__all__ = ["BF16Embedding", "BF16Linear", "has_bf16", "round_to_bf16"]


def has_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 in hardware; without it, bfloat16 is many times slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    known = torch.cpu.get_capabilities()
    return any(known.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


class BF16Linear(FrozenLinear):
    """A `FrozenLinear` whose weight is bfloat16, whatever it multiplies in."""

    qweight: Tensor
    """bfloat16 [N, K]"""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__(weight.shape[1], weight.shape[0], bias)
        self.register_buffer("qweight", weight.to(torch.bfloat16))

    def stored(self) -> tuple[NDArray[np.generic], ...]:
        return (self.qweight.view(torch.int16).cpu().numpy(),)  # numpy knows no bfloat16

    def dequantize(self, dtype: torch.dtype = torch.float32, columns: slice | Tensor = slice(None)) -> Tensor:
        return self.qweight[columns].T.to(dtype)


class BF16Embedding(nn.Embedding):
    """A frozen embedding in bfloat16: ids [...] -> float32 [..., embedding_dim]."""

    qweight: Tensor
    """bfloat16 [num_embeddings, embedding_dim]"""

    def __init__(self, weight: Tensor, padding_idx: int | None = None, scale: float = 1.0) -> None:
        """`scale` is what every embedding is multiplied by."""
        nn.Module.__init__(self)
        self.scale = scale
        self.num_embeddings, self.embedding_dim = weight.shape
        self.padding_idx = padding_idx
        self.register_parameter("weight", None)
        self.register_buffer("qweight", weight.to(torch.bfloat16))

    def forward(self, input_ids: Tensor) -> Tensor:
        return nn.functional.embedding(input_ids, self.qweight).float() * self.scale


def round_to_bf16(
    model: nn.Module, keep: tuple[str, ...] = (), read: Callable[[str, slice], Tensor] | None = None
) -> None:
    """Hold every linear layer and the token embedding of `model` in bfloat16, in place.

    Args:
        model: A model with a word embedding as `get_input_embeddings()`.
        keep: Names of modules that stay float with all that is in them.
        read: As for `edge_ft.quant.layers.quantize_model`.
    """
    whole = slice(None)
    read = read or (lambda name, rows: model.get_parameter(name)[rows])
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    names = {module: name for name, module in model.named_modules()}
    weight, scale = read(f"{names[embedding]}.weight", whole).detach(), embedding_scale(embedding)
    narrow = BF16Embedding(weight, embedding.padding_idx, scale)
    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear) or is_within(name, keep):
            continue
        bias = None if module.bias is None else read(f"{name}.bias", whole).detach()
        if module.weight is embedding.weight:  # tied
            layer = BF16Linear(narrow.qweight, bias)
            layer.qweight = narrow.qweight
        else:
            layer = BF16Linear(read(f"{name}.weight", whole).detach(), bias)
        model.set_submodule(name, layer)
    model.set_input_embeddings(narrow)  # type: ignore[operator]
