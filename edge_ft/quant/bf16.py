"""Weights in bfloat16: half of float32's memory, and exact where the checkpoint was published in it, as most are."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edge_ft.quant.conversion import ReadWeight, current_weights, embedding_scale, replace_linear_layers
from edge_ft.quant.layers import FrozenEmbedding, FrozenLinear

__all__ = ["BF16Embedding", "BF16Linear", "has_bf16", "round_to_bf16"]


def has_bf16(device: torch.device) -> bool:
    """Return whether the device multiplies bfloat16 in hardware.

    Without such hardware, bfloat16 is many times slower than float32.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    known = torch.cpu.get_capabilities()
    return any(known.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


class BF16Linear(FrozenLinear):
    """A `FrozenLinear` whose weight is bfloat16, whatever the dtype of its input."""

    qweight: Tensor
    """bfloat16 [N, K]"""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__(weight.shape[1], weight.shape[0], bias)
        self.register_buffer("qweight", weight.to(torch.bfloat16))

    def weight_arrays(self) -> tuple[NDArray[np.generic], ...]:
        """Return the bits of the weight, int16 [N, K]."""
        return (self.qweight.view(torch.int16).cpu().numpy(),)  # numpy knows no bfloat16

    def dequantize(self, dtype: torch.dtype = torch.float32, columns: slice | Tensor = slice(None)) -> Tensor:
        """Return the transposed weight [K, N], or some of its columns, in `dtype`."""
        return self.qweight[columns].T.to(dtype)


class BF16Embedding(FrozenEmbedding):
    """A `FrozenEmbedding` in bfloat16: ids [...] -> float32 [..., embedding_dim]."""

    qweight: Tensor
    """bfloat16 [num_embeddings, embedding_dim]"""

    def __init__(self, weight: Tensor, padding_idx: int | None = None, scale: float = 1.0) -> None:
        super().__init__(weight.shape[0], weight.shape[1], padding_idx, scale)
        self.register_buffer("qweight", weight.to(torch.bfloat16))

    def forward(self, input_ids: Tensor) -> Tensor:
        """[...] -> float32 [..., embedding_dim]."""
        return nn.functional.embedding(input_ids, self.qweight).float() * self.scale


def round_to_bf16(model: nn.Module, keep: tuple[str, ...] = (), read: ReadWeight | None = None) -> None:
    """Replace every linear layer and the token embedding of `model` by its bfloat16 form, in place.

    Args:
        model: A model with a word embedding as `get_input_embeddings()`.
        keep: Names of modules that stay float with all that is in them.
        read: As for `edge_ft.quant.conversion.quantize_model`.
    """
    read = read or current_weights(model)

    def replacement(name: str, layer: nn.Linear, bias: Tensor | None) -> BF16Linear:
        if layer.weight is not embedding.weight:
            return BF16Linear(read(f"{name}.weight", slice(None)).detach(), bias)
        tied = BF16Linear(narrow.qweight, bias)
        tied.qweight = narrow.qweight
        return tied

    embedding = model.get_input_embeddings()  # type: ignore[operator]
    name = next(name for name, module in model.named_modules() if module is embedding)
    weight = read(f"{name}.weight", slice(None)).detach()
    narrow = BF16Embedding(weight, embedding.padding_idx, embedding_scale(embedding))
    replace_linear_layers(model, keep, read, replacement)
    model.set_input_embeddings(narrow)  # type: ignore[operator]
