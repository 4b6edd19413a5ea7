"""Products of float32 matrices: computed by the faster library, in float32 all the same."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from edge_ft.models.products import choose_library

ZEN5 = {"avx512_f": True, "avx512_bw": True, "avx512_vl": True, "avx512_dq": True, "cpu_name": "AMD EPYC"}


class OtherTorch(SimpleNamespace):
    """Torch on another machine, where products with this setting may lose digits."""

    def __init__(self, known: dict[str, Any], *, cuda: bool = False, rounds: bool = False) -> None:
        super().__init__(full=torch.full, equal=torch.equal, precision="highest")
        self.cpu = SimpleNamespace(get_capabilities=lambda: known)
        self.cuda = SimpleNamespace(is_available=lambda: cuda)
        self.eye = (lambda size: torch.eye(size).mul(1 + 2**-8)) if rounds else torch.eye

    def get_float32_matmul_precision(self) -> str:
        return self.precision

    def set_float32_matmul_precision(self, precision: str) -> None:
        self.precision = precision


@pytest.fixture
def _as_before() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


def chosen(known: dict[str, Any], **where: bool) -> str:
    other = OtherTorch(known, **where)
    choose_library(other)  # type: ignore[arg-type]
    return other.precision


def test_onednn_multiplies_where_mkl_would_use_half_of_the_vectors() -> None:
    assert chosen(ZEN5) == "medium"


@pytest.mark.parametrize(
    "known",
    [
        ZEN5 | {"cpu_name": "Intel(R) Xeon(R) Platinum 8280"},
        ZEN5 | {"avx512_dq": False},
        ZEN5 | {"amx_tile": True},
        {},
    ],
    ids=["intel", "avx2", "amx", "unknown"],
)
def test_mkl_stays_where_onednn_is_not_faster_or_might_round_to_bfloat16(known: dict[str, Any]) -> None:
    assert chosen(known) == "highest"


def test_mkl_stays_with_a_gpu_whose_products_the_setting_would_round() -> None:
    assert chosen(ZEN5, cuda=True) == "highest"


def test_mkl_stays_if_a_product_lost_digits() -> None:
    assert chosen(ZEN5, rounds=True) == "highest"


def test_a_setting_that_is_not_the_default_stays() -> None:
    other = OtherTorch(ZEN5)
    other.precision = "high"
    choose_library(other)  # type: ignore[arg-type]
    assert other.precision == "high"


@pytest.mark.usefixtures("_as_before")
@pytest.mark.parametrize(("rows", "inner", "columns"), [(1, 576, 1536), (7, 64, 8), (300, 576, 1536), (64, 1536, 576)])
def test_products_on_this_machine_have_the_digits_of_float32(rows: int, inner: int, columns: int) -> None:
    torch.set_float32_matmul_precision("highest")
    choose_library(torch)
    torch.manual_seed(0)
    x, weight = torch.randn(rows, inner), torch.randn(columns, inner)
    exact = x.double() @ weight.double().T
    for product in (x @ weight.T, torch.nn.functional.linear(x, weight), torch.bmm(x[None], weight.T[None])[0]):
        assert (product - exact).abs().max() < 1e-6 * inner**0.5 * exact.abs().max()
