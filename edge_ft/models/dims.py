"""Dimensions of a model, read from its transformers config, and which of them can be exported."""

import copy
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from huggingface_hub.errors import StrictDataclassError

from edge_ft.errors import ModelError

__all__ = ["ModelDims", "check_supported", "read_config"]

ROPES = ("default", "linear", "llama3", "yarn", "longrope")
"""Rotary embeddings whose table does not depend on the length of the text."""
LAYER_TYPES = ("full_attention", "sliding_attention")


@dataclass(frozen=True)
class ModelDims:
    """Dimensions in a `transformers.PretrainedConfig`, whose keys differ by family."""

    config: Any

    @property
    def layers(self) -> int:
        """Number of transformer layers; of an encoder-decoder, that of its smaller stack."""
        layers = int(self.config.num_hidden_layers)
        return min(layers, int(getattr(self.config, "num_decoder_layers", layers)))

    @property
    def shares_layers(self) -> bool:
        """Whether layers share their weights (ALBERT)."""
        return int(getattr(self.config, "num_hidden_groups", self.layers)) < self.layers

    @property
    def hidden(self) -> int:
        """Width of the residual stream."""
        return int(self.config.hidden_size)

    @property
    def intermediate(self) -> int:
        """Width inside an MLP."""
        names = ("intermediate_size", "n_inner", "ffn_dim", "d_ff")
        return next((int(found) for name in names if (found := getattr(self.config, name, None))), 4 * self.hidden)

    @property
    def vocabulary(self) -> int:
        """Rows of the token embedding."""
        return int(self.config.vocab_size)

    def with_vocabulary(self, size: int) -> "ModelDims":
        """Return the same dimensions with another number of rows of the token embedding."""
        config = copy.copy(self.config)
        config.vocab_size = size
        return ModelDims(config)

    @property
    def heads(self) -> int:
        """Query heads of a layer."""
        return int(self.config.num_attention_heads)

    @property
    def kv_heads(self) -> int:
        """Key and value heads of a layer."""
        return int(getattr(self.config, "num_key_value_heads", None) or self.heads)

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return int(getattr(self.config, "head_dim", None) or self.hidden // self.heads)

    @cached_property
    def ropes(self) -> list[dict[str, Any]]:
        """The kinds of rotary embedding, one for each kind of layer that has its own; none for learned positions."""
        found = getattr(self.config, "rope_parameters", None) or {}
        kinds = [value for value in found.values() if isinstance(value, dict)]
        return kinds or ([found] if found else [])

    @property
    def rotary_dim(self) -> int:
        """Dimensions of a head that are rotated; 0 for learned positions."""
        shares = [float(rope.get("partial_rotary_factor", 1.0)) for rope in self.ropes]
        return int(self.head_dim * min(shares)) if shares else 0

    @property
    def positions(self) -> int:
        """Tokens that the model can process.

        LongRoPE rotates the whole text by another table once it is longer than the original length. Cached keys
        cannot be rotated again, so the original length is the limit.
        """
        whole = int(getattr(self.config, "max_position_embeddings", None) or 1024)
        short = [
            int(rope["original_max_position_embeddings"]) for rope in self.ropes if rope["rope_type"] == "longrope"
        ]
        return min([whole, *short])


def read_config(model_type: str, config: dict[str, Any], where: object) -> Any:
    """Return the `PretrainedConfig` of the content of a config.json; `where` names the file in an error.

    Raises:
        ModelError: transformers refuses its values.
    """
    from transformers import CONFIG_MAPPING

    try:
        return CONFIG_MAPPING[model_type].from_dict(config)
    except (StrictDataclassError, AttributeError, LookupError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ModelError(f"{where} is not the config of a {model_type} model: {reason}") from error


def check_supported(dims: ModelDims, where: object) -> None:
    """Refuse a decoder that could be trained but not exported; `where` names it in the message.

    Raises:
        ModelError: it has a part that ONNX Runtime's attention or the exported graph cannot express, named in the
            message.
    """
    config = dims.config
    if dims.head_dim % 16:
        raise ModelError(f"{where} has heads of size {dims.head_dim}: ONNX Runtime's attention takes multiples of 16")
    if dims.rotary_dim % 16:
        raise ModelError(
            f"{where} rotates {dims.rotary_dim} of {dims.head_dim} dimensions of a head: ONNX Runtime's attention "
            "takes multiples of 16"
        )
    for rope in dims.ropes:
        if (kind := rope.get("rope_type")) not in ROPES:
            raise ModelError(
                f"{where} has a rotary embedding of type {kind!r}, which cannot be exported; "
                f"supported are {', '.join(ROPES)}"
            )
    for kind in getattr(config, "layer_types", None) or ():
        if kind not in LAYER_TYPES:
            raise ModelError(f"{where} has layers of type {kind!r}: supported are {', '.join(LAYER_TYPES)}")
    for field, what in (
        ("use_bidirectional_attention", "attends to later tokens too"),
        ("add_cross_attention", "attends to an encoder"),
    ):
        if getattr(config, field, False):
            raise ModelError(f"{where} {what} ({field}), which text generation cannot export")
