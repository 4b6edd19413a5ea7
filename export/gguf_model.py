"""A whole model as one GGUF file: weights, sizes, tokenizer and chat template."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from edge_ft.data import SpecialIds, TextTokenizer
from edge_ft.export.gguf_file import Blocks, file_tensors, write_gguf_file
from edge_ft.export.gguf_metadata import architecture_for, model_fields, rope_tensors
from edge_ft.export.gguf_vocabulary import vocabulary_fields
from edge_ft.models.dims import ModelDims
from edge_ft.models.gguf_names import Heads
from edge_ft.quant.blockwise import Codes

__all__ = ["GgufModel", "write_gguf_model"]

FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7}
"""`general.file_type` by the type of most matrices."""


@dataclass(frozen=True)
class GgufModel:
    """What a GGUF file says of a model beside its weights."""

    name: str
    license: str | None
    config: Any
    """transformers config."""
    tokenizer: TextTokenizer
    special: SpecialIds
    chat_template: str | None
    """None: the tokenizer's own, if it has one."""


def write_gguf_model(
    file: Path, model: GgufModel, weights: Mapping[str, Codes | Blocks | NDArray[Any]]
) -> dict[str, int]:
    """Write a GGUF file.

    Args:
        file: What is written.
        model: What it holds.
        weights: By parameter of the transformers model, as `file_tensors` takes them; without a head that is tied to
            the embedding.

    Returns:
        The number of tensors of each type.

    Raises:
        UsageError: a GGUF file cannot hold the model, its codes or its tokenizer.
        OSError: the file cannot be written.
    """
    dims = ModelDims(model.config)
    architecture = architecture_for(model.config.model_type)
    tensors = file_tensors(architecture.name, dims.layers, Heads(dims.heads, dims.kv_heads), weights)
    tensors |= rope_tensors(dims)
    types: dict[str, int] = {}
    for blocks in tensors.values():
        types[blocks.type] = types.get(blocks.type, 0) + 1
    most = max((kind for kind in types if kind in FILE_TYPES and kind != "F32"), key=types.__getitem__, default="F32")
    fields: dict[str, Any] = {
        "general.type": "model",
        "general.name": model.name,
        "general.license": model.license,
        "general.file_type": FILE_TYPES[most],
        "general.quantization_version": 2,
        **model_fields(dims, architecture),
        **vocabulary_fields(model.tokenizer, model.special, dims.vocabulary, model.name),
    }
    if model.chat_template is not None:
        fields["tokenizer.chat_template"] = model.chat_template
    write_gguf_file(file, architecture.name, fields, tensors)
    return types
