"""Weights in bitsandbytes' nf4 (Dettmers et al., arXiv:2305.14314): QLoRA's format, here on a CPU too."""

import numpy as np
import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, quantize_4bit
from numpy.typing import NDArray
from torch import Tensor, nn

from edge_ft.quant.conversion import ReadWeight, current_weights, replace_linear_layers
from edge_ft.quant.layers import FrozenLinear

__all__ = ["NF4Linear", "round_to_nf4"]

BLOCK = 64
"""Weights per scale, bitsandbytes' own default."""


class NF4Linear(FrozenLinear):
    """A `FrozenLinear` over the same bytes as `bitsandbytes.nn.Linear4bit`, with float32 scales."""

    qweight: Tensor
    """uint8 [blocks * BLOCK / 2, 1], the weight [N, K] row after row; the high nibble is the earlier one."""
    absmax: Tensor
    """float32 [blocks]"""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__(weight.shape[1], weight.shape[0], bias)
        if not torch.isfinite(weight).all():
            raise ValueError("the weight contains NaN or infinity")
        # Blocks run over the ends of rows, but the CPU kernel of bitsandbytes 0.50 gives each row blocks of its
        # own: where K is no multiple of BLOCK it reads wrong scales. As [blocks, BLOCK] both mean the same.
        flat = nn.functional.pad(weight.float().flatten(), (0, -weight.numel() % BLOCK)).view(-1, BLOCK)
        qweight, state = quantize_4bit(flat, blocksize=BLOCK, quant_type="nf4")
        self.register_buffer("qweight", qweight)
        self.register_buffer("absmax", state.absmax)

    def weight_arrays(self) -> tuple[NDArray[np.generic], ...]:
        """Return qweight and absmax."""
        return self.qweight.cpu().numpy(), self.absmax.cpu().numpy()

    def dequantize(self, dtype: torch.dtype = torch.float32, columns: slice | Tensor = slice(None)) -> Tensor:
        """Return the transposed weight [K, N], or some of its columns, in `dtype`."""
        shape = torch.Size((len(self.absmax), BLOCK))
        state = QuantState(self.absmax, shape, blocksize=BLOCK, quant_type="nf4", dtype=dtype)
        flat = dequantize_4bit(self.qweight, state).flatten()
        weight = flat[: self.out_features * self.in_features].view(self.out_features, self.in_features)
        return weight[columns].T


def round_to_nf4(model: nn.Module, keep: tuple[str, ...] = (), read: ReadWeight | None = None) -> None:
    """Replace every linear layer of `model` but its output layer by its nf4 form, in place, as bitsandbytes does.

    Args:
        model: Its embedding stays float too.
        keep: Names of modules that stay float with all that is in them.
        read: As for `edge_ft.quant.conversion.quantize_model`.
    """
    read = read or current_weights(model)
    head = model.get_output_embeddings()  # type: ignore[operator]

    def replacement(name: str, layer: nn.Linear, bias: Tensor | None) -> NF4Linear | None:
        return None if layer is head else NF4Linear(read(f"{name}.weight", slice(None)).detach(), bias)

    replace_linear_layers(model, keep, read, replacement)
