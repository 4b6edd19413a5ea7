"""What some outputs need of a tape, as a graph of its own."""

from collections.abc import Iterable

import onnx_ir as ir

from edge_ft.export.differentiate import MICROSOFT, Tape

__all__ = ["extract"]


def extract(tape: Tape, outputs: dict[str, ir.Value], given: Iterable[ir.Value] = ()) -> ir.Model:
    """Copy what `outputs` need of a tape into a graph of its own.

    Args:
        tape: The nodes.
        outputs: By the name that the output gets.
        given: Values that the graph takes as inputs, under their names, instead of computing them.

    Returns:
        The graph.
    """
    copies: dict[ir.Value, ir.Value] = {}
    given = list(given)
    wanted = set(outputs.values())
    needed: list[ir.Node] = []
    for node in reversed(tape.nodes):
        if any(output in wanted and output not in given for output in node.outputs):
            needed.append(node)
            wanted.update(value for value in node.inputs if value is not None)
    inputs = [value for value in (*tape.inputs.values(), *given) if value in wanted]
    for value in inputs:
        copies[value] = ir.val(str(value.name), shape=value.shape, type=value.type or ir.TensorType(ir.DataType.FLOAT))
    nodes = []
    for node in reversed(needed):
        copy = ir.Node(
            node.domain,
            node.op_type,
            [None if value is None else copies[value] for value in node.inputs],
            list(node.attributes.values()),
            num_outputs=len(node.outputs),
            version=node.version,
        )
        for old, new in zip(node.outputs, copy.outputs, strict=True):
            if old in wanted:
                copies.setdefault(old, new)
        nodes.append(copy)
    results = []
    for name, value in outputs.items():
        result = copies[value]
        if result in results or value in inputs:  # one value under two names
            node = ir.node("Identity", [result])
            nodes.append(node)
            result = node.outputs[0]
        result.name, result.type = name, value.type or ir.TensorType(ir.DataType.FLOAT)
        results.append(result)
    graph = ir.Graph(
        [copies[value] for value in inputs], results, nodes=nodes, opset_imports={"": 21, MICROSOFT: 1}, name="train"
    )
    return ir.Model(graph, ir_version=10)
