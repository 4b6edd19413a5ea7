"""The grid rounds to the nearest code and packs without loss."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from edge_ft.quant import blockwise as grid
from edge_ft.quant.blockwise import Bits, dequantize, pack_nibbles, quantize, unpack_nibbles

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
def test_a_cut_range_is_taken_only_where_it_is_closer(weight: np.ndarray, block_size: int) -> None:
    def error(weight: np.ndarray) -> np.ndarray:
        padded = np.pad(dequantize(quantize(weight, block_size)) - weight, ((0, 0), (0, -weight.shape[1] % block_size)))
        return (padded.reshape(len(weight), -1, block_size) ** 2).sum(axis=2)

    found = error(weight)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grid, "_SHARES", (1.0,))
        assert (found <= error(weight) * 1.001 + 1e-6).all()


def test_an_outlier_is_cut_for_the_sake_of_the_others() -> None:
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


def test_the_layout_is_that_of_matmulnbits() -> None:
    found = quantize(np.random.default_rng(0).normal(size=(6, 80)).astype(np.float32), 32)
    assert found.qweight.shape == (6, 3, 16)
    assert found.scales.shape == (6, 3)
    assert found.zero_points.shape == (6, 2)
    assert (found.in_features, found.block_size) == (80, 32)


def test_weights_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="NaN"):
        quantize(np.array([[np.nan, 1.0]], np.float32), 16)


@pytest.mark.parametrize("bits", [4, 8])
def test_threads_and_parts_change_no_code(bits: Bits, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = np.random.default_rng(0).normal(size=(40, 100)).astype(np.float32)
    whole = quantize(weight, 32, bits)
    monkeypatch.setattr(grid, "_BLOCKS_AT_ONCE", 7)
    parts = quantize(weight, 32, bits, threads=3)
    for field in ("qweight", "scales", "zero_points"):
        assert (getattr(parts, field) == getattr(whole, field)).all()
