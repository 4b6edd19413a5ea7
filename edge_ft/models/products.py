"""Which library computes products of float32 matrices on the CPU: MKL, or oneDNN where that is faster."""

from contextlib import suppress
from types import ModuleType

__all__ = ["choose_library"]


def choose_library(torch: ModuleType) -> None:
    """Let oneDNN compute products of float32 matrices where MKL would use half of the processor's vectors, in float32.

    MKL has AVX-512 kernels for Intel's processors alone: on another one it computes with AVX2 at half the speed
    (docs/decisions/041). torch takes oneDNN where products may be rounded to bfloat16; oneDNN rounds them only where
    that makes them faster, which is where there are AMX tiles. A setting that is not torch's default stays.

    Args:
        torch: The module.
    """
    known = torch.cpu.get_capabilities()
    wide = all(known.get(f"avx512_{name}") for name in ("f", "bw", "vl", "dq"))
    if not wide or "Intel" in known.get("cpu_name", "Intel") or known.get("amx_tile") or torch.cuda.is_available():
        return  # of a GPU the setting would round products, too
    with suppress(RuntimeError):  # who calls us has set it in torch's newer way
        if torch.get_float32_matmul_precision() == "highest":
            torch.set_float32_matmul_precision("medium")
            if not _is_exact(torch):
                torch.set_float32_matmul_precision("highest")


def _is_exact(torch: ModuleType) -> bool:
    """Return whether a product is computed in float32: numbers that bfloat16 does not have survive it."""
    numbers = torch.full((64, 64), 1 + 2**-20)
    return bool(torch.equal(numbers @ torch.eye(64), numbers))
