"""The graphs with which a bundle learns: cut out of the graph that ships, and differentiated.

A layer is what lies between two values through which everything passes. Layers that compute the same share their
graphs: forward; forward with the values that the backward pass reads; backward from these; backward that computes them
again. Weights are inputs: a table names the bytes of the bundle's data file that go into each.
"""

import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from safetensors.numpy import save_file

from edge_ft.config import INT8_ACTIVATIONS
from edge_ft.errors import UsageError
from edge_ft.export.bundle_weights import JOINED
from edge_ft.export.differentiate import MICROSOFT, Tape, Undifferentiable, Weight, extract
from edge_ft.export.source import ExportSource
from edge_ft.files import write_json

__all__ = ["add_training", "write_train_graphs"]

FOLDER = "train"
INLINE = f"{FOLDER}/inline.safetensors"
"""Copies of the small tensors that lie inside the graph's own file."""
LARGEST = 2_000_000
"""Bytes that the folder may have unless it is asked for."""
VOCABULARY_CHUNK = 8192
"""Rows of the head's weight that are float at a time."""
LINEARS = ("MatMulNBits", "MatMul", "FusedMatMul")
FURTHER = "further"
"""Where a layer's node keeps its `_FurtherBits`."""

Parts = Callable[[str, int], list[tuple[str, int]]]


def add_training(folder: Path, source: ExportSource, graph: str, trainable: bool | None) -> dict[str, Any]:
    """Write `train/` into a bundle if its model can learn.

    Args:
        folder: The bundle.
        source: What was exported.
        graph: Path of the exact main graph relative to `folder`.
        trainable: Whether it must be able to, or must not; None: if it can be, in a small folder.

    Returns:
        The manifest's `train`: the path of the `index`, or the `reason` why it cannot learn.

    Raises:
        UsageError: --trainable asks for it and it cannot.
    """
    try:
        _refuse(source, trainable)
        dims = source.dims
        index = write_train_graphs(folder, graph, source.base.family.layers, _parts(source), dims.hidden)
        _refuse_large(folder / FOLDER, trainable)
    except Undifferentiable as error:
        shutil.rmtree(folder / FOLDER, ignore_errors=True)
        if trainable:
            raise UsageError(f"--trainable: {source.base.name} cannot learn as a bundle: {error}") from error
        return {"reason": str(error)}
    return {"index": index}


def _refuse(source: ExportSource, trainable: bool | None) -> None:
    """Refuse what no bundle can learn over.

    Raises:
        Undifferentiable: and why.
    """
    if trainable is False:
        raise Undifferentiable("it was exported with --no-trainable")
    if source.lane == "merged":
        raise Undifferentiable("its adapter is merged into the weights: export the run with --lane adapter")
    if source.weights in INT8_ACTIVATIONS:
        raise Undifferentiable("it computes in int8, which has no gradient: export it with --weights int4 or int8")
    if not source.base.family.decoder:
        raise Undifferentiable(f"training over a bundle does not know the task {source.task} yet")


def _refuse_large(folder: Path, trainable: bool | None) -> None:
    """Refuse a folder that is large, unless it is asked for.

    Raises:
        Undifferentiable: it is.
    """
    size = sum(file.stat().st_size for file in folder.iterdir())
    if size > LARGEST and not trainable:
        raise Undifferentiable(f"its training graphs would take {size / 1e6:.1f} MB (--trainable keeps them)")


def _parts(source: ExportSource) -> Parts:
    """Return how a layer that the export joined is cut into those of the model."""
    dims = source.dims
    query, key = dims.heads * dims.head_dim, dims.kv_heads * dims.head_dim

    def parts(module: str, outputs: int) -> list[tuple[str, int]]:
        block, dot, name = module.rpartition(".")
        if name != "qkv_proj" or source.base.family.name == "phi3":  # whose own layer that is
            return [(module, outputs)]
        return [(f"{block}{dot}{part}", n) for part, n in zip(JOINED[name], (query, key, key), strict=True)]

    return parts


def write_train_graphs(folder: Path, graph: str, layers: str, parts: Parts, hidden: int) -> str:
    """Write `train/` into a bundle.

    Args:
        folder: The bundle.
        graph: Path of its main graph relative to `folder`.
        layers: Dotted name of the list of transformer layers.
        parts: Name and outputs of a linear layer -> those of the layers that an export joined into it.
        hidden: Width of the model.

    Returns:
        Path of the index relative to `folder`.

    Raises:
        Undifferentiable: the model cannot learn, and why; nothing is written.
    """
    model = ir.load(folder / graph)
    flow = _Flow(model.graph, layers)
    tensors = _Tensors(Path(graph).parent)
    models: dict[str, ir.Model] = {}
    blocks: list[dict[str, Any]] = []
    known: dict[bytes, int] = {}
    entries = []
    for piece in flow.layers:
        block = _Block(piece, layers, parts)
        kind = known.setdefault(block.signature, len(blocks))
        if kind == len(blocks):
            paths = {name: f"{FOLDER}/block{kind}_{name}.onnx" for name in block.models}
            models |= {paths[name]: graph for name, graph in block.models.items()}
            blocks.append({"graphs": paths, **block.description})
        entries.append({"block": kind, "window": block.window, "weights": tensors.table(block.builder.weights)})
    embed, head = _Embedding(flow.before), _Head(flow.after)
    models |= {f"{FOLDER}/embed.onnx": embed.model, f"{FOLDER}/head.onnx": head.model}
    models[f"{FOLDER}/head_score.onnx"] = head.score
    (folder / FOLDER).mkdir()
    for path, made in models.items():
        ir.save(made, folder / path)
    document = {
        "format": 1,
        "layers_name": layers,
        "hidden": hidden,
        "embed": {"graph": f"{FOLDER}/embed.onnx", "weights": tensors.table(embed.builder.weights)},
        "blocks": blocks,
        "layers": entries,
        "head": {
            "graph": f"{FOLDER}/head.onnx",
            "score": f"{FOLDER}/head_score.onnx",
            "weights": tensors.table(head.builder.weights),
        },
        "tensors": tensors.places,
    }
    if tensors.inline:
        save_file(tensors.inline, folder / INLINE)
    write_json(folder / FOLDER / "index.json", document)
    return f"{FOLDER}/index.json"


@dataclass(frozen=True)
class _FurtherBits:
    """What more is known of the first rows of a layer's weight: codes around 8 in the same scales, divided."""

    codes: ir.Value
    scales: ir.Value
    rows: int
    divisor: float


@dataclass(frozen=True)
class _Piece:
    """A part of the graph that reads one activation and computes another."""

    nodes: list[ir.Node]
    x: ir.Value
    y: ir.Value


class _Flow:
    """The graph as a chain: before the layers, each layer, after the layers.

    Raises:
        Undifferentiable: it is no chain.
    """

    def __init__(self, graph: ir.Graph, layers: str) -> None:
        _simplify(graph)
        (tokens,) = [value for value in graph.inputs if value.name == "input_ids"]
        active, nodes = {tokens}, list[ir.Node]()
        for node in graph:
            if node.op_type != "Shape" and any(value in active for value in node.inputs):
                nodes.append(node)
                active.update(node.outputs)
        order = {node: at for at, node in enumerate(nodes)}
        last_use = {
            value: max((order[use.node] for use in value.uses() if use.node in order), default=-1) for value in active
        }
        pieces: list[_Piece] = []
        start, x, live = 0, tokens, set[ir.Value]()
        for at, node in enumerate(nodes):
            live = {value for value in (*live, *node.outputs) if last_use[value] > at}
            if len(live) == 1 or at == len(nodes) - 1:
                y = next(iter(live)) if live else node.outputs[0]
                pieces.append(_Piece(nodes[start : at + 1], x, y))
                start, x = at + 1, y
        owners = [_layer_of(piece, layers) for piece in pieces]
        first = next((at for at, owner in enumerate(owners) if owner is not None), None)
        if first is None:
            raise Undifferentiable("its graph has no layers that could be told apart")
        last = max(at for at, owner in enumerate(owners) if owner is not None)
        groups: list[list[_Piece]] = []
        current = None
        for piece, owner in zip(pieces[first : last + 1], owners[first : last + 1], strict=True):
            if owner is not None and owner != current:
                groups.append([])
                current = owner
            groups[-1].append(piece)
        self.before = _joined(pieces[:first])
        self.layers = [_joined(group) for group in groups]
        self.after = _joined(pieces[last + 1 :])


def _joined(pieces: list[_Piece]) -> _Piece:
    if not pieces:
        raise Undifferentiable("its graph has nothing before or after the layers")
    return _Piece([node for piece in pieces for node in piece.nodes], pieces[0].x, pieces[-1].y)


def _layer_of(piece: _Piece, layers: str) -> int | None:
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
                node.outputs[0].replace_all_uses_with(_given(node, 0), replace_graph_outputs=True)
                graph.remove(node, safe=True)
    for node in list(graph):
        if node.op_type == "Add" and (further := _further_bits(node)) is not None:
            product = _given(node, 0).producer()
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
            node.outputs[0].replace_all_uses_with(norm.outputs[0])
            node.outputs[3].replace_all_uses_with(total.outputs[0])
            graph.remove(node, safe=True)
    for node in reversed(list(graph)):
        if not any(output.uses() or output.is_graph_output() for output in node.outputs):
            graph.remove(node, safe=True)


def _further_bits(total: ir.Node) -> _FurtherBits | None:
    """Return the second summand, where it is the product with the further bits of the layer that is the first one."""
    first, second = (None if value is None else value.producer() for value in total.inputs[:2])
    if second is not None and second.op_type == "Pad":  # zeros for rows without further bits
        second = _given(second, 0).producer()
    if second is None or second.op_type != "Div" or first is None or first.op_type != "MatMulNBits":
        return None
    product, divisor = _given(second, 0).producer(), _given(second, 1).const_value
    if product is None or product.op_type != "MatMulNBits" or divisor is None:
        return None
    codes, scales = _given(product, 1), _given(product, 2)
    return _FurtherBits(codes, scales, product.attributes["N"].as_int(), float(divisor.numpy()))


@dataclass
class _Tensors:
    """Where each weight's bytes lie in the bundle."""

    beside: Path
    """Folder of the main graph, relative to the bundle."""
    places: dict[str, dict[str, Any]] = field(default_factory=dict)
    inline: dict[str, NDArray[Any]] = field(default_factory=dict)

    def table(self, weights: dict[str, tuple[ir.Value, tuple[int, ...]]]) -> dict[str, str]:
        """Return the name of the tensor for each input; note where its bytes are."""
        return {name: self._place(value, shape) for name, (value, shape) in weights.items()}

    def _place(self, value: ir.Value, shape: tuple[int, ...]) -> str:
        tensor = value.const_value
        assert tensor is not None
        name = f"{value.name}" if tuple(tensor.shape.numpy()) == shape else f"{value.name}:{len(shape)}"
        place: dict[str, Any] = {"dtype": tensor.dtype.numpy().name, "shape": list(shape)}
        if isinstance(tensor, ir.ExternalTensor):
            place |= {"file": (self.beside / str(tensor.location)).as_posix(), "offset": tensor.offset or 0}
        else:
            self.inline[name] = np.ascontiguousarray(tensor.numpy().reshape(shape))
            place["file"] = INLINE
        self.places[name] = place
        return name


class _Builder:
    """Repeats nodes of the graph on a tape, with gradients for those that the activation reaches."""

    def __init__(self, piece: _Piece, x: ir.Value, layers: str = "", parts: Parts | None = None) -> None:
        self.tape = Tape()
        if parts is not None:
            self.tape.parts = parts
        self.inner = re.compile(rf"{re.escape(layers)}\.\d+\." if layers else "(?!)")
        """Matches what stands before a name inside a layer."""
        self.weights: dict[str, tuple[ir.Value, tuple[int, ...]]] = {}
        """By the name of an input, the initializer and the shape in which it is read."""
        self.active = {output for node in piece.nodes for output in node.outputs}
        self.copies: dict[ir.Value, ir.Value] = {piece.x: x}
        self.windows: set[int | None] = set()
        self.causal = True

    def repeat(self, nodes: list[ir.Node]) -> None:
        """Repeat nodes of the flow.

        Raises:
            Undifferentiable: an operator has no rule.
        """
        for node in nodes:
            rule = RULES.get(node.op_type)
            if rule is None:
                raise Undifferentiable(f"its layers hold the operator {node.op_type}, for which there is no gradient")
            outputs = rule(self, node)
            outputs = outputs if isinstance(outputs, list) else [outputs]
            for old, new in zip(node.outputs, outputs, strict=False):
                self.copies[old] = new

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
        further: _FurtherBits | None = node.meta.get(FURTHER)
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


class _Block:
    """A transformer layer."""

    def __init__(self, piece: _Piece, layers: str, parts: Parts) -> None:
        x = ir.val("x", type=ir.TensorType(ir.DataType.FLOAT))
        self.builder = builder = _Builder(piece, x, layers, parts)
        tape = builder.tape
        tape.inputs["x"] = x
        tape.active.add(x)
        builder.repeat(piece.nodes)
        self.y = builder.copies[piece.y]
        self.signature = _serialized(extract(tape, {"y": self.y}))
        self._x = x

    @property
    def models(self) -> dict[str, ir.Model]:
        """Forward and backward graphs."""
        tape, y, x = self.builder.tape, self.y, self._x
        dy = tape.input("dy", ir.DataType.FLOAT)
        forward = set(tape.nodes)
        gradients = tape.gradients({y: dy})
        outputs = {"dx": gradients[x]}
        for name, value in tape.inputs.items():
            if name.startswith("lora_"):
                outputs[f"grad.{name}"] = gradients[value]
        saved = self._saved(forward, set(outputs.values()))
        for index, value in enumerate(saved):
            value.name = f"saved_{index}"
        return {
            "forward": extract(tape, {"y": y}),
            "forward_saved": extract(tape, {"y": y} | {str(value.name): value for value in saved}),
            "backward": extract(tape, outputs, saved),
            "backward_recompute": extract(tape, outputs),
        }

    @property
    def description(self) -> dict[str, Any]:
        """What the loop needs to know of it."""
        return {"linears": [asdict(linear) for linear in self.builder.tape.linears], "causal": self.builder.causal}

    @property
    def window(self) -> int | None:
        """Tokens that attend to each other at most; None: all."""
        if len(self.builder.windows) > 1:
            raise Undifferentiable("a layer attends twice, over windows of different lengths")
        return next(iter(self.builder.windows), None)

    def _saved(self, forward: set[ir.Node], gradients: set[ir.Value]) -> list[ir.Value]:
        """Values of the forward pass that the backward pass reads and that cost a product with a weight."""
        kept = self.builder.tape.kept
        saved: dict[ir.Value, None] = {}
        wanted = set(gradients)
        for node in reversed(self.builder.tape.nodes):
            if not any(output in wanted for output in node.outputs):
                continue
            if node in forward and any(output in kept for output in node.outputs):
                saved.update(dict.fromkeys(output for output in node.outputs if output in wanted))
                continue
            wanted.update(value for value in node.inputs if value is not None)
        return list(saved)


class _Embedding:
    """What comes before the layers: token ids -> the first layer's input. It has no gradient."""

    def __init__(self, piece: _Piece) -> None:
        ids = ir.val("input_ids", shape=ir.Shape(("batch", "sequence")), type=ir.TensorType(ir.DataType.INT64))
        self.builder = builder = _Builder(piece, ids)
        tape = builder.tape
        tape.inputs["input_ids"] = ids
        builder.active = set()  # every node is copied as it is
        self.model = extract(tape, {"x": builder.copy(piece.y)})


class _Head:
    """A norm and the product with the vocabulary, for rows that have a label: loss, and its gradient.

    The weight becomes float some rows at a time, so that the whole of it never is.
    """

    def __init__(self, piece: _Piece) -> None:
        x = ir.val("x", shape=ir.Shape(("rows", "hidden")), type=ir.TensorType(ir.DataType.FLOAT))
        self.builder = builder = _Builder(piece, x)
        tape = builder.tape
        tape.inputs["x"] = x
        tape.active.add(x)
        # Which positions get logits is chosen outside: rows come one by one.
        nodes = [node for node in piece.nodes if node.op_type not in ("Slice", "Reshape")]
        for node in piece.nodes:
            if node.op_type in ("Slice", "Reshape"):
                node.outputs[0].replace_all_uses_with(_given(node, 0), replace_graph_outputs=True)
        at = max(index for index, node in enumerate(nodes) if node.op_type in LINEARS)
        builder.repeat(nodes[:at])
        head, after = nodes[at], nodes[at + 1 :]
        hidden, bias = builder.at(head, 0), builder.optional(head, 5)
        if bias is not None:
            raise Undifferentiable("its head has a bias")
        whole = builder.weight(head)
        chunks: list[tuple[int, ir.Value]] = []
        for start in range(0, whole.outputs, VOCABULARY_CHUNK):
            rows = builder.weight(head, (start, min(start + VOCABULARY_CHUNK, whole.outputs)))
            builder.copies[head.outputs[0]] = tape.linear(hidden, rows)
            builder.repeat(after)
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


def _given(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index]
    assert value is not None
    return value


def _serialized(model: ir.Model) -> bytes:
    return ir.to_proto(model).SerializeToString(deterministic=True)


def _linear(builder: _Builder, node: ir.Node) -> ir.Value:
    if node.op_type == "FusedMatMul" and not node.attributes["transB"].as_int():
        raise Undifferentiable("its layers multiply activations outside of attention")
    bias = builder.optional(node, 5) if node.op_type == "MatMulNBits" else None
    return builder.tape.linear(builder.at(node, 0), builder.weight(node), bias)


def _group_query_attention(builder: _Builder, node: ir.Node) -> ir.Value:
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
    return tape.attention(query, key, value, (many, few), scale=settings["scale"].as_float(), softcap=cap)


def _multi_head_attention(builder: _Builder, node: ir.Node) -> ir.Value:
    heads, scale = node.attributes["num_heads"].as_int(), node.attributes["scale"].as_float()
    if builder.optional(node, 3) is not None or len(node.outputs) > 1:
        raise Undifferentiable("its attention has biases or a cache")
    builder.causal = False
    builder.windows.add(None)
    query, key, value = (builder.at(node, index) for index in range(3))
    bias = builder.optional(node, 5)
    if bias is not None:
        bias = builder.tape.op("Unsqueeze", bias, builder.tape.constant([2], np.int64))
    return builder.tape.attention(query, key, value, (heads, heads), scale=scale, bias=bias)


def _power(builder: _Builder, node: ir.Node) -> ir.Value:
    exponent = node.inputs[1]
    if exponent is None or exponent.const_value is None:
        raise Undifferentiable("its layers hold a power with a computed exponent")
    count = float(exponent.const_value.numpy())
    if count not in (2.0, 3.0):
        raise Undifferentiable(f"its layers hold a power of {count:g}")
    x = builder.at(node, 0)
    square = builder.tape.multiply(x, x)
    return square if count == 2 else builder.tape.multiply(square, x)


def _divide(builder: _Builder, node: ir.Node) -> ir.Value:
    x, divisor = builder.at(node, 0), builder.at(node, 1)
    if divisor in builder.tape.active:
        raise Undifferentiable("its layers divide by an activation")
    tape = builder.tape
    return tape.record(tape.op("Div", x, divisor), (x, lambda g: tape.op("Div", g, divisor)))


def _relu(builder: _Builder, node: ir.Node) -> ir.Value:
    tape, x = builder.tape, builder.at(node, 0)
    y = tape.op("Relu", x)

    def back(g: ir.Value) -> ir.Value:
        return tape.op("Mul", g, tape.op("Cast", tape.op("Greater", y, tape.constant(0.0)), to=ir.DataType.FLOAT))

    return tape.record(y, (x, back))


def _split(builder: _Builder, node: ir.Node) -> list[ir.Value]:
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
    sizes = node.inputs[1].const_value if len(node.inputs) > 1 and node.inputs[1] is not None else None
    return builder.tape.split(builder.at(node, 0), sizes.numpy().tolist() if sizes else len(node.outputs), axis)


def _norm(builder: _Builder, node: ir.Node) -> ir.Value:
    epsilon = node.attributes["epsilon"].as_float()
    return builder.tape.rms_norm(builder.at(node, 0), builder.at(node, 1), epsilon)


def _layer_norm(builder: _Builder, node: ir.Node) -> ir.Value:
    epsilon = node.attributes["epsilon"].as_float()
    return builder.tape.layer_norm(builder.at(node, 0), builder.at(node, 1), builder.optional(node, 2), epsilon)


def _gelu(builder: _Builder, node: ir.Node) -> ir.Value:
    attribute = node.attributes.get("approximate")
    return builder.tape.gelu(builder.at(node, 0), attribute.as_string() if attribute is not None else "none")


RULES: dict[str, Callable[[_Builder, ir.Node], Any]] = {
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
}
"""How each operator of a layer is repeated on a tape."""
