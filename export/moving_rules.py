"""Operators that move numbers about: how each is repeated on a tape, with its gradient."""

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir

from edge_ft.export.differentiate import Tape, Undifferentiable
from edge_ft.export.piece_builder import Builder

__all__ = ["MOVING_RULES"]

END = 2**31 - 1
"""Of a dimension, however long it is."""


def _constants(node: ir.Node, start: int) -> list[int]:
    """Return the single numbers that a node's inputs from `start` on hold.

    Raises:
        Undifferentiable: one is computed, or holds several.
    """
    found = []
    for value in node.inputs[start:]:
        if value is None or value.const_value is None or value.const_value.size != 1:
            raise Undifferentiable(f"its layers hold a {node.op_type} whose places are computed")
        found.append(int(value.const_value.numpy().item()))
    return found


def _numbers(tape: Tape, *values: int) -> ir.Value:
    return tape.constant(values, np.int64)


def _size(tape: Tape, x: ir.Value, axis: int) -> ir.Value:
    """Return the length [1] of a dimension."""
    if axis == -1:
        return tape.op("Shape", x, start=axis)  # type: ignore[no-any-return]
    return tape.op("Shape", x, start=axis, end=axis + 1)  # type: ignore[no-any-return]


def _zeros(tape: Tape, x: ir.Value, start: int, end: int, axis: int) -> ir.Value:
    """Return zeros of the shape of a part of x.

    A Pad with axes would do, but ONNX Runtime moves transpositions through it as if it had none.
    """
    part = tape.op("Slice", x, *(_numbers(tape, number) for number in (start, end, axis)))
    return tape.op("Mul", part, tape.constant(0.0))  # type: ignore[no-any-return]


def _slice(builder: Builder, node: ir.Node) -> ir.Value:
    tape, x = builder.tape, builder.at(node, 0)
    start, end, axis, *steps = _constants(node, 1)
    if steps not in ([], [1]):
        raise Undifferentiable("its layers hold a Slice with steps")

    def back(g: ir.Value) -> ir.Value:
        before = [] if start == 0 else [_zeros(tape, x, 0, start, axis)]
        after = [] if end >= END else [_zeros(tape, x, end, END, axis)]
        return tape.op("Concat", *before, g, *after, axis=axis)  # type: ignore[no-any-return]

    bounds = (_numbers(tape, number) for number in (start, min(end, END), axis))
    return tape.record(tape.op("Slice", x, *bounds), (x, back))


def _gather(builder: Builder, node: ir.Node) -> ir.Value:
    """The first position of each row: [batch, seq, hidden] -> [batch, hidden]."""
    tape, x = builder.tape, builder.at(node, 0)
    index = node.inputs[1]
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
    if _constants(node, 1) != [0] or index is None or index.const_value is None or index.const_value.shape.rank():
        raise Undifferentiable("its layers gather other positions than the first")

    def back(g: ir.Value) -> ir.Value:
        first = tape.op("Unsqueeze", g, _numbers(tape, axis))
        return tape.op("Concat", first, _zeros(tape, x, 1, END, axis), axis=axis)  # type: ignore[no-any-return]

    return tape.record(tape.op("Gather", x, tape.constant(0, np.int64), axis=axis), (x, back))


def _reduce_sum(builder: Builder, node: ir.Node) -> ir.Value:
    tape, x = builder.tape, builder.at(node, 0)
    keep = node.attributes["keepdims"].as_int() if "keepdims" in node.attributes else 1
    axes = _numbers(tape, *_constants(node, 1))

    def back(g: ir.Value) -> ir.Value:
        return tape.op("Expand", g if keep else tape.op("Unsqueeze", g, axes), tape.op("Shape", x))  # type: ignore[no-any-return]

    return tape.record(tape.op("ReduceSum", x, axes, keepdims=keep), (x, back))


def _reshaped(builder: Builder, node: ir.Node) -> ir.Value:
    """Squeeze and Unsqueeze."""
    tape, x = builder.tape, builder.at(node, 0)
    y = tape.op(node.op_type, x, _numbers(tape, *_constants(node, 1)))
    return tape.record(y, (x, lambda g: tape.op("Reshape", g, tape.op("Shape", x))))


def _concat(builder: Builder, node: ir.Node) -> ir.Value:
    tape, axis = builder.tape, node.attributes["axis"].as_int()
    parts = [builder.at(node, index) for index in range(len(node.inputs))]

    def of(index: int) -> Callable[[ir.Value], ir.Value]:
        def back(g: ir.Value) -> ir.Value:
            sizes = tape.op("Concat", *(_size(tape, part, axis) for part in parts), axis=0)
            return tape.op("Split", g, sizes, outputs=len(parts), axis=axis)[index]  # type: ignore[no-any-return]

        return back

    whole = tape.op("Concat", *parts, axis=axis)
    return tape.record(whole, *((part, of(index)) for index, part in enumerate(parts)))


def _negative(builder: Builder, node: ir.Node) -> ir.Value:
    tape, x = builder.tape, builder.at(node, 0)
    return tape.record(tape.op("Neg", x), (x, lambda g: tape.op("Neg", g)))


MOVING_RULES: dict[str, Callable[[Builder, ir.Node], Any]] = {
    "Slice": _slice,
    "Gather": _gather,
    "ReduceSum": _reduce_sum,
    "Squeeze": _reshaped,
    "Unsqueeze": _reshaped,
    "Concat": _concat,
    "Neg": _negative,
}
