"""The head of a classifier, as graphs that give its logits, and the gradients of everything that is trained in it."""

from collections.abc import Iterable, Iterator

import onnx_ir as ir

from edge_ft.export.differentiate import Undifferentiable
from edge_ft.export.graph_pieces import Piece
from edge_ft.export.lowering import input_of
from edge_ft.export.operator_rules import repeat
from edge_ft.export.piece_builder import Builder
from edge_ft.export.tape_graph import extract
from edge_ft.quant.conversion import is_within

__all__ = ["ClassHead"]

PRODUCTS = ("MatMul", "FusedMatMul")
HEAD = "head."
"""Before the name of a parameter of the head, in the names of inputs."""


class ClassHead:
    """What comes after the layers, down to logits; its linear layers, and norms after the first of them, are trained.

    Inputs are `x` [batch, sequence, hidden], `head.PARAMETER` as PyTorch has it, and for the gradients `dlogits`.
    """

    def __init__(self, piece: Piece, modules: tuple[str, ...], norms: Iterable[str] = ()) -> None:
        """Write both graphs.

        Args:
            piece: What comes after the layers.
            modules: Modules of the head.
            norms: Names of its norms, in the order in which they run.
        """
        x = ir.val("x", shape=ir.Shape(("batch", "sequence", "hidden")), type=ir.TensorType(ir.DataType.FLOAT))
        self.builder = builder = Builder(piece, x)
        self.parameters: dict[str, tuple[ir.Value, bool]] = {}
        """By name, the initializer that a parameter starts from, and whether it is transposed there."""
        self._modules = modules
        tape = builder.tape
        tape.inputs["x"] = x
        tape.active.add(x)
        nodes, names = iter(piece.nodes), iter(norms)
        for node in nodes:
            found = self._trained(node)
            if found is None:
                if self.parameters and node.op_type == "LayerNormalization":
                    self._norm(node, names)
                else:
                    repeat(builder, [node])
            else:
                self._linear(node, *found, nodes)
        logits = builder.copies[piece.y]
        self.score = extract(tape, {"logits": logits})
        gradients = tape.gradients({logits: tape.input("dlogits", ir.DataType.FLOAT)})
        trained = {f"grad.{name}": tape.inputs[f"{HEAD}{name}"] for name in self.parameters}
        outputs = {name: gradients[value] for name, value in trained.items()}
        self.model = extract(tape, {"dx": gradients[x], **outputs})

    def _trained(self, node: ir.Node) -> tuple[str, ir.Value] | None:
        """Return name and weight of the trained linear layer whose product a node is; None if it is none."""
        if node.op_type not in PRODUCTS:
            return None
        weight = input_of(node, 1)
        producer = weight.producer()
        if producer is not None and producer.op_type == "Cast":
            weight = input_of(producer, 0)
        name = str(weight.name).removesuffix(".weight")
        if weight.is_graph_input():  # of a graph that answers with an adapter
            name = name.removeprefix(HEAD)
        return (name, weight) if weight.const_value is not None and is_within(name, self._modules) else None

    def _linear(self, node: ir.Node, name: str, weight: ir.Value, nodes: Iterator[ir.Node]) -> None:
        """Repeat the product of a trained layer, and the sum with its bias that follows."""
        builder, tape, transposed = self.builder, self.builder.tape, node.op_type == "MatMul"
        assert weight.const_value is not None
        sizes = [int(size) for size in weight.const_value.shape.numpy()]
        outputs, inputs = sizes[::-1] if transposed else sizes
        self.parameters[f"{name}.weight"] = weight, transposed
        given = self._parameter(f"{name}.weight", (outputs, inputs))
        flat = tape.reshape(builder.at(node, 0), (-1, inputs))
        y = tape.matmul(flat, given, transposed=True)
        builder.copies[node.outputs[0]] = y
        # Of initializers with the same numbers a graph has one: a bias is found by its place, not by its name.
        use = next(iter(node.outputs[0].uses()), None)
        add = None if use is None or use.node.op_type != "Add" else use.node
        bias = (
            None if add is None else next((v for v in add.inputs if v is not None and v.const_value is not None), None)
        )
        if add is None or bias is None:
            return
        if next(nodes) is not add:
            raise Undifferentiable("something lies between a layer of its head and the bias of that layer")
        self.parameters[f"{name}.bias"] = bias, False
        builder.copies[add.outputs[0]] = tape.bias(y, self._parameter(f"{name}.bias", (outputs,)))

    def _norm(self, node: ir.Node, names: Iterator[str]) -> None:
        """Repeat a LayerNorm that is trained."""
        name = next(names)
        given: list[ir.Value | None] = [None, None]
        for index, kind in enumerate(("weight", "bias")):
            value = node.inputs[index + 1] if index + 1 < len(node.inputs) else None
            if value is not None:
                assert value.const_value is not None
                self.parameters[f"{name}.{kind}"] = value, False
                sizes = tuple(int(size) for size in value.const_value.shape.numpy())
                given[index] = self._parameter(f"{name}.{kind}", sizes)
        weight, bias = given
        assert weight is not None
        epsilon, x = node.attributes["epsilon"].as_float(), self.builder.at(node, 0)
        self.builder.copies[node.outputs[0]] = self.builder.tape.layer_norm(x, weight, bias, epsilon)

    def _parameter(self, name: str, shape: tuple[int, ...]) -> ir.Value:
        """Return the input of a trained parameter."""
        tape = self.builder.tape
        given = tape.input(f"{HEAD}{name}", ir.DataType.FLOAT, shape)
        tape.active.add(given)
        return given
