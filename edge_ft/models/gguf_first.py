"""Conversions of GGUF files by the first releases, which runs of that time were trained on.

They left out what the file lacked (its weights became random numbers), the other parts of a split model, and the
scaling of positions. A run over a conversion that lacks nothing of this still opens.
"""

import re
from pathlib import Path
from typing import Any

from edge_ft.errors import ModelError
from edge_ft.files import cache_folder, file_sha256
from edge_ft.models.dims import read_config
from edge_ft.models.gguf import plan_conversion
from edge_ft.models.gguf_files import open_gguf
from edge_ft.progress import Progress
from edge_ft.utf8 import read_json

__all__ = ["check_first_conversion", "first_conversion", "is_first_conversion"]

NAME = re.compile(r"^gguf-[0-9a-f]{16}$")
OTHERWISE = {"architectures", "dtype", "transformers_version", "_name_or_path", "bos_token_id", "eos_token_id"} | {
    *("pad_token_id", "unk_token_id", "use_cache", "initializer_range"),
}
"""Settings that do not change what a model computes."""


def is_first_conversion(folder: Path) -> bool:
    """Whether a folder is named as a conversion of the first releases."""
    return NAME.match(folder.name) is not None


def first_conversion(model: str) -> Path | None:
    """Return the folder of a GGUF file's conversion by a first release, if there is one in the cache.

    Args:
        model: As the user gave it.

    Raises:
        ModelError: the file cannot be read.
    """
    file = _file_of(model)
    if file is None:
        return None
    try:
        folder = cache_folder() / f"gguf-{file_sha256(file)[:16]}"
    except OSError as error:
        raise ModelError(f"{file} cannot be read: {error}") from error
    return folder if folder.is_dir() else None


def _file_of(model: str) -> Path | None:
    """The GGUF file that a model's name meant in the first releases: itself, or the only one of a folder."""
    path = Path(model).expanduser()
    if path.is_file():
        return path if path.suffix == ".gguf" else None
    files = [] if (path / "config.json").is_file() else sorted(path.glob("*.gguf"))
    return files[0] if len(files) == 1 else None


def check_first_conversion(folder: Path, model: str, progress: Progress | None = None) -> None:
    """Refuse a conversion of a first release that is gone or not the whole model.

    Args:
        folder: The conversion.
        model: The GGUF file it was made from, or the folder of that file.
        progress: Receives it if the file is no longer there, so that nothing can be compared.

    Raises:
        ModelError: it is gone, or not the model of the file; the message says what is missing and what to do.
    """
    again = f"tune again with --model {model}, which is then converted anew"
    if not folder.is_dir():
        raise ModelError(f"{folder} is gone, a conversion of {model} by an earlier edge-ft: restore it, or {again}")
    if (file := _file_of(model)) is None:
        if progress is not None:
            progress.say(f"{model} is no longer there: whether {folder} holds the whole of it could not be checked")
        return
    try:
        if (loss := _loss(folder, file)) is not None:
            raise ModelError(loss)
    except ModelError as error:
        raise ModelError(f"{folder} was converted from {model} by an earlier edge-ft, {error}: {again}") from error


def _loss(folder: Path, file: Path) -> str | None:
    """What a conversion lacks; None: nothing."""
    opened = open_gguf(file)
    if len(opened.files) > 1:
        return f"which read one of its {len(opened.files)} parts and set the weights of the others to random numbers"
    plan = plan_conversion(opened.header)
    config = read_json(folder / "config.json", ModelError)
    before = read_config(str(config.get("model_type")), config, folder).to_dict()
    now = plan.config.to_dict()
    differs = sorted(key for key in now.keys() - OTHERWISE if not _same(before.get(key), now[key]))
    return f"which read its {', '.join(differs)} wrongly" if differs else None


def _same(one: Any, other: Any) -> bool:
    """Whether two values of a config are equal, apart from the rounding of numbers."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, float) and isinstance(other, float | int):
        return abs(one - other) <= 1e-6 * max(abs(one), abs(other))
    return bool(one == other)
