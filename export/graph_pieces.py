"""A graph as a chain of pieces: before the layers, each layer, after the layers.

A layer is what lies between two values through which everything passes.
"""

import re
from dataclasses import dataclass

import onnx_ir as ir

from edge_ft.export.differentiate import Undifferentiable
from edge_ft.export.lowering import input_of

__all__ = ["FURTHER", "Flow", "FurtherBits", "Piece"]

FURTHER = "further"
"""Where a layer's node keeps its `FurtherBits`."""


@dataclass(frozen=True)
class FurtherBits:
    """What more is known of the first rows of a layer's weight: codes around 8 in the same scales, divided."""

    codes: ir.Value
    scales: ir.Value
    rows: int
    divisor: float


@dataclass(frozen=True)
class Piece:
    """A part of the graph that reads one activation and computes another."""

    nodes: list[ir.Node]
    x: ir.Value
    y: ir.Value
    source: ir.Value | None = None
    """What it reads besides: the encoder's hidden states."""


class Flow:
    """The graph as a chain: before the layers, each layer, after the layers."""

    def __init__(self, graph: ir.Graph, layers: str, output: str | None = None) -> None:
        """Cut the graph, which is changed.

        Args:
            graph: A lowered graph.
            layers: Dotted name of the list of transformer layers.
            output: The only output that counts; None: all.

        Raises:
            Undifferentiable: it is no chain.
        """
        if output is not None:
            kept = [value for value in graph.outputs if value.name == output]
            graph.outputs.clear()
            graph.outputs.extend(kept)
        _simplify(graph)
        (tokens,) = [value for value in graph.inputs if value.name == "input_ids"]
        nodes, active = _reached(graph, tokens)
        order = {node: at for at, node in enumerate(nodes)}
        last_use = {
            value: max((order[use.node] for use in value.uses() if use.node in order), default=-1) for value in active
        }
        pieces: list[Piece] = []
        start, x, live = 0, tokens, set[ir.Value]()
        for at, node in enumerate(nodes):
            live = {value for value in (*live, *node.outputs) if last_use[value] > at}
            if len(live) == 1 or at == len(nodes) - 1:
                y = next(iter(live)) if live else node.outputs[0]
                pieces.append(Piece(nodes[start : at + 1], x, y))
                start, x = at + 1, y
        owners = [_layer_of(piece, layers) for piece in pieces]
        first = next((at for at, owner in enumerate(owners) if owner is not None), None)
        if first is None:
            raise Undifferentiable("its graph has no layers that could be told apart")
        last = max(at for at, owner in enumerate(owners) if owner is not None)
        groups: list[list[Piece]] = []
        current = None
        for piece, owner in zip(pieces[first : last + 1], owners[first : last + 1], strict=True):
            if owner is not None and owner != current:
                groups.append([])
                current = owner
            groups[-1].append(piece)
        self.before = _joined(pieces[:first])
        self.layers = [_joined(group) for group in groups]
        self.after = _joined(pieces[last + 1 :])
        sources = [value for value in graph.inputs if value.name == "encoder_hidden_states"]
        if sources:
            beside = [node for node in _reached(graph, sources[0])[0] if node not in order]
            self.layers = [_with_source(piece, sources[0], beside) for piece in self.layers]


def _reached(graph: ir.Graph, start: ir.Value) -> tuple[list[ir.Node], set[ir.Value]]:
    """Return the nodes that read what is computed from a value, in order, and these values."""
    active, nodes = {start}, list[ir.Node]()
    for node in graph:
        if node.op_type != "Shape" and any(value in active for value in node.inputs):
            nodes.append(node)
            active.update(node.outputs)
    return nodes, active


def _with_source(piece: Piece, source: ir.Value, beside: list[ir.Node]) -> Piece:
    """Return a piece with those nodes before it that it needs of what is computed from the source alone."""
    needed = list[ir.Node]()
    wanted = {value for node in piece.nodes for value in node.inputs}
    for node in reversed(beside):
        if any(value in wanted for value in node.outputs):
            needed.append(node)
            wanted.update(node.inputs)
    return Piece([*reversed(needed), *piece.nodes], piece.x, piece.y, source)


def _joined(pieces: list[Piece]) -> Piece:
    if not pieces:
        raise Undifferentiable("its graph has nothing before or after the layers")
    return Piece([node for piece in pieces for node in piece.nodes], pieces[0].x, pieces[-1].y)


def _layer_of(piece: Piece, layers: str) -> int | None:
    """Return the number of the layer whose weights a piece reads; None if it reads no layer's.

    Only matrices count: of equal vectors, such as norms that were never trained, a graph holds one for all layers.
    """
    for value in (value for node in piece.nodes for value in node.inputs if value is not None):
        match = re.match(rf"{re.escape(layers)}\.(\d+)\.", str(value.name))
        if match and value.const_value is not None and len(value.const_value.shape) > 1:
            return int(match[1])
    return None


def _simplify(graph: ir.Graph) -> None:
    """Take LoRA terms out, make one layer of its two products, and cut a sum that is joined with the norm after it."""
    for node in list(graph):
        if node.op_type == "Add" and (up := node.inputs[1]) is not None and (producer := up.producer()) is not None:
            # Of q, k and v that are one layer, the terms are joined before they are added.
            terms = [value.producer() for value in producer.inputs if value is not None]
            term = terms[0] if producer.op_type == "Concat" and terms[0] is not None else producer
            read = [str(value.name) for value in term.inputs if value is not None]
            if term.op_type == "FusedMatMul" and any(name.startswith("lora_B.") for name in read):
                node.outputs[0].replace_all_uses_with(input_of(node, 0), replace_graph_outputs=True)
                graph.remove(node, safe=True)
    for node in list(graph):
        if node.op_type == "Add" and (further := _further_bits(node)) is not None:
            product = input_of(node, 0).producer()
            assert product is not None
            product.meta[FURTHER] = further
            node.outputs[0].replace_all_uses_with(product.outputs[0], replace_graph_outputs=True)
            graph.remove(node, safe=True)
        elif node.op_type == "SkipSimplifiedLayerNormalization":
            first, second, weight = node.inputs[:3]
            total = ir.node("Add", [first, second])
            attributes = {"axis": -1, "epsilon": node.attributes["epsilon"].as_float(), "stash_type": 1}
            norm = ir.node("SimplifiedLayerNormalization", [total.outputs[0], weight], attributes)
            graph.insert_before(node, [total, norm])
            node.outputs[0].replace_all_uses_with(norm.outputs[0], replace_graph_outputs=True)
            node.outputs[3].replace_all_uses_with(total.outputs[0])
            graph.remove(node, safe=True)
    for node in reversed(list(graph)):
        if not any(output.uses() or output.is_graph_output() for output in node.outputs):
            graph.remove(node, safe=True)


def _further_bits(total: ir.Node) -> FurtherBits | None:
    """Return the second summand, where it is the product with the further bits of the layer that is the first one."""
    first, second = (None if value is None else value.producer() for value in total.inputs[:2])
    if second is not None and second.op_type == "Pad":  # zeros for rows without further bits
        second = input_of(second, 0).producer()
    if second is None or second.op_type != "Div" or first is None or first.op_type != "MatMulNBits":
        return None
    product, divisor = input_of(second, 0).producer(), input_of(second, 1).const_value
    if product is None or product.op_type != "MatMulNBits" or divisor is None:
        return None
    codes, scales = input_of(product, 1), input_of(product, 2)
    return FurtherBits(codes, scales, product.attributes["N"].as_int(), float(divisor.numpy()))
