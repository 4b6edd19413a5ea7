"""Which tokens of a tokenizer some texts need, and the tokenizer with these tokens alone.

Whatever the full tokenizer can encode, the cut one can, if with more tokens; texts of which all tokens are kept become
the same tokens as before.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from edge_ft.errors import ModelError

__all__ = ["cut_ids", "cut_settings", "cut_tokenizer", "kept_tokens"]

IDS = ("_token_id", "_token_ids")
"""Endings of the settings that name tokens by id."""
LISTS = ("suppress_tokens", "begin_suppress_tokens")
"""Lists of ids in generation_config.json, from which those of tokens that are gone are left out."""
SEQUENCES = ("bad_words_ids", "force_words_ids", "forced_decoder_ids", "sequence_bias", "constraints")
"""Settings with ids in other forms, which are left out: no model that is supported needs them."""


def kept_tokens(tokenizer: Mapping[str, Any], used: Collection[int], general: int) -> list[int]:
    """Choose the tokens that a cut tokenizer keeps.

    Args:
        tokenizer: Content of a tokenizer.json, with all added tokens.
        used: Ids that must stay: of the texts, and those that the model's settings name.
        general: Most tokens that are kept for other text.

    Returns:
        The ids in ascending order: those in `used`, added tokens, bytes or letters, the tokens of general text, and
        all tokens that these are merged from.

    Raises:
        ModelError: a kind of tokenizer that cannot be cut.
    """
    model = tokenizer["model"]
    kind = str(model.get("type"))
    if (
        kind not in KEEP
        or model.get("end_of_word_suffix")
        or (kind == "BPE" and model.get("continuing_subword_prefix"))
    ):
        raise ModelError(
            f"the vocabulary of a {kind} tokenizer{' with marks inside words' if kind == 'BPE' else ''} cannot be cut: "
            "leave --vocabulary out"
        )
    added = {int(token["id"]) for token in tokenizer.get("added_tokens") or ()}
    return sorted({*used, *added} | KEEP[kind](model, set(used) - added, general))


def cut_tokenizer(tokenizer: Mapping[str, Any], kept: Sequence[int]) -> dict[str, Any]:
    """Return the content of a tokenizer.json with the kept tokens alone, numbered anew in the same order.

    Args:
        tokenizer: Content of the whole one, with all added tokens.
        kept: What `kept_tokens` returned.

    Returns:
        The content.
    """
    new = {old: at for at, old in enumerate(kept)}
    model = dict(tokenizer["model"])
    if isinstance(model["vocab"], list):
        model["vocab"] = [piece for at, piece in enumerate(model["vocab"]) if at in new]
        model["unk_id"] = new.get(model["unk_id"])
    else:
        vocab = {text: new[at] for text, at in model["vocab"].items() if at in new}
        model["vocab"] = vocab
        if model["type"] == "BPE":
            pairs = (_pair(merge) for merge in model["merges"])
            model["merges"] = [[one, two] for one, two in pairs if {one, two, one + two} <= vocab.keys()]
    added = [{**token, "id": new[token["id"]]} for token in tokenizer.get("added_tokens") or ()]
    processor = _renumbered(tokenizer.get("post_processor"), new)
    return {**tokenizer, "model": model, "added_tokens": added, "post_processor": processor, "padding": None}


def cut_ids(settings: Mapping[str, Any], new: Mapping[int, int]) -> dict[str, Any]:
    """Return the settings of a config.json or generation_config.json that name tokens by id, with the new ids.

    Args:
        settings: With all of these settings.
        new: The new id of each kept one.

    Returns:
        These settings alone; an id that is not kept, and means no token of the model, is null.
    """

    def renumber(value: Any) -> Any:
        if isinstance(value, list):
            return [new[at] for at in value if at in new]
        return new.get(value) if isinstance(value, int) else value

    named = {key: value for key, value in settings.items() if key.endswith(IDS) or key in LISTS}
    return {key: renumber(value) for key, value in named.items()} | {key: None for key in SEQUENCES if key in settings}


def cut_settings(config: Mapping[str, Any], new: Mapping[int, int]) -> dict[str, Any]:
    """Return the content of a tokenizer_config.json with the new ids of its added tokens.

    Args:
        config: Content of the whole one.
        new: The new id of each kept one.

    Returns:
        The content.
    """
    decoder = config.get("added_tokens_decoder")
    if not isinstance(decoder, dict):
        return dict(config)
    entries = {str(new[int(at)]): entry for at, entry in decoder.items() if int(at) in new}
    return {**config, "added_tokens_decoder": entries}


def _renumbered(processor: Any, new: Mapping[int, int]) -> Any:
    """Return a post-processor with the new ids of the tokens that it adds."""
    if not isinstance(processor, dict):
        return processor
    found = dict(processor)
    if isinstance(found.get("processors"), list):
        found["processors"] = [_renumbered(part, new) for part in found["processors"]]
    if isinstance(found.get("special_tokens"), dict):
        found["special_tokens"] = {
            name: {**token, "ids": [new[at] for at in token["ids"]]} for name, token in found["special_tokens"].items()
        }
    for name in ("sep", "cls"):
        if isinstance(found.get(name), list):
            text, at = found[name]
            found[name] = [text, new[at]]
    return found


def _pair(merge: Any) -> tuple[str, str]:
    """Return the two parts of a merge, which older files hold as one text."""
    one, two = merge.split(" ", 1) if isinstance(merge, str) else merge
    return one, two


def _is_byte(text: str) -> bool:
    return len(text) == 6 and text.startswith("<0x") and text.endswith(">")


def _letters(model: Mapping[str, Any], texts: Iterable[str]) -> set[str]:
    """Return what every text can be encoded with: its bytes where the tokenizer falls back to them, else letters."""
    found = set(texts)
    bytes_ = {text for text in found if _is_byte(text)} if model.get("byte_fallback") else set()
    return bytes_ if len(bytes_) == 256 else bytes_ | {text for text in found if len(text) == 1}


def _keep_bpe(model: Mapping[str, Any], used: set[int], general: int) -> set[int]:
    """Return the ids that stay of a BPE vocabulary: each token with those that it is merged from."""
    vocab: dict[str, int] = model["vocab"]
    merges = [_pair(merge) for merge in model["merges"]]
    ranks = {pair: rank for rank, pair in reversed([*enumerate(merges)])}
    texts = {at: text for text, at in vocab.items()}
    keep = _letters(model, vocab) | {texts[at] for at in used if at in texts}
    first = dict.fromkeys(one + two for one, two in merges)
    keep |= {text for text, _ in zip(first, range(general), strict=False)}
    for text in sorted(keep):
        keep.update(part for part in _parts(text, ranks) if part in vocab)
    if model.get("unk_token") in vocab:
        keep.add(model["unk_token"])
    return {vocab[text] for text in keep if text in vocab}


def _parts(text: str, ranks: Mapping[tuple[str, str], int]) -> set[str]:
    """Return the letters of a token and all that BPE makes of them, in the order in which it merges."""
    symbols = list(text)
    found = set(symbols)
    while len(symbols) > 1:
        pairs = [(ranks.get(pair, len(ranks)), at) for at, pair in enumerate(pairwise(symbols))]
        rank, at = min(pairs)
        if rank == len(ranks):
            break
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
        found.add(symbols[at])
    return found


def _keep_unigram(model: Mapping[str, Any], used: set[int], general: int) -> set[int]:
    """Return the ids that stay of a Unigram vocabulary: the likeliest pieces, and what no letters can replace."""
    pieces = [(str(text), float(score)) for text, score in model["vocab"]]
    letters = _letters(model, (text for text, _ in pieces))
    keep = {at for at, (text, _) in enumerate(pieces) if text in letters}
    if not model.get("byte_fallback"):
        keep |= {at for at, (text, _) in enumerate(pieces) if not letters.issuperset(text)}
    likeliest = sorted(range(len(pieces)), key=lambda at: -pieces[at][1])[:general]
    unknown = {model["unk_id"]} if model.get("unk_id") is not None else set()
    return {at for at in used if at < len(pieces)} | keep | {*likeliest} | unknown


def _keep_wordpiece(model: Mapping[str, Any], used: set[int], general: int) -> set[int]:
    """Return the ids that stay of a WordPiece vocabulary: its first pieces, and what no letters can replace."""
    vocab, mark = model["vocab"], str(model["continuing_subword_prefix"])

    def letters(text: str) -> list[str]:
        inside = text.startswith(mark) and len(text) > len(mark)
        rest = text.removeprefix(mark) if inside else text
        return [letter if at == 0 and not inside else mark + letter for at, letter in enumerate(rest)]

    keep = {at for text, at in vocab.items() if letters(text) == [text] or not vocab.keys() >= set(letters(text))}
    first = sorted(vocab.values())[:general]
    unknown = {vocab[model["unk_token"]]} if model.get("unk_token") in vocab else set()
    return (used & set(vocab.values())) | keep | {*first} | unknown


KEEP: dict[str, Callable[[Mapping[str, Any], set[int], int], set[int]]] = {
    "BPE": _keep_bpe,
    "Unigram": _keep_unigram,
    "WordPiece": _keep_wordpiece,
}
"""What stays of the vocabulary of each kind of tokenizer."""
