"""Products with further bits as one 8-bit product each, in graphs whose activations are int8.

A weight with further bits is scale · (code − zero point + (further code − 8) / 16), and ships as two 4-bit products,
which every runtime computes exactly. It is also scale / 16 · (16 code + further code − (16 zero point + 8)): 8-bit
codes with another scale, for which ONNX Runtime has fast kernels where activations are int8. They are made of the 4-bit
codes by operators over constants, which ONNX Runtime computes when it opens the graph: the file holds the codes once.
"""

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edge_ft.export.lowering import input_of, take_over

__all__ = ["join_further_bits"]

STEPS = 16
"""Values of the further four bits, into which they divide a step of the 4-bit codes."""


def join_further_bits(graph: ir.Graph) -> None:
    """Replace each product with further bits for all of its rows; the values stay the same but for rounding.

    Args:
        graph: Lowered, changed in place.
    """
    constants = _Constants(graph)
    for total in list(graph):
        further = _further_product(total)
        if further is None:
            continue
        product = input_of(total, 0).producer()
        assert product is not None
        operands = list(product.inputs)
        steps = _Steps(str(input_of(product, 1).name).rpartition(".")[0], constants)
        operands[1:4] = _eight_bits(steps, product, input_of(further, 1))
        joined = ir.node(
            "MatMulNBits",
            operands,
            {name: attribute.value for name, attribute in product.attributes.items()} | {"bits": 8},
            domain=product.domain,
            version=product.version,
        )
        take_over(total.outputs[0], joined.outputs[0])
        graph.insert_before(total, [*steps.nodes, joined])
        divide = input_of(total, 1).producer()
        assert divide is not None
        graph.remove([total, divide, further, product], safe=True)


def _further_product(total: ir.Node) -> ir.Node | None:
    """Return the product with the further bits, where a node adds it to that of 4-bit codes; else None."""
    if total.op_type != "Add" or None in total.inputs:
        return None
    first, second = (input_of(total, index).producer() for index in (0, 1))
    if first is None or second is None or first.op_type != "MatMulNBits" or second.op_type != "Div":
        return None
    further, divisor = input_of(second, 0).producer(), input_of(second, 1).const_value
    if divisor is None or divisor.size != 1 or divisor.numpy().item() != STEPS:
        return None
    if further is None or further.op_type != "MatMulNBits" or further.inputs[0] is not first.inputs[0]:
        return None
    if any(len(node.outputs[0].uses()) > 1 or node.outputs[0].is_graph_output() for node in (first, second, further)):
        return None
    same = all(
        first.attributes[name].as_int() == further.attributes[name].as_int() for name in ("N", "K", "block_size")
    )
    return further if same and first.attributes["bits"].as_int() == 4 else None


class _Constants:
    """Small constants of a graph, each once."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph

    def __call__(self, array: NDArray[np.generic]) -> ir.Value:
        name = f"eight_bits.{array.dtype}.{'_'.join(map(str, array.reshape(-1).tolist()))}.{array.ndim}"
        if (known := self._graph.initializers.get(name)) is not None:
            return known
        value = ir.val(name, const_value=ir.tensor(array, name=name))
        self._graph.register_initializer(value)
        return value


class _Steps:
    """Operators over constants, in order."""

    def __init__(self, layer: str, constants: _Constants) -> None:
        self.nodes: list[ir.Node] = []
        self._layer = layer
        self._constants = constants

    def op(self, kind: str, *inputs: ir.Value | NDArray[np.generic] | np.generic, **attributes: int | str) -> ir.Value:
        """Add an operator and return its output."""
        values = [each if isinstance(each, ir.Value) else self._constants(np.asarray(each)) for each in inputs]
        self.nodes.append(ir.node(kind, values, attributes))
        self.nodes[-1].outputs[0].name = f"{self._layer}.eight_bits.{len(self.nodes)}"
        return self.nodes[-1].outputs[0]

    def high(self, packed: ir.Value, odd: bool) -> ir.Value:
        """Return the codes of even or odd columns in the four higher bits of a byte."""
        return (
            self.op("BitwiseAnd", packed, np.uint8(0xF0))
            if odd
            else self.op("BitShift", packed, np.uint8(4), direction="LEFT")
        )

    def low(self, packed: ir.Value, odd: bool) -> ir.Value:
        """Return the codes of even or odd columns in the four lower bits of a byte."""
        return (
            self.op("BitShift", packed, np.uint8(4), direction="RIGHT")
            if odd
            else self.op("BitwiseAnd", packed, np.uint8(0x0F))
        )

    def interleaved(self, even: ir.Value, odd: ir.Value, shape: list[int]) -> ir.Value:
        """Return even and odd columns in turn."""
        last = np.array([-1], np.int64)
        pair = self.op("Concat", self.op("Unsqueeze", even, last), self.op("Unsqueeze", odd, last), axis=-1)
        return self.op("Reshape", pair, np.array(shape, np.int64))


def _eight_bits(steps: _Steps, product: ir.Node, further: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Return codes [N, blocks, block_size], scales and zero points [N, blocks] of the 8-bit product."""
    rows, inputs, block = (product.attributes[name].as_int() for name in ("N", "K", "block_size"))
    blocks = -(-inputs // block)
    packed = input_of(product, 1)
    even, odd = (
        steps.op("BitwiseOr", steps.high(packed, is_odd), steps.low(further, is_odd)) for is_odd in (False, True)
    )
    codes = steps.interleaved(even, odd, [rows, blocks, block])
    scales = steps.op("Div", input_of(product, 2), np.float32(STEPS))
    points = product.inputs[3] if len(product.inputs) > 3 else None
    if points is None:
        zeros = steps.op("Expand", np.uint8(STEPS * 8 + 8), np.array([rows, blocks], np.int64))
        return codes, scales, zeros
    half = np.uint8(8)
    even, odd = (steps.op("BitwiseOr", steps.high(points, is_odd), half) for is_odd in (False, True))
    zeros = steps.interleaved(even, odd, [rows, blocks + blocks % 2])
    if blocks % 2:  # each row ends with an unused code
        first, last, axis = (np.array([number], np.int64) for number in (0, blocks, 1))
        zeros = steps.op("Slice", zeros, first, last, axis)
    return codes, scales, zeros
