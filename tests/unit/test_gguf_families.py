"""The model in a GGUF file of every family computes what the checkpoint computes that it was made from."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints_table import largest_errors, record_checkpoint
from tiny_gguf import SETTINGS, write_gguf
from tiny_models import write_decoder
from transformers import AutoModelForCausalLM

from edge_ft.errors import ModelError
from edge_ft.models.base_model import find_base
from edge_ft.models.gguf import convert_gguf

ROPE = {"rope_theta": 10000.0}
BATCH = {"input_ids": torch.tensor([[5, 9, 40, 77, 120, 33, 8, 100, 31, 17, 60, 61, 62, 63, 64, 65]])}
Checkpoint = Callable[..., Path]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    """Writes a tiny checkpoint of a family."""

    def write(family: str, **config: Any) -> Path:
        return write_decoder(tmp_path / family, family, **{**SETTINGS[family], **config})

    return write


def reference(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("family", SETTINGS)
def test_logits_are_those_of_the_checkpoint(family: str, checkpoint: Checkpoint) -> None:
    folder = checkpoint(family)
    errors = largest_errors(str(write_gguf(folder, folder / "model.gguf")), reference(folder), BATCH)
    assert errors["fp32"] == 0
    assert max(errors.values()) < 1e-4
    record_checkpoint("GGUF", f"F32, {family}", **errors)


def test_an_untied_head_and_biases_are_read(checkpoint: Checkpoint) -> None:
    folder = checkpoint("llama", tie_word_embeddings=False, attention_bias=True, mlp_bias=True)
    file = write_gguf(folder, folder / "model.gguf")
    assert largest_errors(str(file), reference(folder), BATCH, formats=("fp32",))["fp32"] == 0


def llama3_factors(old: int, factor: float, low: float = 1.0, high: float = 4.0) -> Any:
    """As llama.cpp's `conversion/llama.py` computes them."""
    found = []
    for frequency in 1.0 / 10000.0 ** (np.arange(0, 16, 2) / 16):
        length = 2 * math.pi / frequency
        smooth = (old / length - low) / (high - low)
        between = 1 / ((1 - smooth) / factor + smooth)
        found.append(1.0 if length < old / high else factor if length > old / low else between)
    return np.array(found, np.float32)


@pytest.mark.parametrize(
    ("old", "high", "kind"), [(64, 4.0, "llama3"), (8192, 4.0, "llama3"), (100, 4.0, "longrope"), (64, 2.0, "longrope")]
)
def test_rope_freqs_of_llama_3_become_its_scaling(old: int, high: float, kind: str, checkpoint: Checkpoint) -> None:
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": high, "original_max_position_embeddings": old}
    folder = checkpoint(
        "llama", max_position_embeddings=16384, rope_parameters={**ROPE, "rope_type": "llama3", **scaling}
    )
    factors = {"rope_freqs.weight": llama3_factors(old, 8.0, high=high)}
    file = write_gguf(folder, folder / "model.gguf", tensors=factors)
    errors = largest_errors(str(file), reference(folder), BATCH)
    assert errors["fp32"] < 1e-5
    assert max(errors.values()) < 1e-4
    assert find_base(str(file)).dims.ropes[0]["rope_type"] == kind
    record_checkpoint("GGUF", f"rope_freqs.weight, read as {kind}", **errors)


@pytest.mark.parametrize(
    ("family", "rope"),
    [
        ("llama", {**ROPE, "rope_type": "linear", "factor": 4.0}),
        ("qwen2", {**ROPE, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 24}),
        (
            "gemma3_text",
            {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", **ROPE},
            },
        ),
    ],
)
def test_a_scaling_in_the_header_is_read(family: str, rope: dict[str, Any], checkpoint: Checkpoint) -> None:
    folder = checkpoint(family, rope_parameters=rope)
    file = write_gguf(folder, folder / "model.gguf")
    errors = largest_errors(str(file), reference(folder), BATCH, formats=("fp32",))
    assert errors["fp32"] == 0
    record_checkpoint("GGUF", f"rope.scaling {rope.get('rope_type', 'linear')}, {family}", **errors)


def test_rope_factors_of_phi_3_are_read(checkpoint: Checkpoint) -> None:
    short, long = [1.0 + 0.1 * n for n in range(8)], [1.5 + n for n in range(8)]
    rope = {**ROPE, "rope_type": "longrope", "short_factor": short, "long_factor": long, "partial_rotary_factor": 0.5}
    folder = checkpoint("phi3", sliding_window=None, original_max_position_embeddings=32, rope_parameters=rope)
    factors = {"rope_factors_short.weight": np.float32(short), "rope_factors_long.weight": np.float32(long)}
    scale = math.sqrt(1 + math.log(3) / math.log(32))
    file = write_gguf(folder, folder / "model.gguf", tensors=factors, fields={".rope.scaling.attn_factor": scale})
    model, expected = (AutoModelForCausalLM.from_pretrained(path).eval() for path in (convert_gguf(file), folder))
    errors = []
    for length in (16, 48):  # below the original length, and above
        ids = torch.arange(5, 5 + length)[None]
        errors.append((model(ids).logits - expected(ids).logits).abs().max().item())
    assert max(errors) < 1e-5
    assert find_base(str(file)).max_length == 32
    unscaled = write_gguf(folder, folder / "unscaled.gguf", tensors=factors)
    with pytest.raises(ModelError, match=r"lacks phi3\.rope\.scaling\.attn_factor"):
        convert_gguf(unscaled)
    record_checkpoint("GGUF", "rope_factors of Phi-3 (LongRoPE)", fp32=max(errors))


@pytest.mark.parametrize(
    ("fields", "tensors", "reason"),
    [
        ({".rope.scaling.type": "dynamic"}, {}, "'dynamic'"),
        (
            {".rope.scaling.type": "longrope"},
            {},
            "rope_factors_long.weight and rope_factors_short.weight and has neither",
        ),
        ({".rope.scaling.alpha": 2.0}, {}, "rope.scaling.alpha is not known"),
        ({".rope.dimension_count": 8}, {}, "rope.dimension_count is 8"),
        ({".rope.dimension_sections": [4, 2, 2]}, {}, "rotates by sections"),
        ({}, {"rope_freqs.weight": np.ones(4, np.float32)}, "not 8 numbers"),
        ({}, {"rope_freqs.weight": np.zeros(8, np.float32)}, "not positive numbers"),
        ({}, {"rope_factors_long.weight": np.ones(8, np.float32)}, "lacks rope_factors_short.weight"),
    ],
)
def test_a_rotation_that_is_not_known_is_refused(
    fields: dict[str, Any], tensors: dict[str, Any], reason: str, llama: Path, tmp_path: Path
) -> None:
    file = write_gguf(llama, tmp_path / "model.gguf", fields=fields, tensors=tensors)
    with pytest.raises(ModelError) as refused:
        convert_gguf(file)
    assert reason in str(refused.value)


def test_mistral_with_a_window_keeps_it(checkpoint: Checkpoint) -> None:
    folder = checkpoint("llama")
    file = write_gguf(folder, folder / "model.gguf", fields={".attention.sliding_window": 8})
    assert find_base(str(file)).family.name == "mistral"
    windowed = json.loads((folder / "config.json").read_text()) | {"model_type": "mistral", "sliding_window": 8}
    (folder / "config.json").write_text(json.dumps(windowed), encoding="utf-8")
    assert largest_errors(str(file), reference(folder), BATCH, formats=("fp32",))["fp32"] == 0


def test_gemma_is_scaled_as_the_header_says(checkpoint: Checkpoint) -> None:
    folder = checkpoint("gemma2", query_pre_attn_scalar=24)
    file = write_gguf(folder, folder / "model.gguf", fields={".attention.scale": 24**-0.5})
    assert largest_errors(str(file), reference(folder), BATCH, formats=("fp32",))["fp32"] == 0
