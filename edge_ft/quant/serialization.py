"""The quantized weights of a model by name: their hash, and the file in which a run stores calibrated codes."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import nn

from edge_ft.errors import ModelError
from edge_ft.files import atomic_file
from edge_ft.quant.blockwise import Codes
from edge_ft.quant.layers import BUFFERS, FrozenLinear, QuantEmbedding

__all__ = ["codes_sha256", "frozen_layers", "read_codes", "stored_finer", "write_codes"]


def frozen_layers(model: nn.Module) -> dict[str, FrozenLinear | QuantEmbedding]:
    """Return every quantized layer by its name in the model without PEFT around it."""
    # PEFT wraps a layer as NAME.base_layer inside base_model.model: the layer itself is the same.
    return {
        name.removeprefix("base_model.model.").removesuffix(".base_layer"): module
        for name, module in model.named_modules()
        if isinstance(module, FrozenLinear | QuantEmbedding)
    }


def codes_sha256(model: nn.Module) -> str:
    """Return the hex sha256 of the arrays of every quantized layer, in the order of the layers' names."""
    digest = hashlib.sha256()
    for name, layer in sorted(frozen_layers(model).items()):
        digest.update(name.encode())
        for array in layer.weight_arrays():
            digest.update(array.tobytes())
    return digest.hexdigest()


def write_codes(file: Path, model: nn.Module) -> None:
    """Write the codes of every layer of `model` to a safetensors file, in the layout of `Codes`, atomically.

    Tensors are NAME.qweight, NAME.scales, NAME.zero_points and, where rows have further bits, NAME.fine; a head that
    is tied to the embedding has none.
    """
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    arrays: dict[str, NDArray[np.generic]] = {}
    for name, layer in frozen_layers(model).items():
        if layer is embedding or layer.qweight is not getattr(embedding, "qweight", None):
            for part, array in zip(BUFFERS, layer.weight_arrays(), strict=False):
                arrays[f"{name}.{part}"] = array
    with atomic_file(file) as temporary:
        save_file(arrays, temporary)


def stored_finer(file: Path) -> dict[str, int]:
    """Return the number of rows with further bits by layer, as a file of `write_codes` holds them.

    Raises:
        ModelError: the file cannot be read.
    """
    try:
        with safe_open(file, "np") as arrays:
            names = [name for name in arrays.keys() if name.endswith(".fine")]  # noqa: SIM118 - not a dict
            return {name.removesuffix(".fine"): arrays.get_slice(name).get_shape()[0] for name in names}
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{file} cannot be read: {error}") from error


def read_codes(file: Path) -> Callable[[str, int], Codes | None]:
    """Open a file of `write_codes`.

    Returns:
        A function of a layer's name and the number of its weight's columns, which returns the codes, or None where
        the file has none of that name. It raises a `ModelError` where the file cannot be read.
    """

    def codes(name: str, columns: int) -> Codes | None:
        try:
            with safe_open(file, "np") as arrays:
                if f"{name}.qweight" not in arrays.keys():  # noqa: SIM118 - not a dict
                    return None
                held = [f"{name}.{part}" for part in BUFFERS if f"{name}.{part}" in arrays.keys()]  # noqa: SIM118
                qweight, scales, zero_points, *fine = map(arrays.get_tensor, held)
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{file} cannot be read for {name}: {error}") from error
        return Codes(qweight, scales, zero_points, columns, 4, *fine)

    return codes
