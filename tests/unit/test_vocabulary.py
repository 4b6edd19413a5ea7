"""A tokenizer with fewer tokens reads every text, and the texts that it was cut for as before."""

import json
import string
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tokenizers import write_bpe
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from edge_ft.data import TextTokenizer, cut_ids, cut_settings, cut_tokenizer, kept_tokens
from edge_ft.errors import ModelError

TEXTS = [
    "Seven answers are better than one answer, and the answers were written by seven writers.",
    "An embedding of many tokens is the larger part of a small model: half of it and more.",
    "Writers who write rewritten texts were rewriting the writing of other writers' readers.",
    "A reader reads; the readers are reading what was written, and the writer writes again.",
]
TRAIN = TEXTS[:2]


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.add_tokens(["[over]"])  # behind all others
    return tokenizer


def _with_bytes() -> tuple[normalizers.Normalizer, decoders.Decoder]:
    """As Llama 2 and Gemma: spaces are ▁, and letters without a token are bytes."""
    spaces = normalizers.Replace(" ", "▁")
    return spaces, decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])


BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def byte_fallback() -> Tokenizer:
    learner = Tokenizer(models.BPE())
    learner.normalizer, _ = _with_bytes()
    learner.train_from_iterator(TEXTS * 3, trainers.BpeTrainer(vocab_size=160, show_progress=False))
    learned = json.loads(learner.to_str())["model"]
    texts = ["<unk>", "<s>", "</s>", *BYTES, *sorted(learned["vocab"], key=learned["vocab"].get)]
    merges = [tuple(merge) for merge in learned["merges"]]
    vocab = {text: at for at, text in enumerate(dict.fromkeys(texts))}
    # Some tokens can be merged in two ways, as in tokenizers that were converted from SentencePiece.
    more = [(text[:1], text[1:]) for text in vocab if len(text) > 2 and text[:1] in vocab and text[1:] in vocab]
    tokenizer = Tokenizer(
        models.BPE(
            vocab, [*merges, *(pair for pair in more if pair not in merges)], byte_fallback=True, unk_token="<unk>"
        )
    )
    tokenizer.normalizer, tokenizer.decoder = _with_bytes()
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


def unigram() -> Tokenizer:
    learner = Tokenizer(models.Unigram())
    learner.normalizer, _ = _with_bytes()
    learner.train_from_iterator(TEXTS * 3, trainers.UnigramTrainer(vocab_size=120, show_progress=False))
    pieces = [tuple(piece) for piece in json.loads(learner.to_str())["model"]["vocab"]]
    listed = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *((text, -20.0) for text in BYTES), *pieces]
    tokenizer = Tokenizer(models.Unigram(listed, unk_id=0, byte_fallback=True))
    tokenizer.normalizer, tokenizer.decoder = _with_bytes()
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


def wordpiece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(
        vocab_size=260, special_tokens=names, initial_alphabet=list(string.printable), show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return tokenizer


MADE = {make.__name__: make() for make in (byte_level, byte_fallback, unigram, wordpiece)}
LOSSLESS = ("byte_level", "byte_fallback", "unigram")


def cut(tokenizer: Tokenizer, general: int = 8) -> tuple[Tokenizer, list[int]]:
    """The tokenizer cut to what TRAIN needs, and the ids that are kept."""
    content = json.loads(tokenizer.to_str())
    used = {at for text in TRAIN for at in tokenizer.encode(text).ids}
    kept = kept_tokens(content, used, general)
    return Tokenizer.from_str(json.dumps(cut_tokenizer(content, kept))), kept


CUT = {name: cut(tokenizer) for name, tokenizer in MADE.items()}


@pytest.mark.parametrize("name", MADE)
def test_texts_of_kept_tokens_have_the_same_tokens_under_new_ids(name: str) -> None:
    whole, (smaller, kept) = MADE[name], CUT[name]
    assert smaller.get_vocab_size() == len(kept) < whole.get_vocab_size()
    for text in TRAIN:
        ids = smaller.encode(text).ids
        assert [kept[at] for at in ids] == whole.encode(text).ids
        assert smaller.encode(text).tokens == whole.encode(text).tokens
    assert len(smaller.encode(TEXTS[2]).ids) > len(whole.encode(TEXTS[2]).ids)


@pytest.mark.parametrize("name", LOSSLESS)
@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=40) | st.lists(st.sampled_from(" ".join(TEXTS).split())).map(" ".join))
def test_every_text_is_written_and_read_back_as_before(name: str, text: str) -> None:
    whole, (smaller, _) = MADE[name], CUT[name]
    before = whole.decode(whole.encode(text).ids, skip_special_tokens=True)
    assert smaller.decode(smaller.encode(text).ids, skip_special_tokens=True) == before
    if not any(name in text for name in ("<", "▁", "[over]")):
        assert before == text


@settings(max_examples=60, deadline=None)
@given(text=st.text(string.ascii_letters + " .,é漢", max_size=40))
def test_a_wordpiece_tokenizer_knows_the_words_that_it_knew(text: str) -> None:
    whole, (smaller, _) = MADE["wordpiece"], CUT["wordpiece"]
    unknown = [[tokenizer.encode(word).tokens == ["[CLS]", "[UNK]", "[SEP]"] for word in text.split()]
               for tokenizer in (whole, smaller)]  # fmt: skip
    assert unknown[0] == unknown[1]


@pytest.mark.parametrize("name", MADE)
def test_added_tokens_and_what_is_put_around_a_text_keep_their_texts(name: str) -> None:
    whole, (smaller, _) = MADE[name], CUT[name]
    before, after = (tokenizer.get_added_tokens_decoder().values() for tokenizer in (whole, smaller))
    assert [repr(token) for token in before] == [repr(token) for token in after]
    assert smaller.encode("one", "two").tokens[:1] == whole.encode("one", "two").tokens[:1]


def test_more_general_tokens_are_kept_if_asked_for_the_likeliest_first() -> None:
    for name, tokenizer in MADE.items():
        few, more = (set(cut(tokenizer, general)[1]) for general in (0, 300))
        assert few < more, name
    content = json.loads(MADE["byte_level"].to_str())
    first = [one + two for one, two in content["model"]["merges"][:8]]
    assert CUT["byte_level"][0].get_vocab().keys() >= set(first)


def test_letters_that_no_byte_stands_for_stay(tmp_path: Path) -> None:
    """T5's vocabulary has no bytes: a letter without a piece would be unknown."""
    pieces = [("<unk>", 0.0), ("a", -3.0), ("b", -3.0), ("ab", -2.0), ("abab", -9.0), ("ça", -9.0)]
    content = json.loads(Tokenizer(models.Unigram(pieces, unk_id=0)).to_str())
    assert kept_tokens(content, {3}, 0) == [0, 1, 2, 3, 5]  # nothing else writes a ç


def test_ids_in_settings_follow_and_those_of_no_token_are_null() -> None:
    new = {0: 0, 5: 1, 9: 2}
    found = {
        "eos_token_id": [5, 9],
        "bos_token_id": 0,
        "pad_token_id": 50256,
        "hidden_size": 5,
        "decoder_start_token_id": 9,
    }
    assert cut_ids(found, new) == {
        "eos_token_id": [1, 2], "bos_token_id": 0, "pad_token_id": None, "decoder_start_token_id": 2
    }  # fmt: skip
    assert cut_ids({"suppress_tokens": [1, 5, 9], "bad_words_ids": [[1, 5]]}, new) == {
        "suppress_tokens": [1, 2], "bad_words_ids": None
    }  # fmt: skip
    assert cut_settings({"added_tokens_decoder": {"9": {"content": "x"}, "7": {}}, "a": 1}, new) == {
        "added_tokens_decoder": {"2": {"content": "x"}}, "a": 1
    }  # fmt: skip


def test_a_tokenizer_is_complete_as_json(tmp_path: Path) -> None:
    """Tokens that only tokenizer_config.json adds are in it."""
    decoder = {"299": {"content": "[only here]", "special": True}}
    tokenizer = TextTokenizer.load(write_bpe(tmp_path, added_tokens_decoder=decoder))
    assert "[only here]" in {token["content"] for token in tokenizer.to_json()["added_tokens"]}


@pytest.mark.parametrize(
    ("model", "kind"),
    [
        (models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"), "WordLevel"),
        (models.BPE({"a</w>": 0, "a": 1}, [], end_of_word_suffix="</w>"), "BPE tokenizer with marks inside words"),
    ],
)
def test_other_kinds_of_tokenizers_are_refused_by_name(model: Any, kind: str) -> None:
    with pytest.raises(ModelError, match=f"the vocabulary of a {kind}.* cannot be cut: leave --vocabulary out"):
        kept_tokens(json.loads(Tokenizer(model).to_str()), {0}, 8)
