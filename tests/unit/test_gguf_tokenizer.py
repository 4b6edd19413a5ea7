"""The tokenizer in a GGUF header gives the tokens of the checkpoint's tokenizer, and of llama.cpp."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints_table import record_checkpoint
from tiny_gguf import write_gguf
from tokenizers import Tokenizer
from transformers.integrations.gguf import convert_gguf_tokenizer

from edge_ft.bench.studies.datasets import decoder_weights
from edge_ft.data import TextTokenizer
from edge_ft.errors import ModelError
from edge_ft.models.gguf_header import GgufHeader, read_header
from edge_ft.models.gguf_tokenizer import write_tokenizer

TEXTS = [
    *("hello world, the answer is\n\n\n\nseven", "Don't! It's 12345 or 3.5", "Straße 中文 🙂 é\t\r\n x=1;", ""),
    *("<|im_start|>user\nhello<|im_end|>\n", "    def f():\n        return 1"),
]
PIECES = [
    "▁",
    "h",
    "e",
    "l",
    "o",
    "w",
    "r",
    "d",
    "▁h",
    "el",
    "lo",
    "▁hel",
    "▁hello",
    "or",
    "▁w",
    "ld",
    "▁wor",
    "▁world",
]


def written(header: GgufHeader, folder: Path) -> TextTokenizer:
    folder.mkdir(exist_ok=True)
    write_tokenizer(header, folder)
    return TextTokenizer.load(folder)


def opened(folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def of_transformers(header: GgufHeader) -> Tokenizer:
    """As transformers converts it."""
    keys = {"tokenizer_type": "model", "pre_tokenizer_type": "pre"}
    values = {
        name: header.fields.get(f"tokenizer.ggml.{keys.get(name, name)}")
        for name in (*keys, "tokens", "scores", "token_type", "merges")
    }
    plain = {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in values.items()}
    return convert_gguf_tokenizer(header.architecture, {k: v for k, v in plain.items() if v is not None})[0]


def sentencepiece(**fields: Any) -> dict[str, Any]:
    """Fields of a SentencePiece BPE vocabulary with all bytes; the longer a piece, the better its score."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *PIECES]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": None,
        "tokenizer.ggml.merges": None,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * 259 + [-1.0 / len(piece) for piece in PIECES],
        "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * len(PIECES)],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        **fields,
    }


def test_byte_level_bpe_gives_the_tokens_of_the_checkpoint(llama: Path, tmp_path: Path) -> None:
    header = read_header(write_gguf(llama, tmp_path / "model.gguf"))
    found = written(header, tmp_path / "out")
    expected, theirs = opened(llama), of_transformers(header)
    for text in TEXTS:
        assert opened(tmp_path / "out").encode(text).ids == expected.encode(text).ids
        assert theirs.encode(text).ids == expected.encode(text).ids
    assert found.control_tokens == {0: "<|endoftext|>", 1: "<|im_start|>", 2: "<|im_end|>"}
    assert (found.bos_id, found.eos_id) == (None, 2)
    assert found.chat_template == (llama / "chat_template.jinja").read_text(encoding="utf-8")
    record_checkpoint("GGUF", "tokenizer: byte-level BPE", said="the tokens of the checkpoint's tokenizer")


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "phi3"])
def test_sentencepiece_bpe_gives_the_tokens_of_transformers(architecture: str, llama: Path, tmp_path: Path) -> None:
    file = write_gguf(llama, tmp_path / "model.gguf", fields=sentencepiece())
    header = read_header(file)
    header = GgufHeader(file, {**header.fields, "general.architecture": architecture}, header.tensors)
    found, theirs = written(header, tmp_path / "out"), of_transformers(header)
    for text in ["hello world", " hello", "  hello  world", "hello 中é", "hello</s> world", "\n"]:
        assert opened(tmp_path / "out").encode(text, add_special_tokens=False).ids == theirs.encode(text).ids, text
    assert found.bos_id == 1  # a SentencePiece model puts it there unless the header says no
    assert found.vocab_size == len(header.fields["tokenizer.ggml.tokens"])
    record_checkpoint("GGUF", "tokenizer: SentencePiece BPE", said="the tokens of transformers")


@pytest.mark.parametrize(
    ("fields", "text", "tokens"),
    [
        ({}, "hello", ["<s>", "▁hello"]),
        ({"tokenizer.ggml.add_bos_token": False}, "hello", ["▁hello"]),
        ({"tokenizer.ggml.add_eos_token": True}, "hello", ["<s>", "▁hello", "</s>"]),
        ({"tokenizer.ggml.add_space_prefix": False}, "hello hello", ["<s>", "h", "el", "lo", "▁hello"]),
    ],
)
def test_flags_of_the_header_are_kept(
    fields: dict[str, Any], text: str, tokens: list[str], llama: Path, tmp_path: Path
) -> None:
    written(read_header(write_gguf(llama, tmp_path / "model.gguf", fields=sentencepiece(**fields))), tmp_path)
    assert opened(tmp_path).encode(text).tokens == tokens


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("gpt-2", "a  12", ["a", "Ġ", "Ġ12"]),
        ("smollm", "a  12", ["a", "ĠĠ", "1", "2"]),
        ("qwen2", "a  12", ["a", "Ġ", "Ġ", "1", "2"]),
        ("llama-bpe", "a  12345", ["a", "Ġ", "Ġ", "123", "45"]),
        ("tekken", "aBC 12/\n", ["a", "BC", "Ġ", "1", "2", "/Ċ"]),
        ("gpt-4o", "It's 1234", ["It's", "Ġ", "123", "4"]),
    ],
)
def test_texts_are_split_by_the_rules_that_the_header_names(
    pre: str, text: str, pieces: list[str], llama: Path, tmp_path: Path
) -> None:
    fields = {"tokenizer.ggml.pre": pre, "tokenizer.ggml.add_bos_token": False}
    written(read_header(write_gguf(llama, tmp_path / "model.gguf", fields=fields)), tmp_path)
    splitter = opened(tmp_path).pre_tokenizer
    assert splitter is not None
    assert [piece for piece, _ in splitter.pre_tokenize_str(text)] == pieces


@pytest.mark.parametrize("pre", ["llama-bpe", "tekken"])
def test_llama_3_puts_bos_before_a_text_and_takes_words_that_are_tokens(pre: str, llama: Path, tmp_path: Path) -> None:
    written(read_header(write_gguf(llama, tmp_path / "model.gguf", fields={"tokenizer.ggml.pre": pre})), tmp_path)
    found = opened(tmp_path)
    assert found.encode("hello").tokens[0] == "<|im_start|>"  # the token with bos_token_id
    assert json.loads(found.to_str())["model"]["ignore_merges"]


def test_special_tokens_outside_the_letters_of_bytes_are_matched_and_add_no_id(llama: Path, tmp_path: Path) -> None:
    header = read_header(write_gguf(llama, tmp_path / "model.gguf"))
    tokens = ["<｜begin▁of▁sentence｜>", *header.fields["tokenizer.ggml.tokens"][1:]]
    other = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.bos_token_id": 0, "tokenizer.ggml.add_bos_token": True}
    found = written(GgufHeader(header.file, {**header.fields, **other}, header.tensors), tmp_path / "out")
    assert (found.bos_id, found.vocab_size) == (0, len(tokens))
    assert opened(tmp_path / "out").encode("<｜begin▁of▁sentence｜>hello").ids[:2] == [0, 0]


def test_control_tokens_of_phi_3_take_the_blanks_after_them(llama: Path, tmp_path: Path) -> None:
    for name, tokens in (("Phi-3 mini", 1), ("Other", 2)):
        written(read_header(write_gguf(llama, tmp_path / "model.gguf", fields={"general.name": name})), tmp_path)
        assert len(opened(tmp_path).encode("<|im_end|>\n").ids) == tokens


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"tokenizer.ggml.model": "bert"}, "a tokenizer of kind 'bert'"),
        ({"tokenizer.ggml.tokens": None}, "has no tokenizer in its header"),
        ({"tokenizer.ggml.pre": "bailingmoe"}, "by rules named 'bailingmoe'"),
        ({"tokenizer.ggml.merges": None}, "lacks the merges"),
        ({"tokenizer.ggml.merges": ["a"]}, "'a' in tokenizer.ggml.merges is not a pair"),
        ({"tokenizer.ggml.merges": ["no where"]}, "its tokenizer cannot be read"),
        ({"tokenizer.ggml.token_type": [1, 2]}, "has 2 values for"),
        ({"tokenizer.ggml.bos_token_id": 70000}, "bos_token_id is 70000, which is no token"),
        ({"tokenizer.ggml.add_bos_token": 3}, "add_bos_token is 3, not true or false"),
    ],
)
def test_a_tokenizer_that_cannot_be_right_is_refused(
    fields: dict[str, Any], reason: str, llama: Path, tmp_path: Path
) -> None:
    header = read_header(write_gguf(llama, tmp_path / "model.gguf", fields=fields))
    with pytest.raises(ModelError) as refused:
        write_tokenizer(header, tmp_path)
    assert reason in str(refused.value)


def test_smollm2_has_the_tokens_of_llama_cpp(tmp_path: Path) -> None:
    """The ids are llama.cpp's (xllamacpp 2026.10.11549)."""
    written(read_header(decoder_weights()), tmp_path)
    found = opened(tmp_path)
    for text, ids in {
        "  1": [256, 33],  # two blanks are one token; transformers' conversion gives 216, 216, 33
        "abc 12345": [25276, 216, 33, 34, 35, 36, 37],
        "  12 a\n\n 3": [256, 33, 34, 253, 8866, 35],
        "é１２ ½": [2756, 8083, 235, 8083, 236, 216, 16738],
        "it's 5pm, don't": [269, 506, 216, 37, 11043, 28, 1326, 982],
    }.items():
        assert found.encode(text).ids == ids
