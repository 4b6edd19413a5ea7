"""The graph with LoRA inputs: beside linear layers a low-rank term B A x, whose A and B have no values yet.

It reads the same file of weights as the graph that it is made from. The rank is a free dimension of each layer.
`edge_ft.export.lora_defaults` gives such a graph an adapter that it answers with.
"""

from collections.abc import Container, Iterable, Iterator, Mapping

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from edge_ft.export.bundle_weights import JOINED
from edge_ft.export.lowering import input_of, take_over, transposed_matmul

__all__ = ["add_head_inputs", "add_lora_inputs"]

MATMULS = ("MatMulNBits", "MatMul", "FusedMatMul")
Sizes = Mapping[str, tuple[int, int]]


def add_lora_inputs(model: ir.Model, sizes: Sizes, tied: Mapping[str, str] | None = None) -> set[str]:
    """Add inputs `lora_A.MODULE` [rank, in_features] and `lora_B.MODULE` [out_features, rank] to linear layers.

    Each layer has a rank of its own; rank 0 leaves it as it is. The scaling is part of B.

    Args:
        model: A graph of `edge_ft.export.lowering.lower`, changed in place.
        sizes: in_features and out_features by the name of the layer, as in the model that was traced.
        tied: By the name of a module whose weight is that of another one, the name of the other (a head and the
            token embedding).

    Returns:
        The layers that the graph holds: of an encoder-decoder's graphs each holds some.
    """
    graph = model.graph
    held: set[str] = set()
    for parts, nodes in _find_layers(graph, sizes, tied or {}):
        pairs = [(_input(graph, "A", part, sizes), _input(graph, "B", part, sizes)) for part in parts]
        held.update(parts)
        for node in nodes:
            downs = [transposed_matmul(input_of(node, 0), a) for a, _ in pairs]
            ups = [transposed_matmul(down.outputs[0], b) for down, (_, b) in zip(downs, pairs, strict=True)]
            terms = [up.outputs[0] for up in ups]
            joined = [ir.node("Concat", terms, {"axis": -1})] if len(terms) > 1 else []
            add = ir.node("Add", [node.outputs[0], joined[0].outputs[0] if joined else terms[0]])
            take_over(node.outputs[0], add.outputs[0])
            add.replace_input_with(0, node.outputs[0])
            graph.insert_after(node, [*downs, *ups, *joined, add])
    return held


def add_head_inputs(model: ir.Model, layers: Iterable[str], norms: Iterable[str] = ()) -> None:
    """Make the weights [out_features, in_features] and biases of linear layers inputs `head.MODULE.weight` and `.bias`.

    Args:
        model: A graph of `edge_ft.export.lowering.lower`, changed in place.
        layers: Float layers of a head that is trained in full, as in the model that was traced.
        norms: Its LayerNorms, in the order in which they run; all come after the first of `layers`.
    """
    graph = model.graph
    heads = {f"{module}.weight" for module in layers}
    for module, node in zip(norms, norms_after(graph, heads), strict=False):
        for index, kind in enumerate(("weight", "bias"), start=1):
            old = node.inputs[index] if index < len(node.inputs) else None
            if old is not None:
                value = ir.val(f"head.{module}.{kind}", ir.DataType.FLOAT, old.shape)
                node.replace_input_with(index, value)
                graph.inputs.append(value)
    for module in layers:
        weight = graph.initializers.get(f"{module}.weight")
        users = [] if weight is None else [use.node for use in weight.uses() if use.node.op_type == "MatMul"]
        for node in users:
            assert weight is not None and weight.shape is not None
            shape = ir.Shape(reversed(weight.shape))
            given = ir.val(f"head.{module}.weight", ir.DataType.FLOAT, shape)
            product = transposed_matmul(input_of(node, 0), given)
            take_over(node.outputs[0], product.outputs[0])
            graph.insert_before(node, product)
            graph.remove(node, safe=True)
            graph.inputs.append(given)
            # Of initializers with the same numbers the graph has one: a bias is found by its place, not by its name.
            add = next(use.node for use in product.outputs[0].uses())
            at = next((at for at, value in enumerate(add.inputs) if value is not None and value.is_initializer()), None)
            if add.op_type == "Add" and at is not None:
                bias = ir.val(f"head.{module}.bias", ir.DataType.FLOAT, ir.Shape((shape[0],)))
                add.replace_input_with(at, bias)
                graph.inputs.append(bias)
    RemoveUnusedNodesPass()(model)


def norms_after(nodes: Iterable[ir.Node], weights: Container[str]) -> Iterator[ir.Node]:
    """Yield the LayerNorms that come after the first product with a weight of one of these names."""
    inside = False
    for node in nodes:
        inside = inside or any(value is not None and str(value.name) in weights for value in node.inputs)
        if inside and node.op_type == "LayerNormalization":
            yield node


def _find_layers(graph: ir.Graph, sizes: Sizes, tied: Mapping[str, str]) -> list[tuple[tuple[str, ...], list[ir.Node]]]:
    """Return the layers of each product, several where an export joined them, and the nodes that compute it.

    There are several nodes if a model runs the same layers again.
    """
    products: dict[str, list[ir.Node]] = {}
    for name, weight in graph.initializers.items():
        module, _, part = name.rpartition(".")
        if part in ("qweight", "weight"):
            users = [use.node for use in weight.uses() if use.idx == 1 and use.node.op_type in MATMULS]
            if users:
                products[module] = users
    found: dict[str, tuple[tuple[str, ...], list[ir.Node]]] = {}
    for module, nodes in products.items():
        block, _, last = module.rpartition(".")
        parts = tuple(f"{block}.{part}" for part in JOINED.get(last, ()))
        if parts and module not in sizes and all(part in sizes for part in parts):
            found |= dict.fromkeys(parts, (parts, nodes))
    for module in sizes:
        named = next((name for name in (module, tied.get(module)) if name in products), None)
        if module not in found and named is not None:
            found[module] = (module,), products[named]
    return list({parts: (parts, nodes) for parts, nodes in found.values()}.values())


def _input(graph: ir.Graph, part: str, module: str, sizes: Sizes) -> ir.Value:
    in_features, out_features = sizes[module]
    # ONNX Runtime requires dimensions of the same name to be equal, and layers may differ in rank.
    rank = f"rank.{module}"
    shape = (rank, in_features) if part == "A" else (out_features, rank)
    value = ir.val(f"lora_{part}.{module}", ir.DataType.FLOAT, ir.Shape(shape))
    graph.inputs.append(value)
    return value
