"""Reverse-mode differentiation of the operators that `edge_ft.export.lowering` leaves in a graph.

A `Tape` writes forward nodes and remembers for each what its gradient is made of; `Tape.gradients` writes the backward
nodes. Both passes use plain ONNX operators and a few of ONNX Runtime's, so that onnxruntime alone runs them. A new
family needs nothing here unless its layers hold an operator without a rule in `edge_ft.export.operator_rules`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from edge_ft.errors import ModelError

__all__ = ["MASK", "MICROSOFT", "SOURCE_MASK", "Linear", "Scores", "Tape", "Undifferentiable", "Weight"]

MICROSOFT = "com.microsoft"
MASK = "mask"
"""Graph input, float32 [batch, 1, 1, rows or 1, columns]: 0 where a token attends, else the lowest number."""
SOURCE_MASK = "source_mask"
"""The same of the source that an encoder-decoder's answer attends to."""

Gradient = Callable[..., ir.Value]
"""Gradients of the outputs of an operator -> gradient of an input."""


class Undifferentiable(ModelError):
    """A layer holds an operator or a form of it without a gradient here."""


@dataclass(frozen=True)
class Linear:
    """A linear layer whose weight a LoRA pair changes; of joined layers, one of those that were joined."""

    module: str
    """Its dotted name inside the transformer layer."""
    inputs: int
    outputs: int


@dataclass(frozen=True)
class Weight:
    """The float weight of a linear layer, while a graph runs."""

    value: ir.Value
    """[outputs, inputs] if `transposed`, else [inputs, outputs]."""
    inputs: int
    outputs: int
    transposed: bool = True
    module: str | None = None
    """Dotted name of the layer inside its transformer layer; None: no LoRA."""


@dataclass(frozen=True)
class Scores:
    """How the products of query and key become attention scores, before the mask and the softmax."""

    scale: float
    """Factor of the products."""
    softcap: float = 0.0
    """What they are capped at, by tanh; 0: not."""
    bias: ir.Value | None = None
    """Added to them, [1 or batch, heads, 1, seq, seq]."""


@dataclass
class Tape:
    """Nodes in the order in which they run, and the gradients of those that depend on a trained value."""

    nodes: list[ir.Node] = field(default_factory=list)
    inputs: dict[str, ir.Value] = field(default_factory=dict)
    """Graph inputs by name: activations, weights, A and B."""
    kept: set[ir.Value] = field(default_factory=set)
    """Values that a backward pass reads rather than computes again: they cost a product with a weight."""
    linears: list[Linear] = field(default_factory=list)
    active: set[ir.Value] = field(default_factory=set)
    """Values that have a gradient."""
    parts: Callable[[str, int], list[tuple[str, int]]] = lambda module, outputs: [(module, outputs)]
    """Name and outputs of a linear layer -> those of the layers that it was joined from."""
    _steps: list[tuple[tuple[ir.Value, ...], list[tuple[ir.Value, Gradient]]]] = field(default_factory=list)

    def op(self, kind: str, *inputs: ir.Value | None, domain: str = "", outputs: int = 1, **attributes: Any) -> Any:
        """Add a node; return its output, or a list of several."""
        given = list(inputs)
        while given and given[-1] is None:  # ONNX Runtime's fusions crash over a LayerNorm with an empty bias
            given.pop()
        node = ir.node(
            kind, given, attributes or None, domain=domain, num_outputs=outputs, version=1 if domain else None
        )
        self.nodes.append(node)
        return node.outputs[0] if outputs == 1 else list(node.outputs)

    def constant(self, value: Any, dtype: Any = np.float32) -> ir.Value:
        """Return a constant."""
        return self.op("Constant", value=ir.tensor(np.array(value, dtype)))

    def input(self, name: str, dtype: ir.DataType, shape: Sequence[int | str | None] | None = None) -> ir.Value:
        """Return the graph input of that name; it is made at the first call."""
        if name not in self.inputs:
            kind = ir.TensorType(dtype)
            self.inputs[name] = ir.val(name, shape=None if shape is None else ir.Shape(shape), type=kind)
        return self.inputs[name]

    def record(self, output: ir.Value, *gradients: tuple[ir.Value | None, Gradient]) -> ir.Value:
        """Remember how the gradient of `output` reaches those of its inputs that have one; return `output`."""
        found = [(value, gradient) for value, gradient in gradients if value is not None and value in self.active]
        if found:
            self.active.add(output)
            self._steps.append(((output,), found))
        return output

    def gradients(self, seeds: Mapping[ir.Value, ir.Value]) -> dict[ir.Value, ir.Value]:
        """Write the backward nodes.

        Args:
            seeds: Gradients of outputs.

        Returns:
            The gradient of each value on the way from the trained ones to the outputs.
        """
        found = dict(seeds)
        for outputs, inputs in reversed(self._steps):
            if not any(value in found for value in outputs):
                continue
            whole = [found[v] if v in found else self.op("Mul", v, self.constant(0.0)) for v in outputs]
            for source, rule in inputs:
                part = rule(*whole)
                found[source] = self.op("Add", found[source], part) if source in found else part
        return found

    # Differentiable operators

    def add(self, a: ir.Value, b: ir.Value) -> ir.Value:
        """a + b; only a value of the shape of the sum may have a gradient."""
        return self.record(self.op("Add", a, b), (a, lambda g: g), (b, lambda g: g))

    def multiply(self, a: ir.Value, b: ir.Value) -> ir.Value:
        """a b; only a value of the shape of the product may have a gradient."""
        return self.record(
            self.op("Mul", a, b), (a, lambda g: self.op("Mul", g, b)), (b, lambda g: self.op("Mul", g, a))
        )

    def matmul(self, a: ir.Value, b: ir.Value, *, transposed: bool = False, alpha: float = 1.0) -> ir.Value:
        """alpha a b, or alpha a bᵀ, over the last two dimensions; the others are the same in both."""

        def product(a: ir.Value, b: ir.Value, first: bool, second: bool) -> ir.Value:
            return self.op("FusedMatMul", a, b, domain=MICROSOFT, transA=int(first), transB=int(second), alpha=alpha)

        def of_b(g: ir.Value) -> ir.Value:
            return product(g, a, True, False) if transposed else product(a, g, True, False)

        return self.record(
            product(a, b, False, transposed), (a, lambda g: product(g, b, False, not transposed)), (b, of_b)
        )

    def reshape(self, x: ir.Value, shape: ir.Value | Sequence[int]) -> ir.Value:
        """X in another shape; 0 in it keeps a dimension, -1 is what is left."""
        target = shape if isinstance(shape, ir.Value) else self.constant(list(shape), np.int64)
        return self.record(self.op("Reshape", x, target), (x, lambda g: self.op("Reshape", g, self.op("Shape", x))))

    def transpose(self, x: ir.Value, order: Sequence[int]) -> ir.Value:
        """X with its dimensions in another order."""
        back = [list(order).index(axis) for axis in range(len(order))]
        return self.record(self.op("Transpose", x, perm=list(order)), (x, lambda g: self.op("Transpose", g, perm=back)))

    def split(self, x: ir.Value, sizes: Sequence[int] | int, axis: int = -1) -> list[ir.Value]:
        """X cut along a dimension into parts of these sizes, or into so many equal ones."""
        if isinstance(sizes, int):
            parts = self.op("Split", x, outputs=sizes, axis=axis, num_outputs=sizes)
        else:
            parts = self.op("Split", x, self.constant(list(sizes), np.int64), outputs=len(sizes), axis=axis)
        if x in self.active:
            self.active.update(parts)
            self._steps.append((tuple(parts), [(x, lambda *g: self.op("Concat", *g, axis=axis))]))
        return list(parts)

    def bias(self, x: ir.Value, bias: ir.Value) -> ir.Value:
        """X [rows, size] + bias [size]."""
        return self.record(self.op("Add", x, bias), (x, lambda g: g), (bias, self._sum_rows))

    def softmax(self, x: ir.Value) -> ir.Value:
        """Softmax over the last dimension."""
        p = self.op("Softmax", x, axis=-1)

        def back(g: ir.Value) -> ir.Value:
            return self.op("Mul", p, self.op("Sub", g, self._sum(self.op("Mul", g, p))))

        return self.record(p, (x, back))

    def tanh(self, x: ir.Value) -> ir.Value:
        """Tanh."""
        y = self.op("Tanh", x)
        return self.record(
            y, (x, lambda g: self.op("Mul", g, self.op("Sub", self.constant(1.0), self.op("Mul", y, y))))
        )

    def sigmoid(self, x: ir.Value) -> ir.Value:
        """Sigmoid."""
        y = self.op("Sigmoid", x)

        def back(g: ir.Value) -> ir.Value:
            return self.op("Mul", g, self.op("Mul", y, self.op("Sub", self.constant(1.0), y)))

        return self.record(y, (x, back))

    def gelu(self, x: ir.Value, approximate: str) -> ir.Value:
        """GELU, by erf or, with `approximate` "tanh", by tanh."""

        def back(g: ir.Value) -> ir.Value:
            def times(factor: float, value: ir.Value) -> ir.Value:
                return self.op("Mul", self.constant(factor), value)

            one = self.constant(1.0)
            square = self.op("Mul", x, x)
            if approximate == "tanh":
                root = math.sqrt(2 / math.pi)
                inner = self.op("Mul", x, self.op("Add", self.constant(root), times(root * 0.044715, square)))
                t = self.op("Tanh", inner)
                slope = self.op("Add", self.constant(root), times(3 * root * 0.044715, square))
                rise = self.op("Mul", self.op("Mul", x, self.op("Sub", one, self.op("Mul", t, t))), slope)
            else:
                t = self.op("Erf", times(math.sqrt(0.5), x))
                rise = times(2 / math.sqrt(2 * math.pi), self.op("Mul", x, self.op("Exp", times(-0.5, square))))
            return self.op("Mul", g, times(0.5, self.op("Add", self.op("Add", one, t), rise)))

        return self.record(self.op("Gelu", x, approximate=approximate), (x, back))

    def rms_norm(self, x: ir.Value, weight: ir.Value, epsilon: float) -> ir.Value:
        """RMSNorm over the last dimension."""
        y = self.op("SimplifiedLayerNormalization", x, weight, axis=-1, epsilon=epsilon, stash_type=1)

        def back(g: ir.Value) -> ir.Value:
            mean = self._mean(self.op("Mul", x, x))
            r = self.op("Reciprocal", self.op("Sqrt", self.op("Add", mean, self.constant(epsilon))))
            scaled = self.op("Mul", g, weight)
            along = self.op("Mul", self._mean(self.op("Mul", scaled, x)), self.op("Mul", r, r))
            return self.op("Mul", r, self.op("Sub", scaled, self.op("Mul", x, along)))

        return self.record(y, (x, back))

    def layer_norm(self, x: ir.Value, weight: ir.Value, bias: ir.Value | None, epsilon: float) -> ir.Value:
        """LayerNorm over the last dimension; weight and bias may have gradients, that of x [rows, size] then."""
        y, mean, r = self.op("LayerNormalization", x, weight, bias, outputs=3, axis=-1, epsilon=epsilon, stash_type=1)

        def back(g: ir.Value) -> ir.Value:
            normed = self.op("Mul", self.op("Sub", x, mean), r)
            scaled = self.op("Mul", g, weight)
            along = self.op("Mul", normed, self._mean(self.op("Mul", scaled, normed)))
            return self.op("Mul", r, self.op("Sub", self.op("Sub", scaled, self._mean(scaled)), along))

        def of_weight(g: ir.Value) -> ir.Value:
            return self._sum_rows(self.op("Mul", g, self.op("Mul", self.op("Sub", x, mean), r)))

        return self.record(y, (x, back), (weight, of_weight), (bias, self._sum_rows))

    def rotate(self, x: ir.Value, heads: int, tables: tuple[ir.Value, ir.Value], *, interleaved: int) -> ir.Value:
        """Rotary embedding of [batch, seq, heads * size] by cos and sin [positions, rotated / 2], from position 0."""
        cos, sin = tables
        shape = cos.shape
        assert shape is not None
        rotated = 2 * int(shape[1])  # type: ignore[arg-type]

        def turn(x: ir.Value, sin: ir.Value) -> ir.Value:
            # 0 means that whole heads are rotated; the number of heads is needed otherwise.
            start = self.constant([0], np.int64)
            return self.op(
                "RotaryEmbedding",
                *(x, start, cos, sin),
                domain=MICROSOFT,
                num_heads=heads,
                rotary_embedding_dim=rotated,
                interleaved=interleaved,
            )

        def back(g: ir.Value) -> ir.Value:
            return turn(g, self.op("Neg", sin))

        return self.record(turn(x, sin), (x, back))

    def attention(
        self,
        query: ir.Value,
        key: ir.Value,
        value: ir.Value,
        heads: tuple[int, int],
        scores: "Scores",
        *,
        of_source: bool = False,
    ) -> ir.Value:
        """Attention of [batch, seq, heads * size]; `heads` are those of the query and of key and value.

        The query heads that share a key are stacked along the sequence, so that nothing is repeated.

        Args:
            query: See above.
            key: As the query; with `of_source` [batch, heads, seq of the source, size].
            value: As the key.
            heads: Of the query, and of key and value.
            scores: How the products of query and key become scores.
            of_source: Whether key and value are of an encoder-decoder's source: then `SOURCE_MASK` says what is
                attended to, else `MASK`.

        Returns:
            [batch, seq, heads * size].
        """
        many, few = heads
        share = many // few
        q = self.transpose(self.reshape(query, (0, 0, few, share, -1)), (0, 2, 3, 1, 4))
        k, v = key, value
        if not of_source:
            k, v = (self.transpose(self.reshape(x, (0, 0, few, -1)), (0, 2, 1, 3)) for x in (key, value))
        length = self.op("Shape", query, start=1, end=2)
        last = self.op("Shape", q, start=4, end=5)
        batch = self.op("Shape", query, start=0, end=1)
        keys = self.op("Shape", k, start=2, end=3) if of_source else length

        def numbers(*values: int) -> ir.Value:
            return self.constant(values, np.int64)

        stacked = self.op("Concat", batch, numbers(few, -1), last, axis=0)
        found = self.matmul(self.reshape(q, stacked), k, transposed=True, alpha=scores.scale)
        if scores.softcap:
            found = self.tanh(self.multiply(found, self.constant(1 / scores.softcap)))
            found = self.multiply(found, self.constant(scores.softcap))
        found = self.reshape(found, self.op("Concat", batch, numbers(few, share), length, keys, axis=0))
        if scores.bias is not None:
            found = self.add(found, scores.bias)
        mask = self.input(SOURCE_MASK if of_source else MASK, ir.DataType.FLOAT, ("batch", 1, 1, "rows", "columns"))
        weights = self.softmax(self.add(found, mask))
        flat = self.reshape(weights, self.op("Concat", batch, numbers(few, -1), keys, axis=0))
        mixed = self.matmul(flat, v)
        apart = self.reshape(mixed, self.op("Concat", batch, numbers(few, share), length, last, axis=0))
        return self.reshape(self.transpose(apart, (0, 3, 1, 2, 4)), (0, 0, -1))

    def linear(self, x: ir.Value, weight: "Weight", bias: ir.Value | None = None) -> ir.Value:
        """X weightᵀ + bias for a frozen weight, with LoRA on top if the layer has a name."""
        product = self.op("FusedMatMul", x, weight.value, domain=MICROSOFT, transB=int(weight.transposed))
        self.kept.add(product)

        def back(g: ir.Value) -> ir.Value:
            return self.op("FusedMatMul", g, weight.value, domain=MICROSOFT, transB=int(not weight.transposed))

        y = self.record(product, (x, back))
        if bias is not None:
            y = self.add(y, bias)
        if weight.module is None:
            return y
        flat = self.reshape(x, (-1, weight.inputs))
        parts = self.parts(weight.module, weight.outputs)
        changes = []
        for name, size in parts:
            linear = Linear(name, weight.inputs, size)
            if linear not in self.linears:  # ALBERT calls its only layer again and again
                self.linears.append(linear)
            a = self.input(f"lora_A.{name}", ir.DataType.FLOAT, ("rank", weight.inputs))
            b = self.input(f"lora_B.{name}", ir.DataType.FLOAT, (size, "rank"))
            scaling = self.input("scaling", ir.DataType.FLOAT, ())
            self.active |= {a, b}
            down = self.matmul(flat, a, transposed=True)
            self.kept.add(down)
            changes.append(self.matmul(self.multiply(down, scaling), b, transposed=True))
        change = changes[0] if len(changes) == 1 else self.join(changes, [size for _, size in parts])
        return self.add(y, self.reshape(change, self.op("Shape", y)))

    def join(self, parts: Sequence[ir.Value], sizes: Sequence[int]) -> ir.Value:
        """Parts side by side along the last dimension."""
        ends = np.cumsum(sizes).tolist()

        def of(start: int, end: int) -> Gradient:
            def back(g: ir.Value) -> ir.Value:
                bounds = (self.constant([number], np.int64) for number in (start, end, -1))
                return self.op("Slice", g, *bounds)

            return back

        whole = self.op("Concat", *parts, axis=-1)
        return self.record(
            whole, *((part, of(end - size, end)) for part, size, end in zip(parts, sizes, ends, strict=True))
        )

    def _sum(self, x: ir.Value) -> ir.Value:
        return self.op("ReduceSum", x, self.constant([-1], np.int64), keepdims=1)

    def _sum_rows(self, x: ir.Value) -> ir.Value:
        return self.op("ReduceSum", x, self.constant([0], np.int64), keepdims=0)

    def _mean(self, x: ir.Value) -> ir.Value:
        return self.op("ReduceMean", x, self.constant([-1], np.int64), keepdims=1)
