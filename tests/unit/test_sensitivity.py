"""Further bits go where rounding costs the most loss, and no further than the bytes that are given."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from edge_ft.data import IGNORED, Batch
from edge_ft.models.scorer import decoder_head_inputs
from edge_ft.quant import sensitivity
from edge_ft.quant.blockwise import Grid, dequantize
from edge_ft.quant.conversion import quantize_model, retained_weights
from edge_ft.quant.layers import QuantLinear
from edge_ft.quant.sensitivity import finer_layers, refine, saved_bytes, spend
from edge_ft.quant.serialization import read_codes, stored_finer, write_codes

EVERYTHING = 10**9


def forward(model: Any, batch: Batch) -> Tensor:
    return decoder_head_inputs(model, batch, torch.device("cpu"))[0]


@pytest.fixture
def batch() -> Any:
    ids = np.random.default_rng(0).integers(3, 64, (6, 20))
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "labels": ids, "rows": [*range(6)]}


@pytest.fixture
def rounded(llama: Path) -> tuple[Any, Any, Any]:
    """A float model, the same with 4-bit codes, and what reads the float weights of the second."""
    model, exact = (AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32) for _ in range(2))
    read = retained_weights(model)
    quantize_model(model, Grid(32))
    return exact, model, read


def divergence(exact: Any, model: Any, batch: Any) -> float:
    """Mean Kullback-Leibler divergence from the float model, in nats."""
    ids = torch.from_numpy(batch["input_ids"])
    with torch.no_grad():
        right, found = (torch.log_softmax(each(input_ids=ids).logits, -1) for each in (exact, model))
    return float((right.exp() * (right - found)).sum(-1).mean())


def test_everything_is_8_bits_where_all_of_it_fits(rounded: Any, batch: Any) -> None:
    exact, model, read = rounded
    before = divergence(exact, model, batch)
    refine(model, read, spend(model, batch, read, forward, EVERYTHING))
    layers = {name: m.out_features for name, m in model.named_modules() if isinstance(m, QuantLinear)}
    assert finer_layers(model) == layers
    assert divergence(exact, model, batch) < 0.02 * before


def test_the_layer_that_rounding_hurts_most_comes_first(rounded: Any, batch: Any) -> None:
    _, model, read = rounded
    worst = model.model.layers[1].mlp.down_proj
    worst.scales *= 1.5
    size = worst.qweight.numel()
    assert spend(model, batch, read, forward, size) == {"model.layers.1.mlp.down_proj": worst.out_features}
    assert "model.layers.1.mlp.down_proj" not in spend(model, batch, read, forward, size - 1)


def test_no_more_bytes_are_spent_than_given(rounded: Any, batch: Any) -> None:
    _, model, read = rounded
    budget = saved_bytes(model)
    refine(model, read, spend(model, batch, read, forward, budget))
    fine = [m.fine.numel() for m in model.modules() if isinstance(m, QuantLinear) and m.fine is not None]
    assert 0 < sum(fine) <= budget


def test_padding_does_not_change_the_choice(rounded: Any, batch: Any) -> None:
    _, model, read = rounded
    seen = []

    def watched(model: Any, batch: Batch) -> Tensor:
        seen.append(batch["input_ids"].shape)
        return forward(model, batch)

    chosen = spend(model, batch, read, watched, EVERYTHING // 10**5)
    padded = {name: np.pad(array, ((0, 0), (0, 9))) if np.ndim(array) == 2 else array for name, array in batch.items()}
    padded["labels"][:, -9:] = IGNORED
    assert spend(model, padded, read, watched, EVERYTHING // 10**5) == chosen
    assert seen == [(6, 20), (6, 20)]


def test_queries_keys_and_values_get_them_together(rounded: Any, batch: Any) -> None:
    _, model, read = rounded
    for layer in model.model.layers:
        layer.self_attn.v_proj.scales *= 1.3
    attention = {name for name in spend(model, batch, read, forward, EVERYTHING // 10**5) if "self_attn" in name}
    for name in [name for name in attention if name.endswith("v_proj")]:
        assert {name.replace("v_proj", part) for part in ("q_proj", "k_proj")} <= attention


def test_of_the_head_the_first_rows_come_first_and_a_tied_embedding_has_them_too(
    rounded: Any, batch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, model, read = rounded
    monkeypatch.setattr(sensitivity, "FIRST_ROWS", 16)
    model.lm_head.scales[:, :32] *= 1.5
    refine(model, read, {"lm_head": spend(model, batch, read, forward, 16 * 32)["lm_head"]})
    assert finer_layers(model) == {"lm_head": 16}
    assert model.model.embed_tokens.fine is model.lm_head.fine
    weight, exact = model.model.embed_tokens.dequantize().T, read("model.embed_tokens.weight", slice(None))
    errors = (weight - exact).abs().mean(1)
    assert errors[:16].mean() < 0.2 * errors[16:].mean()


def test_stored_codes_hold_the_further_bits(rounded: Any, tmp_path: Path) -> None:
    _, model, read = rounded
    refine(model, read, {"lm_head": 16, "model.layers.0.mlp.up_proj": model.model.layers[0].mlp.up_proj.out_features})
    write_codes(tmp_path / "codes.safetensors", model)
    stored = stored_finer(tmp_path / "codes.safetensors")
    assert sorted(stored) == ["model.embed_tokens", "model.layers.0.mlp.up_proj"]
    found = read_codes(tmp_path / "codes.safetensors")("model.embed_tokens", 64)
    assert found is not None
    np.testing.assert_array_equal(dequantize(found), dequantize(model.lm_head.codes()))
    refine(model, read, stored)  # by the embedding's name, as they are stored
    assert finer_layers(model) == {"lm_head": 16, "model.layers.0.mlp.up_proj": stored["model.layers.0.mlp.up_proj"]}


def test_of_long_sequences_only_the_beginning_counts(rounded: Any, batch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the pass keeps for its gradient would be the peak of an export's memory."""
    _, model, read = rounded
    monkeypatch.setattr(sensitivity, "TOKENS", 12)
    seen = []

    def watched(model: Any, few: Batch) -> Tensor:
        seen.append(few["input_ids"].shape)
        return forward(model, few)

    assert spend(model, batch, read, watched, EVERYTHING)
    assert seen == [(1, 12)]
