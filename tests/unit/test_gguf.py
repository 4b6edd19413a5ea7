"""GGUF models: every type of tensor, complete and incomplete files, split ones, and the cache of conversions."""

import json
import math
import re
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints_table import largest_errors, record_checkpoint
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from safetensors.torch import load_file
from tiny_gguf import encode, write_gguf
from tiny_models import write_llama
from transformers import AutoModelForCausalLM
from transformers.integrations.gguf.dequant import GGML_NAME
from transformers.integrations.gguf.dequant import dequantize as transformers_dequantize

from edge_ft.errors import ModelError, WillNotFit
from edge_ft.models import gguf
from edge_ft.models.base_model import find_base
from edge_ft.models.gguf import TYPES, convert_gguf
from edge_ft.models.gguf_files import pick_gguf
from edge_ft.models.gguf_first import check_first_conversion, first_conversion
from edge_ft.models.gguf_header import read_header

BATCH = {"input_ids": torch.tensor([[5, 9, 40, 77, 120, 33, 8, 100]])}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGE_FT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose rows hold a block of 256 weights."""
    return write_llama(tmp_path_factory.mktemp("wide"), hidden_size=256, intermediate_size=256, num_attention_heads=8)


class Said:
    """A progress that keeps what it is told."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.counts: dict[str, list[tuple[int, int]]] = {}

    def say(self, text: str) -> None:
        self.texts.append(text)

    def advance(self, stage: str, done: int, total: int, detail: str = "") -> None:
        self.counts.setdefault(stage, []).append((done, total))


NAMES = {"model.embed_tokens": "token_embd"} | {
    f"model.layers.{layer}.{ours}": f"blk.{layer}.{theirs}"
    for layer in (0, 1)
    for ours, theirs in (
        *(("mlp.gate_proj", "ffn_gate"), ("mlp.up_proj", "ffn_up"), ("mlp.down_proj", "ffn_down")),
        *(("self_attn.v_proj", "attn_v"), ("self_attn.o_proj", "attn_output")),
    )
}
"""Matrices of a Llama whose rows have the same order in both."""


@pytest.mark.parametrize("kind", TYPES)
def test_a_type_is_read_as_gguf_py_and_transformers_read_it(kind: str, wide: Path, tmp_path: Path) -> None:
    file = write_gguf(wide, tmp_path / "model.gguf", kind)
    expected = AutoModelForCausalLM.from_pretrained(wide, dtype=torch.float32).eval()
    state = expected.state_dict()
    converted = load_file(convert_gguf(file) / "model.safetensors")
    for ours, theirs in NAMES.items():
        weight = state[f"{ours}.weight"]
        data, stored = encode(weight.numpy(), kind, f"{theirs}.weight")
        blocks = np.ascontiguousarray(data).view(np.uint8).reshape(len(data), -1)
        assert stored == GGMLQuantizationType[kind]
        found = converted[f"{ours}.weight"].float()
        np.testing.assert_array_equal(found.numpy(), dequantize(blocks, stored).reshape(weight.shape))
        if int(stored) in GGML_NAME:
            values = transformers_dequantize(torch.from_numpy(blocks), int(stored))
            torch.testing.assert_close(found, values.reshape(weight.shape), rtol=1e-6, atol=1e-8)
    expected.load_state_dict({name: converted.get(name, value).float() for name, value in state.items()})
    expected.tie_weights()
    errors = largest_errors(str(file), expected, BATCH)
    assert max(errors.values()) < 1e-4
    record_checkpoint("GGUF", f"type {kind}", **errors)


def refused(file: Path) -> str:
    """The message with which a model is refused, before anything is written."""
    with pytest.raises(ModelError) as caught:
        find_base(str(file))
    assert not list(gguf.cache_folder().glob("*"))
    assert str(file) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("kind", ["IQ4_XS", "IQ2_XXS", "TQ1_0", "MXFP4"])
def test_a_type_that_is_not_read_is_refused_by_name(kind: str, wide: Path, tmp_path: Path) -> None:
    stored = GGMLQuantizationType[kind]
    block, size = GGML_QUANT_SIZES[stored]
    blocks = np.zeros((256, 256 // block * size), np.uint8)
    file = write_gguf(wide, tmp_path / "model.gguf", raw={"blk.0.ffn_up.weight": (blocks, stored)})
    message = refused(file)
    assert f"tensors of type {kind} (blk.0.ffn_up.weight is {kind})" in message
    assert "for example Q4_K_M" in message
    record_checkpoint("GGUF", f"type {kind}", refused=message)


def test_a_missing_tensor_is_refused_by_name(llama: Path, tmp_path: Path) -> None:
    message = refused(write_gguf(llama, tmp_path / "model.gguf", without=("blk.1.ffn_up.weight",)))
    assert "lacks the tensor blk.1.ffn_up.weight" in message
    record_checkpoint("GGUF", "a tensor is missing", refused=message)
    assert "lacks the tensor token_embd.weight" in refused(
        write_gguf(llama, tmp_path / "model.gguf", without=("token_embd.weight",))
    )


def test_a_tensor_that_no_weight_needs_is_refused_by_name(llama: Path, tmp_path: Path) -> None:
    more = {"blk.2.attn_norm.weight": np.ones(64, np.float32), "cls.output.weight": np.ones((2, 64), np.float32)}
    message = refused(write_gguf(llama, tmp_path / "model.gguf", tensors=more))
    assert "has the tensor blk.2.attn_norm.weight and 1 more" in message
    record_checkpoint("GGUF", "a tensor that the model does not have", refused=message)


def test_a_tensor_of_another_shape_is_refused_by_name(llama: Path, tmp_path: Path) -> None:
    other = {"blk.0.ffn_norm.weight": np.ones(32, np.float32)}
    message = refused(write_gguf(llama, tmp_path / "model.gguf", tensors=other))
    assert "blk.0.ffn_norm.weight has shape [32] where its header asks for [64]" in message


def test_tensors_that_llama_cpp_does_not_read_are_named(llama: Path, tmp_path: Path) -> None:
    old = {"blk.0.attn_rot_embd.weight": np.ones(8, np.float32)}
    said = Said()
    convert_gguf(write_gguf(llama, tmp_path / "model.gguf", tensors=old), progress=said)
    assert "not used, as in llama.cpp: blk.0.attn_rot_embd.weight (1 tensors in all)" in said.texts


@pytest.mark.parametrize(
    "key",
    [
        *(".context_length", ".embedding_length", ".block_count", ".feed_forward_length", ".attention.head_count"),
        ".attention.layer_norm_rms_epsilon",
    ],
)
def test_a_size_that_the_header_lacks_is_not_guessed(key: str, llama: Path, tmp_path: Path) -> None:
    message = refused(write_gguf(llama, tmp_path / "model.gguf", without=(key,)))
    assert f"lacks llama{key} in its header" in message
    if key == ".block_count":
        record_checkpoint("GGUF", "an architecture without sizes", refused=message)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({".block_count": 2**30}, "names 1073741824 layers, but the file has"),
        ({".embedding_length": 0}, "llama.embedding_length is 0"),
        ({".embedding_length": 2**31}, "llama.embedding_length is 2147483648"),
        ({".attention.head_count": "four"}, "llama.attention.head_count is 'four'"),
        ({".attention.head_count": 7}, "llama.attention.key_length|not a multiple|shape|multiples of 16"),
        ({".feed_forward_length": [96, 64]}, "layers of different sizes"),
        ({".attention.value_length": 32}, "heads of different sizes"),
        ({".rope.freq_base": float("nan")}, "llama.rope.freq_base is nan"),
        ({".expert_count": 8}, "a mixture of experts"),
        ({".logit_scale": 4.0}, "llama.logit_scale is 4.0"),
        ({".attention.clamp_kqv": 8.0}, "llama.attention.clamp_kqv is 8.0"),
        (
            {"tokenizer.ggml.tokens": ["a"] * 4000, "tokenizer.ggml.token_type": [1] * 4000},
            "4000 tokens and embeddings",
        ),
    ],
)
def test_a_header_that_describes_no_model_here_is_refused(
    fields: dict[str, Any], reason: str, llama: Path, tmp_path: Path
) -> None:
    assert re.search(reason, refused(write_gguf(llama, tmp_path / "model.gguf", fields=fields)))


@pytest.mark.parametrize(
    ("fields", "kind", "reason"),
    [
        ({"general.architecture": "mamba"}, "an architecture that is not supported", "architecture 'mamba'"),
        ({"general.architecture": "bert"}, "an encoder", "architecture 'bert'"),
        ({"general.architecture": "clip"}, "mmproj", "the image or audio part of a model"),
        ({"general.type": "mmproj"}, "", "the image or audio part of a model"),
        ({"general.type": "adapter", "adapter.type": "lora"}, "a LoRA adapter", "a PEFT adapter with --adapter"),
        ({"general.type": "imatrix"}, "", "an importance matrix"),
    ],
)
def test_a_file_that_is_no_supported_language_model_says_what_it_is(
    fields: dict[str, Any], kind: str, reason: str, llama: Path, tmp_path: Path
) -> None:
    message = refused(write_gguf(llama, tmp_path / "model.gguf", fields=fields))
    assert reason in message
    if kind:
        record_checkpoint("GGUF", kind, refused=message)


def test_another_task_is_refused_before_the_conversion(llama: Path, tmp_path: Path) -> None:
    file = write_gguf(llama, tmp_path / "model.gguf")
    with pytest.raises(ModelError, match="does text-generation here, not text-classification"):
        find_base(str(file), "text-classification")


@pytest.fixture
def parts(llama: Path, tmp_path: Path) -> list[Path]:
    """A model in three parts, of which the first has no tensors."""
    folder = tmp_path / "split"
    folder.mkdir()
    write_gguf(llama, folder / "model.gguf", split_max_tensors=10, small_first_shard=True)
    found = sorted(folder.glob("*.gguf"))
    assert len(found) > 2
    return found


@pytest.mark.parametrize("given", ["first", "last", "folder"])
def test_a_split_model_is_read_from_all_of_its_parts(given: str, parts: list[Path], llama: Path) -> None:
    model = {"first": parts[0], "last": parts[-1], "folder": parts[0].parent}[given]
    errors = largest_errors(str(model), AutoModelForCausalLM.from_pretrained(llama).eval(), BATCH)
    assert max(errors.values()) < 1e-4
    record_checkpoint("GGUF", f"split, the {given} given", **errors)


@pytest.mark.parametrize("given", ["first", "last", "folder"])
def test_a_missing_part_is_refused_by_name(given: str, parts: list[Path]) -> None:
    parts[1].unlink()
    model = {"first": parts[0], "last": parts[-1], "folder": parts[0].parent}[given]
    with pytest.raises(
        ModelError, match=rf"one of {len(parts)} parts of a model, and {parts[1].name} is not"
    ) as caught:
        find_base(str(model))
    record_checkpoint("GGUF", "split, a part is missing", refused=str(caught.value))


def test_parts_that_do_not_belong_together_are_refused(parts: list[Path]) -> None:
    shutil.copy(parts[1], parts[2])
    with pytest.raises(ModelError, match=r"says that it is part 1 \(from 0\) of"):
        find_base(str(parts[0]))
    renamed = parts[0].rename(parts[0].with_name("first.gguf"))
    with pytest.raises(ModelError, match="which are found by their names"):
        find_base(str(renamed))


def test_of_a_folder_one_model_is_picked_and_several_are_named(llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    assert pick_gguf(folder) is None
    file = write_gguf(llama, folder / "model.gguf")
    write_gguf(llama, folder / "mmproj-model.gguf", fields={"general.type": "mmproj"})
    assert pick_gguf(folder) == file
    shutil.copy(llama / "config.json", folder)  # repositories of GGUF files often have it
    assert find_base(str(folder)).path.name.startswith("gguf-")
    shutil.copy(file, folder / "other.gguf")
    with pytest.raises(ModelError, match=r"2 models as GGUF \(model.gguf, other.gguf\)"):
        find_base(str(folder))


def test_a_file_is_known_by_its_content(llama: Path, tmp_path: Path) -> None:
    file = write_gguf(llama, tmp_path / "model.gguf")
    assert find_base(str(file.rename(tmp_path / "blob"))).family.name == "llama"
    (tmp_path / "weights.bin").write_bytes(b"PK\3\4")
    with pytest.raises(ModelError, match="neither a folder nor a GGUF file"):
        find_base(str(tmp_path / "weights.bin"))


def test_a_file_is_converted_once_and_the_converter_s_version_counts(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, said = write_gguf(llama, tmp_path / "model.gguf"), Said()
    folder = convert_gguf(file, progress=said)
    assert any("converting" in text for text in said.texts)
    assert said.counts["tensors converted"][-1] == (20, 20)
    again = Said()
    assert convert_gguf(file, progress=again) == folder
    assert not again.texts
    monkeypatch.setattr(gguf, "CONVERTER", gguf.CONVERTER + 1)
    assert convert_gguf(file) != folder


def test_what_a_killed_conversion_left_is_removed(llama: Path, tmp_path: Path, cache: Path) -> None:
    file = write_gguf(llama, tmp_path / "model.gguf")
    folder = convert_gguf(file)
    rest = folder.rename(cache / f".{folder.name}.4711.tmp")
    assert convert_gguf(file) == folder
    assert not rest.exists()


def test_a_disk_that_is_too_small_is_refused_before_the_conversion(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_gguf(llama, tmp_path / "model.gguf")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(WillNotFit, match="set EDGE_FT_CACHE"):
        convert_gguf(file)


def test_half_types_are_stored_as_they_are(wide: Path, tmp_path: Path) -> None:
    for kind, dtype in (("F16", torch.float16), ("BF16", torch.bfloat16), ("Q8_0", torch.float32)):
        weights = load_file(convert_gguf(write_gguf(wide, tmp_path / f"{kind}.gguf", kind)) / "model.safetensors")
        assert weights["model.embed_tokens.weight"].dtype == dtype
        assert weights["model.norm.weight"].dtype == torch.float32


@pytest.fixture
def earlier(llama: Path, tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    """Writes a GGUF file, and its conversion as a first release left it in the cache."""

    def write(**changes: Any) -> tuple[Path, Path]:
        file = write_gguf(llama, tmp_path / "model.gguf", **changes)
        folder = gguf.cache_folder() / f"gguf-{gguf._key((file,), Said())}"
        shutil.copytree(llama, folder)
        return file, folder

    return write


def test_a_complete_conversion_of_a_first_release_still_counts(earlier: Callable[..., tuple[Path, Path]]) -> None:
    file, folder = earlier()
    assert first_conversion(str(file)) == folder
    check_first_conversion(folder, str(file))
    file.unlink()
    said = Said()
    check_first_conversion(folder, str(file), said)
    assert "could not be checked" in said.texts[0]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"without": ("blk.1.ffn_up.weight",)}, "lacks the tensor blk.1.ffn_up.weight"),
        ({"tensors": {"rope_freqs.weight": np.float32([1, 1, 1, 1, 2, 4, 8, 8])}}, "read its rope_parameters wrongly"),
        ({"fields": {".attention.sliding_window": 8}}, "sliding_window"),
    ],
)
def test_an_incomplete_conversion_of_a_first_release_says_how_to_convert_again(
    changes: dict[str, Any], reason: str, earlier: Callable[..., tuple[Path, Path]]
) -> None:
    file, folder = earlier(**changes)
    with pytest.raises(ModelError) as caught:
        check_first_conversion(folder, str(file))
    assert reason in str(caught.value)
    assert f"tune again with --model {file}, which is then converted anew" in str(caught.value)
    shutil.rmtree(folder)
    with pytest.raises(ModelError, match="is gone"):
        check_first_conversion(folder, str(file))


def test_the_conversion_is_a_checkpoint_folder(llama: Path, tmp_path: Path) -> None:
    base = find_base(str(write_gguf(llama, tmp_path / "model.gguf", fields={"tokenizer.ggml.eot_token_id": 1})))
    assert base.license == "apache-2.0"
    assert sorted(path.name for path in base.path.iterdir()) == [
        *("README.md", "chat_template.jinja", "config.json", "generation_config.json", "gguf.json"),
        *("model.safetensors", "tokenizer.json", "tokenizer_config.json"),
    ]
    assert json.loads((base.path / "generation_config.json").read_text())["eos_token_id"] == [2, 1]
    assert base.open_tokenizer().stop_ids == {1, 2}


def test_one_tensor_is_in_memory_at_a_time(wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf, "CHUNK", 2**12)
    file = write_gguf(wide, tmp_path / "model.gguf", "Q4_K")
    plan = gguf.plan_conversion(read_header(file))
    largest = max(math.prod(weight.shape) * 4 for weight in plan.weights)
    tracemalloc.start()
    gguf.write_safetensors(tmp_path / "model.safetensors", plan.weights, Said())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 3 * largest < plan.size / 3


def test_a_repository_of_gguf_files_says_how_to_get_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda model, **_: str(tmp_path))
    with pytest.raises(ModelError, match=r"hf download some/model-GGUF NAME\.gguf"):
        find_base("some/model-GGUF")


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0"])
def test_weights_that_are_no_numbers_are_refused_by_name(kind: str, wide: Path, tmp_path: Path) -> None:
    weights = np.ones((256, 256), np.float32)
    weights[3, 7] = np.inf
    with np.errstate(all="ignore"):
        file = write_gguf(wide, tmp_path / "model.gguf", kind, tensors={"blk.0.ffn_up.weight": weights})
    with pytest.raises(ModelError, match=r"blk\.0\.ffn_up\.weight has values that are infinite or no numbers"):
        convert_gguf(file)
    assert not list(gguf.cache_folder().glob("gguf-*"))


def test_a_cache_that_cannot_be_written_is_refused_with_the_variable(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_gguf(llama, tmp_path / "model.gguf")
    monkeypatch.setenv("EDGE_FT_CACHE", str(file / "cache"))
    with pytest.raises(ModelError, match="set EDGE_FT_CACHE to a folder"):
        convert_gguf(file)
