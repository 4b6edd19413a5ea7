"""A base with fewer tokens: a model folder of its own, whose tokenizer, embedding and head are cut alike."""

import copy
import json
import shutil
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from numpy.typing import NDArray

from edge_ft.config import Task
from edge_ft.data import KnownIds, TextTokenizer, cut_ids, cut_settings, cut_tokenizer, kept_tokens
from edge_ft.errors import ModelError
from edge_ft.files import cache_folder, write_json, write_text
from edge_ft.models.base_model import Base, find_base
from edge_ft.models.cached_model import Words, write_once
from edge_ft.models.loading import model_class
from edge_ft.models.stored import Stored
from edge_ft.models.tensor_file import BYTES, FileTensor, write_tensors
from edge_ft.models.weight_names import match_names
from edge_ft.progress import Progress, Silent
from edge_ft.utf8 import read_json, read_utf8

__all__ = ["RECORD", "Vocabulary", "choose_vocabulary", "cut_base"]

RECORD = "vocabulary.json"
"""Of a cut base and of the run over it: the `Vocabulary`."""
GENERAL = 16_384
"""Tokens that are kept for text in general: the first merges of a BPE tokenizer, which are those of a smaller tokenizer
trained on the same text; in Unigram and WordPiece the likeliest pieces."""
CUTTER = 1
"""Version of what is written here: part of the name of a cut base in the cache, so that an older one is not used."""
COPIED = (
    *("README.md", "chat_template.jinja", "special_tokens_map.json", "modules.json", "*/config.json"),
    *("sentence_bert_config.json", "config_sentence_transformers.json"),
)
"""Files that say nothing about ids, as patterns."""
QUANTIZED = ("quantization_config", "compression_config")
"""Settings of quantized weights, which the cut base holds as floats."""


@dataclass(frozen=True)
class Vocabulary:
    """Which tokens of a model are kept."""

    content_sha256: str
    """Of the whole model."""
    tokens: int
    """Rows of its token embedding."""
    kept: tuple[int, ...]
    """Ids of the kept tokens there, in ascending order: their places are the new ids."""

    @classmethod
    def read(cls, file: Path) -> "Vocabulary":
        """Read a vocabulary.json.

        Returns:
            The tokens.

        Raises:
            ModelError: it is not one.
        """
        content = read_json(file, ModelError)
        try:
            return cls(str(content["content_sha256"]), int(content["tokens"]), tuple(map(int, content["kept"])))
        except (KeyError, TypeError, ValueError) as error:
            raise ModelError(f"{file} is damaged, which lists the kept tokens: restore it, or tune again") from error

    def write(self, file: Path) -> None:
        """Write it as JSON."""
        write_json(file, asdict(self))

    @property
    def rows(self) -> list[int]:
        """The kept rows of the embedding; a special token may be beyond its end."""
        return [at for at in self.kept if at < self.tokens]


def choose_vocabulary(base: Base, used: Collection[int]) -> Vocabulary:
    """Choose the tokens that a cut base keeps.

    Args:
        base: The whole model.
        used: Ids of the tokens in the texts that must stay as they are.

    Returns:
        These, tokens of general text, and those that the model's settings name.

    Raises:
        ModelError: a kind of tokenizer that cannot be cut.
    """
    size, tokenizer = base.dims.vocabulary, base.open_tokenizer()
    settings = (base.dims.config.to_dict(), _read(tokenizer.folder / "generation_config.json"))
    same = {at: at for at in range(size)}
    named = {at for found in settings for value in cut_ids(found, same).values() for at in _numbers(value)}
    if base.family.positions_after_pad:  # a text's positions begin after the id of the padding, which must not change
        named |= set(range((base.dims.config.pad_token_id or 0) + 1))
    return Vocabulary(base.content_sha256, size, tuple(kept_tokens(tokenizer.to_json(), {*used, *named}, GENERAL)))


def cut_base(base: Base, vocabulary: Vocabulary, task: Task, progress: Progress | None = None) -> Base:
    """Return a base with some tokens of another, written once into the user's cache.

    One tensor is in memory at a time. Of two processes that cut the same, one waits for the other.

    Args:
        base: The whole model.
        vocabulary: What is kept; of this base.
        task: The task that the cut base is for: it holds the weights of the model for it.
        progress: Receives the tensors that are done; None is silent.

    Returns:
        The cut base, under the name of the whole one.

    Raises:
        ModelError: weights that do not fit the config, or a tokenizer whose tokens cannot be numbered anew.
        WillNotFit: the disk of the cache is too small.
        OSError: the cache cannot be written.
    """
    progress = progress or Silent()
    tokenizer = base.open_tokenizer()
    parts = [
        CUTTER,
        base.content_sha256,
        tokenizer.to_json(),
        tokenizer.special_tokens,
        tokenizer.chat_template,
        vocabulary.kept,
    ]
    digest = sha256(json.dumps([*parts, task], sort_keys=True).encode()).hexdigest()
    folder = cache_folder() / f"vocabulary-{digest[:16]}"
    if not folder.is_dir():
        tensors = _tensors(base, vocabulary, task)

        def write(target: Path) -> None:
            _write_tokenizer(base, tokenizer, vocabulary, target)
            write_tensors(target / "model.safetensors", tensors, partial(progress.advance, "tensors written"))
            vocabulary.write(target / RECORD)

        words = Words(
            doing=f"cutting the vocabulary of {base.name} to {len(vocabulary.rows)} tokens",
            waiting="cutting the same vocabulary",
            holds=f"{base.name} with fewer tokens takes",
            place="cut models are kept",
        )
        write_once(folder, sum(tensor.size for tensor in tensors), words, write, progress)
    return replace(find_base(str(folder), task), name=base.name)


def _write_tokenizer(base: Base, tokenizer: TextTokenizer, vocabulary: Vocabulary, folder: Path) -> None:
    """Write config.json and the tokenizer's files.

    Raises:
        ModelError: the tokenizer that is written does not number its tokens as the weights.
    """
    new = {old: at for at, old in enumerate(vocabulary.kept)}
    rows = {old: at for old, at in new.items() if old < vocabulary.tokens}
    config = {key: value for key, value in base.config.items() if key not in QUANTIZED}
    config |= cut_ids(base.dims.config.to_dict(), rows) | {"vocab_size": len(rows)}
    write_json(folder / "config.json", config)
    source = tokenizer.folder
    for pattern in COPIED:
        for file in (*base.path.glob(pattern), *source.glob(pattern)):
            place = folder / file.relative_to(source if file.is_relative_to(source) else base.path)
            place.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, place)
    if generation := _read(source / "generation_config.json"):
        write_json(folder / "generation_config.json", {**generation, **cut_ids(generation, rows)})
    write_json(folder / "tokenizer_config.json", cut_settings(_read(source / "tokenizer_config.json"), new))
    whole = tokenizer.to_json()
    write_text(folder / "tokenizer.json", json.dumps(cut_tokenizer(whole, vocabulary.kept), ensure_ascii=False))
    cut = TextTokenizer.load(folder, KnownIds.from_config(config))
    if cut.tokens() != {text: new[at] for text, at in tokenizer.tokens().items() if at in new}:
        raise ModelError(f"{source}: the tokens of this tokenizer cannot be numbered anew: leave --vocabulary out")


def _tensors(base: Base, vocabulary: Vocabulary, task: Task) -> list[FileTensor]:
    """Return the tensors of the cut base."""
    checkpoint, rows = base.checkpoint, torch.tensor(vocabulary.rows)
    model, larger = _meta_model(base, task, vocabulary.tokens), _meta_model(base, task, vocabulary.tokens + 1)
    names = match_names(model, checkpoint, base.family.trained_head(task))
    sizes = {name: tuple(found.shape) for name, found in larger.named_parameters(remove_duplicate=False)}
    found = []
    for name, key in names.keys.items():
        stored, axis = checkpoint.tensors[key], _axis(tuple(model.get_parameter(name).shape), sizes[name])
        shape = tuple(len(rows) if at == axis else size for at, size in enumerate(stored.shape))
        dtype = stored.entry.dtype if type(stored) is Stored and stored.entry.dtype in BYTES else "F32"
        found.append(FileTensor(key, dtype, shape, partial(_parts, stored, dtype, axis, rows)))
    return found


def _axis(shape: tuple[int, ...], larger: tuple[int, ...]) -> int | None:
    """Return the axis over the vocabulary: the one that is longer in a model with more tokens."""
    return next((at for at, (one, other) in enumerate(zip(shape, larger, strict=True)) if one != other), None)


def _parts(stored: Stored, dtype: str, axis: int | None, rows: torch.Tensor) -> Iterator[NDArray[Any]]:
    """Yield the bytes of a tensor."""
    whole = stored.entry.load() if stored.entry.dtype == dtype and type(stored) is Stored else stored.read(slice(None))
    cut = whole if axis is None else whole.index_select(axis, rows)
    yield cut.contiguous().view(-1).view(torch.uint8).numpy()


def _meta_model(base: Base, task: Task, tokens: int) -> Any:
    """Return the model for a task without weights."""
    config = copy.copy(base.dims.config)
    config.vocab_size = tokens
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with init_empty_weights(include_buffers=False):
        model = model_class(task).from_config(config, dtype=torch.float32, trust_remote_code=False)
    model.tie_weights()
    return model


def _read(file: Path) -> Mapping[str, Any]:
    """Return the content of a settings file; nothing where there is none."""
    found: Mapping[str, Any] = json.loads(read_utf8(file, ModelError)) if file.is_file() else {}
    return found


def _numbers(value: Any) -> list[int]:
    """Return the ids in the value of a setting."""
    return [at for at in (value if isinstance(value, list) else [value]) if isinstance(at, int)]
