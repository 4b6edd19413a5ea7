"""Replace the float layers of a model by frozen ones, a weight at a time."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from edge_ft.quant.blockwise import Bits, Codes, Grid, quantize
from edge_ft.quant.layers import BUFFERS, BF16Embedding, BF16Linear, FrozenLinear, QuantEmbedding, QuantLinear

__all__ = [
    "ReadWeight",
    "current_weights",
    "embedding_scale",
    "is_within",
    "quantize_model",
    "replace_linear_layers",
    "restore_conv1d",
    "retained_weights",
    "round_to_bf16",
    "transpose_conv1d",
]

ReadWeight = Callable[[str, slice], Tensor]
"""Returns some rows of the float parameter of a name."""

_ROUNDED = 2**19
"""Weights that a thread rounds at a time."""


def current_weights(model: nn.Module) -> ReadWeight:
    """Return a function that reads the parameters of `model` as they are when it is called."""
    return lambda name, rows: model.get_parameter(name)[rows]


def retained_weights(model: nn.Module) -> ReadWeight:
    """Return a function that reads the parameters of `model` as they are now, also after its layers were replaced."""
    weights = dict(model.named_parameters())
    return lambda name, rows: weights[name].detach()[rows]


def is_within(name: str, modules: tuple[str, ...]) -> bool:
    """Return whether a dotted name is one of `modules`, or of something inside one."""
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def embedding_scale(embedding: nn.Module) -> float:
    """Return what a token embedding multiplies its rows by: the square root of the width in Gemma, else 1."""
    return float(getattr(embedding, "embed_scale", 1.0))


def transpose_conv1d(model: nn.Module) -> set[str]:
    """Replace GPT-2's `Conv1D` layers by linear layers of the same name, in place: their weights are [out, in] then.

    Returns:
        The names of these weights, which are [in, out] in the checkpoint.
    """
    transposed = set()
    for name, module in list(model.named_modules()):
        if isinstance(module, Conv1D):
            transposed.add(f"{name}.weight")
            layer = nn.Linear(module.nx, module.nf, device="meta")
            layer.weight = nn.Parameter(module.weight.detach().T.contiguous())
            layer.bias = module.bias
            model.set_submodule(name, layer)
    return transposed


def restore_conv1d(model: nn.Module, layers: str) -> None:
    """Undo `transpose_conv1d` in place: make `Conv1D` of each linear layer inside the module of the name `layers`."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and is_within(name, (layers,)):
            layer = Conv1D(module.out_features, module.in_features)
            layer.weight = nn.Parameter(module.weight.detach().T.contiguous(), requires_grad=False)
            layer.bias = module.bias
            model.set_submodule(name, layer)


def replace_linear_layers(
    model: nn.Module,
    keep: tuple[str, ...],
    read: ReadWeight,
    replacement: Callable[[str, nn.Linear, Tensor | None], FrozenLinear | None],
) -> None:
    """Replace the linear layers of `model`, in place.

    Args:
        model: Any model.
        keep: Names of modules that stay as they are with all that is in them.
        read: Reads the biases.
        replacement: Returns the new layer for a name, the layer there and its bias; None leaves it as it is.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and not is_within(name, keep):
            bias = None if module.bias is None else read(f"{name}.bias", slice(None)).detach()
            layer = replacement(name, module, bias)
            if layer is not None:
                model.set_submodule(name, layer)


def quantize_model(
    model: nn.Module,
    grid: Grid,
    keep: tuple[str, ...] = (),
    bits: Bits = 4,
    read: ReadWeight | None = None,
    existing: Callable[[str, int], Codes | None] = lambda name, columns: None,
) -> None:
    """Replace every linear layer and the token embedding of `model` by its blockwise form, in place.

    An embedding whose width is no multiple of the block size stays float, and so does a head that is tied to it.

    Args:
        model: A model with a word embedding as `get_input_embeddings()`.
        grid: How weights are rounded.
        keep: Names of modules that stay float with all that is in them (a head that is trained in full).
        bits: Of a code.
        read: Reads the float weights, where those of `model` are on the meta device; None: the model's own.
        existing: Returns the codes of the layer of a name and number of columns, where they are known already;
            None: the weight is read and rounded.
    """
    read = read or current_weights(model)

    embedding = model.get_input_embeddings()  # type: ignore[operator]
    names = {module: name for name, module in model.named_modules()}
    linear = {  # but for a layer that is tied to the embedding: it shares its codes and is replaced below
        name: module.weight.shape
        for module, name in names.items()
        if isinstance(module, nn.Linear) and not is_within(name, keep) and module.weight is not embedding.weight
    }
    shapes = list(linear.items())
    if embedding.embedding_dim % grid.block_size == 0:  # GatherBlockQuantized supports no padded last block
        shapes.append((names[embedding], embedding.weight.shape))
    codes = _codes_in_threads(
        shapes, read, existing, lambda rows: quantize(rows, grid.block_size, bits, grid.half_scales)
    )

    def replacement(name: str, _: nn.Linear, bias: Tensor | None) -> QuantLinear | None:
        return QuantLinear(next(codes), bias) if name in linear else None

    replace_linear_layers(model, keep, read, replacement)
    if embedding.embedding_dim % grid.block_size:
        return
    shared = next(codes)
    head = model.get_output_embeddings()  # type: ignore[operator]
    tied = head is not None and getattr(head, "weight", None) is embedding.weight
    quantized = QuantEmbedding(shared, embedding.padding_idx, embedding_scale(embedding))
    model.set_input_embeddings(quantized)  # type: ignore[operator]
    if tied:
        bias = None if head.bias is None else read(f"{names[head]}.bias", slice(None)).detach()
        tied_head = QuantLinear(shared, bias)
        for buffer in BUFFERS:
            setattr(tied_head, buffer, getattr(quantized, buffer))
        model.set_output_embeddings(tied_head)  # type: ignore[operator]


def _codes_in_threads(
    shapes: Iterable[tuple[str, Sequence[int]]],
    read: ReadWeight,
    existing: Callable[[str, int], Codes | None],
    round_rows: Callable[[NDArray[np.float32]], Codes],
) -> Iterator[Codes]:
    """Yield the codes of each weight, in this order; only a few rows of a few weights are float at a time."""

    def parts() -> Iterator[tuple[Codes | NDArray[np.float32], bool]]:
        """Yield the known codes of a weight, or some of its rows, and whether they are the last ones."""
        for name, (rows, columns) in shapes:
            if (found := existing(name, columns)) is not None:
                yield found, True
                continue
            size = max(1, _ROUNDED // columns)
            for start in range(0, rows, size):
                weight = read(f"{name}.weight", slice(start, start + size))
                yield weight.detach().float().cpu().numpy(), start + size >= rows

    def work(part: Codes | NDArray[np.float32]) -> Codes:
        return part if isinstance(part, Codes) else round_rows(part)

    waiting: deque[tuple[Future[Codes], bool]] = deque()
    done: list[Codes] = []

    def take() -> Iterator[Codes]:
        part, last = waiting.popleft()
        done.append(part.result())
        if last:
            yield Codes.concatenate(done)
            done.clear()

    threads = torch.get_num_threads()
    with ThreadPoolExecutor(threads) as pool:
        for part, last in parts():
            waiting.append((pool.submit(work, part), last))
            if len(waiting) > threads:
                yield from take()
        while waiting:
            yield from take()


def round_to_bf16(model: nn.Module, keep: tuple[str, ...] = (), read: ReadWeight | None = None) -> None:
    """Replace every linear layer and the token embedding of `model` by its bfloat16 form, in place.

    Args:
        model: A model with a word embedding as `get_input_embeddings()`.
        keep: Names of modules that stay float with all that is in them.
        read: As for `quantize_model`.
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
