"""What transformers makes of the files beside a tokenizer.json: named and added tokens, clean-up."""

from base64 import b64decode
from collections.abc import Callable, Mapping
from operator import itemgetter
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, models

from edge_ft.errors import ModelError
from edge_ft.utf8 import read_json

__all__ = ["check_charsmaps", "clean_up", "complete", "named_tokens"]

_BERT = {"unk_token": "[UNK]", "sep_token": "[SEP]", "pad_token": "[PAD]", "cls_token": "[CLS]", "mask_token": "[MASK]"}
_ROBERTA = {
    **{"bos_token": "<s>", "eos_token": "</s>", "sep_token": "</s>", "cls_token": "<s>"},
    **{"unk_token": "<unk>", "pad_token": "<pad>", "mask_token": "<mask>"},
}
_ENDOFTEXT = {"unk_token": "<|endoftext|>", "bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
CLASS_TOKENS: dict[str, dict[str, str]] = {
    "Bert": _BERT,
    "DistilBert": _BERT,
    "Electra": _BERT,
    "MPNet": {**_ROBERTA, "unk_token": "[UNK]"},
    "Roberta": _ROBERTA,
    "XLMRoberta": _ROBERTA,
    "Albert": {**_BERT, "bos_token": "[CLS]", "eos_token": "[SEP]", "unk_token": "<unk>", "pad_token": "<pad>"},
    "T5": {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"},
    "GPT2": _ENDOFTEXT,
    "GPTNeoX": _ENDOFTEXT,
    "Qwen2": {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
    "Llama": {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"},
    "Gemma": {"unk_token": "<unk>", "bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"},
}
"""Tokens that a class of transformers names where the files do not: those of BERT and RoBERTa name none at all."""
CLASS_OF = {
    "bert": "Bert",
    "distilbert": "DistilBert",
    "electra": "Electra",
    "mpnet": "MPNet",
    "roberta": "Roberta",
    "xlm-roberta": "XLMRoberta",
    "albert": "Albert",
    "t5": "T5",
    "mt5": "T5",
    "gpt2": "GPT2",
    "gpt_neox": "GPTNeoX",
    "qwen2": "Qwen2",
    "qwen3": "Qwen2",
    "llama": "Llama",
    "mistral": "Llama",
    "gemma2": "Gemma",
    "gemma3_text": "Gemma",
}
"""The class of a `model_type` whose files name none."""
FLAGS = ("lstrip", "rstrip", "normalized", "single_word", "special")
SPACED = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")
"""What clean_up_tokenization_spaces writes without spaces, in this order."""


def check_charsmaps(file: Path) -> None:
    """Check the sizes in the character maps of a tokenizer.json: the library allocates them without looking.

    Args:
        file: The tokenizer.json.

    Raises:
        ModelError: a map is shorter than its first four bytes say.
    """
    if b"precompiled_charsmap" not in file.read_bytes():
        return
    content = read_json(file, ModelError)
    parts = [content.get("normalizer")] if isinstance(content, dict) else []
    while parts:
        part = parts.pop()
        if isinstance(part, list):
            parts += part
        elif isinstance(part, dict):
            parts.append(part.get("normalizers"))
            text = part.get("precompiled_charsmap")
            try:
                charsmap = b64decode(text) if isinstance(text, str) else b""
            except ValueError:
                charsmap = b""  # the library says what is wrong
            if int.from_bytes(charsmap[:4], "little") > len(charsmap):
                raise ModelError(f"{file} is damaged: its precompiled_charsmap is cut off; save or download it again")


def named_tokens(named: Mapping[str, Any], model_type: str | None, tokenizer: Tokenizer) -> dict[str, str]:
    """Return the texts of `bos_token`, `eos_token` and so on.

    Args:
        named: Content of tokenizer_config.json over special_tokens_map.json.
        model_type: Of config.json; None where it is not known.
        tokenizer: Only tokens that it has are named by default.
    """
    texts = {name: text.get("content") if isinstance(text, dict) else text for name, text in named.items()}
    found = {name: text for name, text in texts.items() if name.endswith("_token") and isinstance(text, str)}
    written = named.get("tokenizer_class")
    kind = str(written).removesuffix("Fast").removesuffix("Tokenizer") if written else CLASS_OF.get(model_type or "")
    for name, text in CLASS_TOKENS.get(kind or "", {}).items():
        if name not in named and tokenizer.token_to_id(text) is not None:
            found[name] = text
    return found


def complete(tokenizer: Tokenizer, config: Mapping[str, Any], named: Mapping[str, str]) -> None:
    """Give a tokenizer, in place, what transformers adds to its tokenizer.json.

    These are the tokens of `added_tokens_decoder` with their flags, and named tokens that the vocabulary has, as
    special ones. `add_bos_token` and `add_eos_token` change nothing beside a tokenizer.json, as in transformers.

    Args:
        tokenizer: As tokenizer.json defines it.
        config: Content of tokenizer_config.json.
        named: What `named_tokens` returned.
    """
    known = {repr(token) for token in tokenizer.get_added_tokens_decoder().values()}
    decoder = config.get("added_tokens_decoder")
    numbered = [(int(at), entry) for at, entry in decoder.items()] if isinstance(decoder, dict) else []
    listed = [
        AddedToken(str(entry["content"]), **{flag: bool(entry[flag]) for flag in FLAGS if flag in entry})
        for _, entry in sorted(numbered, key=itemgetter(0))
        if isinstance(entry, dict)
    ]
    tokenizer.add_tokens([token for token in listed if repr(token) not in known])
    texts = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    tokenizer.add_special_tokens(
        [AddedToken(text, special=True) for text in dict.fromkeys(named.values()) if _is_piece(tokenizer, text, texts)]
    )


def clean_up(tokenizer: Tokenizer, config: Mapping[str, Any]) -> Callable[[str], str] | None:
    """Return what removes spaces from a decoded text, where tokenizer_config.json asks for it; None: nothing does.

    transformers ignores the setting for BPE, where it would remove spaces that the model wrote.
    """
    if config.get("clean_up_tokenization_spaces") is not True or isinstance(tokenizer.model, models.BPE):
        return None

    def clean(text: str) -> str:
        for spaced in SPACED:
            text = text.replace(spaced, spaced.strip())
        return text

    return clean


def _is_piece(tokenizer: Tokenizer, text: str, added: set[str]) -> bool:
    """Return whether a text is in the vocabulary, but no added token."""
    return text not in added and tokenizer.token_to_id(text) is not None
