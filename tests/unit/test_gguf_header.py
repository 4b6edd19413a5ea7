"""GGUF headers: what is read from them, and torn or malformed ones, which are refused with one sentence."""

import struct
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from tiny_gguf import write_gguf

from edge_ft.errors import ModelError
from edge_ft.models.gguf_header import read_header


def number(value: int, size: int = 8) -> bytes:
    return value.to_bytes(size, "little")


def text(value: bytes) -> bytes:
    return number(len(value)) + value


def header(*parts: bytes, tensors: int = 0, keys: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + number(version, 4) + number(tensors) + number(keys) + b"".join(parts)


def key(name: bytes, kind: int, value: bytes) -> bytes:
    return text(name) + number(kind, 4) + value


def tensor(name: bytes, shape: tuple[int, ...] = (32,), kind: int = 0, offset: int = 0) -> bytes:
    dimensions = number(len(shape), 4) + b"".join(map(number, shape))
    return text(name) + dimensions + number(kind, 4) + number(offset)


ARCHITECTURE = key(b"general.architecture", 8, text(b"llama"))
WEIGHTS = b"\0" * 4096
MALFORMED = {
    "not a GGUF file": b"PK\3\4" + b"\0" * 40,
    "does not begin with a GGUF header": b"GGUF\3",
    "version 1": header(WEIGHTS, version=1),
    "big-endian": b"GGUF" + struct.pack(">I", 3) + WEIGHTS,
    "ends inside": header(ARCHITECTURE, keys=2)[:-3],
    "too short for the 18446744073709551615 values of the list of tensors": header(WEIGHTS, tensors=2**64 - 1),
    "ends inside its header": header(keys=2**63),
    "the key 'general.architecture' is there twice": header(ARCHITECTURE, ARCHITECTURE, WEIGHTS, keys=2),
    "a key has 1099511627776 bytes": header(number(2**40), WEIGHTS, keys=1),
    "ends inside the text of a": header(key(b"a", 8, number(2**40)), WEIGHTS, keys=1),
    "the text of a is not UTF-8": header(key(b"a", 8, text(b"\xff\xfe")), WEIGHTS, keys=1),
    "of the unknown type 99": header(key(b"a", 99, b""), WEIGHTS, keys=1),
    "too short for the 9223372036854775808 values of a": header(key(b"a", 9, number(4, 4) + number(2**63)), keys=1),
    "too short for the 4611686018427387904 values of a": header(key(b"a", 9, number(8, 4) + number(2**62)), keys=1),
    "value 1 of a is not UTF-8": header(
        key(b"a", 9, number(8, 4) + number(2) + text(b"x") + text(b"\xff")), WEIGHTS, keys=1
    ),
    "nested more than 4 deep": header(key(b"a", 9, (number(9, 4) + number(1)) * 9), WEIGHTS, keys=1),
    "general.alignment is 24": header(key(b"general.alignment", 4, number(24, 4)), WEIGHTS, keys=1),
    "general.architecture is not a text": header(key(b"general.architecture", 4, number(1, 4)), WEIGHTS, keys=1),
    "'w' is there twice": header(tensor(b"w"), tensor(b"w", offset=128), WEIGHTS, tensors=2),
    "has 5 dimensions": header(tensor(b"w", (1, 1, 1, 1, 1)), WEIGHTS, tensors=1),
    "has no weights": header(tensor(b"w", (32, 0)), WEIGHTS, tensors=1),
    "of type Q4_0_4_4": header(tensor(b"w", kind=31), WEIGHTS, tensors=1),
    "of type 4711": header(tensor(b"w", kind=4711), WEIGHTS, tensors=1),
    "not a multiple of 256": header(tensor(b"w", (32,), kind=12), WEIGHTS, tensors=1),
    "is not aligned to 32 bytes": header(tensor(b"w", offset=4), WEIGHTS, tensors=1),
    "'a' and 'b' share bytes": header(tensor(b"a"), tensor(b"b", offset=64), WEIGHTS, tensors=2),
    "ends inside the tensor 'w'": header(tensor(b"w", (2**40, 2**22)), WEIGHTS, tensors=1),
}


@pytest.mark.parametrize("reason", MALFORMED)
def test_a_malformed_file_is_refused_with_its_name_and_the_reason(tmp_path: Path, reason: str) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(MALFORMED[reason])
    with pytest.raises(ModelError) as refused:
        read_header(file)
    assert str(file) in str(refused.value)
    assert reason in str(refused.value)


def test_a_file_cut_anywhere_is_refused_or_has_all_of_its_tensors(llama: Path, tmp_path: Path) -> None:
    whole = write_gguf(llama, tmp_path / "whole.gguf").read_bytes()
    file = tmp_path / "cut.gguf"
    for size in np.linspace(0, len(whole) - 1, 200, dtype=int):
        file.write_bytes(whole[:size])
        with pytest.raises(ModelError):
            read_header(file)


def test_it_reads_what_gguf_py_reads(llama: Path, tmp_path: Path) -> None:
    file = write_gguf(llama, tmp_path / "model.gguf", "Q8_0", fields={"general.alignment": 64, "x.list": [1, 2, 3]})
    found, expected = read_header(file), GGUFReader(file)
    for name, field in expected.fields.items():
        if not name.startswith("GGUF."):
            value: Any = found.fields[name]
            assert (value.tolist() if isinstance(value, np.ndarray) else value) == field.contents(), name
    assert list(found.tensors) == [info.name for info in expected.tensors]
    for info in expected.tensors:
        mine = found.tensors[info.name]
        assert (mine.start, mine.size, mine.type) == (info.data_offset, info.n_bytes, info.tensor_type)
        assert mine.shape == tuple(reversed(info.shape.tolist()))


def test_a_vocabulary_of_262144_tokens_is_read_in_seconds(tmp_path: Path) -> None:
    file = tmp_path / "large.gguf"
    writer = GGUFWriter(file, "gemma3")
    writer.add_token_list([f"token{index}" for index in range(262144)])
    writer.add_tensor("w", np.zeros(32, np.float32), raw_dtype=GGMLQuantizationType.F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    start = time.process_time()
    assert read_header(file).fields["tokenizer.ggml.tokens"][-1] == "token262143"
    assert time.process_time() - start < 2
