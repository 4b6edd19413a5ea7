"""Layers whose weights stay codes: dequantized one layer at a time, one operator under ONNX export.

Both are subclasses of the torch layer they replace, with `weight` None and the codes in a buffer named
`qweight`: the name by which PEFT finds a quantized layer's device, so that its LoRA layers wrap them.

In memory the codes lie the other way round than in the file, K before N, so that each step of dequantizing
runs along N in full vectors; along the file's inner dimension, one block, it took 20 times as long.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from edge_ft.families import Family
from edge_ft.quant.blockwise import Bits, Codes, pack_nibbles, quantize, unpack_nibbles

__all__ = [
    "FrozenLinear",
    "Kept",
    "QuantEmbedding",
    "QuantLinear",
    "codes_sha256",
    "embedding_scale",
    "exporting",
    "frozen_layers",
    "is_within",
    "move",
    "quantize_model",
    "stack_names",
    "transpose_conv1d",
    "transposed_weight",
]

# torch.onnx.is_in_onnx_export() is False inside torch.export.export: without a flag of our own the
# trace would hold a dense float graph, and nothing would say so.
_exporting = False

_ROUNDED = 2**19
"""Weights that are rounded at a time."""
_DEQUANTIZED = 2**20
"""Weights that are float32 at a time on the way to fewer bits: all of a large layer's would cost a page of new memory
each time (2,048 x 5,632 to bfloat16: 37 ms at once, so 18; a page is the system's to clear)."""


class _OverCodes(nn.Module):
    """What both layers share: the buffers."""

    qweight: Tensor
    """uint8 [K_blocks * block_size * bits / 8, N]; at 4 bits the low nibble is the earlier row."""
    scales: Tensor
    """float32 [K_blocks, N]"""
    zero_points: Tensor
    """uint8 [K_blocks, N]"""
    bits: Bits
    block_size: int
    size: int
    """K of the weight [N, K], without the last block's padding."""

    def hold(self, codes: Codes) -> None:
        """Take these codes, instead of those it had."""
        self.bits, self.block_size, self.size = codes.bits, codes.block_size, codes.in_features
        rows, blocks = codes.scales.shape
        zero_points = unpack_nibbles(codes.zero_points, blocks) if codes.bits == 4 else codes.zero_points
        for name, array in (
            ("qweight", codes.qweight.reshape(rows, -1)),
            ("scales", codes.scales),
            ("zero_points", zero_points),
        ):
            self.register_buffer(name, torch.from_numpy(np.ascontiguousarray(array.T)))

    def codes(self) -> Codes:
        """The codes in the file's layout."""
        qweight, scales, zero_points = (
            np.ascontiguousarray(buffer.cpu().numpy().T) for buffer in (self.qweight, self.scales, self.zero_points)
        )
        rows, blocks = scales.shape
        return Codes(
            qweight.reshape(rows, blocks, -1),
            scales,
            pack_nibbles(zero_points) if self.bits == 4 else zero_points,
            self.size,
            self.bits,
        )

    def stored(self) -> tuple[NDArray[np.generic], ...]:
        codes = self.codes()
        return codes.qweight, codes.scales, codes.zero_points

    def dequantize(self, dtype: torch.dtype = torch.float32, columns: slice | Tensor = slice(None)) -> Tensor:
        """The transposed weight [K, N], or some of its columns, computed in float32 and rounded once to `dtype`."""
        qweight, scales, zero_points = (buffer[:, columns] for buffer in (self.qweight, self.scales, self.zero_points))
        blocks, width = scales.shape
        values = qweight.unflatten(0, (blocks, -1))
        if values.is_cuda:  # in the fewest launches, which are what a small layer takes there
            weight = torch.empty(blocks, self.block_size, width, dtype=dtype, device=values.device)
            torch.mul(self._differences(values, zero_points), scales[:, None], out=weight)
        elif dtype == torch.float32:
            weight = self._differences(values, zero_points).to(dtype).mul_(scales[:, None])
        else:
            weight = torch.empty(blocks, self.block_size, width, dtype=dtype)
            step = max(1, _DEQUANTIZED // max(1, self.block_size * width))
            for start in range(0, blocks, step):
                part = slice(start, start + step)
                wide = self._differences(values[part], zero_points[part]).to(torch.float32)
                weight[part] = wide.mul_(scales[part, None])
        return weight.flatten(0, 1)[: self.size]

    def _differences(self, values: Tensor, zero_points: Tensor) -> Tensor:
        """Codes less zero points [blocks, block_size, N], of bytes [blocks, block_size * bits / 8, N]."""
        if self.bits == 8:
            return values.to(torch.int16).sub_(zero_points[:, None])
        both = torch.empty(*values.shape[:2], 2, values.shape[2], dtype=torch.uint8, device=values.device)
        torch.bitwise_and(values, 15, out=both[:, :, 0])
        torch.bitwise_right_shift(values, 4, out=both[:, :, 1])
        # The difference of two 4-bit codes is right in a signed byte, however the unsigned one wraps.
        return both.flatten(1, 2).sub_(zero_points[:, None]).view(torch.int8)


@contextmanager
def exporting(model: nn.Module) -> Iterator[None]:
    """While inside, the quantized layers of `model` hold the file's layout and emit ONNX operators over it."""
    global _exporting
    layers = [module for module in model.modules() if isinstance(module, _OverCodes)]
    before = [dict(layer._buffers) for layer in layers]
    files: dict[int, tuple[Tensor, ...]] = {}  # tied layers stay tied
    for layer in layers:
        at = layer.qweight.data_ptr()
        if at not in files:
            files[at] = tuple(map(torch.from_numpy, layer.stored()))
        layer.qweight, layer.scales, layer.zero_points = files[at]
    _exporting = True
    try:
        yield
    finally:
        _exporting = False
        for layer, buffers in zip(layers, before, strict=True):
            layer._buffers.update(buffers)


class Kept:
    """The float weights of a layer, or parts of them, as they were first dequantized to one dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._parts: dict[tuple[int | None, int | None], Tensor] = {}

    def get(self, layer: "FrozenLinear", columns: slice) -> Tensor:
        key = columns.start, columns.stop
        if key not in self._parts:
            self._parts[key] = layer.dequantize(self.dtype, columns)
        return self._parts[key]


class FrozenLinear(nn.Linear):
    """A frozen linear layer that holds no float weight: [..., in_features] -> [..., out_features], in x's dtype."""

    kept: Kept | None = None
    """Its float weights, where time is worth more than memory."""

    def __init__(self, in_features: int, out_features: int, bias: Tensor | None) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.register_parameter("weight", None)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))

    def dequantize(self, dtype: torch.dtype = torch.float32, columns: slice | Tensor = slice(None)) -> Tensor:
        """The transposed weight [in_features, out_features], or some of its columns."""
        raise NotImplementedError

    def stored(self) -> tuple[NDArray[np.generic], ...]:
        """What it holds of the weight, in an order that a hash may rely on."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _FrozenMatMul.apply(x, self)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class _FrozenMatMul(torch.autograd.Function):
    """x Wᵀ with W dequantized in forward and again in backward, so that no float weight is kept between."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: FrozenLinear) -> Tensor:
        ctx.layer = layer
        return x @ transposed_weight(layer, x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad @ transposed_weight(ctx.layer, grad.dtype).T, None


class QuantLinear(_OverCodes, FrozenLinear):
    """A `FrozenLinear` over codes of the grid."""

    def __init__(self, codes: Codes, bias: Tensor | None = None) -> None:
        FrozenLinear.__init__(self, codes.in_features, codes.qweight.shape[0], bias)
        self.hold(codes)

    def forward(self, x: Tensor) -> Tensor:
        if not _exporting:
            return super().forward(x)
        return torch.onnx.ops.symbolic(
            "com.microsoft::MatMulNBits",
            [x, self.qweight, self.scales, self.zero_points, None, self.bias],
            {
                "K": self.in_features,
                "N": self.out_features,
                "bits": self.bits,
                "block_size": self.block_size,
                "accuracy_level": 1,
            },
            dtype=x.dtype,
            shape=(*x.shape[:-1], self.out_features),
            version=1,
        )


def transposed_weight(layer: nn.Module, dtype: torch.dtype, columns: slice | Tensor = slice(None)) -> Tensor:
    """[in_features, out_features] of a frozen or float linear layer, or some of its columns."""
    if isinstance(layer, FrozenLinear):
        if layer.kept is not None and layer.kept.dtype == dtype and isinstance(columns, slice):
            return layer.kept.get(layer, columns)
        return layer.dequantize(dtype, columns)
    return layer.get_parameter("weight")[columns].T.to(dtype)


class QuantEmbedding(_OverCodes, nn.Embedding):
    """A frozen embedding over codes: ids [...] -> float32 [..., embedding_dim]."""

    def __init__(self, codes: Codes, padding_idx: int | None = None, scale: float = 1.0) -> None:
        """`scale` is what every embedding is multiplied by (Gemma's square root of the width)."""
        nn.Module.__init__(self)
        self.scale = scale
        self.num_embeddings, self.embedding_dim = codes.qweight.shape[0], codes.in_features
        self.padding_idx = padding_idx
        self.register_parameter("weight", None)
        self.hold(codes)

    def forward(self, input_ids: Tensor) -> Tensor:
        if not _exporting:
            return self._scaled(self.dequantize(columns=input_ids.flatten()).T.unflatten(0, input_ids.shape))
        embedded = torch.onnx.ops.symbolic(
            "com.microsoft::GatherBlockQuantized",
            # The operator wants [N, blob]: edge_ft.export.trace gives it the same bytes in that shape.
            [self.qweight, input_ids, self.scales, self.zero_points],
            {"gather_axis": 0, "quantize_axis": 1, "block_size": self.block_size, "bits": self.bits},
            dtype=torch.float32,
            shape=(*input_ids.shape, self.embedding_dim),
            version=1,
        )
        return self._scaled(embedded)

    def _scaled(self, embedded: Tensor) -> Tensor:
        return embedded if self.scale == 1.0 else embedded * self.scale


def embedding_scale(embedding: nn.Module) -> float:
    """What a token embedding multiplies its rows by: the square root of the width in Gemma, else 1."""
    return float(getattr(embedding, "embed_scale", 1.0))


def transpose_conv1d(model: nn.Module) -> set[str]:
    """Replace GPT-2's `Conv1D` layers by linear layers of the same name, in place: the weights lie [out, in] then.

    Returns:
        The names of these weights, which lie [in, out] in the checkpoint.
    """
    turned = set()
    for name, module in list(model.named_modules()):
        if isinstance(module, Conv1D):
            turned.add(f"{name}.weight")
            layer = nn.Linear(module.nx, module.nf, device="meta")
            layer.weight = nn.Parameter(module.weight.detach().T.contiguous())
            layer.bias = module.bias
            model.set_submodule(name, layer)
    return turned


def quantize_model(
    model: nn.Module,
    block_size: int,
    keep: tuple[str, ...] = (),
    bits: Bits = 4,
    read: Callable[[str, slice], Tensor] | None = None,
    known: Callable[[str, int], Codes | None] = lambda name, columns: None,
) -> None:
    """Replace every linear layer and token embedding of `model` by its quantized form, in place.

    Args:
        model: A model with a word embedding as `get_input_embeddings()`.
        block_size: Weights per scale.
        keep: Names of modules that stay float with all that is in them (a head that is trained in full).
        bits: Of a code.
        read: Gives some rows of the parameter of a name, where those of `model` are on the meta device; default
            the model's own.
        known: Gives the codes of the layer of a name with so many columns where they were chosen before, else None.
    """
    read = read or (lambda name, rows: model.get_parameter(name)[rows])

    def rounded(rows: Tensor) -> Codes:
        return quantize(rows.detach().float().cpu().numpy(), block_size, bits, torch.get_num_threads())

    def codes_of(name: str, shape: Sequence[int]) -> Codes:
        """A few rows at a time: they are float only while they are rounded."""
        if (found := known(name, shape[1])) is not None:
            return found
        size = max(1, _ROUNDED // shape[1])
        return Codes.of_rows(
            [rounded(read(f"{name}.weight", slice(start, start + size))) for start in range(0, shape[0], size)]
        )

    embedding = model.get_input_embeddings()  # type: ignore[operator]
    names = {module: name for name, module in model.named_modules()}
    for name, module in list(model.named_modules()):
        parent = model.get_submodule(name.rpartition(".")[0])
        if is_within(name, keep):
            continue
        if isinstance(module, nn.Linear):
            if module.weight is embedding.weight:
                continue  # tied to the embedding: set below, over the same codes
            bias = None if module.bias is None else read(f"{name}.bias", slice(None)).detach()
            codes = codes_of(name, module.weight.shape)
            setattr(parent, name.rpartition(".")[2], QuantLinear(codes, bias))
    # Only whole blocks: GatherBlockQuantized knows no padded last block.
    if embedding.embedding_dim % block_size:
        return
    codes = codes_of(names[embedding], embedding.weight.shape)
    head = model.get_output_embeddings()  # type: ignore[operator]
    tied = head is not None and getattr(head, "weight", None) is embedding.weight
    quantized = QuantEmbedding(codes, embedding.padding_idx, embedding_scale(embedding))
    model.set_input_embeddings(quantized)  # type: ignore[operator]
    if tied:
        tied_head = QuantLinear(codes, None if head.bias is None else read(f"{names[head]}.bias", slice(None)).detach())
        for buffer in ("qweight", "scales", "zero_points"):
            setattr(tied_head, buffer, getattr(quantized, buffer))
        model.set_output_embeddings(tied_head)  # type: ignore[operator]


def move(model: Any, device: torch.device | str) -> Any:
    """`model.to(device)`, after which tied codes are still tied: torch moves each buffer by itself."""
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


def is_within(name: str, modules: tuple[str, ...]) -> bool:
    """Whether a dotted name is one of `modules`, or of something inside one."""
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def stack_names(model: nn.Module, family: Family) -> tuple[str, ...]:
    """Dotted names of the lists of transformer layers in `model`: a body without a head has no prefix."""
    prefix = str(model.base_model_prefix)
    return tuple(stack if hasattr(model, prefix) else stack.removeprefix(f"{prefix}.") for stack in family.stacks)


def frozen_layers(model: nn.Module) -> dict[str, FrozenLinear | QuantEmbedding]:
    """Every quantized layer by its name in the model without PEFT around it."""
    # PEFT wraps a layer as NAME.base_layer inside base_model.model: the layer itself is the same.
    return {
        name.removeprefix("base_model.model.").removesuffix(".base_layer"): module
        for name, module in model.named_modules()
        if isinstance(module, FrozenLinear | QuantEmbedding)
    }


def codes_sha256(model: nn.Module) -> str:
    """Hex sha256 over what every quantized layer holds, in the order of their names."""
    layers = frozen_layers(model)
    digest = hashlib.sha256()
    for name in sorted(layers):
        digest.update(name.encode())
        for array in layers[name].stored():
            digest.update(array.tobytes())
    return digest.hexdigest()
