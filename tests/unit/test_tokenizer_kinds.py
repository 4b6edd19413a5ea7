"""Tokenizers of every kind: ids and text as transformers', whole streams, and the loss on the answer."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoints_table import record_checkpoint
from small_tokenizers import write_bpe
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

from edge_ft.config import RowsConfig
from edge_ft.data import IGNORED, Columns, KnownIds, Row, TextTokenizer, encode_rows
from edge_ft.data.rendering import make_rendering
from edge_ft.errors import ModelError
from edge_ft.models.slow_tokenizer import tokenizer_folder
from edge_ft.runtime.decode import StreamingDetokenizer

CORPUS = ["hello world, the answer is seven hello the answer. don't, it's we've 'a' !? "] * 3
TEXTS = (
    "hello world",
    " hello  the answer ",
    "the answer . it 's seven , don 't we 've ' a ' !",
    "naïve 🙂 日本\n\n\ttabs",
    "a",
    "",
)
FAST = {"tokenizer_class": "PreTrainedTokenizerFast"}


def write(folder: Path, tokenizer: Tokenizer, model_type: str | None = None, **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if model_type is not None:
        (folder / "config.json").write_text(json.dumps({"model_type": model_type, "vocab_size": 9999}))
    return folder


def byte_level(folder: Path, **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    return write_bpe(folder, **{**FAST, **config})


def plain_bpe(folder: Path) -> Path:
    """Characters with a suffix at the end of each word, as GPT-1's."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.BPEDecoder(suffix="</w>")
    trainer = trainers.BpeTrainer(
        vocab_size=90, special_tokens=["<unk>", "</s>"], end_of_word_suffix="</w>", show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return write(folder, tokenizer, **FAST, unk_token="<unk>", eos_token="</s>")


def unigram(folder: Path, *, ends: bool = True, **config: Any) -> Path:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=80, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    if ends:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
        )
    return write(
        folder, tokenizer, **{**FAST, "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>", **config}
    )


def byte_fallback(folder: Path, **config: Any) -> Path:
    """SentencePiece's BPE, as Llama 2's: a blank before each text, and bytes for characters that it does not have."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefghilnorstvwy.,'!?"]
    merges = [
        ("h", "e"),
        ("l", "l"),
        ("he", "ll"),
        ("hell", "o"),
        ("▁", "hello"),
        ("▁", "a"),
        ("t", "he"),
        ("▁", "the"),
    ]
    pieces += ["".join(merge) for merge in merges]
    vocabulary = {piece: at for at, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return write(folder, tokenizer, **{**FAST, **named, **config})


def word_piece(folder: Path, **config: Any) -> Path:
    """As BERT's, whose own files name no special tokens."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "hello", "world", "the", "answer", "seven", "a", ".", ","]
    words += ["##s", "it", "'", "s", "don", "t", "!", "we", "ve"]
    tokenizer = Tokenizer(models.WordPiece({word: at for at, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(words[:5])
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=4)
    return write(folder, tokenizer, "bert", **config)


def with_added_tokens(folder: Path) -> Path:
    byte_level(folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens(
        [AddedToken("the answer", normalized=True), AddedToken("world", single_word=True, lstrip=True, rstrip=True)]
    )
    tokenizer.add_special_tokens([AddedToken("<call>", lstrip=True), AddedToken("<back>", rstrip=True)])
    config = json.loads((folder / "tokenizer_config.json").read_text())
    return write(folder, tokenizer, **config)


def bos_and_eos(folder: Path) -> Path:
    byte_level(folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A <|im_end|>", special_tokens=[("<|endoftext|>", 0), ("<|im_end|>", 2)]
    )
    return write(folder, tokenizer, **FAST, bos_token="<|endoftext|>", eos_token="<|im_end|>")


def added_in_settings_alone(folder: Path) -> Path:
    """tokenizer.json lacks a token that added_tokens_decoder has."""
    byte_level(folder)
    entry = {"content": "<late>", "lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    size = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size()
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"] = {str(size): {**entry, "special": True}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


KINDS: dict[str, Callable[[Path], Path]] = {
    "byte-level BPE, no BOS": byte_level,
    "byte-level BPE, add_bos_token and add_eos_token (tokenizer.json decides)": lambda folder: byte_level(
        folder, bos_token="<|endoftext|>", add_bos_token=True, add_eos_token=True
    ),
    "BPE over characters": plain_bpe,
    "SentencePiece Unigram, EOS after each text": unigram,
    "SentencePiece Unigram, no EOS, clean_up_tokenization_spaces": lambda folder: unigram(
        folder, ends=False, clean_up_tokenization_spaces=True
    ),
    "SentencePiece BPE, byte fallback, dummy prefix, BOS": byte_fallback,
    "SentencePiece BPE, add_bos_token off (tokenizer.json decides)": lambda folder: byte_fallback(
        folder, add_bos_token=False
    ),
    "byte fallback, clean_up_tokenization_spaces (ignored for BPE)": lambda folder: byte_fallback(
        folder, clean_up_tokenization_spaces=True
    ),
    "WordPiece, own truncation and padding, no named tokens": word_piece,
    "WordPiece, clean_up_tokenization_spaces": lambda folder: word_piece(folder, clean_up_tokenization_spaces=True),
    "added tokens, special and not, lstrip, rstrip, normalized": with_added_tokens,
    "BOS and EOS by the post-processor": bos_and_eos,
    "tokens that only tokenizer_config.json has": added_in_settings_alone,
}


def known_by(folder: Path) -> KnownIds | None:
    config = folder / "config.json"
    return KnownIds.from_config(json.loads(config.read_text())) if config.exists() else None


def check_as_transformers(folder: Path, own: Path) -> None:
    """Compare ids, framed ids, decoded and streamed text of TEXTS with AutoTokenizer's."""
    theirs = AutoTokenizer.from_pretrained(folder)
    if getattr(theirs, "backend_tokenizer", None) is not None:
        theirs.backend_tokenizer.no_truncation()
        theirs.backend_tokenizer.no_padding()
    ours = TextTokenizer.load(own, known_by(own) or known_by(folder))
    for name in ("bos_token", "eos_token", "pad_token", "unk_token", "mask_token"):
        assert ours.special_tokens.get(name) == getattr(theirs, name), name
    for text in TEXTS:
        ids = theirs(text, add_special_tokens=False, truncation=False, padding=False).input_ids
        assert ours.encode(text) == ids, text
        assert ours.encode_framed(text, 512).ids == theirs(text, truncation=False, padding=False).input_ids, text
        for skip in (True, False):
            assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip), text
        pieces = StreamingDetokenizer(ours.decode_raw, clean=ours.clean)
        streamed = "".join([pieces.push(token) for token in ids] + [pieces.finish()])
        assert streamed == ours.decode(ids).rstrip("\ufffd"), text


@pytest.mark.parametrize("kind", KINDS)
def test_ids_and_text_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    folder = KINDS[kind](tmp_path / "model")
    check_as_transformers(folder, folder)
    record_checkpoint("tokenizers", kind, fp32="ids, text and stream as transformers'")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.startswith("WordPiece")])
def test_the_loss_is_on_the_answer_and_its_end(kind: str, tmp_path: Path) -> None:
    tokenizer = TextTokenizer.load(KINDS[kind](tmp_path / "model"))
    columns = Columns("prompt_completion", "{prompt}", "{completion}")
    rendering = make_rendering(RowsConfig(chat_template="none"), columns, "text-generation", tokenizer, 512, ())
    (row,) = encode_rows(rendering, tokenizer, [Row(1, {"prompt": "hello the", "completion": " answer, seven"})])
    trained = [int(label) for label in row.labels if label != IGNORED]
    assert trained == [*tokenizer.encode(" answer, seven"), tokenizer.eos_id]
    begins = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    assert row.input_ids[: row.prompt_length] == [*begins, *tokenizer.encode("hello the")]


def slow_bert(folder: Path) -> Path:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "hello", "world", "the", "answer", "##s", ".", ",", "a"]
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", "vocab_size": 99}))
    return folder


def slow_gpt2(folder: Path) -> Path:
    folder.mkdir()
    written = json.loads((write_bpe(folder) / "tokenizer.json").read_text())["model"]
    (folder / "tokenizer.json").unlink()
    (folder / "chat_template.jinja").unlink()
    (folder / "vocab.json").write_text(json.dumps(written["vocab"]))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in written["merges"]]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    config = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2", "vocab_size": 999}))
    return folder


@pytest.mark.parametrize(("kind", "make"), [("vocab.txt alone", slow_bert), ("vocab.json and merges.txt", slow_gpt2)])
def test_files_without_a_tokenizer_json_are_converted_once(
    kind: str, make: Callable[[Path], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGE_FT_CACHE", str(tmp_path / "cache"))
    folder = make(tmp_path / "model")
    converted = tokenizer_folder(folder)
    check_as_transformers(folder, converted)
    assert tokenizer_folder(folder) == converted != folder
    record_checkpoint("tokenizers", f"without tokenizer.json: {kind}", fp32="converted; ids as transformers'")


def test_a_sentencepiece_model_that_cannot_be_converted_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGE_FT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a\x0e\x0a\x05<unk>\x15\x00\x00")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ModelError, match=r"tokenizer\.model cannot be converted .* save the fast tokenizer") as caught:
        tokenizer_folder(tmp_path)
    record_checkpoint("tokenizers", "without tokenizer.json: a damaged SentencePiece model", refused=str(caught.value))


def test_a_model_without_its_unknown_token_is_refused_by_name(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordPiece({"hello": 0, "a": 1, "end": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    write(tmp_path / "model", tokenizer, **FAST, eos_token="end")
    opened = TextTokenizer.load(tmp_path / "model")
    assert opened.encode("hello a") == [0, 1]
    with pytest.raises(ModelError, match="has no unknown token") as caught:
        opened.encode("world")
    record_checkpoint("tokenizers", "no unknown token, and a text that needs one", refused=str(caught.value))


def test_a_named_token_that_the_vocabulary_lacks_is_none(tmp_path: Path) -> None:
    opened = TextTokenizer.load(byte_level(tmp_path, pad_token="<nowhere>"))
    assert (opened.eos_id, opened.pad_id) == (2, 2), "padding falls back on EOS, and is masked everywhere"
