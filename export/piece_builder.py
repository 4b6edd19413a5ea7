"""Repeats the nodes of a piece of a graph on a tape; weights become inputs of the graph that is made of it."""

import re
from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from edge_ft.export.differentiate import MICROSOFT, Tape, Undifferentiable, Weight
from edge_ft.export.graph_pieces import FURTHER, FurtherBits, Piece

__all__ = ["Builder", "Parts"]

Parts = Callable[[str, int], list[tuple[str, int]]]
"""Name and outputs of a linear layer -> those of the layers that an export joined into it."""


class Builder:
    """Repeats nodes of the graph on a tape, with gradients for those that the activation reaches."""

    def __init__(self, piece: Piece, x: ir.Value, layers: str = "", parts: Parts | None = None) -> None:
        self.tape = Tape()
        if parts is not None:
            self.tape.parts = parts
        self.inner = re.compile(rf"{re.escape(layers)}\.\d+\." if layers else "(?!)")
        """Matches what stands before a name inside a layer."""
        self.weights: dict[str, tuple[ir.Value, tuple[int, ...]]] = {}
        """By the name of an input, the initializer and the shape in which it is read."""
        self.active = {output for node in piece.nodes for output in node.outputs}
        self.copies: dict[ir.Value, ir.Value] = {piece.x: x}
        self.source: ir.Value | None = None
        """The copy of what the piece reads besides, which has a gradient too."""
        if piece.source is not None:
            self.source = self.tape.input(str(piece.source.name), ir.DataType.FLOAT)
            self.tape.active.add(self.source)
            self.copies[piece.source] = self.source
        self.windows: set[int | None] = set()
        self.causal = True

    def at(self, node: ir.Node, index: int) -> ir.Value:
        """Return the copy of a node's input."""
        value = node.inputs[index]
        assert value is not None
        return self.copy(value)

    def optional(self, node: ir.Node, index: int) -> ir.Value | None:
        """Return the copy of a node's input, if it has it."""
        return self.copy(value) if index < len(node.inputs) and (value := node.inputs[index]) is not None else None

    def copy(self, value: ir.Value, shape: tuple[int, ...] | None = None) -> ir.Value:
        """Return the copy of a value: a weight, a constant, an input, or what other nodes compute of these."""
        if value in self.copies:
            return self.copies[value]
        if value.const_value is not None and not value.is_graph_input():
            made = self._initializer(value, shape)
        elif value.is_graph_input():
            assert value.dtype is not None
            made = self.tape.input(str(value.name), value.dtype, ("batch", "sequence"))
        else:
            node = value.producer()
            assert node is not None
            inputs = [None if source is None else self.copy(source) for source in node.inputs]
            attributes = {name: attribute.value for name, attribute in node.attributes.items()}
            made = self.tape.op(node.op_type, *inputs, domain=node.domain, outputs=len(node.outputs), **attributes)
            if isinstance(made, list):
                raise Undifferentiable(f"its layers hold the operator {node.op_type}, for which there is no gradient")
        self.copies[value] = made
        return made

    def _initializer(self, value: ir.Value, shape: tuple[int, ...] | None) -> ir.Value:
        tensor = value.const_value
        assert tensor is not None
        own = tuple(int(size) for size in tensor.shape.numpy())
        if not own or tensor.dtype == ir.DataType.INT64:
            return self.tape.constant(tensor.numpy(), tensor.dtype.numpy())
        name = self.inner.sub("", str(value.name), count=1)
        self.weights[name] = value, shape or own
        return self.tape.input(name, tensor.dtype, shape or own)

    def weight(self, node: ir.Node, rows: tuple[int, int] | None = None) -> Weight:
        """Return the float weight of a linear layer, or some of its rows."""
        source = node.inputs[1]
        assert source is not None
        producer = source.producer()
        origin = producer.inputs[0] if producer is not None and producer.op_type == "Cast" else source
        if origin is None or origin.const_value is None:
            raise Undifferentiable("its layers multiply activations outside of attention")
        name = str(origin.name)
        module = name[match.end() :].rpartition(".")[0] if (match := self.inner.match(name)) else None
        if node.op_type == "MatMulNBits":
            return self._dequantized(node, module, rows)
        transposed = node.op_type == "FusedMatMul"
        size = tuple(int(length) for length in origin.const_value.shape.numpy())
        outputs, inputs = size if transposed else size[::-1]
        value = self.copy(source)
        if rows is not None:
            start, end, axis = (self.tape.constant([n], np.int64) for n in (*rows, 0 if transposed else 1))
            value, outputs = self.tape.op("Slice", value, start, end, axis), rows[1] - rows[0]
        return Weight(value, inputs, outputs, transposed, module)

    def _dequantized(self, node: ir.Node, module: str | None, rows: tuple[int, int] | None) -> Weight:
        bits, block, inputs, outputs = (node.attributes[name].as_int() for name in ("bits", "block_size", "K", "N"))
        blocks = -(-inputs // block)
        if blocks * block != inputs:
            raise Undifferentiable(f"a layer has {inputs} inputs, which is no multiple of the block size {block}")
        start, end = rows or (0, outputs)
        value = self._rows(node.inputs[1:4], (outputs, inputs), (start, end), (bits, block))
        further: FurtherBits | None = node.meta.get(FURTHER)
        if further is not None and start < further.rows:
            last = min(end, further.rows)
            operands = further.codes, further.scales
            finer = self._rows(operands, (further.rows, inputs), (start, last), (bits, block))
            finer = self.tape.op("Div", finer, self.tape.constant(further.divisor))
            if last < end:
                finer = self.tape.op("Pad", finer, self.tape.constant([0, 0, end - last, 0], np.int64))
            value = self.tape.op("Add", value, finer)
        return Weight(value, inputs, end - start, True, module)

    def _rows(
        self,
        operands: Sequence[ir.Value | None],
        size: tuple[int, int],
        rows: tuple[int, int],
        grid: tuple[int, int],
    ) -> ir.Value:
        """Return some rows of a blockwise weight [N, K] as float, from its codes, scales and zero points if it has any.

        Args:
            operands: As MatMulNBits has them.
            size: N and K.
            rows: The first row, and the one after the last.
            grid: Bits of a code, and the block size.
        """
        (outputs, inputs), (bits, block) = size, grid
        blocks = inputs // block
        shapes = [(outputs, inputs * bits // 8), (outputs, blocks), (outputs, -(-blocks * bits // 8))]
        copies = [
            None if value is None else self.copy(value, shape)
            for value, shape in zip(operands, shapes[: len(operands)], strict=True)
        ]
        numbers = self.tape.op("Range", *(self.tape.constant(n, np.int64) for n in (*rows, 1)))
        return self.tape.op(  # type: ignore[no-any-return]
            "GatherBlockQuantized",
            *(copies[0], numbers, *copies[1:]),
            domain=MICROSOFT,
            gather_axis=0,
            quantize_axis=1,
            block_size=block,
            bits=bits,
        )
