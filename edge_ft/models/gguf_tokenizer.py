"""The tokenizer in a GGUF file's header, as tokenizer.json: byte-level BPE, or SentencePiece's BPE.

The header has the vocabulary, and names the rules by which texts are split; the rules themselves are llama.cpp's code.
A name that is not known here is refused, since other rules give other tokens without an error.
"""

from collections.abc import Iterator
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from edge_ft.errors import ModelError
from edge_ft.files import write_json, write_text
from edge_ft.models.gguf_header import GgufHeader

__all__ = ["WHOLE_WORDS", "splitting_rules", "write_tokenizer"]

UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4
"""Kinds of tokens in `tokenizer.ggml.token_type` that are matched in a text as a whole."""
SPACE = "▁"
DIGITS = r"\p{N}"
GPT2 = ("", "default", "gpt-2", "phi-2", "mpt", "olmo", "jais", "mellum", "gigachat", "roberta-bpe", "trillion")
SINGLE_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
"""GPT-2's rules after each digit was split off."""
QWEN2 = ("qwen2", "stablelm2", "deepseek-r1-qwen", "kormo", "f2llmv2", "megrez", "hunyuan", "solar-open")
LLAMA3 = ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano")
LLAMA3_SPLIT = (*LLAMA3, "dbrx", "smaug-bpe")
TEKKEN = ("tekken",)
GPT4O = ("gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2")
_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_BEFORE, _SLASHES = r"[^\r\n\p{L}\p{N}]?", r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
SPLITS: dict[tuple[str, ...], str] = {
    QWEN2: rf"{_LETTERS}|\p{{N}}{_REST}",
    LLAMA3_SPLIT: rf"{_LETTERS}|\p{{N}}{{1,3}}{_REST}",
    TEKKEN: rf"{_BEFORE}{_UPPER}*{_LOWER}+|{_BEFORE}{_UPPER}+{_LOWER}*|\p{{N}}{_SLASHES}",
    GPT4O: rf"{_BEFORE}{_UPPER}*{_LOWER}+{_SHORT}|{_BEFORE}{_UPPER}+{_LOWER}*{_SHORT}|\p{{N}}{{1,3}}{_SLASHES}",
}
"""The expression that splits a text, by the names of `tokenizer.ggml.pre`."""
WHOLE_WORDS = (*LLAMA3, *TEKKEN)
"""Names whose tokenizers take a word that is a token as it is, and put BOS before a text unless the header says no."""


class _Vocabulary:
    """What the header says of the tokenizer, with lengths and types checked."""

    def __init__(self, header: GgufHeader) -> None:
        self.header = header
        self.kind = header.get("tokenizer.ggml.model")
        self.tokens: list[str] = self._array("tokens", list, None)
        if not self.tokens:
            raise ModelError(f"{header.file} has no tokenizer in its header (tokenizer.ggml.tokens): take another file")
        count = len(self.tokens)
        self.types = np.asarray(self._array("token_type", np.ndarray, count, np.ones(count, np.int32)))
        self.special: dict[str, str | None] = {
            name: self._special(key)
            for name, key in (
                ("bos_token", "bos_token_id"),
                ("eos_token", "eos_token_id"),
                ("unk_token", "unknown_token_id"),
                ("pad_token", "padding_token_id"),
            )
        }

    def scores(self) -> list[float]:
        return [float(score) for score in self._array("scores", np.ndarray, len(self.tokens))]

    def merges(self) -> list[tuple[str, str]] | None:
        """The merges in the header, if any."""
        if self.header.get("tokenizer.ggml.merges") is None:
            return None
        pairs = [tuple(merge.split(" ")) for merge in self._array("merges", list, None)]
        if wrong := next((" ".join(pair) for pair in pairs if len(pair) != 2), None):
            raise ModelError(f"{self.header.file}: {wrong!r} in tokenizer.ggml.merges is not a pair of tokens")
        return [(first, second) for first, second in pairs]

    def flag(self, key: str, default: bool) -> bool:
        value = self.header.get(f"tokenizer.ggml.{key}", default)
        if not isinstance(value, bool):
            raise ModelError(f"{self.header.file}: tokenizer.ggml.{key} is {value!r}, not true or false")
        return value

    def _array(self, key: str, kind: type, length: int | None, default: Any = None) -> Any:
        value = self.header.get(f"tokenizer.ggml.{key}", default)
        texts = kind is list and isinstance(value, list) and all(isinstance(text, str) for text in value)
        if value is None and key == "tokens":
            return []
        if not (texts or (kind is np.ndarray and isinstance(value, np.ndarray))):
            raise ModelError(f"{self.header.file}: tokenizer.ggml.{key} is missing or not what a tokenizer needs")
        if length is not None and len(value) != length:
            raise ModelError(
                f"{self.header.file}: tokenizer.ggml.{key} has {len(value)} values for {length} tokens: take another "
                "file"
            )
        return value

    def _special(self, key: str) -> str | None:
        index = self.header.get(f"tokenizer.ggml.{key}")
        if index is None or index == 2**32 - 1:
            return None
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(self.tokens):
            raise ModelError(f"{self.header.file}: tokenizer.ggml.{key} is {index!r}, which is no token of the file")
        return self.tokens[index]


def write_tokenizer(header: GgufHeader, folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and the chat template of a GGUF file.

    Args:
        header: Of the file.
        folder: Where to write.

    Raises:
        ModelError: the header has no tokenizer, a malformed one, or one of another kind.
        OSError: the files cannot be written.
    """
    vocabulary = _Vocabulary(header)
    try:
        tokenizer = _build(vocabulary)
    except (ValueError, OverflowError, MemoryError) as error:
        raise ModelError(_unreadable(header, error)) from error
    # The library raises a bare Exception for a merge of unknown tokens, and PanicException for what it did not foresee.
    except BaseException as error:
        if type(error) is Exception or type(error).__name__ == "PanicException":
            raise ModelError(_unreadable(header, error)) from error
        raise
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {name: text for name, text in vocabulary.special.items() if text is not None}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    write_json(folder / "tokenizer_config.json", settings | named)
    template = header.get("tokenizer.chat_template")
    if isinstance(template, str):
        write_text(folder / "chat_template.jinja", template)


def _unreadable(header: GgufHeader, error: BaseException) -> str:
    return f"{header.file}: its tokenizer cannot be read ({error}): take another file"


def _build(vocabulary: _Vocabulary) -> Tokenizer:
    """Return the tokenizer, with its special tokens and what it puts around a text."""
    pre = str(vocabulary.header.get("tokenizer.ggml.pre", ""))
    if vocabulary.kind == "gpt2":
        tokenizer, default_bos = _byte_level(vocabulary, pre), pre in WHOLE_WORDS
    elif vocabulary.kind == "llama":
        tokenizer, default_bos = _sentencepiece(vocabulary), True
    else:
        raise ModelError(
            f"{vocabulary.header.file} has a tokenizer of kind {vocabulary.kind!r}: read are gpt2 (byte-level BPE) and "
            "llama (SentencePiece); give the checkpoint folder that it was converted from"
        )
    _add_whole_tokens(tokenizer, vocabulary)
    bos, eos = vocabulary.special["bos_token"], vocabulary.special["eos_token"]
    before = bos if vocabulary.flag("add_bos_token", default_bos) else None
    after = eos if vocabulary.flag("add_eos_token", False) else None
    start, end = ([text] if text is not None else [] for text in (before, after))
    second = [f"{text}:1" for text in start], [f"{text}:1" for text in end]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*start, "$A", *end],
        pair=[*start, "$A", *end, *second[0], "$B:1", *second[1]],
        special_tokens=[(text, tokenizer.token_to_id(text)) for text in dict.fromkeys([*start, *end])],
    )
    return tokenizer


def _byte_level(vocabulary: _Vocabulary, pre: str) -> Tokenizer:
    """A byte-level BPE tokenizer, as GPT-2's."""
    merges = vocabulary.merges()
    if merges is None:
        raise ModelError(f"{vocabulary.header.file} lacks the merges of its tokenizer (tokenizer.ggml.merges)")
    alphabet = bytes_to_unicode()
    letters, whole = set(alphabet.values()), np.isin(vocabulary.types, (CONTROL, USER_DEFINED))
    named = set(vocabulary.special.values())
    ids = {
        # A token that is not written in bytes' letters, and is no special token, stands for its UTF-8 text.
        token
        if is_whole or token in named or set(token) <= letters
        else "".join(alphabet[byte] for byte in token.encode()): index
        for index, (token, is_whole) in enumerate(zip(vocabulary.tokens, whole.tolist(), strict=True))
    }
    tokenizer = Tokenizer(
        models.BPE(ids, merges, continuing_subword_prefix="", end_of_word_suffix="", ignore_merges=pre in WHOLE_WORDS)
    )
    tokenizer.pre_tokenizer = splitting_rules(vocabulary.header.file, pre)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def splitting_rules(where: object, pre: str) -> Any:
    """Return the rules named `pre` by which a byte-level tokenizer splits a text.

    Raises:
        ModelError: they are not known here; `where` names the file.
    """
    if pre in GPT2:
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    if pre in SINGLE_DIGITS:
        digits = pre_tokenizers.Split(Regex(DIGITS), "isolated")
        return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    for names, expression in SPLITS.items():
        if pre in names:
            return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(expression), "isolated"), by_bytes])
    raise ModelError(
        f"{where}: its tokenizer splits texts by rules named {pre!r} (tokenizer.ggml.pre), which are not known "
        "here: give the checkpoint folder that the file was converted from"
    )


def _sentencepiece(vocabulary: _Vocabulary) -> Tokenizer:
    """A SentencePiece BPE tokenizer; its merges are recovered from the vocabulary and its scores."""
    architecture = vocabulary.header.architecture
    gemma = architecture.startswith("gemma")
    tokens = vocabulary.tokens
    if gemma:  # its files write runs of blanks as they are
        tokens = [SPACE * len(token) if " " in token and not token.strip(" ") else token for token in tokens]
    ids = {token: index for index, token in enumerate(tokens)}
    merges = vocabulary.merges()
    if merges is None:
        # The scores of Gemma do not follow the order of its merges; that of its tokens does.
        ranks = [-float(index) for index in range(len(tokens))] if gemma else vocabulary.scores()
        merges = list(_merges(ids, dict(zip(tokens, ranks, strict=True))))
    unknown = vocabulary.special["unk_token"]
    tokenizer = Tokenizer(
        models.BPE(ids, merges, fuse_unk=True, byte_fallback=True, unk_token=unknown if unknown in ids else None)
    )
    prefix = vocabulary.flag("add_space_prefix", True) and not gemma
    if prefix and architecture == "phi3":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    else:
        scheme = "first" if prefix else "never"
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme=scheme, split=False)
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, *([decoders.Strip(" ", 1, 0)] if prefix else [])])
    return tokenizer


def _merges(ids: dict[str, int], scores: dict[str, float]) -> Iterator[tuple[str, str]]:
    """Yield every pair of tokens that makes a token: the best first, then those whose first part is longer."""
    best_first = sorted(scores.items(), key=itemgetter(1), reverse=True)
    for _, equal in groupby(best_first, key=itemgetter(1)):
        found: list[tuple[str, str]] = []
        for token, _ in equal:
            cuts = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
            pairs = [pair for pair in cuts if pair[0] in ids and pair[1] in ids]
            found.extend(sorted(pairs, key=lambda pair: (ids[pair[0]], ids[pair[1]])) if len(pairs) > 1 else pairs)
        yield from sorted(found, key=lambda pair: (len(pair[0]), len(pair[1])), reverse=True)


def _add_whole_tokens(tokenizer: Tokenizer, vocabulary: _Vocabulary) -> None:
    """Name the tokens that are matched in a text as a whole: control tokens, and those that the user defined."""
    named = [text for text in vocabulary.special.values() if text is not None]
    of_type = {
        kind: [vocabulary.tokens[index] for index in np.flatnonzero(vocabulary.types == kind)]
        for kind in (CONTROL, USER_DEFINED)
    }
    model = str(vocabulary.header.get("general.name", "")).lower()
    # llama.cpp knows by the name that Phi-3's control tokens take the blanks after them
    strips = "phi-3" in model or "phi3" in model
    keep = {"<unk>", "<s>", "<|endoftext|>"}
    present = tokenizer.get_vocab()
    tokenizer.add_special_tokens(
        [
            AddedToken(text, normalized=False, special=True, rstrip=strips and text not in keep)
            for text in dict.fromkeys([*of_type[CONTROL], *named])
            if text in present
        ]
    )
    tokenizer.add_tokens(
        [AddedToken(text, normalized=False, special=False) for text in of_type[USER_DEFINED] if text in present]
    )


def bytes_to_unicode() -> dict[int, str]:
    """The letter that stands for each byte in a byte-level vocabulary."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}
