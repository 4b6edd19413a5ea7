"""Names of tensors in a GGUF file and in a transformers checkpoint, and what else differs between their weights.

The names are gguf-py's tables. What llama.cpp's conversion scripts change in the weights is undone here, or done to
weights that are written.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray

from edge_ft.errors import ModelError

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "Heads",
    "Reorder",
    "architecture_of",
    "gguf_names",
    "reorder_of",
    "to_file",
]


@dataclass(frozen=True)
class Heads:
    """Numbers of attention heads of a model."""

    queries: int
    keys: int


Reorder = Callable[[NDArray[Any], int], NDArray[Any]]
"""Weights in the file's order, and the number of heads of the tensor, to weights as transformers has them."""


def rotary_halves(weights: NDArray[Any], heads: int) -> NDArray[Any]:
    """Rows of a head from pairs that are rotated together (ggml's normal rotation) to two halves (transformers')."""
    rest = weights.shape[1:]
    return weights.reshape(heads, -1, 2, *rest).swapaxes(1, 2).reshape(weights.shape)


def interleaved_heads(weights: NDArray[Any], heads: int) -> NDArray[Any]:
    """Rows from all queries, all keys, all values to query, key and value head by head (GPT-NeoX)."""
    rest = weights.shape[1:]
    return weights.reshape(3, heads, -1, *rest).swapaxes(0, 1).reshape(weights.shape)


def transposed(weights: NDArray[Any], _: int) -> NDArray[Any]:
    """A matrix [out, in] as transformers' Conv1D has it, [in, out] (GPT-2)."""
    return weights.T


def minus_one(weights: NDArray[Any], _: int) -> NDArray[Any]:
    """The weight of a norm whose layer adds 1 (Gemma)."""
    return weights - 1


def rotary_pairs(weights: NDArray[Any], heads: int) -> NDArray[Any]:
    """Undo `rotary_halves`."""
    rest = weights.shape[1:]
    return weights.reshape(heads, 2, -1, *rest).swapaxes(1, 2).reshape(weights.shape)


def plus_one(weights: NDArray[Any], _: int) -> NDArray[Any]:
    """Undo `minus_one`."""
    return weights + 1


INVERSE: dict[Reorder, Reorder] = {rotary_halves: rotary_pairs, minus_one: plus_one}
"""What undoes a change, of the architectures that are written too."""


@dataclass(frozen=True)
class Architecture:
    """One `general.architecture` of GGUF."""

    name: str
    model_type: str
    """The family's name, in config.json."""
    reorder: dict[str, Reorder] = field(default_factory=dict)
    """By a pattern that a tensor's name contains."""


_ROTARY: dict[str, Reorder] = {r"\.attn_[qk]\.": rotary_halves}
_NORMS: dict[str, Reorder] = {r"norm\.weight$": minus_one}
ARCHITECTURES = {
    row.name: row
    for row in (
        Architecture("llama", "llama", _ROTARY),
        Architecture("smollm3", "smollm3", _ROTARY),
        Architecture("qwen2", "qwen2"),
        Architecture("qwen3", "qwen3"),
        Architecture("gemma2", "gemma2", _NORMS),
        Architecture("gemma3", "gemma3_text", _NORMS),
        Architecture("phi3", "phi3"),
        Architecture("gpt2", "gpt2", {r"\.(attn_qkv|attn_output|ffn_up|ffn_down)\.weight$": transposed}),
        Architecture("gptneox", "gpt_neox", {r"\.attn_qkv\.": interleaved_heads}),
    )
}


def architecture_of(name: str, file: object) -> Architecture:
    """Find the row of a `general.architecture`; `file` names it in an error.

    Returns:
        The row.

    Raises:
        ModelError: it is not supported; the message lists what is.
    """
    if name not in ARCHITECTURES:
        raise ModelError(
            f"{file} holds a model of architecture {name!r}: GGUF files are read of {', '.join(ARCHITECTURES)}; give "
            "the checkpoint folder that it was converted from, if its family is supported"
        )
    return ARCHITECTURES[name]


def gguf_names(architecture: str, layers: int, names: Iterable[str]) -> dict[str, str | None]:
    """Return the name in a GGUF file of each parameter of a transformers model; None where GGUF has none.

    Args:
        architecture: `general.architecture`.
        layers: Number of layers.
        names: Parameters of the model for text generation.
    """
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    kind = next(kind for kind, name in MODEL_ARCH_NAMES.items() if name == architecture)
    known = get_tensor_name_map(kind, layers)
    return {name: known.get_name(name, try_suffixes=(".weight", ".bias")) for name in names}


def reorder_of(architecture: Architecture, name: str, heads: Heads) -> Callable[[NDArray[Any]], NDArray[Any]] | None:
    """Return what brings the weights of a tensor of a GGUF file into transformers' order; None: they are in it."""
    reorder = _change_of(architecture, name)
    return None if reorder is None else lambda weights: reorder(weights, _heads_in(name, heads))


def to_file(architecture: Architecture, name: str, heads: Heads, weights: NDArray[Any]) -> NDArray[Any]:
    """Return the weights of a transformers parameter, or their codes by rows, as the tensor `name` of a file has them.

    The inverse of `reorder_of`.
    """
    reorder = _change_of(architecture, name)
    return weights if reorder is None else INVERSE[reorder](weights, _heads_in(name, heads))


def _change_of(architecture: Architecture, name: str) -> Reorder | None:
    return next((reorder for pattern, reorder in architecture.reorder.items() if re.search(pattern, name)), None)


def _heads_in(name: str, heads: Heads) -> int:
    return heads.keys if ".attn_k." in name else heads.queries
