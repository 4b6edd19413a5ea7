"""Layers whose weights stay 4-bit codes: dequantized one layer at a time, one operator under ONNX export.

Both are subclasses of the torch layer they replace, with `weight` None and the codes in a buffer named
`qweight`: the name by which PEFT finds a quantized layer's device, so that its LoRA layers wrap them.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from edge_ft.base.grid import Codes, quantize

__all__ = ["QuantEmbedding", "QuantLinear", "codes_sha256", "exporting", "is_within", "quantize_model"]

# torch.onnx.is_in_onnx_export() is False inside torch.export.export: without a flag of our own the
# trace would hold a dense float graph, and nothing would say so.
_exporting = False


@contextmanager
def exporting() -> Iterator[None]:
    """While inside, quantized layers emit ONNX operators over their codes instead of computing."""
    global _exporting
    _exporting = True
    try:
        yield
    finally:
        _exporting = False


def dequantize(qweight: Tensor, scales: Tensor, zero_points: Tensor) -> Tensor:
    """[N, K_blocks, block_size / 2] codes -> float32 [N, K_blocks · block_size], as `grid.dequantize`."""
    rows, blocks = scales.shape
    values = torch.stack((qweight & 15, qweight >> 4), dim=-1).view(rows, blocks, -1)
    zeros = torch.stack((zero_points & 15, zero_points >> 4), dim=-1).view(rows, -1)[:, :blocks]
    return torch.sub(values, zeros.unsqueeze(-1).to(scales.dtype)).mul_(scales.unsqueeze(-1)).view(rows, -1)


class _FrozenMatMul(torch.autograd.Function):
    """x Wᵀ with W dequantized in forward and again in backward, so that no float weight is kept between."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, qweight: Tensor, scales: Tensor, zero_points: Tensor) -> Tensor:
        ctx.save_for_backward(qweight, scales, zero_points)
        ctx.in_features = x.shape[-1]
        weight = dequantize(qweight, scales, zero_points)[:, : x.shape[-1]]
        return x @ weight.T.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        weight = dequantize(*ctx.saved_tensors)[:, : ctx.in_features]
        return grad @ weight.to(grad.dtype), None, None, None


class QuantLinear(nn.Linear):
    """A frozen linear layer over codes: [..., in_features] -> [..., out_features]."""

    qweight: Tensor
    scales: Tensor
    zero_points: Tensor

    def __init__(self, codes: Codes, bias: Tensor | None = None) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = codes.qweight.shape[0], codes.in_features
        self.block_size = codes.block_size
        self.register_parameter("weight", None)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))
        _register(self, codes)

    def forward(self, x: Tensor) -> Tensor:
        if not _exporting:
            y: Tensor = _FrozenMatMul.apply(x, self.qweight, self.scales, self.zero_points)
            return y if self.bias is None else y + self.bias
        return torch.onnx.ops.symbolic(
            "com.microsoft::MatMulNBits",
            [x, self.qweight, self.scales, self.zero_points, None, self.bias],
            {
                "K": self.in_features,
                "N": self.out_features,
                "bits": 4,
                "block_size": self.block_size,
                "accuracy_level": 1,
            },
            dtype=x.dtype,
            shape=(*x.shape[:-1], self.out_features),
            version=1,
        )


class QuantEmbedding(nn.Embedding):
    """A frozen embedding over codes: ids [...] -> [..., embedding_dim]."""

    qweight: Tensor
    scales: Tensor
    zero_points: Tensor

    def __init__(self, codes: Codes, padding_idx: int | None = None) -> None:
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = codes.qweight.shape[0], codes.in_features
        self.padding_idx = padding_idx
        self.block_size = codes.block_size
        self.register_parameter("weight", None)
        _register(self, codes)

    def forward(self, input_ids: Tensor) -> Tensor:
        if not _exporting:
            ids = input_ids.flatten()
            rows = dequantize(self.qweight[ids], self.scales[ids], self.zero_points[ids])
            return rows.view(*input_ids.shape, -1)
        return torch.onnx.ops.symbolic(
            "com.microsoft::GatherBlockQuantized",
            # The operator wants [N, blob]: edge_ft.export.trace gives it the same bytes in that shape.
            [self.qweight, input_ids, self.scales, self.zero_points],
            {"gather_axis": 0, "quantize_axis": 1, "block_size": self.block_size, "bits": 4},
            dtype=torch.float32,
            shape=(*input_ids.shape, self.embedding_dim),
            version=1,
        )


def quantize_model(model: nn.Module, block_size: int, keep: tuple[str, ...] = ()) -> None:
    """Replace every linear layer and token embedding of `model` by its quantized form, in place.

    Args:
        model: A float model with a word embedding as `get_input_embeddings()`.
        block_size: Weights per scale.
        keep: Names of modules that stay float with all that is in them (a head that is trained in full).
    """
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    for name, module in list(model.named_modules()):
        parent = model.get_submodule(name.rpartition(".")[0])
        if is_within(name, keep):
            continue
        if isinstance(module, nn.Linear):
            if module.weight is embedding.weight:
                continue  # tied to the embedding: set below, over the same codes
            bias = None if module.bias is None else module.bias.data
            setattr(parent, name.rpartition(".")[2], QuantLinear(_codes(module.weight, block_size), bias))
    # Only whole blocks: GatherBlockQuantized knows no padded last block.
    if embedding.embedding_dim % block_size:
        return
    codes = _codes(embedding.weight, block_size)
    head = model.get_output_embeddings()  # type: ignore[operator]
    tied = head is not None and getattr(head, "weight", None) is embedding.weight
    quantized = QuantEmbedding(codes, embedding.padding_idx)
    model.set_input_embeddings(quantized)  # type: ignore[operator]
    if tied:
        tied_head = QuantLinear(codes, None if head.bias is None else head.bias.data)
        for buffer in ("qweight", "scales", "zero_points"):
            setattr(tied_head, buffer, getattr(quantized, buffer))
        model.set_output_embeddings(tied_head)  # type: ignore[operator]


def is_within(name: str, modules: tuple[str, ...]) -> bool:
    """Whether a dotted name is one of `modules`, or of something inside one."""
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def codes_sha256(model: nn.Module) -> str:
    """Hex sha256 over the codes of every quantized layer, in the order of their names."""
    # PEFT wraps a layer as NAME.base_layer inside base_model.model: the layer itself is the same.
    layers = {
        name.removeprefix("base_model.model.").removesuffix(".base_layer"): module
        for name, module in model.named_modules()
        if isinstance(module, QuantLinear | QuantEmbedding)
    }
    digest = hashlib.sha256()
    for name in sorted(layers):
        digest.update(name.encode())
        for buffer in (layers[name].qweight, layers[name].scales, layers[name].zero_points):
            digest.update(buffer.cpu().numpy().tobytes())
    return digest.hexdigest()


def _codes(weight: Tensor, block_size: int) -> Codes:
    return quantize(weight.detach().float().cpu().numpy(), block_size)


def _register(module: nn.Module, codes: Codes) -> None:
    module.register_buffer("qweight", torch.from_numpy(codes.qweight))
    module.register_buffer("scales", torch.from_numpy(codes.scales))
    module.register_buffer("zero_points", torch.from_numpy(codes.zero_points))
