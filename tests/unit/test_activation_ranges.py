"""How int8-static reads the inputs of its products."""

import numpy as np
import pytest
from numpy.typing import NDArray

from edge_ft.export.activation_ranges import choose_reading


def products(channel: float = 1.0, value: float = 0.0) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Inputs [tokens, channels] of one channel that is larger than the others, or of one large value; and a weight."""
    random = np.random.default_rng(0)
    inputs, weight = random.standard_normal((256, 32)), random.standard_normal((32, 16))
    inputs[:, 3] *= channel
    weight[3] /= channel
    inputs[7, 5] += value
    return inputs.astype(np.float32), weight.astype(np.float32)


def test_inputs_without_outliers_are_read_as_they_are() -> None:
    reading = choose_reading(*products())
    assert reading.divisor is None
    assert reading.error < 1e-3


def test_a_channel_of_large_values_is_divided_and_the_products_stay_exact() -> None:
    inputs, weight = products(channel=60)
    reading = choose_reading(inputs, weight)
    assert reading.divisor is not None
    assert reading.divisor.argmax() == 3
    assert reading.error < 1e-3
    step = (inputs.max() - inputs.min()) / 255  # as a range from minimum to maximum reads them
    coarse = np.rint(inputs / step) * step
    plain = float(np.square((coarse - inputs) @ weight).sum() / np.square(inputs @ weight).sum())
    assert plain > 20 * reading.error


@pytest.mark.parametrize("value", [0.0, 40.0])
def test_a_range_is_never_wider_than_the_values_and_includes_0(value: float) -> None:
    inputs, weight = products(value=value)
    reading = choose_reading(np.abs(inputs), weight)
    divided = np.abs(inputs) if reading.divisor is None else np.abs(inputs) / reading.divisor
    assert reading.low == 0
    assert 0.5 * divided.max() < reading.high <= divided.max() * 1.0001


def test_an_input_of_zeros_has_a_range() -> None:
    inputs, weight = products()
    reading = choose_reading(np.zeros_like(inputs), weight)
    assert np.isfinite([reading.low, reading.high]).all()
