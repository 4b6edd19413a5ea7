"""The tokenizer's part of a GGUF header: the inverse of `edge_ft.models.gguf_tokenizer`.

A header names the rules by which texts are split. The name is found by trying: the one whose rules split texts as the
tokenizer does.
"""

import json
import re
from typing import Any

from tokenizers import Tokenizer

from edge_ft.data import SpecialIds, TextTokenizer
from edge_ft.errors import UsageError
from edge_ft.models.gguf_tokenizer import WHOLE_WORDS, splitting_rules

__all__ = ["PROBES", "vocabulary_fields"]

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
RULES = ("gpt-2", "smollm", "qwen2", "llama-bpe", "smaug-bpe", "tekken", "gpt-4o")
"""One name of each set of rules that is known here."""
PROBES = (
    *(
        "Hello world, it's the answer: 7, 42 or 123456789.",
        "Don't!  DON'T\n\n\n\tx = [1,2];\r\n  end ",
        "ÄÖ Straße naïve",
    ),
    *(
        "中文 日本語 한국어 русский עברית हिन्दी",
        "🙂👩‍👩‍👧 (a+b)^2≤3½",
        "    def f(x):\n        return x**2 # ok",
        "camelCase HTTPServer",
    ),
)
"""Texts that the rules split differently."""
BYTES = re.compile(r"<0x[0-9A-F]{2}>")


def vocabulary_fields(tokenizer: TextTokenizer, special: SpecialIds, tokens: int, where: str) -> dict[str, Any]:
    """Return the keys of a tokenizer, for `write_gguf_file`.

    Args:
        tokenizer: Of the model.
        special: What begins, ends and pads texts.
        tokens: Rows of the token embedding: the vocabulary is filled up to it.
        where: Names the model in errors.

    Raises:
        UsageError: a tokenizer of another kind, or with rules that llama.cpp has no name for.
    """
    content = json.loads((tokenizer.folder / "tokenizer.json").read_text(encoding="utf-8"))
    library = Tokenizer.from_file(str(tokenizer.folder / "tokenizer.json"))
    model = content["model"]
    if model.get("type") != "BPE":
        raise UsageError(
            f"the tokenizer of {where} is of type {model.get('type')}, and GGUF files are written with BPE: "
            "export a bundle instead"
        )
    ends = dict(zip(("eos", "eot", "eom"), special.ends, strict=False))
    named = {
        "bos": special.bos,
        "padding": special.pad,
        "unknown": library.token_to_id(model.get("unk_token") or ""),
        **ends,
    }
    fields: dict[str, Any] = {f"tokenizer.ggml.{name}_token_id": index for name, index in named.items()}
    fields |= {
        "tokenizer.ggml.add_bos_token": tokenizer.bos_id is not None,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.chat_template": tokenizer.chat_template,
    }
    texts = {index: text for text, index in library.get_vocab(with_added_tokens=True).items()}
    listed = [texts.get(index, f"[PAD{index}]") for index in range(tokens)]
    kinds = _kinds(library, listed, texts.keys())
    fields |= {"tokenizer.ggml.tokens": listed, "tokenizer.ggml.token_type": kinds}
    merges = [pair if isinstance(pair, list) else pair.split(" ") for pair in model["merges"]]
    if model.get("byte_fallback"):
        return fields | _sentencepiece(content, listed, merges)
    return fields | {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": _rules(content, library, where),
        "tokenizer.ggml.merges": [" ".join(pair) for pair in merges],
    }


def _kinds(library: Tokenizer, listed: list[str], known: Any) -> list[int]:
    """Return the kind of each token."""
    added = library.get_added_tokens_decoder()
    kinds = []
    for index, text in enumerate(listed):
        if index not in known:
            kinds.append(UNUSED)
        elif index in added:
            kinds.append(CONTROL if added[index].special else USER_DEFINED)
        else:
            kinds.append(BYTE if BYTES.fullmatch(text) else NORMAL)
    return kinds


def _rules(content: dict[str, Any], library: Tokenizer, where: str) -> str:
    """Return llama.cpp's name of the rules by which a byte-level tokenizer splits a text.

    Raises:
        UsageError: there is none.
    """
    normalizer = content.get("normalizer")
    own = library.pre_tokenizer
    # llama.cpp does not normalize, and its files of Qwen are used as they are: texts are seldom decomposed.
    if (normalizer is None or normalizer.get("type") == "NFC") and own is not None:
        for name in RULES:
            rules = splitting_rules(where, name)
            whole = bool(content["model"].get("ignore_merges"))
            if whole == (name in WHOLE_WORDS) and all(
                own.pre_tokenize_str(text) == rules.pre_tokenize_str(text) for text in PROBES
            ):
                return name
    raise UsageError(
        f"the tokenizer of {where} splits texts by rules that llama.cpp has no name for here (known are "
        f"{', '.join(RULES)}): export a bundle instead"
    )


def _sentencepiece(content: dict[str, Any], listed: list[str], merges: list[list[str]]) -> dict[str, Any]:
    """Return the keys of a SentencePiece BPE tokenizer: a token's score is the rank of the merge that makes it."""
    ranks: dict[str, int] = {}
    for rank, (first, second) in enumerate(merges):
        ranks.setdefault(first + second, rank)
    written = json.dumps([content.get("normalizer"), content.get("pre_tokenizer")])
    prefix = '"Prepend"' in written or '"prepend_scheme": "first"' in written or '"prepend_scheme": "always"' in written
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.scores": [-float(ranks.get(text, len(merges))) for text in listed],
        "tokenizer.ggml.add_space_prefix": prefix,
    }
