"""A GGUF file that is written here is read back as the same model: codes, sizes, rotation and tokenizer."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants
from small_tokenizers import write_bpe
from tiny_gguf import SETTINGS, pairs
from tiny_models import write_decoder, write_llama

from edge_ft.data import SpecialIds, TextTokenizer
from edge_ft.errors import UsageError
from edge_ft.export.gguf_file import BLOCK, file_tensors, pack_blocks
from edge_ft.export.gguf_metadata import WRITTEN, architecture_for, lost_settings
from edge_ft.export.gguf_model import GgufModel, write_gguf_model
from edge_ft.export.gguf_vocabulary import PROBES
from edge_ft.models.base_model import find_base
from edge_ft.models.gguf import plan_conversion
from edge_ft.models.gguf_header import read_header
from edge_ft.models.gguf_names import ARCHITECTURES, Heads
from edge_ft.models.gguf_tokenizer import write_tokenizer
from edge_ft.models.loading import ModelSpec, load_model
from edge_ft.quant.blockwise import Codes, dequantize, pack_nibbles, quantize, quantize_finely, unpack_nibbles

FAMILIES = tuple(name for name in SETTINGS if name not in ("gpt2", "gpt_neox"))
ROPES: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
    "llama3": {
        **{"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        "original_max_position_embeddings": 8192,
    },
    "yarn": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64},
    "yarn, own factor": {
        **{"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64},
        "attention_factor": 1.5,
    },
}


def codes_of(rows: int, columns: int, block_size: int = BLOCK, symmetric: bool = False) -> Codes:
    weight = np.random.default_rng(0).normal(0, 0.1, (rows, columns)).astype(np.float32)
    codes = quantize(weight, block_size)
    if not symmetric:
        return codes
    zeros = pack_nibbles(np.full(codes.scales.shape, 8, np.uint8))
    return Codes(codes.qweight, codes.scales, zeros, columns)


def described(folder: Path, config: Any) -> GgufModel:
    tokenizer = find_base(str(folder)).open_tokenizer()
    special = SpecialIds(1, (2,), 2)
    return GgufModel("tiny", "apache-2.0", config, tokenizer, special, None)


def written(folder: Path, file: Path, weights: dict[str, Any]) -> Any:
    """Write a checkpoint with other weights as GGUF; return the header that is read back."""
    write_gguf_model(file, described(folder, find_base(str(folder)).dims.config), weights)
    return read_header(file)


def parameters(folder: Path) -> dict[str, Any]:
    model = load_model(ModelSpec(find_base(str(folder)), "text-generation"))
    tied = model.config.tie_word_embeddings
    return {
        name: parameter.detach().numpy()
        for name, parameter in model.named_parameters()
        if not (tied and name.startswith("lm_head"))
    }


@pytest.mark.parametrize("block_size", [32, 64, 128])
@pytest.mark.parametrize("symmetric", [False, True])
def test_a_block_holds_the_same_codes_nibble_for_nibble(symmetric: bool, block_size: int) -> None:
    codes = codes_of(3, 96, block_size, symmetric)
    blocks = pack_blocks(codes)
    assert blocks.type == ("Q4_0" if symmetric else "Q4_1")
    read = blocks.data.reshape(3, 3, -1)[..., -16:]
    values = np.concatenate([read & 15, read >> 4], axis=-1).reshape(3, 96)
    assert (values == unpack_nibbles(codes.qweight, block_size).reshape(3, -1)[:, :96]).all()
    found = quants.dequantize(blocks.data, GGMLQuantizationType[blocks.type])
    # float16 has 11 bits: of a scale that 15 steps multiply, and of -s·z
    largest = float(np.abs(codes.scales).max())
    assert np.abs(found - dequantize(codes)).max() < 30 * largest * 2**-11


def test_rows_with_further_bits_make_a_tensor_of_q8_0() -> None:
    weight = np.random.default_rng(0).normal(size=(6, 64)).astype(np.float32)
    codes = Codes.concatenate([quantize_finely(weight[:2], BLOCK), quantize(weight[2:], BLOCK)])
    found = pack_blocks(codes)
    assert found.type == "Q8_0"
    read = quants.dequantize(found.data, GGMLQuantizationType.Q8_0)
    assert np.abs(read - dequantize(codes)).max() <= 0.501 * np.abs(weight).max() / 127 + 1e-3


def test_a_tensor_is_q4_0_only_if_every_zero_point_is_8() -> None:
    codes = codes_of(2, 64, symmetric=True)
    codes.zero_points[1, 0] = 7 | (8 << 4)
    assert pack_blocks(codes).type == "Q4_1"


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        (codes_of(2, 64, 16), "in blocks of 16"),
        (codes_of(2, 48), "has 48 columns"),
        (quantize(np.ones((2, 64), np.float32), 32, 8), "8 bits"),
        (quantize(np.full((2, 64), 3e5, np.float32), 32), "beyond float16"),
    ],
)
def test_codes_that_no_block_holds_are_refused_by_name(codes: Codes, expected: str) -> None:
    with pytest.raises(UsageError, match=f"^q_proj .*{expected}"):
        pack_blocks(codes, "q_proj")


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_read_back_as_the_same_model(name: str, tmp_path: Path) -> None:
    folder = write_decoder(tmp_path / "model", name, **SETTINGS[name])
    weights = parameters(folder)
    header = written(folder, tmp_path / "m.gguf", weights)
    plan = plan_conversion(header)
    assert not lost_settings(find_base(str(folder)).dims.config, plan.config)
    assert {weight.name for weight in plan.weights} == weights.keys()
    for weight in plan.weights:
        source = weight.source
        raw = np.fromfile(source.file, "<f4", source.elements, offset=source.start).reshape(source.shape)
        found = raw if weight.reorder is None else weight.reorder(raw)
        assert np.abs(found - weights[weight.name]).max() < 1e-6, weight.name  # the 1 that Gemma's norms add


def test_queries_and_keys_of_llama_are_permuted_with_their_codes(tmp_path: Path) -> None:
    codes = codes_of(64, 64)
    name = "model.layers.0.self_attn.q_proj.weight"
    (tensor,) = file_tensors("llama", 2, Heads(4, 2), {name: codes}).values()
    assert (tensor.data == pairs(pack_blocks(codes).data, 4)).all()


@pytest.mark.parametrize("name", ROPES)
def test_a_scaled_rotation_is_read_back(name: str, tmp_path: Path) -> None:
    folder = write_llama(tmp_path / "model", rope_parameters=ROPES[name])
    plan = plan_conversion(written(folder, tmp_path / "m.gguf", parameters(folder)))
    assert not lost_settings(find_base(str(folder)).dims.config, plan.config)


def test_the_bounds_of_llama_3_cannot_be_others(tmp_path: Path) -> None:
    folder = write_llama(tmp_path / "model", rope_parameters=ROPES["llama3"] | {"high_freq_factor": 3.0})
    with pytest.raises(UsageError, match="other bounds"):
        written(folder, tmp_path / "m.gguf", parameters(folder))


@pytest.mark.parametrize(
    ("family", "setting", "expected"),
    [
        ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ("gemma2", SETTINGS["gemma2"] | {"query_pre_attn_scalar": 24}, "query_pre_attn_scalar is 24"),
        ("smollm3", {"no_rope_layer_interval": 2}, "layers without positions"),
        ("qwen2", {}, "layer windows"),
    ],
)
def test_a_setting_that_the_file_cannot_hold_is_named(
    family: str, setting: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    folder = write_decoder(tmp_path / "model", family, **setting)
    plan = plan_conversion(written(folder, tmp_path / "m.gguf", parameters(folder)))
    (lost,) = lost_settings(find_base(str(folder)).dims.config, plan.config)
    assert lost.startswith(expected)


def test_what_is_written_is_read() -> None:
    assert {architecture_for(ARCHITECTURES[name].model_type).name for name in WRITTEN} == set(WRITTEN)
    with pytest.raises(UsageError, match="a gpt2 model cannot be exported with --format gguf: written are llama"):
        architecture_for("gpt2")


@pytest.mark.parametrize("bos", [None, "<|im_start|>"])
def test_a_tokenizer_is_read_back_with_its_ids_and_template(bos: str | None, tmp_path: Path) -> None:
    folder = write_llama(tmp_path / "model")
    write_bpe(folder, bos=bos)
    written(folder, tmp_path / "m.gguf", parameters(folder))
    (tmp_path / "read").mkdir()
    write_tokenizer(read_header(tmp_path / "m.gguf"), tmp_path / "read")
    ours, read = TextTokenizer.load(folder), TextTokenizer.load(tmp_path / "read")
    for text in (*PROBES, "<|im_start|>user\nhello<|im_end|>"):
        assert ours.encode(text) == read.encode(text)
        assert ours.encode_template(text) == read.encode_template(text)
    assert (ours.bos_id, ours.chat_template, ours.control_tokens) == (
        *(read.bos_id, read.chat_template, read.control_tokens),
    )


RULES = {
    "smollm": [{"type": "Digits", "individual_digits": True}, {"type": "ByteLevel", "add_prefix_space": False}],
    "llama-bpe": [
        {
            "type": "Split",
            "pattern": {
                "Regex": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
                r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
            },
            "behavior": "Isolated",
            "invert": False,
        },
        {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
    ],
}
"""`pre_tokenizer` of the checkpoints of a rule set."""


def with_rules(folder: Path, steps: list[dict[str, Any]], **model: Any) -> None:
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    steps = [
        {"trim_offsets": True, "use_regex": True} | step if step["type"] == "ByteLevel" else step for step in steps
    ]
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
    content["model"] |= model
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")


@pytest.mark.parametrize("name", RULES)
def test_rules_are_named_by_how_they_split(name: str, tmp_path: Path) -> None:
    folder = write_llama(tmp_path / "model")
    with_rules(folder, RULES[name], ignore_merges=name == "llama-bpe")
    header = written(folder, tmp_path / "m.gguf", parameters(folder))
    assert header.get("tokenizer.ggml.pre") == name


def test_rules_without_a_name_are_refused(tmp_path: Path) -> None:
    folder = write_llama(tmp_path / "model")
    with_rules(folder, [{"type": "Punctuation", "behavior": "Isolated"}, RULES["smollm"][1]])
    with pytest.raises(UsageError, match=r"splits texts by rules that llama\.cpp has no name for"):
        written(folder, tmp_path / "m.gguf", parameters(folder))


def test_a_vocabulary_is_filled_up_to_the_embedding(tmp_path: Path) -> None:
    folder = write_llama(tmp_path / "model", vocab_size=320)
    header = written(folder, tmp_path / "m.gguf", parameters(folder))
    tokens, kinds = header.get("tokenizer.ggml.tokens"), header.get("tokenizer.ggml.token_type")
    assert len(tokens) == 320 and tokens[-1] == "[PAD319]" and kinds[-1] == 5


@torch.no_grad()
def test_a_sentencepiece_vocabulary_is_read_back_with_its_merges(tmp_path: Path) -> None:
    folder = write_llama(tmp_path / "model")
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    pieces = ["▁", "h", "e", "l", "o", "▁h", "el", "lo", "▁hel", "▁hello"]
    vocabulary = {text: at for at, text in enumerate(["<unk>", "<s>", "</s>", *bytes_, *pieces])}
    content = {
        "added_tokens": [
            dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
            | {"id": at, "content": text, "special": True}
            for at, text in enumerate(["<unk>", "<s>", "</s>"])
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False},
        "decoder": None,
        "post_processor": None,
        "model": {
            **{"type": "BPE", "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True, "vocab": vocabulary},
            "merges": ["▁ h", "e l", "l o", "▁h el", "▁hel lo"],
        },
    }
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names), encoding="utf-8")
    header = written(folder, tmp_path / "m.gguf", parameters(folder))
    assert header.get("tokenizer.ggml.model") == "llama"
    (tmp_path / "read").mkdir()
    write_tokenizer(header, tmp_path / "read")
    ours, read = TextTokenizer.load(folder), TextTokenizer.load(tmp_path / "read")
    for text in ("hello", "hello hello", "  lo hel é"):
        assert ours.encode(text) == read.encode(text), text
