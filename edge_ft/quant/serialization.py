"""The file in which a run keeps codes that were chosen over its rows: no other rows would choose the same."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import nn

from edge_ft.artifacts import atomic_file
from edge_ft.errors import ModelError
from edge_ft.quant.blockwise import Codes
from edge_ft.quant.layers import frozen_layers

__all__ = ["read_codes", "write_codes"]


def write_codes(file: Path, model: nn.Module) -> None:
    """The codes of every layer of `model`, in the layout of `Codes`, whole or not at all."""
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    arrays: dict[str, NDArray[np.generic]] = {}
    for name, layer in frozen_layers(model).items():
        if layer is embedding or layer.qweight is not getattr(embedding, "qweight", None):  # a tied head is not stored
            for part, array in zip(("qweight", "scales", "zero_points"), layer.stored(), strict=True):
                arrays[f"{name}.{part}"] = array
    with atomic_file(file) as temporary:
        save_file(arrays, temporary)


def read_codes(file: Path) -> Callable[[str, int], Codes | None]:
    """What gives the codes of a layer's name, and of how many columns its weight has; None of one that is not there.

    Raises:
        ModelError: from what is returned: the file is torn.
    """

    def codes(name: str, columns: int) -> Codes | None:
        try:
            with safe_open(file, "np") as arrays:
                if f"{name}.qweight" not in arrays.keys():  # noqa: SIM118 - not a dict
                    return None
                qweight, scales, zero_points = (
                    arrays.get_tensor(f"{name}.{part}") for part in ("qweight", "scales", "zero_points")
                )
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{file} cannot be read for {name}: {error}") from error
        return Codes(qweight, scales, zero_points, columns)

    return codes
