"""Graphs of an encoder-decoder: one that runs once for a source, and one that runs for every token.

The encoder's graph also computes every decoder layer's keys and values of the source, so that the decoder's graph
never reads the source again. For clients that expect these keys and values from the decoder (optimum), a third graph
computes the decoder's first tokens from the encoder's hidden states.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.onnx.ops import symbolic, symbolic_multi_out
from transformers import EncoderDecoderCache, PreTrainedModel

from edge_ft.export.fused_trace import Dims, patches, trace_module
from edge_ft.models.scorer import head_input

__all__ = ["trace_seq2seq"]


def trace_seq2seq(model: PreTrainedModel) -> list[ir.Model]:
    """Trace the encoder, the decoder, and the decoder's first tokens.

    Weights are named and shared as in `edge_ft.export.trace.trace`. The model is afterwards as it was.

    Args:
        model: A T5 or mT5 for conditional generation, float32 on the CPU, in evaluation mode, without an adapter.

    Returns:
        The three graphs; `edge_ft.export.lowering.lower` must follow before they run.
    """
    with patches() as patch:
        kinds: set[Any] = {type(module) for module in model.modules() if hasattr(module, "compute_bias")}
        for kind in kinds:
            patch(kind, "compute_bias", _whole_bias(kind.compute_bias))
        modules = (_Encoder(model), _Decoder(model), _FirstDecoder(model))
        return [trace_module(model, module, _attention) for module in modules]


def _source_cache(model: Any, hidden: Tensor) -> list[Tensor]:
    """Return key and value [batch, heads, seq, head_dim] of every decoder layer for the encoder's hidden states."""
    return [
        layer(hidden).unflatten(2, (-1, model.config.d_kv)).transpose(1, 2)
        for block in model.get_decoder().block
        for layer in (block.layer[1].EncDecAttention.k, block.layer[1].EncDecAttention.v)
    ]


def _cache_dims(model: Any, prefix: str, **lengths: str) -> dict[str, Dims]:
    """Name every decoder layer's keys and values as optimum does, in its order.

    Args:
        model: The model.
        prefix: `past_key_values` or `present`.
        lengths: Name of the length of the answer (`decoder`), of the source (`encoder`), or both.

    Returns:
        Dimensions of each tensor, by name.
    """
    config = model.config
    return {
        f"{prefix}.{layer}.{part}.{name}": ("batch_size", config.num_heads, length, config.d_kv)
        for layer in range(config.num_decoder_layers)
        for part, length in lengths.items()
        for name in ("key", "value")
    }


class _Encoder(nn.Module):
    """The encoder over right-padded rows, and the decoder's keys and values of them."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        dims: Dims = ("batch_size", "encoder_sequence_length")
        self.inputs: dict[str, Dims] = {"input_ids": dims, "attention_mask": dims}
        self.outputs: dict[str, Dims] = {
            "last_hidden_state": (*dims, model.config.d_model),
            **_cache_dims(model, "present", encoder="encoder_sequence_length"),
        }

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        input_ids, attention_mask = tensors
        mask = attention_mask.to(torch.int32)

        def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
            query, key, value = (_joined(x) for x in (query, key, value))
            return symbolic(
                "com.microsoft::MultiHeadAttention",
                [query, key, value, None, mask, bias],
                _attributes(module),
                dtype=query.dtype,
                shape=query.shape,
                version=1,
            )

        hidden = self.model.get_encoder()(
            input_ids=input_ids, attention_mask=attention_mask, attend=attend
        ).last_hidden_state
        return (hidden, *_source_cache(self.model, hidden))


class _Decoder(nn.Module):
    """The decoder with its own keys and values as inputs and outputs, and those of the source as inputs."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.inputs: dict[str, Dims] = {
            "input_ids": ("batch_size", "sequence_length"),
            "encoder_attention_mask": ("batch_size", "encoder_sequence_length"),
            **_cache_dims(model, "past_key_values", decoder="past_sequence_length", encoder="encoder_sequence_length"),
        }
        self.outputs: dict[str, Dims] = {
            "logits": ("batch_size", "sequence_length", model.config.vocab_size),
            **_cache_dims(model, "present", decoder="total_sequence_length"),
        }

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        input_ids, attention_mask, *caches = tensors
        layers = [caches[start : start + 4] for start in range(0, len(caches), 4)]
        own, source = ([tensor for layer in layers for tensor in layer[part]] for part in (slice(2), slice(2, 4)))
        return self.read(input_ids, attention_mask, own, source)

    def read(
        self, input_ids: Tensor, attention_mask: Tensor, own: list[Tensor], source: list[Tensor]
    ) -> tuple[Tensor, ...]:
        """Run the decoder.

        Args:
            input_ids: [batch, seq], tokens of the answer.
            attention_mask: [batch, source], of the encoder's tokens.
            own: Keys and values of each layer for the answer so far; none at its start.
            source: Keys and values of each layer for the source.

        Returns:
            Logits [batch, seq, vocab], and keys and values of each layer for the answer.
        """
        mask = attention_mask.to(torch.int32)
        past_length, length = own[0].shape[2] if own else 0, input_ids.shape[1]
        present: list[Tensor] = []

        def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
            query = _joined(query)
            if not module.is_causal:  # attends to the source
                return symbolic(
                    "com.microsoft::MultiHeadAttention",
                    [query, key, value, None, mask],
                    _attributes(module),
                    dtype=query.dtype,
                    shape=query.shape,
                    version=1,
                )
            past = own[2 * module.layer_idx : 2 * module.layer_idx + 2]
            cache = (query.shape[0], module.n_heads, past_length + length, module.key_value_proj_dim)
            output, *pair = symbolic_multi_out(
                "com.microsoft::MultiHeadAttention",
                [query, _joined(key), _joined(value), None, None, bias, *past],
                {**_attributes(module), "unidirectional": 1},
                dtypes=[query.dtype] * 3,
                shapes=[query.shape, cache, cache],
                version=1,
            )
            present.extend(pair)
            return output

        hidden = self.model.get_decoder()(
            input_ids=input_ids,
            encoder_hidden_states=input_ids,  # never read: its keys and values are in the cache
            past_key_values=_InputCache(past_length, source),
            use_cache=True,
            attend=attend,
        ).last_hidden_state
        return (self.model.get_output_embeddings()(head_input(self.model, hidden)), *present)


class _FirstDecoder(_Decoder):
    """The decoder's first tokens: keys and values are outputs only."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        rows: Dims = ("batch_size", "encoder_sequence_length")
        self.inputs = {
            "input_ids": ("batch_size", "sequence_length"),
            "encoder_hidden_states": (*rows, model.config.d_model),
            "encoder_attention_mask": rows,
        }
        self.outputs = {
            "logits": self.outputs["logits"],
            **_cache_dims(model, "present", decoder="sequence_length"),
            **_cache_dims(model, "present", encoder="encoder_sequence_length"),
        }

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        input_ids, hidden, attention_mask = tensors
        source = _source_cache(self.model, hidden)
        return (*self.read(input_ids, attention_mask, [], source), *source)


class _InputCache(EncoderDecoderCache):
    """A cache of the graph's inputs; the attention operator appends new keys and values itself."""

    def __init__(self, past_length: int, source: list[Tensor]) -> None:
        keys, values = source[::2], source[1::2]
        layers = [SimpleNamespace(keys=key, values=value) for key, value in zip(keys, values, strict=True)]
        self.self_attention_cache: Any = SimpleNamespace(
            get_seq_length=lambda *_: past_length, update=lambda key, value, *_: (key, value), is_compileable=False
        )
        self.cross_attention_cache: Any = SimpleNamespace(layers=layers)
        self.is_updated = dict.fromkeys(range(len(layers)), True)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.self_attention_cache.get_seq_length(layer_idx)  # symbolic, and must stay so


def _whole_bias(compute_bias: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return T5's `compute_bias` for all keys that the operator sees: its arguments do not count cached ones."""

    def whole(
        self: Any, query_length: int, key_length: int, device: torch.device | None = None, past_seen_tokens: int = 0
    ) -> Tensor:
        return compute_bias(self, query_length, key_length + past_seen_tokens, device, past_seen_tokens)

    return whole


def _attributes(module: Any) -> dict[str, Any]:
    return {"num_heads": module.n_heads, "scale": module.scaling}


def _joined(x: Tensor) -> Tensor:
    """Return [batch, heads, seq, head_dim] as [batch, seq, heads * head_dim]."""
    return x.transpose(1, 2).flatten(2)


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    attend: Callable[[Any, Tensor, Tensor, Tensor, Tensor | None], Tensor],
    position_bias: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Return the attention [batch, seq, heads, head_dim] of [batch, heads, seq, head_dim], as transformers calls it."""
    heads, size = query.shape[1], query.shape[3]
    return attend(module, query, key, value, position_bias).unflatten(2, (heads, size)), None
