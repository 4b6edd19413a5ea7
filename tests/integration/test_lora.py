"""Adapters of a tuned model: plain PEFT loads them, and quantized layers keep their kind."""

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from edge_ft.artifacts import RunFolder
from edge_ft.evaluate.loading import open_run_model
from edge_ft.models.adapted import load_adapter
from edge_ft.models.base_model import find_base
from edge_ft.models.loading import ModelSpec, load_model
from edge_ft.quant.blockwise import dequantize
from edge_ft.quant.layers import QuantEmbedding, QuantLinear
from edge_ft.quant.serialization import codes_sha256, frozen_layers

IDS = torch.tensor([[1, 20, 30, 40, 50, 60]])


def base_model(llama: Path, base_format: Any = "fp32") -> Any:
    return load_model(ModelSpec(find_base(str(llama)), "text-generation", base_format))


def test_a_tuned_adapter_loads_with_plain_peft_on_the_plain_base(llama: Path, llama_run: RunFolder) -> None:
    ours, _ = open_run_model(llama_run)
    assert codes_sha256(ours) == llama_run.base()["codes_sha256"]
    plain = AutoModelForCausalLM.from_pretrained(llama)
    for name, layer in frozen_layers(ours).items():  # the same codes as floats: then both must agree
        plain.get_submodule(name).weight.data = torch.from_numpy(dequantize(layer.codes()))
    rows = plain.get_input_embeddings()  # in float16, as the operator looks them up; the tied head stays in float32
    rows.weight = torch.nn.Parameter(rows.weight.half().float())
    theirs = PeftModel.from_pretrained(plain, llama_run.adapter).eval()
    with torch.inference_mode():
        torch.testing.assert_close(ours(IDS).logits, theirs(IDS).logits, rtol=1e-4, atol=1e-4)


def test_quantized_layers_keep_their_kind_under_peft(llama: Path, llama_run: RunFolder) -> None:
    ours = load_adapter(base_model(llama, "int4"), llama_run.adapter)
    kinds = {type(getattr(module, "base_layer", None)) for module in ours.modules()} - {type(None)}
    assert kinds == {QuantLinear}
    assert isinstance(ours.get_input_embeddings(), QuantEmbedding)
