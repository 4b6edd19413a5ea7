"""An adapter is PEFT's in every respect, and what cannot be exported is refused by name."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny_models import write_llama
from transformers import AutoModelForCausalLM

from edge_ft.config import TuneConfig
from edge_ft.errors import ModelError, UsageError
from edge_ft.models.adapted import load_adapter, merge_adapter
from edge_ft.models.base_model import find_base
from edge_ft.models.loading import ModelSpec, load_model
from edge_ft.models.lora import add_lora, lora_pairs

IDS = torch.tensor([[1, 20, 30, 40, 50, 60]])


def save_adapter(llama: Path, folder: Path, **settings: Any) -> Path:
    """An adapter that was trained elsewhere: random A and B."""
    torch.manual_seed(1)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], **settings}
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(llama), LoraConfig(task_type="CAUSAL_LM", **settings))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter) * 0.2
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


def base_model(llama: Path, base_format: Any = "fp32") -> Any:
    return load_model(ModelSpec(find_base(str(llama)), "text-generation", base_format))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {"q_proj": 32}},
        {"use_rslora": True},
    ],
    ids=["plain", "patterns", "rslora"],
)
def test_lora_pairs_include_the_scaling_of_their_layer(llama: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    folder = save_adapter(llama, tmp_path / "adapter", **settings)
    peft_model = load_adapter(base_model(llama), folder)
    pairs = lora_pairs(peft_model)
    assert len(pairs) == 4
    for name, (a, b) in pairs.items():
        layer = peft_model.base_model.model.get_submodule(name)
        np.testing.assert_allclose(b @ a, layer.get_delta_weight("default").detach().numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"use_rslora": True}], ids=["plain", "dora", "rslora"])
def test_a_merged_model_computes_what_peft_computes(llama: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    folder = save_adapter(llama, tmp_path / "adapter", **settings)
    with torch.inference_mode():
        beside = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), folder).eval()(IDS).logits
        merged = merge_adapter(base_model(llama), folder)(IDS).logits
    torch.testing.assert_close(merged, beside, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("settings", "named"),
    [({"use_dora": True}, "Dora"), ({"target_modules": ["embed_tokens"]}, "embedding")],
)
@pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings=True")
def test_the_adapter_lane_refuses_variants_beyond_a_and_b(
    llama: Path, tmp_path: Path, settings: dict[str, Any], named: str
) -> None:
    peft_model = load_adapter(base_model(llama), save_adapter(llama, tmp_path / "adapter", **settings))
    with pytest.raises(ModelError, match=f"{named}.*--lane merged"):
        lora_pairs(peft_model)


@pytest.mark.filterwarnings("ignore:Adapter 'default'")
def test_the_adapter_lane_refuses_lora_biases(tmp_path: Path) -> None:
    biased = write_llama(tmp_path / "biased", attention_bias=True)
    folder = save_adapter(biased, tmp_path / "adapter", target_modules=["q_proj"], lora_bias=True)
    with pytest.raises(ModelError, match=r"not a plain LoRA.*--lane merged"):
        lora_pairs(load_adapter(base_model(biased), folder))


def targets(llama: Path, tmp_path: Path, **settings: Any) -> set[str]:
    config = TuneConfig(model=str(llama), data="", out=tmp_path, **settings)
    base = find_base(str(llama))
    model = add_lora(base_model(llama, "int4"), base.family, "text-generation", config)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    return {
        key.split(".model.", 1)[1].rsplit(".lora_", 1)[0]
        for key in load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    }


def test_all_linear_is_every_linear_layer_but_the_head(llama: Path, tmp_path: Path) -> None:
    assert len(targets(llama, tmp_path)) == 14


def test_target_modules_and_layers_select_linear_layers(llama: Path, tmp_path: Path) -> None:
    found = targets(llama, tmp_path, target_modules=("q_proj", "up_proj"), layers="last:1")
    assert found == {"model.layers.1.self_attn.q_proj", "model.layers.1.mlp.up_proj"}


def test_an_unknown_target_module_gets_a_suggestion(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="did you mean 'q_proj'"):
        targets(llama, tmp_path, target_modules=("q_prj",))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("lm_head", "belongs to the head of text-generation, which stays frozen.*edge-ft export --adapter"),
        ("embed_tokens", "is an embedding, and only linear layers are adapted"),
        ("input_layernorm", "is no linear layer; choose from down_proj"),
    ],
)
@pytest.mark.parametrize("tie", [True, False])
def test_what_cannot_be_adapted_is_refused_with_the_true_reason(
    tmp_path: Path, tie: bool, name: str, said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        targets(write_llama(tmp_path / "model", tie=tie), tmp_path, target_modules=("q_proj", name))


def test_more_layers_than_there_are_is_refused(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="2 layers"):
        targets(llama, tmp_path, layers="last:3")
