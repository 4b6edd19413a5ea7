"""The head over the vocabulary, as a graph that gives the loss of rows with a label, and its gradient."""

import numpy as np
import onnx_ir as ir

from edge_ft.export.differentiate import Undifferentiable
from edge_ft.export.graph_pieces import Piece
from edge_ft.export.lowering import input_of
from edge_ft.export.operator_rules import repeat
from edge_ft.export.piece_builder import Builder
from edge_ft.export.tape_graph import extract

__all__ = ["VocabularyHead"]

VOCABULARY_CHUNK = 8192
"""Rows of the head's weight that are float at a time."""
LINEARS = ("MatMulNBits", "MatMul", "FusedMatMul")


class VocabularyHead:
    """A norm and the product with the vocabulary, for rows that have a label: loss, and its gradient.

    The weight becomes float some rows at a time, so that the whole of it never is.
    """

    def __init__(self, piece: Piece) -> None:
        x = ir.val("x", shape=ir.Shape(("rows", "hidden")), type=ir.TensorType(ir.DataType.FLOAT))
        self.builder = builder = Builder(piece, x)
        tape = builder.tape
        tape.inputs["x"] = x
        tape.active.add(x)
        # Which positions get logits is chosen outside: rows come one by one.
        nodes = [node for node in piece.nodes if node.op_type not in ("Slice", "Reshape")]
        for node in piece.nodes:
            if node.op_type in ("Slice", "Reshape"):
                node.outputs[0].replace_all_uses_with(input_of(node, 0), replace_graph_outputs=True)
        at = max(index for index, node in enumerate(nodes) if node.op_type in LINEARS)
        repeat(builder, nodes[:at])
        head, after = nodes[at], nodes[at + 1 :]
        hidden, bias = builder.at(head, 0), builder.optional(head, 5)
        if bias is not None:
            raise Undifferentiable("its head has a bias")
        whole = builder.weight(head)
        chunks: list[tuple[int, ir.Value]] = []
        for start in range(0, whole.outputs, VOCABULARY_CHUNK):
            rows = builder.weight(head, (start, min(start + VOCABULARY_CHUNK, whole.outputs)))
            builder.copies[head.outputs[0]] = tape.linear(hidden, rows)
            repeat(builder, after)
            chunks.append((start, builder.copies[(after or [head])[-1].outputs[0]]))
        nll, gradients = self._loss(chunks)
        predicted = self._predicted(chunks)
        dx = tape.gradients(gradients)[x]
        self.model = extract(tape, {"nll": nll, "dx": dx})
        self.score = extract(tape, {"nll": nll, "predicted": predicted})

    def _loss(self, chunks: list[tuple[int, ir.Value]]) -> tuple[ir.Value, dict[ir.Value, ir.Value]]:
        """Return nll [rows, 1], and the gradient of nll * scale by each chunk of logits."""
        tape = self.builder.tape
        labels = tape.input("labels", ir.DataType.INT64, ("rows", 1))
        scale = tape.input("scale", ir.DataType.FLOAT, ())
        last = tape.constant([-1], np.int64)
        sums = [tape.op("ReduceLogSumExp", logits, last, keepdims=1) for _, logits in chunks]
        total = (
            sums[0]
            if len(sums) == 1
            else tape.op("ReduceLogSumExp", tape.op("Concat", *sums, axis=-1), last, keepdims=1)
        )
        target: ir.Value | None = None
        gradients = {}
        for start, logits in chunks:
            size = tape.op("Shape", logits, start=1, end=2)
            inside = tape.op("Sub", labels, tape.constant([start], np.int64))
            zero, one = (tape.constant([n], np.int64) for n in (0, 1))
            at = tape.op("Max", tape.op("Min", inside, tape.op("Sub", size, one)), zero)
            here = tape.op("Cast", tape.op("Equal", at, inside), to=ir.DataType.FLOAT)
            found = tape.op("Mul", tape.op("GatherElements", logits, at, axis=1), here)
            target = found if target is None else tape.op("Add", target, found)
            shares = tape.op("Exp", tape.op("Sub", logits, total))
            own = tape.op("Sub", tape.op("GatherElements", shares, at, axis=1), here)
            difference = tape.op("ScatterElements", shares, at, own, axis=1)
            gradients[logits] = tape.op("Mul", difference, scale)
        return tape.op("Sub", total, target), gradients

    def _predicted(self, chunks: list[tuple[int, ir.Value]]) -> ir.Value:
        """Return the likeliest token [rows, 1]."""
        tape = self.builder.tape
        last = tape.constant([-1], np.int64)
        best = [tape.op("ReduceMax", logits, last, keepdims=1) for _, logits in chunks]
        at = [
            tape.op("Add", tape.op("ArgMax", logits, axis=-1, keepdims=1), tape.constant([start], np.int64))
            for start, logits in chunks
        ]
        which = tape.op("ArgMax", tape.op("Concat", *best, axis=-1), axis=-1, keepdims=1)
        found: ir.Value = tape.op("GatherElements", tape.op("Concat", *at, axis=-1), which, axis=1)
        found.type = ir.TensorType(ir.DataType.INT64)
        return found
