"""One trace of a live model, in which hooks stand in where ONNX Runtime has a fused operator.

`torch.export` sees attention, RMSNorm and linear layers as single operators (`torch.onnx.ops.symbolic`), whatever the
architecture around them; `edge_ft.export.lowering` turns the result into plain ONNX and ONNX Runtime's contrib
operators.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.onnx.ops import symbolic
from transformers import AttentionInterface, PreTrainedModel

from edge_ft.export.lowering import silence_exporters
from edge_ft.models.fused_ops import rms_norm_parameters
from edge_ft.quant.layers import exporting

__all__ = ["Attention", "Dims", "patches", "trace_module"]

OPSET = 21

# Names that transformers.js and onnxruntime-genai use to size an empty cache, and the sizes that are traced.
EXAMPLE_SIZES = {
    "batch_size": 2,
    "sequence_length": 3,
    "past_sequence_length": 4,
    "total_sequence_length": 7,
    "encoder_sequence_length": 5,
}

ATTENTION = "edge_ft"
"""Name of the attention function that is registered with transformers while a model is traced."""

Dims = tuple[int | str, ...]
Attention = Callable[..., tuple[Tensor, None]]
"""A function of transformers' attention interface."""


def trace_module(
    model: PreTrainedModel, module: Any, attention: Attention, length: Any = torch.export.Dim.DYNAMIC
) -> ir.Model:
    """Trace a module around `model` or parts of it; the model is afterwards as it was.

    Args:
        model: The model whose names the weights get.
        module: Has the names and `Dims` of its tensors in `inputs` and `outputs`.
        attention: Replaces transformers' attention.
        length: The dimension of `sequence_length`.

    Returns:
        The graph; `edge_ft.export.lowering.lower` must follow before it runs.
    """
    examples = tuple(
        torch.zeros(
            [EXAMPLE_SIZES[size] if isinstance(size, str) else size for size in dims],
            dtype=torch.float32 if len(dims) > 2 else torch.int64,
        )
        for dims in module.inputs.values()
    )
    dynamic = tuple(
        {
            axis: length if size == "sequence_length" else torch.export.Dim.DYNAMIC
            for axis, size in enumerate(dims)
            if isinstance(size, str)
        }
        for dims in module.inputs.values()
    )
    with _fused_operators(model, attention), silence_exporters(), torch.no_grad():
        program = torch.onnx.export(
            torch.export.export(module, examples, dynamic_shapes=(dynamic,), strict=False),
            dynamo=True,
            optimize=False,
            verbose=False,
            opset_version=OPSET,
            input_names=list(module.inputs),
            output_names=list(module.outputs),
        )
    assert program is not None
    _name_values(program.model, {**module.inputs, **module.outputs})
    _name_embedding(program.model.graph, model)
    return program.model


@contextmanager
def patches() -> Iterator[Callable[[Any, str, Any], None]]:
    """Undo attribute changes at the end of a block.

    Yields:
        A function that sets an attribute: owner, name, value.
    """
    with ExitStack() as undo:

        def patch(owner: Any, name: str, value: Any) -> None:
            undo.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, value)

        yield patch


def _name_values(graph_model: ir.Model, dims: dict[str, Dims]) -> None:
    """Give weights the model's names, and dimensions of inputs and outputs the names that clients expect."""
    graph = graph_model.graph
    for value in list(graph.initializers.values()):
        value.name = str(value.name).removeprefix("model.")  # the traced module's name for the model
    for value in (*graph.inputs, *graph.outputs):
        value.shape = ir.Shape(dims[str(value.name)])
        # An input with a default: a client that does not know it gets the last position.
        if value.name == "num_logits_to_keep":
            value.const_value = ir.tensor(np.array(1, dtype=np.int64), name=value.name)
            graph.register_initializer(value)


def _name_embedding(graph: ir.Graph, model: PreTrainedModel) -> None:
    """Give GatherBlockQuantized its codes as [N, blob], in an initializer: OpenVINO refuses a Reshape."""
    names = {module: name for name, module in model.named_modules()}
    embedding, head = names[model.get_input_embeddings()], names.get(model.get_output_embeddings())
    for node in graph:
        codes = node.inputs[0] if node.op_type == "GatherBlockQuantized" else None
        if codes is None or codes.const_value is None:
            continue
        rows = codes.const_value.numpy()
        part = str(codes.name).rpartition(".")[2]  # qweight, or the further bits of some rows
        tensor = ir.tensor(rows.reshape(len(rows), -1), name=f"{embedding}.{part}")
        table = ir.val(tensor.name, const_value=tensor)
        node.replace_input_with(0, table)
        del graph.initializers[str(codes.name)]
        if codes.uses():  # by a head that is tied to the embedding, whose name it may have
            codes.name = f"{head}.{part}" if codes.name == table.name else codes.name
            graph.register_initializer(codes)
        graph.register_initializer(table)


@contextmanager
def _fused_operators(model: PreTrainedModel, attention: Attention) -> Iterator[None]:
    """Replace what ONNX Runtime fuses by single operators inside the block.

    Yields:
        Nothing.
    """
    with ExitStack() as undo:
        patch = undo.enter_context(patches())
        undo.enter_context(exporting(model))
        patch(nn.Linear, "forward", _linear)
        _fuse_norms(patch, model)
        for name in {type(module).__module__ for module in model.modules()}:
            undo.enter_context(_sorted_sets(name))
        AttentionInterface.register(ATTENTION, attention)
        undo.callback(model.set_attn_implementation, model.config._attn_implementation)
        model.set_attn_implementation(ATTENTION)
        yield


def _fuse_norms(patch: Callable[..., None], model: nn.Module) -> None:
    """Trace each RMSNorm as one operator, with the weight that it multiplies by (Gemma's plus 1)."""
    norms = [module for module in model.modules() if type(module).__name__.endswith(("RMSNorm", "T5LayerNorm"))]
    found = {norm: rms_norm_parameters(norm) for norm in norms}
    for norm, plain in found.items():
        if plain is not None and not torch.equal(plain[0], norm.get_parameter("weight")):
            patch(norm, "weight", nn.Parameter(plain[0], requires_grad=False))
    for kind in {type(norm) for norm in norms}:
        if all(plain is not None for norm, plain in found.items() if type(norm) is kind):
            patch(kind, "forward", _rms_norm)


class _SortedSet(set[Any]):
    """A set that is iterated in the same order in every process."""

    def __iter__(self) -> Iterator[Any]:
        return iter(sorted(super().__iter__(), key=str))


@contextmanager
def _sorted_sets(name: str) -> Iterator[None]:
    """Sort the sets that the functions of a transformers module make, as they name values of the graph by order.

    ModernBERT computes its rotary tables in the order of a set of texts, which differs from process to process.

    Yields:
        Nothing.
    """
    namespace = vars(sys.modules[name])
    if not name.startswith("transformers.models.") or "set" in namespace:
        yield
        return
    namespace["set"] = _SortedSet
    try:
        yield
    finally:
        del namespace["set"]


def _linear(module: nn.Linear, x: Tensor) -> Tensor:
    return symbolic(
        "edge_ft::Linear",
        [x, module.weight, module.bias],
        dtype=x.dtype,
        shape=(*x.shape[:-1], module.out_features),
        version=1,
    )


def _rms_norm(module: Any, x: Tensor) -> Tensor:
    eps = module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps
    return symbolic(
        "SimplifiedLayerNormalization",
        [x, module.weight],
        {"axis": -1, "epsilon": eps, "stash_type": 1},
        dtype=x.dtype,
        shape=x.shape,
        version=1,
    )
