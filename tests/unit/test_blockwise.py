"""Weights are rounded to the nearest code of the blockwise grid and packed without loss."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from edge_ft.quant.blockwise import (
    Bits,
    Codes,
    Grid,
    dequantize,
    pack_nibbles,
    quantize,
    quantize_finely,
    unpack_nibbles,
)

WEIGHTS = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 4), st.integers(1, 70)),
    elements=st.floats(-8, 8, width=32, allow_subnormal=False),
)


@given(hnp.arrays(np.uint8, st.tuples(st.integers(1, 3), st.integers(1, 9)), elements=st.integers(0, 15)))
def test_packing_is_undone_by_unpacking(values: np.ndarray) -> None:
    assert (unpack_nibbles(pack_nibbles(values), values.shape[1]) == values).all()


@given(WEIGHTS, st.sampled_from([16, 32]), st.sampled_from([4, 8]))
def test_a_weight_within_the_range_is_within_half_a_step_of_its_code(
    weight: np.ndarray, block_size: int, bits: Bits
) -> None:
    codes = quantize(weight, block_size, bits)
    steps = np.repeat(codes.scales, block_size, axis=1)[:, : weight.shape[1]]
    zero_points = unpack_nibbles(codes.zero_points, codes.scales.shape[1]) if bits == 4 else codes.zero_points
    zeros = np.repeat(zero_points.astype(np.float32), block_size, axis=1)[:, : weight.shape[1]]
    lowest, highest = -zeros * steps, (2**bits - 1 - zeros) * steps
    inside = np.clip(weight, lowest, highest)
    # A rounded zero point shifts the whole block by up to half a step more at its ends.
    assert (np.abs(dequantize(codes) - inside) <= steps * 0.501 + 1e-6).all()


@given(WEIGHTS, st.sampled_from([16, 32]))
def test_no_block_is_worse_than_with_its_whole_range(weight: np.ndarray, block_size: int) -> None:
    padding = ((0, 0), (0, -weight.shape[1] % block_size))
    blocks = np.pad(weight, padding).reshape(len(weight), -1, block_size)
    low, high = np.minimum(blocks.min(2, keepdims=True), 0), np.maximum(blocks.max(2, keepdims=True), 0)
    scale = (high - low) / 15
    scale[scale == 0] = 1
    zero_point = np.rint(-low / scale)
    rounded = (np.clip(np.rint(blocks / scale + zero_point), 0, 15) - zero_point) * scale
    found = np.pad(dequantize(quantize(weight, block_size)), padding).reshape(blocks.shape)
    error, whole_range_error = (((values - blocks) ** 2).sum(axis=2) for values in (found, rounded))
    rounding = 5e-4 * np.sqrt((blocks**2).sum(axis=2))  # of the scale to float16
    assert (np.sqrt(error) <= np.sqrt(whole_range_error) * 1.001 + rounding + 1e-3).all()


@pytest.mark.parametrize("bits", [4, 8])
@given(weight=WEIGHTS)
def test_scales_are_float16_numbers_unless_a_run_has_others(bits: Bits, weight: np.ndarray) -> None:
    scales = quantize(weight, 16, bits).scales
    assert (scales.astype(np.float16) == scales).all() or np.abs(weight).max() < 0.015
    assert (scales > 0).all()


@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_scales_that_float16_would_round_to_a_few_bits_or_to_infinity_stay_float32(factor: float) -> None:
    weight = np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32)
    for rounded in (quantize(weight * np.float32(factor), 32), quantize_finely(weight * np.float32(factor), 32)):
        assert np.abs(dequantize(rounded) / np.float32(factor) - weight).max() < 0.5


def test_earlier_runs_get_the_scales_that_they_were_trained_with() -> None:
    weight = np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32)
    scales = quantize(weight, 32, half_scales=False).scales
    assert (scales.astype(np.float16) != scales).any()
    assert Grid.recorded({"block_size": 32}) == Grid(32, half_scales=False)
    assert Grid.recorded(Grid(64).to_dict()) == Grid(64)


def test_an_outlier_is_clipped_if_that_lowers_the_error() -> None:
    weight = np.random.default_rng(0).normal(size=(1, 32)).astype(np.float32)
    weight[0, 0] = 3.2
    codes = quantize(weight, 32)
    assert codes.scales[0, 0] < (weight.max() - weight.min()) / 15


@given(WEIGHTS)
def test_zero_stays_zero(weight: np.ndarray) -> None:
    assert (dequantize(quantize(np.where(weight > 0, weight, 0), 32))[weight <= 0] == 0).all()


def test_weights_on_the_grid_come_back_exactly() -> None:
    codes = np.arange(32, dtype=np.float32) % 16
    weight = ((codes - 5) * 0.25)[None, :]
    assert (dequantize(quantize(weight, 32)) == weight).all()


@given(WEIGHTS, st.sampled_from([16, 32]))
def test_further_bits_are_an_eighth_bit_code(weight: np.ndarray, block_size: int) -> None:
    codes = quantize_finely(weight, block_size)
    steps = np.repeat(codes.scales, block_size, axis=1)[:, : weight.shape[1]] / 16
    # The zero point is rounded to a whole 4-bit step, which moves the ends of the range by up to half of one.
    assert (np.abs(dequantize(codes) - weight) <= steps * 1.6 + 1e-6).all()
    assert (codes.scales.astype(np.float16) == codes.scales).all() or np.abs(weight).max() < 0.015


def test_the_layout_is_that_of_matmulnbits() -> None:
    found = quantize(np.random.default_rng(0).normal(size=(6, 80)).astype(np.float32), 32)
    assert found.qweight.shape == (6, 3, 16)
    assert found.scales.shape == (6, 3)
    assert found.zero_points.shape == (6, 2)
    assert (found.in_features, found.block_size) == (80, 32)


def test_weights_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="NaN"):
        quantize(np.array([[np.nan, 1.0]], np.float32), 16)


@pytest.mark.parametrize("bits", [4, 8])
def test_the_parts_in_which_a_weight_is_rounded_change_no_code(bits: Bits) -> None:
    weight = np.random.default_rng(0).normal(size=(700, 400)).astype(np.float32)  # 9,100 blocks
    whole = quantize(weight, 32, bits)
    parts = Codes.concatenate([quantize(weight[row : row + 7], 32, bits) for row in range(0, 700, 7)])
    for field in ("qweight", "scales", "zero_points"):
        assert (getattr(parts, field) == getattr(whole, field)).all()
