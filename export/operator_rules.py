"""How each operator of a piece is repeated on a tape, with its gradient."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import onnx_ir as ir

from edge_ft.export.differentiate import Scores, Undifferentiable
from edge_ft.export.moving_rules import MOVING_RULES
from edge_ft.export.piece_builder import Builder

__all__ = ["repeat"]


def repeat(builder: Builder, nodes: Iterable[ir.Node]) -> None:
    """Repeat nodes of a piece on the tape of its builder.

    Args:
        builder: Has the tape, and the copies of the values that the nodes read.
        nodes: In the order in which they run.

    Raises:
        Undifferentiable: an operator has no rule.
    """
    for node in nodes:
        rule = RULES.get(node.op_type)
        if rule is None:
            raise Undifferentiable(f"its layers hold the operator {node.op_type}, for which there is no gradient")
        outputs = rule(builder, node)
        outputs = outputs if isinstance(outputs, list) else [outputs]
        for old, new in zip(node.outputs, outputs, strict=False):
            builder.copies[old] = new


def _linear(builder: Builder, node: ir.Node) -> ir.Value:
    if node.op_type == "FusedMatMul" and not node.attributes["transB"].as_int():
        raise Undifferentiable("its layers multiply activations outside of attention")
    bias = builder.optional(node, 5) if node.op_type == "MatMulNBits" else None
    return builder.tape.linear(builder.at(node, 0), builder.weight(node), bias)


def _group_query_attention(builder: Builder, node: ir.Node) -> ir.Value:
    tape, settings = builder.tape, node.attributes
    many, few = settings["num_heads"].as_int(), settings["kv_num_heads"].as_int()
    past = node.inputs[3]
    assert past is not None and past.shape is not None
    size = int(past.shape[3])  # type: ignore[arg-type]
    query = builder.at(node, 0)
    if node.inputs[1] is None:
        query, key, value = tape.split(query, [many * size, few * size, few * size])
    else:
        key, value = builder.at(node, 1), builder.at(node, 2)
    if settings["do_rotary"].as_int():
        tables = builder.at(node, 7), builder.at(node, 8)
        interleaved = settings["rotary_interleaved"].as_int() if "rotary_interleaved" in settings else 0
        query, key = (
            tape.rotate(x, heads, tables, interleaved=interleaved) for x, heads in ((query, many), (key, few))
        )
    window = settings["local_window_size"].as_int() if "local_window_size" in settings else -1
    builder.windows.add(window if window > 0 else None)
    cap = settings["softcap"].as_float() if "softcap" in settings else 0.0
    return tape.attention(query, key, value, (many, few), Scores(settings["scale"].as_float(), cap))


def _multi_head_attention(builder: Builder, node: ir.Node) -> ir.Value:
    settings = node.attributes
    heads, scale = settings["num_heads"].as_int(), settings["scale"].as_float()
    causal = "unidirectional" in settings and settings["unidirectional"].as_int() == 1
    read = any(output.uses() for output in node.outputs[1:])
    if builder.optional(node, 3) is not None or read or (len(node.inputs) > 6 and any(node.inputs[6:])):
        raise Undifferentiable("its attention has biases or a cache")
    query, key, value = (builder.at(node, index) for index in range(3))
    if builder.source is not None and not causal:  # keys and values of the source, by head
        return builder.tape.attention(query, key, value, (heads, heads), Scores(scale), of_source=True)
    builder.causal = causal
    builder.windows.add(None)
    bias = builder.optional(node, 5)
    if bias is not None:
        bias = builder.tape.op("Unsqueeze", bias, builder.tape.constant([2], np.int64))
    return builder.tape.attention(query, key, value, (heads, heads), Scores(scale, bias=bias))


def _power(builder: Builder, node: ir.Node) -> ir.Value:
    exponent = node.inputs[1]
    if exponent is None or exponent.const_value is None:
        raise Undifferentiable("its layers hold a power with a computed exponent")
    count = float(exponent.const_value.numpy())
    if count not in (2.0, 3.0):
        raise Undifferentiable(f"its layers hold a power of {count:g}")
    x = builder.at(node, 0)
    square = builder.tape.multiply(x, x)
    return square if count == 2 else builder.tape.multiply(square, x)


def _divide(builder: Builder, node: ir.Node) -> ir.Value:
    x, divisor = builder.at(node, 0), builder.at(node, 1)
    if divisor in builder.tape.active:
        raise Undifferentiable("its layers divide by an activation")
    tape = builder.tape
    return tape.record(tape.op("Div", x, divisor), (x, lambda g: tape.op("Div", g, divisor)))


def _relu(builder: Builder, node: ir.Node) -> ir.Value:
    tape, x = builder.tape, builder.at(node, 0)
    y = tape.op("Relu", x)

    def back(g: ir.Value) -> ir.Value:
        return tape.op("Mul", g, tape.op("Cast", tape.op("Greater", y, tape.constant(0.0)), to=ir.DataType.FLOAT))

    return tape.record(y, (x, back))


def _split(builder: Builder, node: ir.Node) -> list[ir.Value]:
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
    sizes = node.inputs[1].const_value if len(node.inputs) > 1 and node.inputs[1] is not None else None
    return builder.tape.split(builder.at(node, 0), sizes.numpy().tolist() if sizes else len(node.outputs), axis)


def _norm(builder: Builder, node: ir.Node) -> ir.Value:
    epsilon = node.attributes["epsilon"].as_float()
    return builder.tape.rms_norm(builder.at(node, 0), builder.at(node, 1), epsilon)


def _layer_norm(builder: Builder, node: ir.Node) -> ir.Value:
    epsilon = node.attributes["epsilon"].as_float()
    return builder.tape.layer_norm(builder.at(node, 0), builder.at(node, 1), builder.optional(node, 2), epsilon)


def _gelu(builder: Builder, node: ir.Node) -> ir.Value:
    attribute = node.attributes.get("approximate")
    return builder.tape.gelu(builder.at(node, 0), attribute.as_string() if attribute is not None else "none")


RULES: dict[str, Callable[[Builder, ir.Node], Any]] = {
    "MatMulNBits": _linear,
    "MatMul": _linear,
    "FusedMatMul": _linear,
    "GroupQueryAttention": _group_query_attention,
    "MultiHeadAttention": _multi_head_attention,
    "SimplifiedLayerNormalization": _norm,
    "LayerNormalization": _layer_norm,
    "Add": lambda builder, node: builder.tape.add(builder.at(node, 0), builder.at(node, 1)),
    "Mul": lambda builder, node: builder.tape.multiply(builder.at(node, 0), builder.at(node, 1)),
    "Div": _divide,
    "Pow": _power,
    "Sigmoid": lambda builder, node: builder.tape.sigmoid(builder.at(node, 0)),
    "Tanh": lambda builder, node: builder.tape.tanh(builder.at(node, 0)),
    "Relu": _relu,
    "Gelu": _gelu,
    "Reshape": lambda builder, node: builder.tape.reshape(builder.at(node, 0), builder.at(node, 1)),
    "Transpose": lambda builder, node: builder.tape.transpose(
        builder.at(node, 0), list(node.attributes["perm"].as_ints())
    ),
    "Split": _split,
    **MOVING_RULES,
}
"""How each operator of a layer is repeated on a tape."""
