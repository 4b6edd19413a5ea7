"""Which tensors are a model does not depend on the weight format: oddities of published checkpoints."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints_table import largest_errors, record_checkpoint
from odd_checkpoints import (
    Tensors,
    edit_config,
    edit_tensors,
    int8_channels,
    read_tensors,
    to_bitsandbytes,
    to_fp8,
    write_shards,
    write_tensors,
)
from recorded_progress import RecordedProgress
from safetensors.torch import save_file
from tiny_models import padded_ids, write_bert, write_llama
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, LlamaForCausalLM

from edge_ft.errors import ModelError
from edge_ft.models.base_model import find_base
from edge_ft.models.loading import ModelSpec, load_model

TOLERANCE = 2e-5
"""Of logits whose largest value is near 1."""


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("models") / "untied", tie=False)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Several blocks of 128 in each direction, the last ones not full."""
    sizes = {"hidden_size": 192, "head_dim": 48, "intermediate_size": 320}
    return write_llama(tmp_path_factory.mktemp("models") / "wide", tie=False, **sizes)


@pytest.fixture(scope="module")
def filler(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT that fills masks, with its head."""
    folder = write_bert(tmp_path_factory.mktemp("models") / "filler")
    torch.manual_seed(5)
    AutoModelForMaskedLM.from_config(AutoConfig.from_pretrained(folder)).save_pretrained(folder)
    return folder


def reference(folder: Path, tensors: Tensors | None = None) -> nn.Module:
    """The plain transformers model of a folder, with these tensors in place of its own if any."""
    config = AutoConfig.from_pretrained(folder)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    kind = AutoModelForCausalLM if config.model_type == "llama" else AutoModelForMaskedLM
    if tensors is None:
        return kind.from_pretrained(folder, dtype=torch.float32)
    model = kind.from_config(config, dtype=torch.float32)
    missing, unexpected = model.load_state_dict({key: value.float() for key, value in tensors.items()}, strict=False)
    assert not unexpected
    assert set(missing) <= set(model.all_tied_weights_keys)
    return model


def batch(bert: bool = False) -> dict[str, torch.Tensor]:
    ids, mask = padded_ids(0)
    ids = ids if bert else ids * 13
    return {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}


def check(kind: str, folder: Path, expected: nn.Module, *, bert: bool = False) -> list[str]:
    """Compare the logits of all formats with the expected model's, record them, and return what is said."""
    progress = RecordedProgress()
    task: Any = "fill-mask" if bert else "text-generation"
    load_model(ModelSpec(find_base(str(folder), task, progress), task), progress)
    errors = largest_errors(str(folder), expected, batch(bert), task)
    assert max(errors.values()) < TOLERANCE, errors
    record_checkpoint("weights", kind, **errors, said="; ".join(progress.lines) or None)
    return progress.lines


def copied(source: Path, folder: Path) -> Path:
    shutil.copytree(source, folder)
    return folder


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("bert", [False, True], ids=["llama", "bert"])
def test_float_dtypes(bert: bool, dtype: torch.dtype, untied: Path, filler: Path, tmp_path: Path) -> None:
    source = filler if bert else untied
    folder = edit_tensors(source, tmp_path / "m", lambda found: {key: value.to(dtype) for key, value in found.items()})
    name = f"{str(dtype).removeprefix('torch.')}{', BERT' if bert else ''}"
    assert check(name, folder, reference(folder, read_tensors(folder)), bert=bert) == []


@pytest.mark.parametrize(
    ("name", "block", "scale", "shape", "config"),
    [
        (
            "FP8 in blocks of 128 x 128, weight_scale_inv",
            (128, 128),
            "weight_scale_inv",
            (),
            {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"},
        ),
        (
            "FP8 in other blocks",
            (64, 32),
            "weight_scale_inv",
            (),
            {"quant_method": "fp8", "weight_block_size": [64, 32]},
        ),
        ("FP8, a scale for each weight", None, "weight_scale", (), {"quant_method": "modelopt", "quant_algo": "FP8"}),
        (
            "FP8, a scale for each row (compressed-tensors)",
            None,
            "weight_scale",
            (-1, 1),
            {"quant_method": "compressed-tensors", "format": "float-quantized"},
        ),
        ("FP8 without a word in the config", (128, 128), "weight_scale_inv", (), None),
    ],
)
def test_fp8(name: str, block: Any, scale: str, shape: Any, config: Any, wide: Path, tmp_path: Path) -> None:
    stored, plain = to_fp8(read_tensors(wide), block, scale, shape)
    folder = edit_config(write_tensors(copied(wide, tmp_path / "m"), stored), quantization_config=config)
    (said,) = check(name, folder, reference(wide, plain))
    assert "its weights are read as float numbers" in said


def test_fp8_of_an_encoder_whose_activation_scales_are_stored_too(filler: Path, tmp_path: Path) -> None:
    stored, plain = to_fp8(read_tensors(filler), None, "weight_scale")
    scales = {key.replace("weight_scale", "input_scale"): torch.ones(()) for key in stored if "weight_scale" in key}
    folder = write_tensors(copied(filler, tmp_path / "m"), stored | scales)
    edit_config(folder, quantization_config={"quant_method": "modelopt", "quant_algo": "FP8"})
    assert len(check("FP8 with scales of activations, BERT", folder, reference(filler, plain), bert=True)) == 1


def test_an_fp8_weight_without_its_scale_is_refused(wide: Path, tmp_path: Path) -> None:
    stored, _ = to_fp8(read_tensors(wide), (128, 128))
    del stored["model.layers.1.mlp.up_proj.weight_scale_inv"]
    folder = write_tensors(copied(wide, tmp_path / "m"), stored)
    edit_config(folder, quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    with pytest.raises(
        ModelError, match=r"layers\.1\.mlp\.up_proj\.weight, which is F8_E4M3 and has no scale"
    ) as caught:
        find_base(str(folder))
    record_checkpoint("weights", "FP8, a scale is missing", refused=str(caught.value))


def test_an_fp8_scale_of_another_size_is_refused(wide: Path, tmp_path: Path) -> None:
    stored, _ = to_fp8(read_tensors(wide), (128, 128))
    stored["model.layers.1.mlp.up_proj.weight_scale_inv"] = torch.ones(7, 5)
    folder = write_tensors(copied(wide, tmp_path / "m"), stored)
    with pytest.raises(ModelError, match=r"up_proj\.weight_scale_inv \[7, 5\] does not fit"):
        find_base(str(folder))


def test_a_float_weight_with_a_scale_is_refused(untied: Path, tmp_path: Path) -> None:
    scale = {"model.layers.0.mlp.up_proj.weight_scale": torch.ones(1)}
    folder = edit_tensors(untied, tmp_path / "m", lambda found: found | scale)
    with pytest.raises(ModelError, match=r"up_proj\.weight, which is F32 .* and has a scale"):
        find_base(str(folder))


@pytest.mark.parametrize("quant_type", ["nf4", "fp4", "int8", "nf4 nested"])
@pytest.mark.parametrize("bert", [False, True], ids=["llama", "bert"])
def test_bitsandbytes(quant_type: str, bert: bool, untied: Path, filler: Path, tmp_path: Path) -> None:
    """Matrices of 96 columns are no whole number of its blocks of 64."""
    source = filler if bert else untied
    kind, _, nested = quant_type.partition(" ")
    stored, plain = to_bitsandbytes(read_tensors(source), kind, bool(nested))
    folder = write_tensors(copied(source, tmp_path / "m"), stored)
    edit_config(folder, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": kind != "int8"})
    name = f"bitsandbytes {kind}{', scales quantized too' if nested else ''}{', BERT' if bert else ''}"
    (said,) = check(name, folder, reference(source, plain), bert=bert)
    assert "quantized with bitsandbytes" in said


def test_int8_with_scales(untied: Path, tmp_path: Path) -> None:
    stored, plain = int8_channels(read_tensors(untied))
    folder = write_tensors(copied(untied, tmp_path / "m"), stored)
    edit_config(folder, quantization_config={"quant_method": "compressed-tensors", "format": "int-quantized"})
    check("int8, a scale for each row (compressed-tensors)", folder, reference(untied, plain))


def test_int8_without_scales_is_refused(untied: Path, tmp_path: Path) -> None:
    folder = edit_tensors(
        untied, tmp_path / "m", lambda found: found | {"lm_head.weight": found["lm_head.weight"].to(torch.int8)}
    )
    with pytest.raises(ModelError, match=r"lm_head\.weight, which is I8 and has no scale") as caught:
        find_base(str(folder))
    record_checkpoint("weights", "int8 without scales", refused=str(caught.value))


REFUSED: dict[str, tuple[dict[str, Any] | None, str]] = {
    "GPTQ": ({"quant_method": "gptq", "bits": 4}, "GPTQ"),
    "AWQ": ({"quant_method": "awq", "bits": 4}, "AWQ"),
    "GPTQ without a word in the config": (None, "GPTQ or AWQ"),
    "HQQ": ({"quant_method": "hqq"}, "HQQ"),
    "MXFP4": ({"quant_method": "mxfp4"}, "MXFP4"),
    "torchao": ({"quant_method": "torchao", "quant_type": "int4_weight_only"}, "torchao"),
    "quanto": ({"quant_method": "quanto", "weights": "int4"}, "quanto"),
    "compressed-tensors in 4 bits": (
        {"quant_method": "compressed-tensors", "format": "pack-quantized"},
        r"compressed-tensors \(pack-quantized\)",
    ),
    "NVFP4 (modelopt)": ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, r"modelopt \(NVFP4\)"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_other_quantized_checkpoints_are_refused(kind: str, untied: Path, tmp_path: Path) -> None:
    config, name = REFUSED[kind]

    def pack(found: Tensors) -> Tensors:
        layer = "model.layers.0.mlp.up_proj."
        packed = {f"{layer}qweight": torch.zeros(8, 96, dtype=torch.int32), f"{layer}scales": torch.ones(2, 96)}
        return {key: value for key, value in found.items() if not key.startswith(layer)} | packed

    folder = edit_config(edit_tensors(untied, tmp_path / "m", pack), quantization_config=config)
    with pytest.raises(ModelError, match=f"is quantized with {name}.*give the float checkpoint") as caught:
        find_base(str(folder))
    record_checkpoint("weights", kind, refused=str(caught.value))


def test_a_quantization_config_beside_the_config_counts(untied: Path, tmp_path: Path) -> None:
    folder = copied(untied, tmp_path / "m")
    (folder / "quantize_config.json").write_text('{"bits": 4, "group_size": 128}')
    with pytest.raises(ModelError, match="quantized with GPTQ"):
        find_base(str(folder))


@pytest.mark.parametrize("bert", [False, True], ids=["llama", "bert"])
def test_shards(bert: bool, untied: Path, filler: Path, tmp_path: Path) -> None:
    """The index decides: an older single file, other shards and tensors that it does not name are left aside."""
    source = filler if bert else untied
    tensors = read_tensors(source)
    folder = write_shards(copied(source, tmp_path / "m"), tensors, 3)
    old = {key: torch.zeros_like(value) for key, value in tensors.items()}
    suffix = ", BERT" if bert else ""
    assert check(f"sharded{suffix}", folder, reference(source), bert=bert) == []
    write_tensors(folder, old)
    write_tensors(folder, old, "model-00001-of-00002.safetensors")
    (said,) = check(f"sharded, an older file and other shards beside{suffix}", folder, reference(source), bert=bert)
    assert said.endswith(
        "model-00001-of-00002.safetensors, model.safetensors are not read, model.safetensors.index.json does not name "
        "them"
    )


def test_shards_without_an_index(untied: Path, tmp_path: Path) -> None:
    folder = write_shards(copied(untied, tmp_path / "m"), read_tensors(untied), 3, index=False)
    check("sharded without an index", folder, reference(untied))
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ModelError, match=r"lacks model-00002-of-00003.safetensors, one of 3 parts") as caught:
        find_base(str(folder))
    record_checkpoint("weights", "sharded without an index, a part is missing", refused=str(caught.value))


def test_a_missing_shard_is_refused(untied: Path, tmp_path: Path) -> None:
    folder = write_shards(copied(untied, tmp_path / "m"), read_tensors(untied))
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ModelError, match=r"lacks model-00002-of-00002.safetensors, which .*index.json names") as caught:
        find_base(str(folder))
    record_checkpoint("weights", "sharded, a file is missing", refused=str(caught.value))


def test_an_index_whose_files_are_all_gone_does_not_count(untied: Path, tmp_path: Path) -> None:
    folder = copied(untied, tmp_path / "m")
    index = {"weight_map": {"lm_head.weight": "model-00001-of-00001.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (said,) = check("a single file, an index of files that are gone beside", folder, reference(untied))
    assert "none of its files is there" in said


@pytest.mark.parametrize("content", ["", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}', "[1]"])
def test_a_damaged_index_is_refused(content: str, untied: Path, tmp_path: Path) -> None:
    folder = copied(untied, tmp_path / "m")
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ModelError, match=r"index.json"):
        find_base(str(folder))


def test_a_shard_without_a_tensor_that_the_index_names_is_refused(untied: Path, tmp_path: Path) -> None:
    folder = write_shards(copied(untied, tmp_path / "m"), read_tensors(untied), 1)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.layers.7.mlp.up_proj.weight"] = "model-00001-of-00001.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"lacks model\.layers\.7\.mlp\.up_proj\.weight, which the index names"):
        find_base(str(folder))


def test_several_files_without_an_index_are_refused(untied: Path, tmp_path: Path) -> None:
    folder = copied(untied, tmp_path / "m")
    (folder / "model.safetensors").rename(folder / "first.safetensors")
    write_tensors(folder, read_tensors(untied), "second.safetensors")
    with pytest.raises(
        ModelError, match=r"holds first\.safetensors, second\.safetensors and no .* leave one"
    ) as caught:
        find_base(str(folder))
    record_checkpoint("weights", "several files without an index", refused=str(caught.value))


def test_another_single_file_beside_is_not_read(untied: Path, tmp_path: Path) -> None:
    """Mistral's repositories hold the same weights twice, once under other names."""
    folder = copied(untied, tmp_path / "m")
    write_tensors(folder, {"tok_embeddings.weight": torch.zeros(4, 4)}, "consolidated.safetensors")
    (said,) = check("model.safetensors with consolidated.safetensors beside", folder, reference(untied))
    assert said.endswith("consolidated.safetensors is not read, model.safetensors counts")


@pytest.mark.parametrize("bert", [False, True], ids=["llama", "bert"])
def test_an_adapter_beside_merged_weights_is_not_applied_again(
    bert: bool, untied: Path, filler: Path, tmp_path: Path
) -> None:
    from peft import LoraConfig, get_peft_model

    source = filler if bert else untied
    folder, model = copied(source, tmp_path / "m"), reference(source)
    targets = ["query"] if bert else ["q_proj"]
    peft_model: Any = get_peft_model(model, LoraConfig(target_modules=targets, init_lora_weights=False))
    peft_model.save_pretrained(folder)
    merged = peft_model.merge_and_unload()
    merged.save_pretrained(folder)
    assert (folder / "adapter_model.safetensors").is_file()
    said = check(f"an adapter beside merged weights{', BERT' if bert else ''}", folder, merged, bert=bert)
    assert "holds an adapter beside its weights (adapter_config.json): it is not applied" in said[0]


def test_an_adapter_alone_is_no_model(untied: Path, tmp_path: Path) -> None:
    folder = copied(untied, tmp_path / "m")
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    with pytest.raises(ModelError, match="holds an adapter and no model: give its base") as caught:
        find_base(str(folder))
    record_checkpoint("weights", "an adapter without its base", refused=str(caught.value))


def test_weights_with_an_adapter_inside_are_refused(untied: Path, tmp_path: Path) -> None:
    def wrap(found: Tensors) -> Tensors:
        key = "model.layers.0.self_attn.q_proj."
        layer = {f"{key}base_layer.weight": found.pop(f"{key}weight"), f"{key}lora_A.default.weight": torch.ones(2, 64)}
        return {f"base_model.model.{name}": value for name, value in (found | layer).items()}

    folder = edit_tensors(untied, tmp_path / "m", wrap)
    with pytest.raises(ModelError, match=r"was saved with an adapter around its layers.*merge_and_unload") as caught:
        find_base(str(folder))
    record_checkpoint("weights", "saved with LoRA layers inside", refused=str(caught.value))


def rename(change: Callable[[str], str]) -> Callable[[Tensors], Tensors]:
    return lambda found: {change(key): value for key, value in found.items()}


PREFIXES: dict[str, Callable[[str], str]] = {
    "names without `model.`": lambda key: key.removeprefix("model."),
    "names with `model.` twice": lambda key: f"model.{key}",
    "names with `base_model.model.`": lambda key: f"base_model.model.{key}",
    "names with `module.`": lambda key: f"module.{key}",
    "names with `_orig_mod.`": lambda key: f"_orig_mod.{key}",
}


@pytest.mark.parametrize("kind", PREFIXES)
def test_prefixes(kind: str, untied: Path, tmp_path: Path) -> None:
    folder = edit_tensors(untied, tmp_path / "m", rename(PREFIXES[kind]))
    assert check(kind, folder, reference(untied)) == []


def test_old_names_of_bert(filler: Path, tmp_path: Path) -> None:
    def old(key: str) -> str:
        return key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")

    folder = edit_tensors(filler, tmp_path / "m", rename(old))
    assert check("names with gamma and beta, BERT", folder, reference(filler), bert=True) == []


def test_a_tensor_under_two_names_is_refused(untied: Path, tmp_path: Path) -> None:
    folder = edit_tensors(untied, tmp_path / "m", lambda found: found | {"norm.weight": torch.zeros(64)})
    with pytest.raises(ModelError, match=r"holds model\.norm\.weight twice, as model\.norm\.weight and norm\.weight"):
        load_model(ModelSpec(find_base(str(folder)), "text-generation"))


def test_a_tied_head_is_the_embedding(llama: Path) -> None:
    assert check("tied", llama, reference(llama)) == []


def test_an_untied_head_is_its_own(untied: Path) -> None:
    assert check("untied", untied, reference(untied)) == []


def test_a_config_that_ties_does_not_replace_a_head_of_its_own(untied: Path, tmp_path: Path) -> None:
    folder = edit_config(copied(untied, tmp_path / "m"), tie_word_embeddings=True)
    expected = LlamaForCausalLM.from_pretrained(untied)
    (said,) = check("tied by the config, the file has another head", folder, expected)
    assert "lm_head.weight differs from model.embed_tokens.weight" in said


def test_a_file_may_hold_the_head_instead_of_the_embedding(llama: Path, tmp_path: Path) -> None:
    """safetensors keeps one name of a shared tensor, the first one of the alphabet."""

    def only_head(found: Tensors) -> Tensors:
        return found | {"lm_head.weight": found.pop("model.embed_tokens.weight")}

    folder = edit_tensors(llama, tmp_path / "m", only_head)
    assert check("tied, stored as lm_head", folder, reference(llama)) == []


def test_both_names_of_a_tied_weight(llama: Path, tmp_path: Path) -> None:
    folder = edit_tensors(
        llama, tmp_path / "m", lambda found: found | {"lm_head.weight": found["model.embed_tokens.weight"].clone()}
    )
    assert check("tied, stored twice", folder, reference(llama)) == []
    model = load_model(ModelSpec(find_base(str(folder)), "text-generation"))
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_an_untied_head_that_is_missing_is_refused(llama: Path, tmp_path: Path) -> None:
    folder = edit_config(copied(llama, tmp_path / "m"), tie_word_embeddings=False)
    with pytest.raises(ModelError, match=r"lacks the weights of lm_head\.weight.*tie_word_embeddings") as caught:
        load_model(ModelSpec(find_base(str(folder)), "text-generation"))
    record_checkpoint("weights", "untied by the config, without a head", refused=str(caught.value))


def test_a_resized_vocabulary(untied: Path, tmp_path: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(untied)
    model.resize_token_embeddings(model.config.vocab_size + 5, mean_resizing=False)
    folder = copied(untied, tmp_path / "m")
    model.save_pretrained(folder)
    assert check("a resized vocabulary", folder, model) == []
    edit_config(folder, vocab_size=model.config.vocab_size - 5)
    with pytest.raises(
        ModelError, match=r"embed_tokens\.weight is \[\d+, 64\] in the weights and \[\d+, 64\] by"
    ) as caught:
        load_model(ModelSpec(find_base(str(folder)), "text-generation", "int4"))
    record_checkpoint("weights", "a resized vocabulary, not in the config", refused=str(caught.value))


@pytest.mark.parametrize("base_format", ["fp32", "int4", "int8", "nf4", "bf16"])
def test_missing_weights_are_refused_in_every_format(base_format: Any, untied: Path, tmp_path: Path) -> None:
    def lose(found: Tensors) -> Tensors:
        del found["model.layers.1.mlp.up_proj.weight"]
        return found

    folder = edit_tensors(untied, tmp_path / "m", lose)
    with pytest.raises(ModelError, match=r"lacks the weights of model\.layers\.1\.mlp\.up_proj\.weight$") as caught:
        load_model(ModelSpec(find_base(str(folder)), "text-generation", base_format))
    record_checkpoint("weights", "a tensor is missing", refused=str(caught.value))


def test_a_head_of_which_a_part_is_missing_is_refused(filler: Path, tmp_path: Path) -> None:
    def lose(found: Tensors) -> Tensors:
        return found | {"bert.pooler.dense.weight": torch.ones(64, 64)}

    folder = edit_tensors(filler, tmp_path / "m", lose)
    with pytest.raises(ModelError, match=r"lacks the weights of bert\.pooler\.dense\.bias"):
        load_model(ModelSpec(find_base(str(folder)), "text-classification", labels=("a", "b")))


def test_what_is_not_used_is_named(untied: Path, tmp_path: Path) -> None:
    more = {f"model.layers.2.mlp.{name}_proj.weight": torch.zeros(4, 4) for name in ("up", "down")}
    computed = {"model.rotary_emb.inv_freq": torch.zeros(8)}
    folder = edit_tensors(untied, tmp_path / "m", lambda found: found | more | computed)
    (said,) = check("tensors that the model does not have", folder, reference(untied))
    assert said.endswith(
        "2 tensors of the checkpoint are not used for text-generation: model.layers.2.mlp.down_proj.weight, "
        "model.layers.2.mlp.up_proj.weight"
    )


def test_a_wrong_shape_is_refused(untied: Path, tmp_path: Path) -> None:
    folder = edit_config(copied(untied, tmp_path / "m"), intermediate_size=64)
    with pytest.raises(ModelError, match=r"gate_proj\.weight is \[96, 64\] in the weights and \[64, 64\] by config"):
        load_model(ModelSpec(find_base(str(folder)), "text-generation", "int4"))


def test_pickled_weights_are_refused(untied: Path, tmp_path: Path) -> None:
    folder = copied(untied, tmp_path / "m")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"PK")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin is never loaded .*save_pretrained") as caught:
        find_base(str(folder))
    record_checkpoint("weights", "pytorch_model.bin", refused=str(caught.value))


def test_a_file_that_is_cut_off_is_refused(untied: Path, tmp_path: Path) -> None:
    folder = copied(untied, tmp_path / "m")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"model\.safetensors cannot be read as safetensors") as caught:
        find_base(str(folder))
    record_checkpoint("weights", "a file that is cut off", refused=str(caught.value))


def test_other_dtypes_are_refused_by_name(untied: Path, tmp_path: Path) -> None:
    folder = edit_tensors(
        untied, tmp_path / "m", lambda found: found | {"model.norm.weight": torch.ones(64, dtype=torch.int64)}
    )
    with pytest.raises(ModelError, match=r"model\.norm\.weight is I64 and has no scale"):
        load_model(ModelSpec(find_base(str(folder)), "text-generation"))


def test_the_content_is_that_of_the_files_that_are_read(untied: Path, tmp_path: Path) -> None:
    folder = copied(untied, tmp_path / "m")
    before = find_base(str(folder)).content_sha256
    save_file({"a": torch.ones(1)}, folder / "other.safetensors")
    assert find_base(str(folder)).content_sha256 == before


def test_a_run_that_recorded_files_beside_the_model_knows_its_base(untied: Path, tmp_path: Path) -> None:
    """Where its codes are compared too; without codes, what it read is not known."""
    folder = copied(untied, tmp_path / "m")
    save_file({"a": torch.ones(1)}, folder / "other.safetensors")
    base, names = find_base(str(folder)), ("config.json", "model.safetensors", "other.safetensors")
    hashes = "".join(hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names)
    old = hashlib.sha256(hashes.encode()).hexdigest()
    assert base.content_sha256 != old
    assert base.as_recorded({"content_sha256": old, "codes_sha256": "1"}).content_sha256 == old
    assert base.as_recorded({"content_sha256": old, "codes_sha256": None}) is base


@pytest.mark.parametrize("base_format", ["fp32", "int4", "nf4", "bf16"])
def test_a_pooler_that_vectors_do_not_need_may_be_missing(base_format: Any, filler: Path) -> None:
    model = load_model(ModelSpec(find_base(str(filler)), "feature-extraction", base_format))
    assert model.pooler is None
