"""A model's tokenizer without transformers, which never reads a control token in a user's text."""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Encoding, Tokenizer

from edge_ft.data.filled import Filled
from edge_ft.data.tokenizer_settings import check_charsmaps, clean_up, complete, named_tokens
from edge_ft.errors import DataError, ModelError
from edge_ft.utf8 import read_json, read_utf8

__all__ = ["SLOW_FILES", "Framed", "KnownIds", "TextTokenizer"]

CUT = "\ufdd0"
"""Marks where a text is tokenized in two parts: a noncharacter, which Unicode reserves for internal use."""

STANDARD_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
)
BESIDE_TOKENIZER = ("generation_config.json", "chat_template.jinja")
"""Files that stay the base's where an adapter has a tokenizer without them."""
SLOW_FILES = (
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "vocab.txt",
    "added_tokens.json",
)
"""Files that define a tokenizer without tokenizer.json."""


@dataclass(frozen=True, slots=True)
class Framed:
    """One or two texts in token ids, with the special tokens that the model's tokenizer puts around them."""

    ids: list[int]
    type_ids: list[int]
    """As long as `ids`: which text a token belongs to (token_type_ids)."""
    start: int
    """Position of the first text."""
    cut: int
    """Tokens of the texts that were cut off."""


@dataclass(frozen=True)
class KnownIds:
    """The ids for which a model has embeddings."""

    tokens: int
    """Rows of the token embedding: ids are below it."""
    segments: int | None = None
    """Rows of the embedding of token_type_ids; None: the model reads none."""
    ends: tuple[int, ...] = ()
    """The end tokens that config.json names, which count where there is no generation_config.json."""
    pad: int | None = None
    """The padding that config.json names."""
    model_type: str | None = None
    """Family, whose tokenizer class names the special tokens that the files do not name."""

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "KnownIds | None":
        """Return what the content of a complete config.json says; None without a vocabulary."""
        if not isinstance(config.get("vocab_size"), int):
            return None
        segments, pad = config.get("type_vocab_size"), config.get("pad_token_id")
        return cls(config["vocab_size"], segments, _ids(config.get("eos_token_id")), pad, config.get("model_type"))


class TextTokenizer:
    """Text to token ids and back, as the model's tokenizer.json defines it."""

    def __init__(self, folder: Path, known: KnownIds | None = None, over: Path | None = None) -> None:
        self._files = _find_files(folder, over)
        self.folder = self._files["tokenizer.json"].parent
        self._segments = known.segments if known is not None else None
        check_charsmaps(self._files["tokenizer.json"])
        with self._library():
            self._tokenizer = Tokenizer.from_file(str(self._files["tokenizer.json"]))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        config = self._settings("tokenizer_config.json")
        named = self._settings("special_tokens_map.json") | config
        self.special_tokens: dict[str, str] = named_tokens(named, known.model_type if known else None, self._tokenizer)
        """The texts of `bos_token`, `eos_token` and so on, as far as the model or its tokenizer class names them."""
        with self._library():
            complete(self._tokenizer, config, self.special_tokens)
        self.clean = clean_up(self._tokenizer, config)
        """Removes spaces from decoded text as `clean_up_tokenization_spaces` asks for; None: nothing does."""
        generation = self._settings("generation_config.json")
        ends = _ids(generation.get("eos_token_id")) if generation or known is None else known.ends
        # A default that the model's author left in config.json may be beyond a small vocabulary: it never occurs.
        ends = tuple(at for at in ends if known is None or at < known.tokens)
        eos = self._id_of("eos_token")
        self.eos_id: int | None = eos if eos is not None else next(iter(ends), None)
        pad = self._id_of("pad_token")
        self.pad_id: int = pad if pad is not None else self.eos_id or 0
        self.stop_ids: frozenset[int] = frozenset(ends) | ({eos} if eos is not None else set())
        self.chat_template: str | None = (_chat_template(over) if over else None) or _chat_template(folder)
        self.vocab_size: int = self._tokenizer.get_vocab_size(with_added_tokens=True)
        self.control_tokens: dict[int, str] = {
            token_id: token.content
            for token_id, token in self._tokenizer.get_added_tokens_decoder().items()
            if token.special
        }
        """Special added tokens, id to text; only templates may write them."""
        self.mask_id: int | None = self._id_of("mask_token")
        self._unknown = self._id_of("unk_token")
        with self._library():
            self._single = _frame(self._tokenizer.encode("a"))
            self._pair = _frame(self._tokenizer.encode("a", "a"))
        self.named_bos_id: int | None = self._id_of("bos_token")
        bos = self.named_bos_id
        self.bos_id: int | None = bos if bos is not None and self._single[0][0] == [bos] else None
        """The id that the tokenizer itself puts before a text; None when it adds none."""
        self._beyond: dict[int, str] = {} if known is None else self._check_fit(known)

    @classmethod
    def load(cls, folder: Path, known: KnownIds | None = None, over: Path | None = None) -> "TextTokenizer":
        """Return the tokenizer of a model folder, run folder or bundle; its own truncation and padding are off.

        Args:
            folder: Holds tokenizer.json, and what else of `FILES` there is.
            known: What the model that reads the ids has embeddings for; None checks nothing.
            over: Folder of an adapter, whose files are read instead of those in `folder` where it has them: its own
                tokenizer, chat template and generation settings.

        Returns:
            The tokenizer.

        Raises:
            ModelError: tokenizer.json is missing or unreadable, or has tokens that the model does not know.
        """
        own = over is not None and (over / "tokenizer.json").is_file()
        if over is not None and not own and (slow := [name for name in SLOW_FILES if (over / name).is_file()]):
            raise ModelError(
                f"{over} has a tokenizer of its own in {slow[0]}, but no tokenizer.json: save its fast tokenizer "
                "there, or remove its tokenizer files if they are the base's"
            )
        if not own and not (folder / "tokenizer.json").is_file():
            raise ModelError(f"{folder} has no tokenizer.json: save the model's fast tokenizer there")
        return cls(folder, known, over)

    @classmethod
    def of_bundle(cls, folder: Path) -> "TextTokenizer":
        """Return the tokenizer of a bundle, held against the sizes in the bundle's config.json.

        Raises:
            ModelError: as for `load`.
        """
        return cls.load(folder, KnownIds.from_config(_read_json(folder / "config.json")))

    def encode(self, text: str) -> list[int]:
        """Return the ids of a user's text; no special tokens are added, and only those of a template are recognised."""
        if isinstance(text, Filled):
            # Text between two control tokens is shielded as a whole: a value can complete a token with its neighbours.
            around = self._around_controls(text)
            around[::2] = [self.shield(part) for part in around[::2]]
            return self.encode_template("".join(around))
        encoding = self._parse(text)
        return self.encode_template(self.shield(text)) if self._controls(text, encoding) else encoding.ids

    def encode_template(self, text: str) -> list[int]:
        """Return the ids of a rendered template: special tokens are recognised, except where `shield` cut them."""
        ids = [token_id for part in text.split(CUT) for token_id in self._parse(part).ids]
        if self._beyond and (found := self._beyond.keys() & ids):
            raise ModelError(self._beyond_message("the template writes", {at: self._beyond[at] for at in found}))
        return ids

    def shield(self, text: str) -> str:
        """Return the text with a cut inside each special token, so that `encode_template` reads it as plain text.

        The noncharacters U+FDD0 to U+FDEF, which mark such places, become U+FFFD.
        """
        text = re.sub("[\ufdd0-\ufdef]", "\ufffd", text)
        found = self._controls(text, self._parse(text))
        if not found:
            return text
        parts = []
        begin = 0
        for start, stop in found:
            # Some special tokens include the spaces around them: cut the token, not the spaces.
            first = stop - len(text[start:stop].lstrip())
            # A token of one character has no inside: remove it.
            parts.append(text[begin : first + (stop - first > 1)])
            begin = first + 1
        # Shield the parts again: a cut can expose another token that overlaps.
        return CUT.join(self.shield(part) for part in [*parts, text[begin:]])

    def without_controls(self, text: str) -> str:
        """Return a filled template without its control tokens, as `decode` omits them; other texts unchanged."""
        return "".join(self._around_controls(text)[::2]) if isinstance(text, Filled) else text

    def encode_framed(self, text: str, max_length: int, pair: str | None = None) -> Framed:
        """Return one or two texts with the model's special tokens, as in [CLS] text [SEP] pair [SEP]."""
        return self.frame(self.encode(text), max_length, None if pair is None else self.encode(pair))

    def frame(self, first: list[int], max_length: int, second: list[int] | None = None) -> Framed:
        """Return ids with the model's special tokens, at most `max_length`: of two texts the longer is cut first."""
        parts = self._single if second is None else self._pair
        available = max(max_length - sum(len(ids) for ids, _ in parts[::2]), 0)
        other = second or []
        shorter = min(len(first), len(other), available // 2)
        of_first = shorter if len(first) <= len(other) else available - shorter
        kept = (first[:of_first], other[: available - of_first])
        ids, type_ids = list(parts[0][0]), list(parts[0][1])
        for text, (_, kind), (after, after_kinds) in zip(kept, parts[1::2], parts[2::2], strict=False):
            ids += [*text, *after]
            type_ids += [*kind * len(text), *after_kinds]
        if self._segments == 1:  # RoBERTa has one row for both texts
            type_ids = [0] * len(ids)
        return Framed(ids, type_ids, len(parts[0][0]), max(len(first) + len(other) - available, 0))

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        """Return the text of `ids`, as transformers decodes it."""
        text = self.decode_raw(ids, skip_special_tokens)
        return text if self.clean is None else self.clean(text)

    def decode_raw(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        """Return the text of `ids` with all its spaces: further ids only add to it."""
        with self._library():
            return str(self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens))

    def tokens(self) -> dict[str, int]:
        """Return the id of every token by its text."""
        found: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        return found

    def to_json(self) -> dict[str, Any]:
        """Return the content of a tokenizer.json that is complete: with the tokens that other files add."""
        content: dict[str, Any] = json.loads(self._tokenizer.to_str())
        return content

    def files(self) -> list[Path]:
        """Return the files that a run folder or bundle needs to load this tokenizer again."""
        return list(self._files.values())

    def _settings(self, name: str) -> dict[str, Any]:
        return _read_json(self._files[name]) if name in self._files else {}

    def _check_fit(self, known: KnownIds) -> dict[int, str]:
        """Refuse a tokenizer whose ids the model has no embedding for.

        Args:
            known: The ids for which it has.

        Returns:
            The special tokens beyond them: no text becomes one, and `encode_template` refuses a template that writes
            one. Gemma 3's text models have such a token, for images.

        Raises:
            ModelError: a text can become such an id, or the tokenizer or a batch needs one.
        """
        self._rows = known.tokens
        tokens = self._tokenizer.get_vocab(with_added_tokens=True).items()
        beyond = {at: text for text, at in tokens if at >= known.tokens}
        framing = {at for ids, _ in (*self._single, *self._pair) for at in ids}
        used = {self._id_of(name) for name in STANDARD_TOKENS} | {known.pad, *framing}
        if unfit := [at for at in beyond if at not in self.control_tokens or at in used]:
            raise ModelError(self._beyond_message("its tokenizer has", {at: beyond[at] for at in unfit}))
        if known.pad is not None and known.pad >= known.tokens:
            raise ModelError(
                f"{self.folder}: config.json says pad_token_id {known.pad}, but the model has embeddings for ids below "
                f"{known.tokens}: correct it there, or set it to null"
            )
        return beyond

    def _beyond_message(self, what: str, tokens: dict[int, str]) -> str:
        first = min(tokens)
        more = f" and {len(tokens) - 1} more tokens" if len(tokens) > 1 else ""
        return (
            f"{self.folder}: {what} {tokens[first]!r} (id {first}){more}, but the model has embeddings for ids "
            f"below {self._rows}: resize the embeddings with model.resize_token_embeddings(len(tokenizer)) and save "
            "model and tokenizer again, or remove the added tokens from the tokenizer's files"
        )

    def _around_controls(self, text: Filled) -> list[str]:
        """Return the texts and the template's control tokens in turn, a text first and last."""
        found = [""]
        for at, part in enumerate(text.parts):
            begin = 0
            for start, stop in self._controls(part, self._parse(part)) if part and at % 2 == 0 else ():
                found[-1] += part[begin:start]
                found += [part[start:stop], ""]
                begin = stop
            found[-1] += part[begin:]
        return found

    def _id_of(self, name: str) -> int | None:
        text = self.special_tokens.get(name)
        return None if text is None else self._tokenizer.token_to_id(text)

    def _controls(self, text: str, encoding: Encoding) -> list[tuple[int, int]]:
        """Return the start and end of each special token in `text`; an unknown word is none, despite its special id."""
        if self.control_tokens.keys().isdisjoint(encoding.ids):
            return []
        return [
            (start, stop)
            for token_id, (start, stop) in zip(encoding.ids, encoding.offsets, strict=True)
            if token_id in self.control_tokens
            and (token_id != self._unknown or text[start:stop].strip() == self.control_tokens[token_id])
        ]

    def _parse(self, text: str) -> Encoding:
        try:
            with self._library():
                return self._tokenizer.encode(text, add_special_tokens=False)
        except TypeError as error:  # the library's error for half of a surrogate pair
            raise DataError("the text holds half of a surrogate pair, which is not a character: remove it") from error

    @contextmanager
    def _library(self) -> Iterator[None]:
        """A block that calls the tokenizers library.

        Raises:
            ModelError: the library cannot read or apply tokenizer.json.
            TypeError: the text holds half of a surrogate pair.
        """
        try:
            yield
        except TypeError:
            raise
        # The library raises a bare Exception for every kind of broken file. What its authors did not expect is a
        # "panic", which is no Exception, and whose class cannot be imported.
        except BaseException as error:
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            where, what, advice = self._files["tokenizer.json"], "be read as a tokenizer", "save or download it again"
            if "unk" in str(error).lower():
                what, advice = "tokenize a text", "it has no unknown token, add one or leave out what it does not know"
            raise ModelError(f"{where} cannot {what} ({error}): {advice}") from error


def _frame(encoding: Encoding) -> list[tuple[list[int], list[int]]]:
    """Return what a post-processor puts before, between and after texts.

    In turn, the post-processor's own tokens first and last: ids and type ids of its tokens; no ids and the type id of
    a text.
    """
    parts: list[tuple[list[int], list[int]]] = [([], [])]
    before = None
    for token, kind, text in zip(encoding.ids, encoding.type_ids, encoding.sequence_ids, strict=True):
        if text is not None:
            parts += [([], [kind]), ([], [])] if text != before else []
            before = text
        else:
            parts[-1][0].append(token)
            parts[-1][1].append(kind)
    return parts


def _ids(value: Any) -> tuple[int, ...]:
    """Return the ids of a value that may be one, several or none, as `eos_token_id` in the files of a model."""
    found = value if isinstance(value, list | tuple) else (value,)
    return tuple(at for at in found if isinstance(at, int) and at >= 0)


def _find_files(folder: Path, over: Path | None) -> dict[str, Path]:
    """Return the tokenizer's files by name: those in `over` win, a tokenizer there as a whole."""
    found = {name: folder / name for name in FILES if (folder / name).is_file()}
    own = {} if over is None else {name: over / name for name in FILES if (over / name).is_file()}
    if "tokenizer.json" in own:
        found = {name: file for name, file in found.items() if name in BESIDE_TOKENIZER}
    if over is not None and _chat_template(over) is not None:
        found.pop("chat_template.jinja", None)
    return found | own


def _chat_template(folder: Path) -> str | None:
    if (folder / "chat_template.jinja").is_file():
        return read_utf8(folder / "chat_template.jinja", ModelError)
    template = _read_json(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(template, list):  # several named templates
        named = (item for item in template if isinstance(item, dict) and item.get("name") == "default")
        template = next((item.get("template") for item in named), None)
    if not isinstance(template, str | None):
        raise ModelError(f"{folder / 'tokenizer_config.json'}: chat_template must be a text: save or download it again")
    return template


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    content = read_json(path, ModelError)
    if not isinstance(content, dict):
        raise ModelError(f"{path} must hold one JSON object: save or download it again")
    return content
