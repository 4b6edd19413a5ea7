"""Give 8 bits to the 4-bit weights whose rounding costs the most loss, as far as a number of bytes goes.

The cost of a layer is estimated to second order: half the mean square of the product of what rounding changes in the
layer's output with the gradient of the log-likelihood, whose tokens are drawn from the model itself (Fisher
information). Of SmolLM2 the sum over all layers is 0.165 nats, where the divergence from the float model is 0.173.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from edge_ft.data import Batch
from edge_ft.quant.blockwise import Codes, quantize_finely
from edge_ft.quant.conversion import ReadWeight
from edge_ft.quant.devices import product_dtype
from edge_ft.quant.layers import BUFFERS, QuantEmbedding, QuantLinear
from edge_ft.quant.serialization import frozen_layers

__all__ = ["finer_layers", "refine", "saved_bytes", "spend"]

TOKENS = 512
"""Tokens that costs are estimated on, in one pass (docs/decisions/042 and 048); of a longer sequence its beginning."""
LOGITS = 2**25
"""Logits in all: they bound the number of targets."""
_LOGITS_AT_ONCE = 2**22
FIRST_ROWS = 1024
"""Rows of the head that are considered together first; twice as many after them, and so on."""
_ROWS = 4096
"""Rows of a head's weight that are float at a time."""


@dataclass(frozen=True)
class Unit:
    """Weights that get further bits together: layers of one input, or some rows of the head."""

    layers: tuple[str, ...]
    rows: int
    """Of the head: the first rows up to and with these; 0 for whole layers."""
    cost: float
    """Nats per target that rounding costs."""
    size: int
    """Bytes of the further bits."""


def saved_bytes(model: Any) -> int:
    """Return the bytes by which scales in float16 are smaller than those in float32."""
    seen = {layer.scales.data_ptr(): layer.scales.numel() for _, layer in _four_bit(model)}
    return 2 * sum(seen.values())


def finer_layers(model: Any) -> dict[str, int]:
    """Return the number of rows with further bits of each linear layer that has any."""
    return {
        name: layer.fine.shape[1]
        for name, layer in frozen_layers(model).items()
        if isinstance(layer, QuantLinear) and layer.fine is not None
    }


def refine(model: Any, read: ReadWeight, finer: Mapping[str, int]) -> None:
    """Give further bits to the first rows of some linear layers, in place; a tied embedding shares them.

    Args:
        model: A model with 4-bit codes.
        read: Reads float weights.
        finer: Number of rows by the layer's name; that of a tied embedding is the head's.
    """
    layers = dict(_four_bit(model))
    embedding = model.get_input_embeddings()
    names = {module: name for name, module in model.named_modules()}
    for name, rows in finer.items():
        layer = layers.get(name) or model.get_output_embeddings()
        tied = isinstance(embedding, QuantEmbedding) and embedding.qweight is layer.qweight
        weight, codes = f"{names[embedding] if tied else name}.weight", layer.codes()
        parts = [slice(start, min(start + _ROWS, rows)) for start in range(0, rows, _ROWS)]
        fine = [quantize_finely(read(weight, part).detach().float().numpy(), codes.block_size) for part in parts]
        layer.set_codes(Codes.concatenate([*fine, codes.rows(slice(rows, None))] if rows < len(codes.scales) else fine))
        if tied:
            for buffer in BUFFERS:
                setattr(embedding, buffer, getattr(layer, buffer))


def spend(
    model: Any,
    batch: Batch,
    read: ReadWeight,
    forward: Callable[[Any, Batch], Tensor | None],
    budget: int,
) -> dict[str, int]:
    """Choose what gets further bits: again and again the unit that saves the most loss a byte, until none fits.

    Args:
        model: A decoder with 4-bit codes, on the CPU, without an adapter.
        batch: Sequences; the first `TOKENS` tokens count.
        read: Reads float weights.
        forward: Runs the model over a batch; returns the inputs of the head [targets, hidden], with their gradient.
        budget: Bytes.

    Returns:
        The number of rows by layer, as `refine` takes it.
    """
    layers, head = _units(model, batch, read, forward)
    finer: dict[str, int] = {}
    while units := [unit for unit in (*layers, *head[:1]) if unit.size <= budget and unit.cost > 0]:
        best = max(units, key=lambda unit: unit.cost / unit.size)
        (head if best.rows else layers).remove(best)
        budget -= best.size
        finer |= {name: best.rows or model.get_submodule(name).out_features for name in best.layers}
    return finer


def _four_bit(model: Any) -> list[tuple[str, QuantLinear]]:
    return [
        (name, module) for name, module in model.named_modules() if isinstance(module, QuantLinear) and module.bits == 4
    ]


def _units(
    model: Any, batch: Batch, read: ReadWeight, forward: Callable[[Any, Batch], Tensor | None]
) -> tuple[list[Unit], list[Unit]]:
    """Return what can get further bits: layers of one input, and parts of the head in their order."""
    arrays: Any = batch
    rows = max(1, TOKENS // batch["input_ids"].shape[1])
    longest = min(TOKENS, int(batch["attention_mask"][:rows].sum(1).max()))
    few: Any = {name: array[:rows] for name, array in arrays.items()}
    few = {name: array[:, :longest] if np.ndim(array) == 2 else array for name, array in few.items()}
    head = model.get_output_embeddings()
    layers = {name: layer for name, layer in _four_bit(model) if layer is not head}
    dtype = product_dtype()
    embedded: list[Tensor] = []
    handle = model.get_input_embeddings().register_forward_hook(lambda _, __, y: _leaf(y, embedded))
    try:
        with torch.enable_grad(), _Costs(layers, read, dtype) as costs:
            last = _HeadCosts(model, read, dtype)
            hidden = forward(model, few)
            assert hidden is not None
            most = max(64, LOGITS // head.out_features)
            chosen = torch.linspace(0, len(hidden) - 1, min(len(hidden), most)).long()
            if len(chosen):
                hidden[chosen].backward(last.gradient(hidden.detach()[chosen]), inputs=embedded)
    finally:
        handle.remove()
    targets = max(1, len(chosen))
    units = []
    for names in costs.together():
        size = sum(layers[name].qweight.numel() for name in names)
        units.append(Unit(names, 0, sum(costs.found[name] for name in names) / targets, size))
    parts: list[Unit] = []
    if last.of_rows is not None:
        of_rows = last.of_rows / targets
        name = next(name for name, module in model.named_modules() if module is head)
        start, end, each = 0, FIRST_ROWS, len(head.qweight)
        while start < head.out_features:
            end = min(end, head.out_features)
            parts.append(Unit((name,), end, float(of_rows[start:end].sum()), (end - start) * each))
            start, end = end, 2 * end
    return units, parts


def _leaf(tensor: Tensor, kept: list[Tensor]) -> Tensor:
    kept.append(tensor.detach().requires_grad_())
    return kept[-1]


class _HeadCosts:
    """What the rounding of the head costs, and the gradients of log-likelihoods by its inputs."""

    def __init__(self, model: Any, read: ReadWeight, dtype: torch.dtype) -> None:
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        rounded = isinstance(head, QuantLinear) and head.bits == 4
        tied = rounded and getattr(embedding, "qweight", None) is head.qweight
        name = next(name for name, module in model.named_modules() if module is (embedding if tied else head))
        self.of_rows = torch.zeros(head.out_features) if rounded else None
        """Nats by row of the head, the sum over all targets; None where it is not rounded to 4 bits."""
        self._dtype = dtype
        self._weights: list[Tensor] = []
        self._errors: list[Tensor] = []
        self._generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for start in range(0, head.out_features, _ROWS):
                part = slice(start, min(start + _ROWS, head.out_features))
                weight = head.dequantize(dtype, part).T if rounded else head.weight[part].to(dtype)
                self._weights.append(weight)
                if rounded:
                    self._errors.append(weight - read(f"{name}.weight", part).to(dtype))

    @torch.no_grad()
    def gradient(self, hidden: Tensor) -> Tensor:
        """Return the gradient [targets, hidden] of a drawn token's log-likelihood, and add up the costs of rows."""
        size = sum(len(weight) for weight in self._weights)
        gradients = []
        for few in hidden.to(self._dtype).split(max(1, _LOGITS_AT_ONCE // size)):
            shares = torch.cat([(few @ weight.T).float() for weight in self._weights], dim=1).softmax(1)
            drawn = torch.multinomial(shares, 1, generator=self._generator)
            if self.of_rows is not None:
                changes = torch.cat([(few @ error.T).float() for error in self._errors], dim=1)
                changes -= (shares * changes).sum(1, keepdim=True)
                self.of_rows += changes.square_().mul_(shares).sum(0) / 2
            shares.scatter_add_(1, drawn, -torch.ones_like(drawn, dtype=shares.dtype))
            parts = shares.to(self._dtype).split(_ROWS, dim=1)
            products = [(part @ weight).float() for part, weight in zip(parts, self._weights, strict=True)]
            gradients.append(torch.stack(products).sum(0))
        return torch.cat(gradients)


class _Costs:
    """Hooks that estimate what the rounding of each layer costs while inside, in the backward pass."""

    def __init__(self, layers: Mapping[str, QuantLinear], read: ReadWeight, dtype: torch.dtype) -> None:
        self.found = dict.fromkeys(layers, 0.0)
        """Nats by layer, the sum over all targets."""
        self._read, self._dtype = read, dtype
        self._groups: dict[tuple[int, str], list[str]] = {}
        self._inputs = 0
        self._last: tuple[Tensor, Tensor] | None = None
        """Input of the last layer, and the same in `dtype`: several projections have one input."""
        self._handles: list[RemovableHandle] = []
        for name, layer in layers.items():
            self._handles += [
                layer.register_forward_pre_hook(lambda _, x, name=name: self._before(name, x[0])),
                layer.register_forward_hook(lambda layer, x, y, name=name: self._after(name, layer, x[0], y)),
            ]

    def __enter__(self) -> "_Costs":
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._last = None  # its graph holds this object: the garbage collector would not find it soon

    def together(self) -> list[tuple[str, ...]]:
        """Return the names of layers by their input and the module that they are in: q, k and v; gate and up."""
        return [tuple(names) for names in self._groups.values()]

    def _before(self, name: str, x: Tensor) -> Tensor:
        if self._last is None or self._last[0] is not x:
            self._last = x, x.to(self._dtype)
            self._inputs += 1
        group = self._groups.setdefault((self._inputs, name.rpartition(".")[0]), [])
        if name not in group:
            group.append(name)
        return self._last[1]

    def _after(self, name: str, layer: QuantLinear, x: Tensor, y: Tensor) -> Tensor:
        y.register_hook(lambda gradient: self._add(name, layer, x.detach(), gradient))
        return y.float()

    def _add(self, name: str, layer: QuantLinear, x: Tensor, gradient: Tensor) -> None:
        with torch.no_grad():
            error = layer.dequantize() - self._read(f"{name}.weight", slice(None)).float().T
            change = x @ error.to(x.dtype)
            self.found[name] += float((change.float() * gradient.float()).sum(-1).square().sum()) / 2
