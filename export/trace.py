"""One trace of the live model, in which hooks stand in where ONNX Runtime has a fused operator.

`torch.export` sees attention, rotary embedding, RMSNorm and linear layers as single operators
(`torch.onnx.ops.symbolic`), whatever the architecture around them; `edge_ft.export.lowering` turns the
result into plain ONNX and ONNX Runtime's contrib operators.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from inspect import signature
from types import SimpleNamespace
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.onnx.ops import symbolic, symbolic_multi_out
from transformers import AttentionInterface, PreTrainedModel

from edge_ft.config import Task
from edge_ft.export.lowering import quiet
from edge_ft.families import Family
from edge_ft.models.dims import ModelDims
from edge_ft.models.rms_norm import plain_rms_norm
from edge_ft.models.supported import refuse_unsupported
from edge_ft.quant.layers import exporting

__all__ = ["trace", "trace_wrapper"]

OPSET = 21

# Names by which transformers.js and onnxruntime-genai size an empty cache, and the sizes that are traced.
EXAMPLE_SIZES = {
    "batch_size": 2,
    "sequence_length": 3,
    "past_sequence_length": 4,
    "total_sequence_length": 7,
    "encoder_sequence_length": 5,
}

Dims = tuple[int | str, ...]
Attend = Callable[[int, Tensor, Tensor, Tensor, dict[str, Any]], Tensor]


def trace(model: PreTrainedModel, family: Family, task: Task | None = None) -> ir.Model:
    """The graph of a float or quantized model; `lowering.lower` must follow before it runs.

    A weight is an initializer named as in the model (`NAME.weight`, or `NAME.qweight`, `NAME.scales` and
    `NAME.zero_points`) and shares the model's memory. The model is afterwards as it was.

    Args:
        model: A transformers task model, float32 on the CPU, in evaluation mode, without an adapter.
        family: Its row; a decoder gets a KV cache, an encoder a padding mask.
        task: What the output is of; default what the family does first.

    Raises:
        ModelError: a decoder that ONNX Runtime's attention does not take.
    """
    # A table of absolute positions can be sliced no further than its end.
    length = torch.export.Dim("sequence_length", max=ModelDims(model.config).positions)
    return trace_wrapper(model, _Decoder(model) if family.decoder else _Encoder(model, task or family.tasks[0]), length)


class Wrapper(Protocol):
    """A module that says what its tensors are called, and how their dimensions are."""

    inputs: dict[str, "Dims"]
    outputs: dict[str, "Dims"]


def trace_wrapper(
    model: PreTrainedModel,
    wrapper: Any,
    length: Any = torch.export.Dim.DYNAMIC,
    attention: Callable[..., tuple[Tensor, None]] | None = None,
) -> ir.Model:
    """The graph of a `Wrapper` around `model` or parts of it.

    Args:
        length: The dimension of `sequence_length`.
        attention: What stands in for transformers' attention; default `_attention`.
    """
    examples = tuple(
        torch.zeros(
            [EXAMPLE_SIZES[size] if isinstance(size, str) else size for size in dims],
            dtype=torch.float32 if len(dims) > 2 else torch.int64,
        )
        for dims in wrapper.inputs.values()
    )
    dynamic = tuple(
        {
            axis: length if size == "sequence_length" else torch.export.Dim.DYNAMIC
            for axis, size in enumerate(dims)
            if isinstance(size, str)
        }
        for dims in wrapper.inputs.values()
    )
    with _hooks(model, wrapper, attention or _attention), quiet(), torch.no_grad():
        program = torch.onnx.export(
            torch.export.export(wrapper, examples, dynamic_shapes=(dynamic,), strict=False),
            dynamo=True,
            optimize=False,
            verbose=False,
            opset_version=OPSET,
            input_names=list(wrapper.inputs),
            output_names=list(wrapper.outputs),
        )
    assert program is not None
    _name(program.model, model, wrapper)
    return program.model


class _Decoder(nn.Module):
    """A causal model with its KV cache as inputs and outputs."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        sizes = ModelDims(model.config)
        refuse_unsupported(sizes, "the model")
        heads, size = sizes.kv_heads, sizes.head_dim
        self.inputs: dict[str, Dims] = {
            "input_ids": ("batch_size", "sequence_length"),
            "attention_mask": ("batch_size", "total_sequence_length"),
            "num_logits_to_keep": (),
        }
        self.outputs: dict[str, Dims] = {"logits": ("batch_size", "num_logits", sizes.vocabulary)}
        for layer in range(sizes.layers):
            for part in ("key", "value"):
                self.inputs[f"past_key_values.{layer}.{part}"] = ("batch_size", heads, "past_sequence_length", size)
                self.outputs[f"present.{layer}.{part}"] = ("batch_size", heads, "total_sequence_length", size)
        self.rotation = SimpleNamespace(tables=None)
        """By which tables the layer at hand rotates: set by the rotary function, taken by the attention after it."""
        rotary = next((module for module in model.modules() if _is_rotary(module)), None)
        if rotary is None:
            return
        # The model's own module fills the tables, so that whatever scaling it applies is in them.
        positions = torch.arange(sizes.positions).unsqueeze(0)
        of_kinds = "layer_type" in signature(rotary.forward).parameters
        for kind in sorted(set(model.config.layer_types)) if of_kinds else (None,):
            tables = rotary(torch.zeros(1), positions, *() if kind is None else (kind,))
            for name, table in zip(_table_names(kind), tables, strict=True):
                self.register_buffer(name, table[0, :, : table.shape[-1] // 2].contiguous())

    def rotary_tables(self, kind: str | None = None) -> tuple[Tensor, Tensor]:
        """cos and sin [positions, rotated / 2] of a kind of layer."""
        cos, sin = (self.get_buffer(name) for name in _table_names(kind))
        return cos, sin

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        input_ids, attention_mask, num_logits_to_keep, *past = tensors
        present: list[Tensor] = []
        lengths = attention_mask.sum(1)
        last_positions = (lengths - 1).to(torch.int32)
        total = symbolic("Shape", [attention_mask], {"start": 1, "end": 2}, dtype=torch.int64, shape=(1,))
        total = total.squeeze().to(torch.int32)

        # Of learned positions: rows are padded on the right, so all but their first run begins where the text ended.
        starts = (lengths - input_ids.shape[1]).clamp(min=0).unsqueeze(1)
        position_ids = starts + torch.arange(input_ids.shape[1])

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor, attributes: dict[str, Any]) -> Tensor:
            past_key, past_value = past[2 * layer : 2 * layer + 2]
            heads, size = past_key.shape[1], past_key.shape[3]
            cache = (query.shape[0], heads, attention_mask.shape[1], size)
            rotation, self.rotation.tables = self.rotation.tables, None
            output, *pair = symbolic_multi_out(
                "com.microsoft::GroupQueryAttention",
                [query, key, value, past_key, past_value, last_positions, total, *(rotation or ())],
                {**attributes, "kv_num_heads": heads, "do_rotary": int(rotation is not None)},
                dtypes=[query.dtype] * 3,
                shapes=[query.shape, cache, cache],
                version=1,
            )
            present.extend(pair)
            return output

        def keep_last(_: nn.Module, arguments: tuple[Tensor, ...]) -> Tensor:
            hidden = arguments[0]
            start = -num_logits_to_keep.reshape(1)  # -0 keeps all
            end, axis = torch.tensor([torch.iinfo(torch.int64).max]), torch.tensor([1])
            # How many are kept is unknown here. Any length but the sequence's says that this is no identity.
            shape = (hidden.shape[0], attention_mask.shape[1], hidden.shape[2])
            return symbolic("Slice", [hidden, start, end, axis], dtype=hidden.dtype, shape=shape)

        handle = self.model.get_output_embeddings().register_forward_pre_hook(keep_last)
        try:
            logits = self.model(input_ids=input_ids, position_ids=position_ids, use_cache=False, attend=attend).logits
        finally:
            handle.remove()
        return (logits, *present)


class _Encoder(nn.Module):
    """A bidirectional model, with or without a head, over right-padded rows."""

    def __init__(self, model: PreTrainedModel, task: Task) -> None:
        super().__init__()
        self.model = model
        takes = signature(model.forward).parameters
        names = ["input_ids", "attention_mask"]
        # RoBERTa has the argument, and one type alone: its tokenizers give none.
        if "token_type_ids" in takes and getattr(model.config, "type_vocab_size", 1) > 1:
            names.append("token_type_ids")
        self.inputs: dict[str, Dims] = dict.fromkeys(names, ("batch_size", "sequence_length"))
        self.fills_types = "token_type_ids" in takes and "token_type_ids" not in names
        self.outputs: dict[str, Dims] = _outputs(model, task)

    def forward(self, *tensors: Tensor) -> Tensor:
        inputs = dict(zip(self.inputs, tensors, strict=True))
        key_padding_mask = inputs["attention_mask"].to(torch.int32)
        if self.fills_types:
            inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
        windows: dict[int, Tensor] = {}

        def attend(
            module: nn.Module,
            query: Tensor,
            key: Tensor,
            value: Tensor,
            bias: Tensor | None,
            *,
            scaling: float,
            sliding_window: int | None = None,
            **_: Any,
        ) -> tuple[Tensor, None]:
            """transformers' attention interface; a mask is made here, so what stands in its place is a bias."""
            if sliding_window is not None:
                if sliding_window not in windows:
                    windows[sliding_window] = _window_bias(query.shape[2], sliding_window)
                bias = windows[sliding_window]
            heads, size = query.shape[1], query.shape[3]
            flat = [x.transpose(1, 2).flatten(2) for x in (query, key, value)]
            output = symbolic(
                "com.microsoft::MultiHeadAttention",
                [*flat, None, key_padding_mask, *([] if bias is None else [bias])],
                {"num_heads": heads, "scale": scaling},
                dtype=query.dtype,
                shape=flat[0].shape,
                version=1,
            )
            return output.unflatten(2, (heads, size)), None

        AttentionInterface.register("edge_ft", attend)
        output: Tensor = self.model(**inputs)[0]
        return output


def _outputs(model: PreTrainedModel, task: Task) -> dict[str, Dims]:
    """What an encoder gives, by optimum's names."""
    config: Any = model.config
    rows = ("batch_size", "sequence_length")
    known: dict[Task, dict[str, Dims]] = {
        "text-classification": {"logits": ("batch_size", config.num_labels)},
        "token-classification": {"logits": (*rows, config.num_labels)},
        "fill-mask": {"logits": (*rows, config.vocab_size)},
        "feature-extraction": {"last_hidden_state": (*rows, config.hidden_size)},
    }
    return known[task]


def _window_bias(length: Any, window: int) -> Tensor:
    """[1, 1, length, length] float32: 0 where two tokens are less than `window` apart, the lowest number elsewhere."""
    position = torch.arange(length)
    apart = (position[:, None] - position[None, :]).abs()
    bias = torch.where(apart < window, 0.0, torch.finfo(torch.float32).min)
    return bias[None, None]


def _name(graph_model: ir.Model, model: PreTrainedModel, wrapper: Wrapper) -> None:
    """Give weights and dimensions the names of the model and of the graph's clients."""
    graph = graph_model.graph
    for value in list(graph.initializers.values()):
        value.name = str(value.name).removeprefix("model.")  # the wrapper's name for the model
    dims = {**wrapper.inputs, **wrapper.outputs}
    for value in (*graph.inputs, *graph.outputs):
        value.shape = ir.Shape(dims[str(value.name)])
        # An input that has a default: a client that knows nothing of it gets the last position.
        if value.name == "num_logits_to_keep":
            value.const_value = ir.tensor(np.array(1, dtype=np.int64), name=value.name)
            graph.register_initializer(value)
    # GatherBlockQuantized wants [N, blob]: as an initializer of the same bytes, since OpenVINO refuses a Reshape.
    names = {module: name for name, module in model.named_modules()}
    embedding, head = names[model.get_input_embeddings()], names.get(model.get_output_embeddings())
    for node in graph:
        codes = node.inputs[0] if node.op_type == "GatherBlockQuantized" else None
        if codes is not None and codes.const_value is not None:
            rows = codes.const_value.numpy()
            tensor = ir.tensor(rows.reshape(len(rows), -1), name=f"{embedding}.qweight")
            table = ir.val(tensor.name, const_value=tensor)
            node.replace_input_with(0, table)
            del graph.initializers[str(codes.name)]
            if codes.uses():  # the head's, tied to the embedding, whose name it may have
                codes.name = f"{head}.qweight" if codes.name == table.name else codes.name
                graph.register_initializer(codes)
            graph.register_initializer(table)


@contextmanager
def _hooks(model: PreTrainedModel, wrapper: Wrapper, attention: Callable[..., tuple[Tensor, None]]) -> Iterator[None]:
    """Replace what ONNX Runtime fuses by single operators while inside."""
    with ExitStack() as undo:

        def patch(owner: Any, name: str, value: Any) -> None:
            undo.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, value)

        undo.enter_context(exporting(model))
        patch(nn.Linear, "forward", _linear)
        _fuse_norms(patch, model)
        for kind in {type(module) for module in model.modules()}:
            if isinstance(wrapper, _Decoder) and _is_rotary(kind):
                _rotate_in_attention(patch, kind, wrapper)
        AttentionInterface.register("edge_ft", attention)
        undo.callback(model.set_attn_implementation, model.config._attn_implementation)
        model.set_attn_implementation("edge_ft")
        yield


def _is_rotary(module: nn.Module | type) -> bool:
    kind = module if isinstance(module, type) else type(module)
    return kind.__name__.endswith("RotaryEmbedding")


def _table_names(kind: str | None) -> tuple[str, str]:
    """Of cos and sin, for a kind of layer that has its own or for all layers."""
    end = "" if kind is None else f"_{kind}"
    return f"cos_cache{end}", f"sin_cache{end}"


def _fuse_norms(patch: Callable[..., None], model: nn.Module) -> None:
    """RMSNorm as one operator, over the weight that it multiplies by (Gemma's plus 1)."""
    norms = [module for module in model.modules() if type(module).__name__.endswith(("RMSNorm", "T5LayerNorm"))]
    found = {norm: plain_rms_norm(norm) for norm in norms}
    for norm, plain in found.items():
        if plain is not None and not torch.equal(plain[0], norm.get_parameter("weight")):
            patch(norm, "weight", nn.Parameter(plain[0], requires_grad=False))
    for kind in {type(norm) for norm in norms}:
        if all(plain is not None for norm, plain in found.items() if type(norm) is kind):
            patch(kind, "forward", _rms_norm)


def _rotate_in_attention(patch: Callable[..., None], kind: type, wrapper: _Decoder) -> None:
    """Leave rotating to GroupQueryAttention, by the tables that are its inputs."""

    def rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        wrapper.rotation.tables = (cos, sin)
        return query, key

    patch(kind, "forward", lambda _, x, position_ids, layer_type=None: wrapper.rotary_tables(layer_type))
    patch(sys.modules[kind.__module__], "apply_rotary_pos_emb", rotate)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    attend: Attend,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: [batch, heads, seq, size] -> [batch, seq, heads, size]."""
    attributes: dict[str, Any] = {"num_heads": query.shape[1], "scale": scaling}
    if sliding_window is not None:
        attributes["local_window_size"] = sliding_window
    if softcap is not None:
        attributes["softcap"] = softcap
    heads, size = query.shape[1], query.shape[3]
    query, key, value = (x.transpose(1, 2).flatten(2) for x in (query, key, value))
    layer: Any = module.layer_idx
    return attend(layer, query, key, value, attributes).unflatten(2, (heads, size)), None


def _linear(module: nn.Linear, x: Tensor) -> Tensor:
    return symbolic(
        "edge_ft::Linear",
        [x, module.weight, module.bias],
        dtype=x.dtype,
        shape=(*x.shape[:-1], module.out_features),
        version=1,
    )


def _rms_norm(module: Any, x: Tensor) -> Tensor:
    eps = module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps
    return symbolic(
        "SimplifiedLayerNormalization",
        [x, module.weight],
        {"axis": -1, "epsilon": eps, "stash_type": 1},
        dtype=x.dtype,
        shape=x.shape,
        version=1,
    )
