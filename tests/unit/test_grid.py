"""The grid rounds to the nearest code and packs without loss."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from edge_ft.base.grid import Bits, dequantize, pack_nibbles, quantize, unpack_nibbles

WEIGHTS = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 4), st.integers(1, 70)),
    elements=st.floats(-8, 8, width=32, allow_subnormal=False),
)


@given(hnp.arrays(np.uint8, st.tuples(st.integers(1, 3), st.integers(1, 9)), elements=st.integers(0, 15)))
def test_packing_is_undone_by_unpacking(values: np.ndarray) -> None:
    assert (unpack_nibbles(pack_nibbles(values), values.shape[1]) == values).all()


@given(WEIGHTS, st.sampled_from([16, 32]), st.sampled_from([4, 8]))
def test_every_weight_is_within_half_a_step_of_its_code(weight: np.ndarray, block_size: int, bits: Bits) -> None:
    codes = quantize(weight, block_size, bits)
    steps = np.repeat(codes.scales, block_size, axis=1)[:, : weight.shape[1]]
    # A rounded zero point shifts the whole block by up to half a step more at its ends.
    assert (np.abs(dequantize(codes) - weight) <= steps * 1.001 + 1e-6).all()


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
