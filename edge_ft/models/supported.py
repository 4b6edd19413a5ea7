"""Refuse models that cannot be exported before anything is trained."""

from edge_ft.errors import ModelError
from edge_ft.models.dims import ModelDims

__all__ = ["check_supported"]

ROPES = ("default", "linear", "llama3", "yarn", "longrope")
"""Rotary embeddings whose table does not depend on the length of the text."""
LAYER_TYPES = ("full_attention", "sliding_attention")


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
        if rope["rope_type"] not in ROPES:
            raise ModelError(
                f"{where} has a rotary embedding of type {rope['rope_type']!r}, which cannot be exported; "
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
