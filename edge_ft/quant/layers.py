"""Frozen linear and embedding layers over quantized weights: dequantized one layer at a time.

The layers are subclasses of the torch layers that they replace. `weight` is None, and the quantized weight is a buffer
named `qweight`: PEFT reads a quantized layer's device from a tensor of that name, so that its LoRA layers wrap these.

A blockwise weight is transposed in memory (K before N, where the file has N before K), so that each step of
dequantizing runs along N in full vectors; along the file's inner dimension, one block, it took 20 times as long.
During an export (`exporting`) a layer has the file's layout and becomes one ONNX operator.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edge_ft.quant.blockwise import FINE_STEPS, FINE_ZERO, Bits, Codes, pack_nibbles, unpack_nibbles

__all__ = [
    "BUFFERS",
    "BF16Embedding",
    "BF16Linear",
    "FrozenEmbedding",
    "FrozenLinear",
    "QuantEmbedding",
    "QuantLinear",
    "are_half",
    "exporting",
    "transposed_weight",
]

# torch.onnx.is_in_onnx_export() is False inside torch.export.export: without a flag of our own the
# trace would hold a dense float graph without any error.
_exporting = False

_DEQUANTIZED = 2**20
"""Weights that are float32 at a time on the way to a narrower dtype: converting all of a large layer at once would
allocate new memory each time, whose pages the system clears (2,048 x 5,632 to bfloat16: 37 ms at once, so 18)."""
BUFFERS = ("qweight", "scales", "zero_points", "fine")
"""Names of the buffers of a blockwise weight; `fine` is None where no row has further bits."""


class _BlockwiseWeight(nn.Module):
    """The buffers of a weight [N, K] on the blockwise grid; see `edge_ft.quant.blockwise.Codes`."""

    qweight: Tensor
    """uint8 [K_blocks * block_size * bits / 8, N]; at 4 bits the low nibble is the earlier row."""
    scales: Tensor
    """float32 [K_blocks, N]"""
    zero_points: Tensor
    """uint8 [K_blocks, N]"""
    fine: Tensor | None
    """uint8 [K_blocks * block_size / 2, rows]: further bits of the first rows of the weight."""
    bits: Bits
    block_size: int
    size: int
    """K, without the last block's padding."""

    def set_codes(self, codes: Codes) -> None:
        """Replace the quantized weight by `codes`."""
        self.bits, self.block_size, self.size = codes.bits, codes.block_size, codes.in_features
        rows, blocks = codes.scales.shape
        zero_points = unpack_nibbles(codes.zero_points, blocks) if codes.bits == 4 else codes.zero_points
        fine = None if codes.fine is None else codes.fine.reshape(len(codes.fine), -1)
        arrays: tuple[NDArray[Any] | None, ...] = codes.qweight.reshape(rows, -1), codes.scales, zero_points, fine
        for name, array in zip(BUFFERS, arrays, strict=True):
            self.register_buffer(name, None if array is None else torch.from_numpy(np.ascontiguousarray(array.T)))

    def codes(self) -> Codes:
        """Return the quantized weight in the file's layout."""
        qweight, scales, zero_points = (
            np.ascontiguousarray(buffer.cpu().numpy().T) for buffer in (self.qweight, self.scales, self.zero_points)
        )
        fine = None if self.fine is None else np.ascontiguousarray(self.fine.cpu().numpy().T)
        rows, blocks = scales.shape
        return Codes(
            qweight.reshape(rows, blocks, -1),
            scales,
            pack_nibbles(zero_points) if self.bits == 4 else zero_points,
            self.size,
            self.bits,
            None if fine is None else fine.reshape(len(fine), blocks, -1),
        )

    def weight_arrays(self) -> tuple[NDArray[np.generic], ...]:
        """Return qweight, scales, zero points and, if some rows have further bits, those, in the file's layout."""
        codes = self.codes()
        fine = () if codes.fine is None else (codes.fine,)
        return codes.qweight, codes.scales, codes.zero_points, *fine

    def dequantize(self, dtype: torch.dtype = torch.float32, columns: slice | Tensor = slice(None)) -> Tensor:
        """Return the transposed weight [K, N], or some of its columns, computed in float32 and rounded to `dtype`."""
        qweight, scales, zero_points = (buffer[:, columns] for buffer in (self.qweight, self.scales, self.zero_points))
        blocks, width = scales.shape
        values = qweight.unflatten(0, (blocks, -1))
        fine = self._fine_of(columns)
        if values.is_cuda and fine is None:  # the fewest kernel launches, which dominate a small layer's time there
            weight = torch.empty(blocks, self.block_size, width, dtype=dtype, device=values.device)
            torch.mul(self._centred(values, zero_points), scales[:, None], out=weight)
        elif dtype == torch.float32:
            weight = self._differences(values, zero_points, fine, slice(None)).mul_(scales[:, None])
        else:
            weight = torch.empty(blocks, self.block_size, width, dtype=dtype, device=values.device)
            step = max(1, _DEQUANTIZED // max(1, self.block_size * width))
            for start in range(0, blocks, step):
                part = slice(start, start + step)
                weight[part] = self._differences(values, zero_points, fine, part).mul_(scales[part, None])
        return weight.flatten(0, 1)[: self.size]

    def _fine_of(self, columns: slice | Tensor) -> tuple[slice | Tensor, Tensor] | None:
        """Return which of some columns have further bits, and those; None where the weight has none."""
        if self.fine is None:
            return None
        rows = self.fine.shape[1]
        if isinstance(columns, Tensor):
            found = columns < rows
            return found, self.fine[:, columns[found]]
        start, stop, _ = columns.indices(self.scales.shape[1])
        count = max(0, min(stop, rows) - start)
        return slice(0, count), self.fine[:, start : start + count]

    def _differences(
        self, values: Tensor, zero_points: Tensor, fine: tuple[slice | Tensor, Tensor] | None, blocks: slice
    ) -> Tensor:
        """Return codes - zero points of some blocks, float32, with the further bits of what `_fine_of` returned."""
        wide = self._centred(values[blocks], zero_points[blocks]).to(torch.float32)
        if fine is not None:
            where, packed = fine
            finer = self._centred_fine(packed.unflatten(0, (len(values), -1))[blocks])
            wide[:, :, where] += finer.to(torch.float32) / FINE_STEPS
        return wide

    def _centred_fine(self, values: Tensor) -> Tensor:
        """Return further codes - their zero point, as `_centred`."""
        return self._centred(values, values.new_full((1, 1), FINE_ZERO))

    def _centred(self, values: Tensor, zero_points: Tensor) -> Tensor:
        """Return codes - zero points [blocks, block_size, N] of bytes [blocks, block_size * bits / 8, N]."""
        if self.bits == 8:
            return values.to(torch.int16).sub_(zero_points[:, None])
        both = torch.empty(*values.shape[:2], 2, values.shape[2], dtype=torch.uint8, device=values.device)
        torch.bitwise_and(values, 15, out=both[:, :, 0])
        torch.bitwise_right_shift(values, 4, out=both[:, :, 1])
        # The difference of two 4-bit codes is right in a signed byte, however the unsigned one wraps.
        return both.flatten(1, 2).sub_(zero_points[:, None]).view(torch.int8)


@contextmanager
def exporting(model: nn.Module) -> Iterator[None]:
    """Give the quantized layers of `model` the file's layout while inside, and trace them as ONNX operators over it."""
    global _exporting
    layers = [module for module in model.modules() if isinstance(module, _BlockwiseWeight)]
    before = [dict(layer._buffers) for layer in layers]
    files: dict[int, tuple[Tensor, ...]] = {}  # tied layers stay tied
    for layer in layers:
        at = layer.qweight.data_ptr()
        if at not in files:
            files[at] = tuple(map(torch.from_numpy, layer.weight_arrays()))
        for name, tensor in zip(BUFFERS, files[at], strict=False):
            layer._buffers[name] = tensor
        if isinstance(layer, QuantEmbedding) and layer.fine is not None and len(layer.fine) < layer.num_embeddings:
            layer._buffers["fine_scales"] = layer.scales[: len(layer.fine)].clone()  # a slice would be no constant
    _exporting = True
    try:
        yield
    finally:
        _exporting = False
        for layer, buffers in zip(layers, before, strict=True):
            layer._buffers.clear()
            layer._buffers.update(buffers)


class FrozenLinear(nn.Linear):
    """A frozen linear layer without a float weight: [..., in_features] -> [..., out_features], in x's dtype."""

    cached_dtype: torch.dtype | None = None
    """Float dtype in which the dequantized weight is kept between calls; None: it is not."""

    def __init__(self, in_features: int, out_features: int, bias: Tensor | None) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.cached: dict[tuple[int | None, int | None], Tensor] = {}
        self.register_parameter("weight", None)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))

    def dequantize(self, dtype: torch.dtype = torch.float32, columns: slice | Tensor = slice(None)) -> Tensor:
        """Return the transposed weight [in_features, out_features], or some of its columns, in `dtype`."""
        raise NotImplementedError

    def weight_arrays(self) -> tuple[NDArray[np.generic], ...]:
        """Return the arrays that define the weight, always in the same order."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]; the weight is dequantized to x's dtype."""
        y = _FrozenMatMul.apply(x, self)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class _FrozenMatMul(torch.autograd.Function):
    """x Wᵀ with W dequantized in forward and again in backward, so that no float weight is saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: FrozenLinear) -> Tensor:
        ctx.layer = layer
        return _product(x, transposed_weight(layer, x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _product(grad, transposed_weight(ctx.layer, grad.dtype).T), None


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """Return x @ weight as one product of matrices: of the last positions alone, torch would copy the weight by row."""
    return (x.reshape(-1, x.shape[-1]) @ weight).view(*x.shape[:-1], weight.shape[-1])


class QuantLinear(_BlockwiseWeight, FrozenLinear):
    """A `FrozenLinear` over a blockwise weight."""

    def __init__(self, codes: Codes, bias: Tensor | None = None) -> None:
        FrozenLinear.__init__(self, codes.in_features, codes.qweight.shape[0], bias)
        self.set_codes(codes)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]; while exporting, two `MatMulNBits` operators at most."""
        if not _exporting:
            return super().forward(x)
        product = self._product(x, self.qweight, self.scales, self.zero_points, self.bias)
        if self.fine is None:
            return product
        rows = len(self.fine)
        # The product is divided, not its input: q, k and v with further bits still have one input.
        if rows == self.out_features:
            return product + self._product(x, self.fine, self.scales, None, None) / FINE_STEPS
        finer = self._product(x, self.fine, self.scales[:rows], None, None) / FINE_STEPS
        return product + nn.functional.pad(finer, (0, self.out_features - rows))

    def _product(
        self, x: Tensor, qweight: Tensor, scales: Tensor, zero_points: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        """Return the operator for the product with some codes, while exporting."""
        return torch.onnx.ops.symbolic(
            "com.microsoft::MatMulNBits",
            [x, qweight, scales, zero_points, None, bias],
            {
                "K": self.in_features,
                "N": len(qweight),
                "bits": self.bits,
                "block_size": self.block_size,
                "accuracy_level": 1,
            },
            dtype=x.dtype,
            shape=(*x.shape[:-1], len(qweight)),
            version=1,
        )


class BF16Linear(FrozenLinear):
    """A `FrozenLinear` whose weight is bfloat16, whatever the dtype of its input.

    That is exact where the checkpoint was published in it, as most are.
    """

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


def transposed_weight(layer: nn.Module, dtype: torch.dtype, columns: slice | Tensor = slice(None)) -> Tensor:
    """Return the weight [in_features, out_features] of a frozen or float linear layer, or some of its columns."""
    if not isinstance(layer, FrozenLinear):
        return layer.get_parameter("weight")[columns].T.to(dtype)
    if layer.cached_dtype != dtype or not isinstance(columns, slice):
        return layer.dequantize(dtype, columns)
    key = columns.start, columns.stop
    if key not in layer.cached:
        layer.cached[key] = layer.dequantize(dtype, columns)
    return layer.cached[key]


class FrozenEmbedding(nn.Embedding):
    """A frozen embedding without a float weight."""

    def __init__(self, num_embeddings: int, embedding_dim: int, padding_idx: int | None, scale: float) -> None:
        """`scale` is what every embedding is multiplied by (Gemma's square root of the width)."""
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.padding_idx, self.scale = padding_idx, scale
        self.register_parameter("weight", None)


class QuantEmbedding(_BlockwiseWeight, FrozenEmbedding):
    """A `FrozenEmbedding` over a blockwise weight: ids [...] -> float32 [..., embedding_dim]."""

    half_rows: bool
    """Whether rows are rounded to float16, as the operator rounds them where the file's scales are float16."""

    def __init__(self, codes: Codes, padding_idx: int | None = None, scale: float = 1.0) -> None:
        FrozenEmbedding.__init__(self, codes.qweight.shape[0], codes.in_features, padding_idx, scale)
        self.set_codes(codes)

    def set_codes(self, codes: Codes) -> None:
        """Replace the quantized weight by `codes`."""
        super().set_codes(codes)
        self.half_rows = are_half(self.scales)

    def forward(self, input_ids: Tensor) -> Tensor:
        """[...] -> float32 [..., embedding_dim]; one `GatherBlockQuantized` operator while exporting."""
        if _exporting:
            embedded = self._gathered(input_ids, self.qweight, self.scales, self.zero_points)
            if self.fine is not None:
                embedded = embedded + self._finer(input_ids, self.fine)
        else:
            embedded = self._rows(input_ids.flatten()).T.unflatten(0, input_ids.shape)
        return embedded if self.scale == 1.0 else embedded * self.scale

    def _rows(self, ids: Tensor) -> Tensor:
        """Return rows of the weight, [embedding_dim, ids], with the operator's rounding."""
        if not self.half_rows:
            return self.dequantize(columns=ids)
        scales = self.scales[:, None, ids]
        fine, zero_points = self._fine_of(ids), self.zero_points[:, ids]
        codes = self.qweight[:, ids].unflatten(0, (len(scales), -1))
        rows = self._differences(codes, zero_points, None, slice(None)).mul_(scales).half().float()
        if fine is not None:
            where, packed = fine
            finer = self._centred_fine(packed.unflatten(0, (len(scales), -1)))
            rows[:, :, where] += (finer * scales[:, :, where]).half().float() / FINE_STEPS
        return rows.flatten(0, 1)[: self.size]

    def _finer(self, input_ids: Tensor, fine: Tensor) -> Tensor:
        """Return what the further bits of the first rows add; other rows get 0 times those of the last such row."""
        rows = len(fine)
        if rows == self.num_embeddings:
            return self._gathered(input_ids, fine, self.scales, None) / FINE_STEPS
        share = torch.where(input_ids < rows, 1.0 / FINE_STEPS, 0.0).unsqueeze(-1)
        return self._gathered(input_ids.clamp(max=rows - 1), fine, self.get_buffer("fine_scales"), None) * share

    def _gathered(self, input_ids: Tensor, qweight: Tensor, scales: Tensor, zero_points: Tensor | None) -> Tensor:
        """Return the operator for a look-up in some codes, while exporting."""
        rows: Tensor = torch.onnx.ops.symbolic(
            "com.microsoft::GatherBlockQuantized",
            # The operator's weight is [N, bytes]: edge_ft.export reshapes it.
            [qweight, input_ids, scales, zero_points],
            {"gather_axis": 0, "quantize_axis": 1, "block_size": self.block_size, "bits": self.bits},
            dtype=torch.float32,
            shape=(*input_ids.shape, self.embedding_dim),
            version=1,
        )
        return rows.half().float() if self.half_rows else rows


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


def are_half(scales: Tensor) -> bool:
    """Return whether float16 represents all of these numbers."""
    return torch.equal(scales, scales.half().float())
