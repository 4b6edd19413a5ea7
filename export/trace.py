"""Graphs of decoders and encoders; those of encoder-decoders are made by `edge_ft.export.trace_seq2seq`."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import signature
from types import SimpleNamespace
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.onnx.ops import symbolic, symbolic_multi_out
from transformers import PreTrainedModel

from edge_ft.config import Task
from edge_ft.export.fused_trace import Dims, patches, trace_module
from edge_ft.families import Family
from edge_ft.models.dims import ModelDims, check_supported

__all__ = ["trace"]


def trace(model: PreTrainedModel, family: Family, task: Task | None = None) -> ir.Model:
    """Trace a decoder or encoder with float or quantized weights.

    A weight is an initializer named as in the model (`NAME.weight`, or `NAME.qweight`, `NAME.scales` and
    `NAME.zero_points`) and shares the model's memory. The model is afterwards as it was.

    Args:
        model: A transformers task model, float32 on the CPU, in evaluation mode, without an adapter.
        family: Its family; a decoder gets a KV cache, an encoder a padding mask.
        task: Task of an encoder, which decides its output; default the family's first.

    Returns:
        The graph; `edge_ft.export.lowering.lower` must follow before it runs.

    Raises:
        ModelError: a decoder that ONNX Runtime's attention does not take.
    """
    # A table of absolute positions can be sliced no further than its end.
    length = torch.export.Dim("sequence_length", max=ModelDims(model.config).positions)
    if not family.decoder:
        encoder = _Encoder(model, task or family.tasks[0])
        return trace_module(model, encoder, encoder.attend, length)
    decoder = _Decoder(model)
    with decoder.rotation_in_attention():
        return trace_module(model, decoder, _decoder_attention, length)


class _Decoder(nn.Module):
    """A causal model with its KV cache as inputs and outputs.

    Raises:
        ModelError: ONNX Runtime's attention does not take the model.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        sizes = ModelDims(model.config)
        check_supported(sizes, "the model")
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
        """cos and sin of the current layer: set by the rotary function, used by the attention that follows it."""
        rotary = next((module for module in model.modules() if _is_rotary(module)), None)
        if rotary is None:
            return
        # The model's own module fills the tables, so that they include its scaling.
        positions = torch.arange(sizes.positions).unsqueeze(0)
        of_kinds = "layer_type" in signature(rotary.forward).parameters
        for kind in sorted(set(model.config.layer_types)) if of_kinds else (None,):
            tables = rotary(torch.zeros(1), positions, *() if kind is None else (kind,))
            for name, table in zip(_table_names(kind), tables, strict=True):
                self.register_buffer(name, table[0, :, : table.shape[-1] // 2].contiguous())

    @contextmanager
    def rotation_in_attention(self) -> Iterator[None]:
        """Leave the rotation to GroupQueryAttention inside the block; its tables become inputs of the operator.

        Yields:
            Nothing.
        """

        def tables(_: nn.Module, x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> list[Tensor]:
            return [self.get_buffer(name) for name in _table_names(layer_type)]

        def rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
            self.rotation.tables = (cos, sin)
            return query, key

        with patches() as patch:
            for kind in {type(module) for module in self.model.modules() if _is_rotary(module)}:
                patch(kind, "forward", tables)
                patch(sys.modules[kind.__module__], "apply_rotary_pos_emb", rotate)
            yield

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        input_ids, attention_mask, num_logits_to_keep, *past = tensors
        present: list[Tensor] = []
        lengths = attention_mask.sum(1)
        last_positions = (lengths - 1).to(torch.int32)
        total = symbolic("Shape", [attention_mask], {"start": 1, "end": 2}, dtype=torch.int64, shape=(1,))
        total = total.squeeze().to(torch.int32)

        # For learned positions. Rows are padded on the right, so every run but the first begins where the text ended.
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
            start = -num_logits_to_keep.reshape(1)  # -0 is the first position: all are kept
            end, axis = torch.tensor([torch.iinfo(torch.int64).max]), torch.tensor([1])
            # The number kept is unknown here. A length other than the sequence's keeps this from being an identity.
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
        parameters = signature(model.forward).parameters
        names = ["input_ids", "attention_mask"]
        # RoBERTa has the argument but only one type, and its tokenizers give none.
        if "token_type_ids" in parameters and getattr(model.config, "type_vocab_size", 1) > 1:
            names.append("token_type_ids")
        self.inputs: dict[str, Dims] = dict.fromkeys(names, ("batch_size", "sequence_length"))
        self.fills_types = "token_type_ids" in parameters and "token_type_ids" not in names
        config: Any = model.config
        rows = ("batch_size", "sequence_length")
        outputs: dict[Task, dict[str, Dims]] = {  # by optimum's names
            "text-classification": {"logits": ("batch_size", config.num_labels)},
            "token-classification": {"logits": (*rows, config.num_labels)},
            "fill-mask": {"logits": (*rows, config.vocab_size)},
            "feature-extraction": {"last_hidden_state": (*rows, config.hidden_size)},
        }
        self.outputs = outputs[task]
        self.masks = SimpleNamespace(padding=None, windows={})
        """Of the forward pass that is traced: the padding mask, and the bias of each sliding window."""

    def forward(self, *tensors: Tensor) -> Tensor:
        inputs = dict(zip(self.inputs, tensors, strict=True))
        self.masks.padding, self.masks.windows = inputs["attention_mask"].to(torch.int32), {}
        if self.fills_types:
            inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
        return self.model(**inputs)[0]

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor | None,
        *,
        scaling: float,
        **options: Any,
    ) -> tuple[Tensor, None]:
        """Attend by one operator, through transformers' attention interface.

        Args:
            module: The layer.
            query: [batch, heads, seq, head_dim], as key and value.
            key: See query.
            value: See query.
            bias: The place of the mask, which is made here; what a model passes in it is a bias.
            scaling: Factor of the products of query and key.
            options: `sliding_window`, if there is one: tokens that are this far apart do not attend to each other.

        Returns:
            [batch, seq, heads, head_dim], and None for the weights.
        """
        windows, window = self.masks.windows, options.get("sliding_window")
        if window is not None:
            if window not in windows:
                windows[window] = _window_bias(query.shape[2], window)
            bias = windows[window]
        heads, size = query.shape[1], query.shape[3]
        flat = [x.transpose(1, 2).flatten(2) for x in (query, key, value)]
        output = symbolic(
            "com.microsoft::MultiHeadAttention",
            [*flat, None, self.masks.padding, *([] if bias is None else [bias])],
            {"num_heads": heads, "scale": scaling},
            dtype=query.dtype,
            shape=flat[0].shape,
            version=1,
        )
        return output.unflatten(2, (heads, size)), None


def _window_bias(length: Any, window: int) -> Tensor:
    """Return [1, 1, length, length] float32: 0 where tokens are less than `window` apart, else the lowest number."""
    position = torch.arange(length)
    apart = (position[:, None] - position[None, :]).abs()
    return torch.where(apart < window, 0.0, torch.finfo(torch.float32).min)[None, None]


def _is_rotary(module: nn.Module) -> bool:
    return type(module).__name__.endswith("RotaryEmbedding")


def _table_names(kind: str | None) -> tuple[str, str]:
    """Return the names of cos and sin: of one kind of layer, or of all layers."""
    end = "" if kind is None else f"_{kind}"
    return f"cos_cache{end}", f"sin_cache{end}"


def _decoder_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    attend: Callable[[int, Tensor, Tensor, Tensor, dict[str, Any]], Tensor],
    **options: Any,
) -> tuple[Tensor, None]:
    """Return the attention [batch, seq, heads, size] of [batch, heads, seq, size], as transformers calls it."""
    attributes: dict[str, Any] = {"num_heads": query.shape[1], "scale": scaling}
    for option, attribute in (("sliding_window", "local_window_size"), ("softcap", "softcap")):
        if options.get(option) is not None:
            attributes[attribute] = options[option]
    heads, size = query.shape[1], query.shape[3]
    query, key, value = (x.transpose(1, 2).flatten(2) for x in (query, key, value))
    return attend(module.layer_idx, query, key, value, attributes).unflatten(2, (heads, size)), None
