"""The graphs with which a bundle learns: cut out of the graph that ships, and differentiated.

Layers that compute the same share their graphs: forward; forward with the values that the backward pass reads; backward
from these; backward that computes them again. Weights are inputs: a table names the bytes of the bundle's data file
that go into each.
"""

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from safetensors.numpy import save_file

from edge_ft.config import INT8_ACTIVATIONS, TEXT_TASKS, Task
from edge_ft.errors import UsageError
from edge_ft.export.bundle import graph_files, lora_graph
from edge_ft.export.bundle_weights import JOINED
from edge_ft.export.class_head import ClassHead
from edge_ft.export.differentiate import Undifferentiable
from edge_ft.export.graph_pieces import Flow, Piece
from edge_ft.export.operator_rules import repeat
from edge_ft.export.piece_builder import Builder, Parts
from edge_ft.export.source import ExportSource
from edge_ft.export.tape_graph import extract
from edge_ft.export.vocabulary_head import VocabularyHead
from edge_ft.families import CLASSIFIERS, Family
from edge_ft.files import write_json

__all__ = ["add_training", "write_train_graphs"]

FOLDER = "train"
INLINE = f"{FOLDER}/inline.safetensors"
"""Copies of the small tensors that lie inside the graph's own file."""
LARGEST = 2_000_000
"""Bytes that the folder may have unless it is asked for."""


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
        index = write_train_graphs(folder, graph, source.base.family, source.task, _parts(source), source.dims.hidden)
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
    if source.task not in (*TEXT_TASKS, *CLASSIFIERS):
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


def write_train_graphs(folder: Path, graph: str, family: Family, task: Task, parts: Parts, hidden: int) -> str:
    """Write `train/` into a bundle.

    Args:
        folder: The bundle.
        graph: Path of its main graph relative to `folder`.
        family: Of the model.
        task: Of the bundle.
        parts: Name and outputs of a linear layer -> those of the layers that an export joined into it.
        hidden: Width of the model.

    Returns:
        Path of the index relative to `folder`.

    Raises:
        Undifferentiable: the model cannot learn, and why; nothing is written.
    """
    written = _Written(_Tensors(Path(graph).parent), parts)
    document: dict[str, Any] = {"format": 1, "hidden": hidden}
    if family.encoder_layers is not None:
        encoder, graph, _ = graph_files(graph)
        flow = Flow(ir.load(folder / encoder).graph, family.encoder_layers, "last_hidden_state")
        document["encoder"] = written.stack(flow, family.encoder_layers, "encoder_", [flow.after])
    # The decoder's first graph reads the source itself; of the others all outputs count.
    flow = Flow(ir.load(folder / graph).graph, family.layers, "logits" if family.encoder_layers else None)
    document |= written.stack(flow, family.layers)
    if trained_head := family.trained_head(task):
        head = ClassHead(flow.after, trained_head, _norms(ir.load(folder / lora_graph(graph)).graph))
        document["head"] = written.head(head)
    else:
        document["head"] = written.head(VocabularyHead(flow.after))
    document |= {"blocks": written.blocks, "tensors": written.tensors.places}
    (folder / FOLDER).mkdir()
    for path, made in written.models.items():
        ir.save(made, folder / path)
    if written.tensors.inline:
        save_file(written.tensors.inline, folder / INLINE)
    write_json(folder / FOLDER / "index.json", document)
    return f"{FOLDER}/index.json"


@dataclass
class _Written:
    """The graphs of a model, and what the index says of them."""

    tensors: "_Tensors"
    parts: Parts
    models: dict[str, ir.Model] = field(default_factory=dict)
    """By path relative to the bundle."""
    blocks: list[dict[str, Any]] = field(default_factory=list)
    """Of layers that compute the same."""
    known: dict[bytes, int] = field(default_factory=dict)

    def stack(self, flow: Flow, layers: str, prefix: str = "", further: Sequence[Piece] = ()) -> dict[str, Any]:
        """Add what comes before the layers, the layers, and `further` pieces after them that have a gradient."""
        entries = []
        for piece in (*flow.layers, *further):
            block = _Block(piece, layers, self.parts)
            kind = self.known.setdefault(block.signature, len(self.blocks))
            if kind == len(self.blocks):
                paths = {name: f"{FOLDER}/block{kind}_{name}.onnx" for name in block.models}
                self.models |= {paths[name]: graph for name, graph in block.models.items()}
                self.blocks.append({"graphs": paths, **block.description})
            weights = self.tensors.table(block.builder.weights)
            entries.append({"block": kind, "window": block.window, "weights": weights})
        embed, path = _Embedding(flow.before), f"{FOLDER}/{prefix}embed.onnx"
        self.models[path] = embed.model
        return {
            "layers_name": layers,
            "embed": {"graph": path, "weights": self.tensors.table(embed.builder.weights)},
            "layers": entries,
        }

    def head(self, head: ClassHead | VocabularyHead) -> dict[str, Any]:
        """Add the head."""
        paths = {"graph": f"{FOLDER}/head.onnx", "score": f"{FOLDER}/head_score.onnx"}
        self.models |= {paths["graph"]: head.model, paths["score"]: head.score}
        found = {**paths, "weights": self.tensors.table(head.builder.weights)}
        if isinstance(head, ClassHead):
            found["parameters"] = self.tensors.parameters(head.parameters)
        return found


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

    def parameters(self, found: dict[str, tuple[ir.Value, bool]]) -> dict[str, dict[str, Any]]:
        """Return where the parameters of a head start: a tensor, and whether it is transposed there."""
        return {
            name: {"tensor": self._place(value, _shape(value)), "transposed": transposed}
            for name, (value, transposed) in found.items()
        }

    def _place(self, value: ir.Value, shape: tuple[int, ...]) -> str:
        tensor = value.const_value
        assert tensor is not None
        name = f"{value.name}" if tuple(tensor.shape.numpy()) == shape else f"{value.name}:{len(shape)}"
        place: dict[str, Any] = {"dtype": tensor.dtype.numpy().name, "shape": list(shape)}
        # The values of an adapter that is kept in the bundle may be replaced.
        if isinstance(tensor, ir.ExternalTensor) and not str(tensor.location).endswith(".safetensors"):
            place |= {"file": (self.beside / str(tensor.location)).as_posix(), "offset": tensor.offset or 0}
        else:
            self.inline[name] = np.ascontiguousarray(tensor.numpy().reshape(shape))
            place["file"] = INLINE
        self.places[name] = place
        return name


class _Block:
    """A transformer layer."""

    def __init__(self, piece: Piece, layers: str, parts: Parts) -> None:
        x = ir.val("x", type=ir.TensorType(ir.DataType.FLOAT))
        self.builder = builder = Builder(piece, x, layers, parts)
        tape = builder.tape
        tape.inputs["x"] = x
        tape.active.add(x)
        repeat(builder, piece.nodes)
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
        if (source := self.builder.source) is not None:
            outputs["dsource"] = gradients[source]
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

    def __init__(self, piece: Piece) -> None:
        ids = ir.val("input_ids", shape=ir.Shape(("batch", "sequence")), type=ir.TensorType(ir.DataType.INT64))
        self.builder = builder = Builder(piece, ids)
        tape = builder.tape
        tape.inputs["input_ids"] = ids
        builder.active = set()  # every node is copied as it is
        self.model = extract(tape, {"x": builder.copy(piece.y)})


def _shape(value: ir.Value) -> tuple[int, ...]:
    tensor = value.const_value
    assert tensor is not None
    return tuple(int(size) for size in tensor.shape.numpy())


def _norms(graph: ir.Graph) -> list[str]:
    """Return the norms of a head whose weights are inputs of the graph that takes an adapter."""
    vectors = [str(value.name) for value in graph.inputs if value.shape is not None and value.shape.rank() == 1]
    return [name.removeprefix("head.").removesuffix(".weight") for name in vectors if name.endswith(".weight")]


def _serialized(model: ir.Model) -> bytes:
    return ir.to_proto(model).SerializeToString(deterministic=True)
