"""The 4-bit formats that people ship: what each makes of a float weight, and how many bytes it takes.

Every weight is rounded by the format's own tool and comes back in float32, as its kernels would multiply it, so that
one scorer compares the formats alone.
"""

import io
import logging
import warnings
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from edge_ft.errors import require
from edge_ft.quant.blockwise import Codes, dequantize

__all__ = ["FORMATS", "Format", "Rounded", "round_weights"]

BLOCK = 32
"""Weights per scale wherever the format leaves a choice: of edge-ft, Q4_0 and onnxruntime-genai's builder."""


@dataclass(frozen=True)
class Rounded:
    """A weight after its rounding."""

    weight: NDArray[np.float32]
    """[N, K], as it is multiplied."""
    size_bytes: int
    """Of codes, scales and zero points."""


Rounding = Callable[[NDArray[np.float32]], Rounded]


@dataclass(frozen=True)
class Format:
    """How a model is shipped."""

    tool: str
    matrices: Rounding
    head: Rounding
    """Of the token embedding, and of the output head that shares its weights."""


def _gguf(kind: str, weight: NDArray[np.float32]) -> Rounded:
    require("gguf", "train")
    from gguf import GGMLQuantizationType, quants

    packed = quants.quantize(weight, GGMLQuantizationType[kind])
    return Rounded(quants.dequantize(packed, GGMLQuantizationType[kind]).astype(np.float32), packed.nbytes)


def _round_to_nearest(bits: int, weight: NDArray[np.float32]) -> Rounded:
    """Round by ONNX Runtime's quantizer of weights, symmetric, one matrix at a time: it looks at no other one."""
    from onnx import TensorProto, helper, numpy_helper
    from onnxruntime.quantization import matmul_nbits_quantizer as tool

    rows, columns = weight.shape
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", columns])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", rows])
    initializer = numpy_helper.from_array(np.ascontiguousarray(weight.T), "w")
    node = helper.make_node("MatMul", ["x", "w"], ["y"], name="matmul")
    graph = helper.make_graph([node], "matrix", [x], [y], [initializer])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    quantizer = tool.MatMulNBitsQuantizer(model, bits=bits, block_size=BLOCK, is_symmetric=True)
    logging.getLogger(tool.__name__).setLevel(logging.WARNING)  # a line a matrix
    with redirect_stdout(io.StringIO()), warnings.catch_warnings():  # a progress bar, and how it reads initializers
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        quantizer.process()
    found = quantizer.model.model.graph
    held = {tensor.name: numpy_helper.to_array(tensor) for tensor in found.initializer}
    (product,) = (node for node in found.node if node.op_type == "MatMulNBits")
    packed, scales = (held[name] for name in product.input[1:3])
    scales = scales.reshape(rows, -1).astype(np.float32)
    nothing = np.zeros((rows, -(-scales.shape[1] * bits // 8)), np.uint8)
    codes = Codes(packed.reshape(rows, -1, BLOCK * bits // 8), scales, nothing, columns, 4 if bits == 4 else 8)
    middle = np.repeat(scales * 2 ** (bits - 1), BLOCK, axis=1)[:, :columns]  # the zero point of all its blocks
    return Rounded(dequantize(codes) - middle, packed.nbytes + scales.nbytes)


def _nf4(weight: NDArray[np.float32]) -> Rounded:
    """bitsandbytes' NF4 with its own block of 64 and float32 scales, as `load_in_4bit` makes it."""
    torch = require("torch", "train")
    functional = require("bitsandbytes.functional", "train")
    packed, state = functional.quantize_4bit(torch.from_numpy(weight), blocksize=64, quant_type="nf4")
    found = functional.dequantize_4bit(packed, state).float().numpy()
    return Rounded(found, int(packed.numel() * packed.element_size() + state.absmax.numel() * 4))


def _half(weight: NDArray[np.float32]) -> Rounded:
    return Rounded(weight.astype(np.float16).astype(np.float32), weight.size * 2)


FORMATS: dict[str, Format] = {
    "Q4_0, 8-bit head": Format("llama.cpp", partial(_gguf, "Q4_0"), partial(_gguf, "Q8_0")),
    "Q4_0, 4-bit head": Format("llama.cpp", partial(_gguf, "Q4_0"), partial(_gguf, "Q4_0")),
    "RTN, 8-bit head": Format("ONNX Runtime", partial(_round_to_nearest, 4), partial(_round_to_nearest, 8)),
    "nf4, 16-bit head": Format("bitsandbytes", _nf4, _half),
}
"""By name. bitsandbytes leaves the head alone; its embedding is counted in float16. Those that lost are in
docs/decisions/048."""


def round_weights(
    weights: Mapping[str, NDArray[np.float32]], form: Format
) -> tuple[dict[str, NDArray[np.float32]], int]:
    """Round every matrix of a decoder.

    Args:
        weights: By parameter; a head that is tied to the embedding is left out.
        form: The format.

    Returns:
        The matrices as they are multiplied, and the bytes of all weights: those that are no matrices are float32.
    """
    found, size = {}, 0
    for name, weight in weights.items():
        if weight.ndim != 2:
            size += weight.size * 4
            continue
        is_head = name.rpartition(".")[0].endswith(("embed_tokens", "lm_head"))
        rounded = (form.head if is_head else form.matrices)(weight)
        found[name], size = rounded.weight, size + rounded.size_bytes
    return found, size
