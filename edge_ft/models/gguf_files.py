"""Find the files of a GGUF model, and check that they make the whole of one language model."""

import re
from dataclasses import dataclass
from pathlib import Path

from edge_ft.errors import ModelError
from edge_ft.models.gguf_header import GgufHeader, TensorInfo, read_header

__all__ = ["GgufModel", "open_gguf", "pick_gguf"]

PART = re.compile(r"^(?P<name>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf$")
OTHERS = {
    "adapter": "a LoRA adapter, not a model: give the model it belongs to, or a PEFT adapter with --adapter",
    "mmproj": "the image or audio part of a model: give the GGUF file of its language model",
    "imatrix": "an importance matrix, not a model",
    "vocab": "a vocabulary without weights",
}
"""What `general.type` names besides a model."""


@dataclass(frozen=True)
class GgufModel:
    """A model in one GGUF file or in several parts, whose headers are read and fit together."""

    files: tuple[Path, ...]
    header: GgufHeader
    """Metadata of the first part, and the tensors of all of them."""


def pick_gguf(path: Path) -> Path | None:
    """Find the GGUF file that a path names.

    Returns:
        The file itself; of a folder, its one model (the first part); None where there is none.

    Raises:
        ModelError: a folder with several models.
    """
    if path.is_file():
        return path
    models: dict[str, Path] = {}
    files = sorted(path.glob("*.gguf"))
    languages = [file for file in files if not file.name.startswith("mmproj")]  # beside it: the part for images
    for file in languages or files:
        part = PART.match(file.name)
        models.setdefault(part["name"] if part else file.name, file)
    if len(models) > 1:
        raise ModelError(
            f"{path} holds {len(models)} models as GGUF ({', '.join(file.name for file in models.values())}): "
            "name one of the files"
        )
    return next(iter(models.values()), None)


def open_gguf(file: Path) -> GgufModel:
    """Read the header of a GGUF file, and of the other parts of a split model, whichever part was given.

    Returns:
        The files and their headers.

    Raises:
        ModelError: a file is malformed, a part is missing, or the file holds no language model.
    """
    header = read_header(file)
    _refuse_other_kinds(header)
    count = header.get("split.count", 1)
    if not isinstance(count, int) or count < 1:
        raise ModelError(f"{file}: split.count is {count!r} in its header, not a number of parts")
    if count == 1:
        return GgufModel((file,), header)
    part = PART.match(file.name)
    if part is None or int(part["count"]) != count:
        raise ModelError(
            f"{file} is one of {count} parts of a model, which are found by their names: name them "
            f"NAME-00001-of-{count:05}.gguf to NAME-{count:05}-of-{count:05}.gguf, in one folder"
        )
    paths = [file.with_name(f"{part['name']}-{number:05}-of-{count:05}.gguf") for number in range(1, count + 1)]
    if missing := [path.name for path in paths if not path.is_file()]:
        raise ModelError(
            f"{file} is one of {count} parts of a model, and {', '.join(missing[:3])}"
            f"{f' and {len(missing) - 3} more' if len(missing) > 3 else ''} "
            f"{'is' if len(missing) == 1 else 'are'} not beside it: download all parts into one folder"
        )
    return GgufModel(tuple(paths), _joined([header if path == file else read_header(path) for path in paths]))


def _refuse_other_kinds(header: GgufHeader) -> None:
    """Refuse a file that is no language model.

    Raises:
        ModelError: the message says what it is, and what to give.
    """
    kind = str(header.get("general.type", "model"))
    if header.architecture == "clip":
        kind = "mmproj"
    elif header.get("adapter.type") is not None or any(name.endswith(".lora_a") for name in header.tensors):
        kind = "adapter"
    if kind in OTHERS:
        raise ModelError(f"{header.file} is {OTHERS[kind]}")
    if not header.architecture and header.get("split.count") is None:
        raise ModelError(f"{header.file} does not say which architecture it holds (general.architecture)")
    if not header.tensors and header.get("split.count") is None:
        raise ModelError(f"{header.file} is {OTHERS['vocab']}")


def _joined(headers: list[GgufHeader]) -> GgufHeader:
    """Join the parts of a split model.

    Returns:
        The first header, with the tensors of all.

    Raises:
        ModelError: they are not the parts of one model.
    """
    tensors: dict[str, TensorInfo] = {}
    for number, header in enumerate(headers):
        if (header.get("split.no"), header.get("split.count")) != (number, len(headers)):
            raise ModelError(
                f"{header.file} says that it is part {header.get('split.no')} (from 0) of {header.get('split.count')}: "
                "the parts were renamed or are of several models, download them again"
            )
        if twice := tensors.keys() & header.tensors.keys():
            raise ModelError(f"{header.file} has the tensor {min(twice)}, which another part has too: download again")
        tensors |= header.tensors
    first = headers[0]
    count = first.get("split.tensors.count", len(tensors))
    if count != len(tensors):
        raise ModelError(
            f"{first.file} and its other parts hold {len(tensors)} tensors, and should hold {count}: download them "
            "again"
        )
    if not first.architecture:
        raise ModelError(f"{first.file} does not say which architecture it holds (general.architecture)")
    return GgufHeader(first.file, first.fields, tensors)
