"""From a traced graph to the one that ships: only ONNX operators and ONNX Runtime's contrib operators.

Each step rewrites one pattern that a trace is known to contain, so that the graph has as few nodes as one written by
hand. Weights move between operators; their values never change.
"""

import logging
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import ClearMetadataAndDocStringPass, IdentityEliminationPass, RemoveUnusedNodesPass
from onnxscript.optimizer import optimize

__all__ = ["input_of", "lower", "silence_exporters", "store_in_fp16", "take_over", "transposed_matmul"]

LINEARS = ("MatMulNBits", "Linear")


@contextmanager
def silence_exporters() -> Iterator[None]:
    """Let the exporters log only errors inside the block: their warnings are not for users.

    Yields:
        Nothing.
    """
    with ExitStack() as undo:
        undo.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir"):
            logger = logging.getLogger(name)
            undo.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.ERROR)
        yield


def lower(model: ir.Model) -> None:
    """Rewrite a traced graph in place into one that ONNX Runtime runs.

    The q, k and v layers of a decoder become one layer `BLOCK.qkv_proj`, whose tensors are theirs concatenated along
    N.

    Args:
        model: A graph of `edge_ft.export.trace.trace` or `trace_seq2seq`.
    """
    graph = model.graph
    IdentityEliminationPass()(model)
    _bypass_reshapes(graph)
    _join_qkv(graph)
    RemoveUnusedNodesPass()(model)
    _lower_linears(graph)
    with silence_exporters():
        optimize(model, onnx_shape_inference=False)
    _take_packed_qkv(graph)
    _join_residuals(graph)
    RemoveUnusedNodesPass()(model)
    graph.sort()
    ClearMetadataAndDocStringPass()(model)
    model.opset_imports.pop("edge_ft", None)
    for value in (*graph.inputs, *graph.outputs, *graph.initializers.values()):
        value.metadata_props.clear()
    # Only the dimensions of inputs and outputs have meaningful names; the rest is inferred on loading.
    for node in graph:
        for value in node.outputs:
            value.metadata_props.clear()
            if not value.is_graph_output():
                value.shape = value.type = None


def store_in_fp16(model: ir.Model) -> None:
    """Store every matrix that float16 represents exactly as float16, with a Cast where it is read; call after `lower`.

    Matrices are weights and the scales of blocks; ONNX Runtime folds such a Cast when it opens the graph. Embedding
    rows are cast after the lookup, so that the table itself stays memory-mapped; OpenVINO takes only constant scales
    there.

    Args:
        model: A lowered graph, changed in place.
    """
    graph = model.graph
    for value in list(graph.initializers.values()):
        array = _array(value)
        if array.dtype != np.float32 or array.ndim < 2 or value.is_graph_input():
            continue
        narrow = array.astype(np.float16)
        if not np.array_equal(narrow, array):
            continue
        uses = list(value.uses())
        value.const_value, value.type = ir.tensor(narrow, name=value.name), ir.TensorType(ir.DataType.FLOAT16)
        whole = ir.node("Cast", [value], {"to": ir.DataType.FLOAT})
        for node, index in uses:
            if node.op_type == "Gather":
                rows = ir.node("Cast", [node.outputs[0]], {"to": ir.DataType.FLOAT})
                take_over(node.outputs[0], rows.outputs[0])
                rows.replace_input_with(0, node.outputs[0])
                graph.insert_after(node, rows)
            elif node.op_type == "GatherBlockQuantized" and (rounding := _rounding(node)) is not None:
                rounding.outputs[0].replace_all_uses_with(node.outputs[0])  # which are float16 now
                graph.remove(rounding, safe=True)
            else:
                node.replace_input_with(index, whole.outputs[0])
        if whole.outputs[0].uses():
            graph.insert_before(graph[0], whole)


def _rounding(lookup: ir.Node) -> ir.Node | None:
    """Return the Cast to float16 of a look-up's rows; None: they are read as they are."""
    uses = [use.node for use in lookup.outputs[0].uses()]
    return uses[0] if len(uses) == 1 and uses[0].op_type == "Cast" else None


def _bypass_reshapes(graph: ir.Graph) -> None:
    """Read q, k, v and the attention's output before heads are split or merged, which has no effect here."""
    for node in graph:
        inner = _producer(node)
        if inner is None:
            continue
        if node.op_type == "SimplifiedLayerNormalization" and inner.op_type == "Transpose":
            # The norm runs along the last axis, which splitting heads does not move.
            outer = next(iter(node.outputs[0].uses())).node
            perm = list(inner.attributes["perm"].as_ints())
            if outer.op_type == "Transpose" and list(outer.attributes["perm"].as_ints()) == perm == [0, 2, 1, 3]:
                node.replace_input_with(0, input_of(inner, 0))
                node.outputs[0].shape = outer.outputs[0].shape
                outer.outputs[0].replace_all_uses_with(node.outputs[0])
        elif node.op_type == inner.op_type == "Transpose":
            first, second = inner.attributes["perm"].as_ints(), node.attributes["perm"].as_ints()
            if [first[axis] for axis in second] == list(range(len(first))):
                node.outputs[0].replace_all_uses_with(input_of(inner, 0))
        elif node.op_type == inner.op_type == "Reshape":
            source = input_of(inner, 0)
            node.replace_input_with(0, source)
            if source.shape == node.outputs[0].shape:
                node.outputs[0].replace_all_uses_with(source)


def _join_qkv(graph: ir.Graph) -> None:
    """Merge three layers over one input that only GroupQueryAttention reads into one layer with all their rows.

    Layers with further bits are two products each, of which the first and the second ones are merged.
    """
    for attention, layers in _attentions(graph):
        finer = [found for layer in layers if (found := _further_bits(layer)) is not None]
        if len(finer) < len(layers):
            joined = _join(graph, attention, layers)
        elif joined := _join(graph, attention, [_producing(layer, 0) for layer in layers]):
            further = _join(graph, attention, [_producing(divide, 0) for divide in finer])
            assert further is not None  # over the same input as the first products
            divide = ir.node("Div", [further.outputs[0], finer[0].inputs[1]])
            joined = ir.node("Add", [joined.outputs[0], divide.outputs[0]])
            graph.insert_before(attention, [divide, joined])
        if joined is not None:
            for index, value in enumerate((joined.outputs[0], None, None)):
                attention.replace_input_with(index, value)


def _further_bits(layer: ir.Node) -> ir.Node | None:
    """Return the Div of the further bits' product, where a layer is the sum of two products; else None."""
    first, second = (_producer(layer, index) for index in (0, 1)) if len(layer.inputs) == 2 else (None, None)
    if layer.op_type != "Add" or first is None or second is None or second.op_type != "Div":
        return None
    product = _producer(second)
    return second if first.op_type in LINEARS and product is not None and product.op_type in LINEARS else None


def _join(graph: ir.Graph, before: ir.Node, layers: list[ir.Node]) -> ir.Node | None:
    """Return one layer with the rows of several over one input, inserted into the graph; None if they differ more."""
    kinds = {(layer.op_type, layer.inputs[0], *(operand is None for operand in layer.inputs)) for layer in layers}
    if len(kinds) > 1 or layers[0].op_type not in LINEARS:
        return None
    first = layers[0]
    operands = list(first.inputs)
    for index, operand in enumerate(first.inputs[1:], start=1):
        if operand is not None:
            block, _, tensor = str(operand.name).rsplit(".", 2)
            name = f"{block}.qkv_proj.{tensor}"
            if (known := graph.initializers.get(name)) is None:
                known = _initializer(graph, name, np.concatenate([_array(input_of(layer, index)) for layer in layers]))
            operands[index] = known
    attributes = dict(first.attributes)
    if "N" in attributes:
        attributes["N"] = ir.AttrInt64("N", sum(layer.attributes["N"].as_int() for layer in layers))
    joined = ir.Node(first.domain, first.op_type, operands, attributes.values(), version=first.version)
    graph.insert_before(before, joined)
    return joined


def _take_packed_qkv(graph: ir.Graph) -> None:
    """Let GroupQueryAttention read q, k and v packed, where one layer computes them packed (GPT-2, Phi-3)."""
    for attention, parts in _attentions(graph):
        if len({part.inputs[0] for part in parts}) > 1:
            continue
        packed = parts[0].op_type == "Split" and list(attention.inputs[:3]) == list(parts[0].outputs)
        if all(part.op_type == "Slice" for part in parts):
            starts, ends = ([_number(part.inputs[index]) for part in parts] for index in (1, 2))
            packed = None not in starts and starts[0] == 0 and starts[1:] == ends[:-1]
        if packed:
            for index, value in enumerate((parts[0].inputs[0], None, None)):
                attention.replace_input_with(index, value)


def _attentions(graph: ir.Graph) -> Iterator[tuple[ir.Node, list[ir.Node]]]:
    """Yield each GroupQueryAttention with the nodes that compute its q, k and v."""
    for attention in graph:
        if attention.op_type == "GroupQueryAttention":
            parts = [part for index in range(3) if (part := _producer(attention, index)) is not None]
            if len(parts) == 3:
                yield attention, parts


def _lower_linears(graph: ir.Graph) -> None:
    """Replace edge_ft::Linear by MatMul with a transposed weight, or FusedMatMul if an embedding shares the weight."""
    weights = {input_of(node, 1) for node in graph if node.op_type == "Linear"}
    alone = {weight for weight in weights if all(use.node.op_type == "Linear" for use in weight.uses())}
    for weight in alone:
        transposed = _array(weight).T
        weight.const_value, weight.shape = ir.tensor(transposed, name=weight.name), ir.Shape(transposed.shape)
    for node in graph:
        if node.op_type != "Linear":
            continue
        x, weight, bias = input_of(node, 0), input_of(node, 1), (*node.inputs, None)[2]
        product = ir.node("MatMul", [x, weight]) if weight in alone else transposed_matmul(x, weight)
        nodes = [product] if bias is None else [product, ir.node("Add", [product.outputs[0], bias])]
        take_over(node.outputs[0], nodes[-1].outputs[0])
        graph.insert_before(node, nodes)
        graph.remove(node, safe=True)


def _join_residuals(graph: ir.Graph) -> None:
    """Merge Add and SimplifiedLayerNormalization into SkipSimplifiedLayerNormalization; ONNX Runtime does not."""
    for norm in graph:
        add = _producer(norm)
        if norm.op_type != "SimplifiedLayerNormalization" or add is None or add.op_type != "Add":
            continue
        joined = ir.node(
            "SkipSimplifiedLayerNormalization",
            [*add.inputs, norm.inputs[1]],
            {"epsilon": norm.attributes["epsilon"].as_float()},
            domain="com.microsoft",
            version=1,
            num_outputs=4,
        )
        graph.insert_before(norm, joined)
        normed, mean, deviation, total = joined.outputs
        mean.name = deviation.name = ""  # an unused output that has a name is computed
        take_over(norm.outputs[0], normed)
        take_over(add.outputs[0], total)


def transposed_matmul(x: ir.Value, weight: ir.Value) -> ir.Node:
    """Return x weightᵀ: [..., K] and [N, K] -> [..., N]."""
    return ir.node("FusedMatMul", [x, weight], {"transB": 1}, domain="com.microsoft", version=1)


def take_over(old: ir.Value, new: ir.Value) -> None:
    """Replace `old` by `new` wherever it is read, also as an output of the graph."""
    new.shape, new.type = old.shape, old.type
    if old.is_graph_output():
        # `old` may stay in the graph, and a clone that names it could choose a name that the graph has.
        new.name, old.name = old.name, f"{old.name}.before"
    old.replace_all_uses_with(new, replace_graph_outputs=True)


def _initializer(graph: ir.Graph, name: str, array: NDArray[np.generic]) -> ir.Value:
    value = ir.val(name, const_value=ir.tensor(array, name=name))
    graph.register_initializer(value)
    return value


def input_of(node: ir.Node, index: int) -> ir.Value:
    """Return an input that the node must have."""
    value = node.inputs[index]
    assert value is not None
    return value


def _producer(node: ir.Node, index: int = 0) -> ir.Node | None:
    value = node.inputs[index] if node.inputs else None
    return None if value is None else value.producer()


def _producing(node: ir.Node, index: int) -> ir.Node:
    found = _producer(node, index)
    assert found is not None
    return found


def _number(value: ir.Value | None) -> int | None:
    """Return the number in a constant of one element, else None."""
    if value is None or value.const_value is None or value.const_value.size != 1:
        return None
    return int(value.const_value.numpy().item())


def _array(value: ir.Value) -> NDArray[np.generic]:
    assert value.const_value is not None
    return value.const_value.numpy()
