"""`--size-mb`: how large a bundle gets, and what is left for further bits."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from edge_ft.errors import UsageError
from edge_ft.models.dims import ModelDims
from edge_ft.quant.blockwise import Grid
from edge_ft.quant.conversion import is_within

__all__ = ["bundle_bytes", "fit", "refuse_larger"]

SETTINGS = 60_000
"""Bytes of manifest and settings, and of what graphs have beside layers."""
LAYER = 30_000
"""Bytes of a layer in the three graphs; those of SmolLM2 have 22,000."""
JOINING = 0.025
"""Bytes of the operators that add further bits to a product, over those of the bits: 4 kB for a small model's layer."""
LARGER_BLOCKS = (64, 128)
"""Blocks that are tried where those of the training are too large a file."""


def bundle_bytes(model: Any, grid: Grid, keep: tuple[str, ...], files: list[Path]) -> int:
    """Estimate the bytes of a decoder's bundle with 4 bits in every layer.

    Args:
        model: A float task model.
        grid: How its weights will be rounded.
        keep: Names of modules that stay float.
        files: Those of its tokenizer.

    Returns:
        The bytes.
    """
    embedding, dims = model.get_input_embeddings(), ModelDims(model.config)
    rounded = {
        id(module.weight)
        for name, module in model.named_modules()
        if (isinstance(module, nn.Linear) and not is_within(name, keep))
        or (module is embedding and embedding.embedding_dim % grid.block_size == 0)
    }
    total = sum(file.stat().st_size for file in files) + 4 * dims.positions * dims.rotary_dim
    total += SETTINGS + LAYER * dims.layers
    for parameter in model.parameters():  # a tied one once
        if id(parameter) not in rounded:
            total += 4 * parameter.numel()
            continue
        rows, columns = parameter.shape
        blocks = -(-columns // grid.block_size)
        total += rows * (blocks * (grid.block_size // 2 + 2) + (blocks + 1) // 2)
    return total


def fit(model: Any, grid: Grid, keep: tuple[str, ...], files: list[Path], size: float) -> tuple[Grid, int]:
    """Choose the smallest blocks with which a bundle fits, and what is left then.

    Args:
        model: As for `bundle_bytes`, as are `keep` and `files`.
        grid: How the training rounded.
        keep: See model.
        files: See model.
        size: Bytes.

    Returns:
        The grid, and the bytes left for further bits.

    Raises:
        UsageError: the bundle does not fit.
    """
    sizes = (grid.block_size, *(larger for larger in LARGER_BLOCKS if larger > grid.block_size))
    needed = {each: bundle_bytes(model, replace(grid, block_size=each), keep, files) for each in sizes}
    for block_size, taken in needed.items():
        if taken <= size:
            return replace(grid, block_size=block_size), int((size - taken) / (1 + JOINING))
    smallest = min(sizes, key=lambda each: needed[each])
    raise UsageError(
        f"--size-mb {size / 1e6:g}: with 4 bits for every weight, in blocks of {smallest}, the bundle takes about "
        f"{needed[smallest] / 1e6:.3g} MB: give more, or tune a smaller model"
    )


def refuse_larger(folder: Path, size_mb: float | None) -> None:
    """Refuse a bundle that became larger than was estimated.

    Raises:
        UsageError: it is.
    """
    total = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    if size_mb is not None and total > size_mb * 1e6:
        raise UsageError(f"--size-mb {size_mb:g}: the bundle takes {total / 1e6:.1f} MB: give more")
