"""Convert a GGUF model once into the cache.

The conversion is a checkpoint folder as every other: config.json, float weights in safetensors, and a tokenizer.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_ft.config import Task
from edge_ft.errors import ModelError
from edge_ft.families import family_of
from edge_ft.files import cache_folder, write_json, write_text
from edge_ft.models.cached_model import Words, write_once
from edge_ft.models.dims import ModelDims, check_supported, read_config
from edge_ft.models.gguf_config import config_settings
from edge_ft.models.gguf_files import GgufModel, open_gguf
from edge_ft.models.gguf_header import GgufHeader, TensorInfo
from edge_ft.models.gguf_names import Heads, architecture_of, gguf_names, reorder_of
from edge_ft.models.gguf_rope import ROPE_TENSORS
from edge_ft.models.gguf_tokenizer import write_tokenizer
from edge_ft.models.logging import silence_libraries
from edge_ft.models.tensor_file import FileTensor, write_tensors
from edge_ft.progress import Progress, Silent

__all__ = ["CONVERTER", "convert_gguf", "plan_conversion", "write_checkpoint"]

CONVERTER = 2
"""Version of what is written here: part of the name of a conversion in the cache, so that an older one is not used."""
RECORD = "gguf.json"
"""Of a conversion: the files it came from, and the converter."""
TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
"""Types of tensors that are read."""
STORED = {"F16": ("F16", 2), "BF16": ("BF16", 2)}
"""Types that safetensors has too; all others are stored as float32."""
UNUSED = re.compile(r"^(blk\.\d+\.attn_rot_embd)\.|\.attn\.(masked_)?bias$")
"""Tensors of older conversions that llama.cpp does not read either."""
CHUNK = 2**19
"""Weights that are dequantized at a time."""
BLOCK = 2**24
"""Bytes that are hashed at a time."""


@dataclass(frozen=True)
class Weight:
    """A parameter of the transformers model, and where it comes from."""

    name: str
    shape: tuple[int, ...]
    source: TensorInfo
    reorder: Any
    """From `reorder_of`: None where the file's order is transformers'."""

    @property
    def stored(self) -> tuple[str, int]:
        """Type in the safetensors file, and bytes of a weight."""
        return ("F32", 4) if self.reorder is not None else STORED.get(self.source.type.name, ("F32", 4))


@dataclass(frozen=True)
class Plan:
    """All that a conversion will write, known before it begins."""

    config: Any
    """transformers config."""
    weights: tuple[Weight, ...]
    unused: tuple[str, ...]
    """Tensors of the file that llama.cpp does not read either."""

    @property
    def size(self) -> int:
        """Bytes of the weights."""
        return sum(int(np.prod(weight.shape)) * weight.stored[1] for weight in self.weights)


def convert_gguf(file: Path, task: Task | None = None, progress: Progress | None = None) -> Path:
    """Return the folder of a GGUF model's float checkpoint, converted once and cached under the files' hash.

    One tensor is in memory at a time. Of two processes that convert the same file, one waits for the other.

    Args:
        file: A GGUF file; any part of a split model.
        task: The task that the model must do; None: any.
        progress: Receives the tensors that are done; None is silent.

    Returns:
        The folder.

    Raises:
        ModelError: the file holds no model that is supported or does `task`, or not the whole of it.
        WillNotFit: the disk of the cache is too small for the float weights.
        OSError: the cache cannot be written.
    """
    progress = progress or Silent()
    model = open_gguf(file)
    family_of(architecture_of(model.header.architecture, file).model_type, task)
    plan = plan_conversion(model.header)
    folder = cache_folder() / f"gguf-{_key(model.files, progress)}-{CONVERTER}"
    words = Words(
        doing=f"converting {model.files[0]} into the cache",
        waiting="converting the same GGUF file",
        holds=f"the float weights of {file} take",
        place="GGUF files are converted",
    )
    return write_once(folder, plan.size, words, lambda to: write_checkpoint(model, plan, to, progress), progress)


def plan_conversion(header: GgufHeader) -> Plan:
    """Pair every parameter of the model with a tensor of the file, and every tensor with a parameter.

    Returns:
        What to write.

    Raises:
        ModelError: a tensor is missing, unknown, of another shape, or of a type that is not read.
    """
    where = header.file
    model_type, settings = config_settings(header)
    architecture = architecture_of(header.architecture, where)
    config = read_config(model_type, settings, where)
    dims = ModelDims(config)
    check_supported(dims, where)
    parameters = _parameters(config, where)
    names = gguf_names(architecture.name, dims.layers, parameters)
    heads = Heads(dims.heads, dims.kv_heads)
    if lost := [names[name] or name for name in parameters if names[name] not in header.tensors]:
        raise ModelError(
            f"{where} lacks the tensor {lost[0]}{f' and {len(lost) - 1} more' if len(lost) > 1 else ''}: it is not "
            "the whole model, take a file that is complete"
        )
    weights = []
    for name, shape in parameters.items():
        source = header.tensors[str(names[name])]
        reorder = reorder_of(architecture, source.name, heads)
        stored = shape[::-1] if reorder is not None and architecture.name == "gpt2" else shape
        if source.shape != stored:
            raise ModelError(
                f"{where}: the tensor {source.name} has shape {list(source.shape)} where its header asks for "
                f"{list(stored)}: take another file"
            )
        weights.append(Weight(name, shape, source, reorder))
    used = {weight.source.name for weight in weights}
    unused = tuple(name for name in header.tensors if name not in used and UNUSED.search(name))
    if unknown := [name for name in header.tensors if name not in {*used, *unused, *ROPE_TENSORS}]:
        raise ModelError(
            f"{where} has the tensor {unknown[0]}{f' and {len(unknown) - 1} more' if len(unknown) > 1 else ''}, which "
            f"a {model_type} model does not have here: give the checkpoint folder that the file was converted from"
        )
    _refuse_types(header, used)
    tokens = len(header.get("tokenizer.ggml.tokens", ()))
    if tokens > dims.vocabulary:
        raise ModelError(
            f"{where} has {tokens} tokens and embeddings for {dims.vocabulary}: it is torn or was changed, take "
            "another file"
        )
    return Plan(config, tuple(weights), unused)


def _refuse_types(header: GgufHeader, used: Iterable[str]) -> None:
    """Refuse tensors of a type that is not read.

    Raises:
        ModelError: the message names the types.
    """
    found = {header.tensors[name].type.name: name for name in used if header.tensors[name].type.name not in TYPES}
    if found:
        kind, name = min(found.items())
        raise ModelError(
            f"{header.file} has tensors of type {', '.join(sorted(found))} ({name} is {kind}), which are not read: "
            f"take a file of another quantization, for example Q4_K_M, Q6_K or Q8_0 (read are {', '.join(TYPES)}), or "
            "the checkpoint folder it was made from"
        )


def _parameters(config: Any, where: Path) -> dict[str, tuple[int, ...]]:
    """Make the model for text generation, without memory for its weights.

    Returns:
        Names and shapes of its parameters; tied ones once.

    Raises:
        ModelError: transformers cannot make a model of these sizes.
    """
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with silence_libraries(), torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            model.tie_weights()
    except (ValueError, TypeError, RuntimeError, KeyError, ZeroDivisionError, OverflowError) as error:
        raise ModelError(f"{where}: its header does not describe a model: {' '.join(str(error).split())}") from error
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def _key(files: tuple[Path, ...], progress: Progress) -> str:
    """16 letters of the hash of the files' content."""
    hashes, done, total = [], 0, sum(file.stat().st_size for file in files)
    stage = f"hashing {files[0].name}"
    for file in files:
        digest = hashlib.sha256()
        with file.open("rb") as stream:
            while block := stream.read(BLOCK):
                digest.update(block)
                done += len(block)
                progress.advance(stage, done // 2**20, -(-total // 2**20), "MB")
        hashes.append(digest.hexdigest())
    return (hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest())[:16]


def write_checkpoint(model: GgufModel, plan: Plan, folder: Path, progress: Progress) -> None:
    """Write the checkpoint of a GGUF model into an empty folder.

    Args:
        model: What is read.
        plan: Of its header.
        folder: What is filled.
        progress: Receives the tensors that are done.

    Raises:
        ModelError: its tokenizer or a weight cannot be read.
        OSError: a file cannot be written.
    """
    header = model.header
    if plan.unused:
        progress.say(f"not used, as in llama.cpp: {', '.join(plan.unused[:3])} ({len(plan.unused)} tensors in all)")
    progress.advance("reading the tokenizer", 0, 0)
    write_tokenizer(header, folder)
    with silence_libraries():
        plan.config.architectures = [_class_name(plan.config)]
        plan.config.dtype = "float32"
        plan.config.save_pretrained(folder)
    ends = [header.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    known = [end for end in dict.fromkeys(ends) if isinstance(end, int) and 0 <= end < plan.config.vocab_size]
    named = {"bos_token_id": plan.config.bos_token_id, "pad_token_id": plan.config.pad_token_id}
    settings = {key: value for key, value in named.items() if value is not None}
    write_json(folder / "generation_config.json", settings | ({"eos_token_id": known} if known else {}))
    licence = header.get("general.license")
    if isinstance(licence, str):
        write_text(folder / "README.md", f"---\nlicense: {licence}\n---\n")
    write_json(folder / RECORD, {"converter": CONVERTER, "files": [file.name for file in model.files]})
    write_safetensors(folder / "model.safetensors", plan.weights, progress)


def _class_name(config: Any) -> str:
    from transformers import AutoModelForCausalLM

    found: Any = AutoModelForCausalLM._model_mapping[type(config)]
    return str(found.__name__)


def write_safetensors(file: Path, weights: tuple[Weight, ...], progress: Progress) -> None:
    """Write weights as one safetensors file, each read when it is written: the library wants all of them at once.

    Args:
        file: What is written.
        weights: In the order of the file.
        progress: Receives the number of tensors that are done.

    Raises:
        ModelError: a weight is no number, or the file was changed meanwhile.
        OSError: the file cannot be written.
    """
    tensors = [FileTensor(weight.name, weight.stored[0], weight.shape, partial(_checked, weight)) for weight in weights]
    write_tensors(file, tensors, partial(progress.advance, "tensors converted"))


def _checked(weight: Weight) -> Iterator[NDArray[Any]]:
    """Yield a tensor's weights as `_parts` does, and refuse what is no number."""
    for part in _parts(weight):
        _check_finite(part, weight.source)
        yield part


def _parts(weight: Weight) -> Iterator[NDArray[Any]]:
    """Yield a tensor's weights in the order and type in which they are stored, some rows at a time if that can be."""
    source, kind = weight.source, weight.stored[0]
    parts = _blocks(source) if kind != "F32" else (_floats(blocks, source) for blocks in _blocks(source))
    if weight.reorder is None:
        yield from parts
    else:
        yield weight.reorder(np.concatenate(list(parts)).reshape(source.shape))


def _blocks(source: TensorInfo) -> Iterator[NDArray[np.uint8]]:
    """Yield the bytes of some rows of a tensor after the other: read, since mapped pages would stay in memory."""
    count = max(1, CHUNK // source.shape[-1]) * source.row_bytes
    with source.file.open("rb") as stream:
        stream.seek(source.start)
        for start in range(0, source.size, count):
            found = np.frombuffer(stream.read(min(count, source.size - start)), np.uint8)
            if len(found) != min(count, source.size - start):
                raise ModelError(f"{source.file} was changed while it was read: run the command again")
            yield found


def _check_finite(weights: NDArray[Any], source: TensorInfo) -> None:
    """Refuse weights that are no numbers.

    Raises:
        ModelError: one is infinite or NaN.
    """
    if source.type.name == "BF16" and weights.dtype == np.uint8:
        finite = bool(((weights.view("<u2") & 0x7F80) != 0x7F80).all())
    else:
        finite = bool(np.isfinite(weights.view("<f2") if weights.dtype == np.uint8 else weights).all())
    if not finite:
        raise ModelError(
            f"{source.file}: the tensor {source.name} has values that are infinite or no numbers: download or convert "
            "it again"
        )


def _floats(blocks: NDArray[np.uint8], source: TensorInfo) -> NDArray[np.float32]:
    """Return the weights of bytes of a tensor, float32, flat."""
    from gguf.quants import dequantize

    # As one row: gguf-py goes through rows in small groups, and blocks do not care where a row ends.
    with np.errstate(all="ignore"):  # a torn file can overflow; the result is checked
        found: NDArray[np.float32] = dequantize(blocks.reshape(1, -1), source.type)
    return found.reshape(-1)
