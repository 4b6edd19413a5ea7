"""Calibrate int4 codes on rows by GPTQ (Frantar et al., arXiv:2210.17323).

Its codes minimise the error of a layer's output, not of its weight. They are chosen when the layer is first called,
from its input there.

One pass of all rows through the model is enough. When a layer is called, those before it compute with their new codes
already, so that it is fitted to the input that it will really get; and only its own float weight is in memory.
"""

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from edge_ft.config import Task
from edge_ft.data import IGNORED, Batch, Example, collate, evenly_spaced, pack
from edge_ft.errors import ModelError
from edge_ft.progress import Progress, Silent, track
from edge_ft.quant.blockwise import Codes, quantize_finely
from edge_ft.quant.conversion import ReadWeight
from edge_ft.quant.devices import product_dtype
from edge_ft.quant.gptq import Curvature, gptq_quantize
from edge_ft.quant.layers import BUFFERS, QuantEmbedding, QuantLinear

__all__ = [
    "MAX_TOKENS",
    "Calibration",
    "calibrate",
    "input_curvature",
    "make_calibration",
]

MAX_TOKENS = 8192
"""Tokens of the calibration batch with padding: it passes through the model at once (docs/decisions/048)."""
PACKED = 128
"""Tokens of the sequences that short rows of a decoder share, so that few positions are padding."""
_HEAD_ROWS = 4096
"""Rows of a head's weight that are float at a time."""
_GRAM_PARTS = 6
"""Parts in which a product with the own transpose is computed: of p parts, (p + 1) / 2p of the products are left."""


@dataclass
class Calibration:
    """The rows that codes are calibrated on, and how long that took."""

    batch: Batch
    progress: Progress
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    once: float = 0.0
    """Seconds of `first_time`."""
    again: float = 0.0
    """Seconds that choosing the codes of the merged model will take."""

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Add the time that passes inside.

        Yields:
            Nothing.
        """
        began, cpu_began = time.monotonic(), time.process_time()
        try:
            yield
        finally:
            self.seconds += time.monotonic() - began
            self.cpu_seconds += time.process_time() - cpu_began

    @contextmanager
    def first_time(self) -> Iterator[None]:
        """Count what passes inside apart: it is not done again where the codes of the merged model are chosen.

        Yields:
            Nothing.
        """
        began = time.monotonic()
        try:
            yield
        finally:
            self.once += time.monotonic() - began

    def to_dict(self) -> dict[str, float]:
        """Return the values of report.json."""
        return {
            "rows": len(self.batch["rows"]),
            "seconds": round(self.seconds, 2),
            "cpu_seconds": round(self.cpu_seconds, 2),
        }


def make_calibration(
    examples: Sequence[Example],
    rows: int,
    pad_id: int,
    task: Task,
    progress: Progress | None = None,
    *,
    packed: bool = False,
) -> Calibration | None:
    """Select examples at even distances for one batch.

    Args:
        examples: Train rows.
        rows: Number of rows; fewer where they would be more than `MAX_TOKENS` tokens.
        pad_id: Token id of the padding.
        task: Of the model.
        progress: Reports the layers that are done.
        packed: Short rows of a decoder share sequences.

    Returns:
        The calibration; None for 0 rows.
    """
    if rows == 0:
        return None

    def make(count: int) -> Batch:
        selected = evenly_spaced(examples, count)
        if task == "text-generation":  # the head is calibrated on prompts too: short answers have few tokens
            longest = max(len(example.input_ids) for example in selected)
            return pack(selected, pad_id, max(longest, PACKED) if packed else 0)
        if task == "feature-extraction":  # only first texts pass through: half of the second ones become first
            selected[1::2] = [replace(e, input_ids=e.pair_ids, pair_ids=e.input_ids) for e in selected[1::2]]
        return collate(selected, pad_id, task)

    batch, count = make(rows), min(rows, len(examples))
    while count > 1 and (size := max(batch["input_ids"].size, batch["labels"].size)) > MAX_TOKENS:
        count = max(1, min(count - 1, count * MAX_TOKENS // size))
        batch = make(count)
    return Calibration(batch, progress or Silent())


@torch.no_grad()
def calibrate(
    model: Any,
    task: Task,
    read: ReadWeight,
    calibration: Calibration,
    forward: Callable[[Any, Batch], Tensor | None],
    only: Collection[str] | None = None,
) -> None:
    """Choose the 4-bit codes of the linear layers of `model` anew by GPTQ, in place.

    Codes that a language model's embedding and head share are chosen as the head's, last: their errors cost most
    there. An embedding that is not tied keeps its codes. Layers with further bits are rounded by themselves.

    Args:
        model: A task model with 4-bit codes, on the CPU, without an adapter.
        task: Of the model and the rows.
        read: Reads float weights.
        calibration: Its batch is the model's input.
        forward: Runs the model over a batch; returns the inputs of the head over the vocabulary [targets, hidden],
            or None where the model has no such head.
        only: Names of the layers that get other codes; None: all of them.

    Raises:
        ModelError: an input of a layer is not finite.
    """
    batch = calibration.batch
    head = model.get_output_embeddings()
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, QuantLinear) and module is not head and (only is None or name in only)
    }
    dtype = product_dtype()
    with _FirstCalls(layers, _token_masks(batch, task), read, dtype, calibration.progress):
        hidden = forward(model, batch)
    if hidden is not None and isinstance(head, QuantLinear) and only is None:
        _calibrate_head(model, head, input_curvature(hidden, dtype, "the head"), read)


class _FirstCalls:
    """Hooks that choose the codes of each layer at its first call while inside, from the input of that call."""

    def __init__(
        self,
        layers: dict[str, QuantLinear],
        masks: dict[int, Tensor],
        read: ReadWeight,
        dtype: torch.dtype,
        progress: Progress,
    ) -> None:
        self._masks, self._read, self._dtype = masks, read, dtype
        self._steps = iter(track(progress, "GPTQ calibration", range(len(layers)), len(layers)))
        self._last_input: tuple[Tensor, Curvature] | None = None
        """Input and curvature of the last layer: several projections have the same input."""
        self._handles: dict[str, list[RemovableHandle]] = {
            name: [
                layer.register_forward_pre_hook(lambda layer, x, name=name: self._before(name, layer, x[0])),
                layer.register_forward_hook(lambda _, __, y, name=name: self._after(name, y)),
            ]
            for name, layer in layers.items()
        }

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name in list(self._handles):
            self._remove(name)

    def _before(self, name: str, layer: Any, x: Tensor) -> Tensor:
        if self._last_input is None or self._last_input[0] is not x:
            rows = x.reshape(-1, x.shape[-1])
            mask = self._masks.get(len(rows))
            self._last_input = None  # its matrices are as large as those that follow
            self._last_input = x, input_curvature(rows if mask is None else rows[mask], self._dtype, name)
        weight, nearest = self._read(f"{name}.weight", slice(None)), layer.codes()
        if nearest.fine is None:
            layer.set_codes(gptq_quantize(weight, self._last_input[1], nearest))
        else:
            layer.set_codes(quantize_finely(weight.numpy(), nearest.block_size))
        next(self._steps, None)
        return x.to(self._dtype)  # only the next layers read the product with the new codes

    def _after(self, name: str, y: Tensor) -> Tensor:
        self._remove(name)
        return y.float()

    def _remove(self, name: str) -> None:
        for handle in self._handles.pop(name):
            handle.remove()


def input_curvature(inputs: Tensor, dtype: torch.dtype, name: str) -> Curvature:
    """Return the curvature of a layer's output error from its inputs, float32 [inputs, K], rounded to `dtype`.

    Raises:
        ModelError: an input is not finite.
    """
    inputs, before = inputs.to(dtype).float(), torch.get_float32_matmul_precision()
    # Products of bfloat16 numbers are exact and are added in float32 at this precision, three times as fast.
    torch.set_float32_matmul_precision("medium" if dtype == torch.bfloat16 else before)
    try:
        return Curvature.of(_gram(inputs))
    except ValueError as error:
        raise ModelError(f"the input of {name} is not finite: the model's weights are damaged") from error
    finally:
        torch.set_float32_matmul_precision(before)


def _calibrate_head(model: Any, head: QuantLinear, curvature: Curvature, read: ReadWeight) -> None:
    """Choose the codes of the output layer, and of the embedding that is tied to it, a few rows at a time."""
    embedding = model.get_input_embeddings()
    tied = isinstance(embedding, QuantEmbedding) and embedding.qweight is head.qweight
    source = embedding if tied else head
    name = next(name for name, module in model.named_modules() if module is source)
    nearest = head.codes()
    parts = (slice(start, start + _HEAD_ROWS) for start in range(0, head.out_features, _HEAD_ROWS))
    codes = [gptq_quantize(read(f"{name}.weight", rows), curvature, nearest.rows(rows)) for rows in parts]
    head.set_codes(Codes.concatenate(codes))
    if tied:
        for buffer in BUFFERS:
            setattr(embedding, buffer, getattr(head, buffer))


def _token_masks(batch: Batch, task: Task) -> dict[int, Tensor]:
    """Return which positions are no padding, by their number: those of prompts, and of an encoder-decoder's answers.

    A layer's input is recognised by its number of positions: where prompts and answers have as many, a position is
    left out only if it is padding in both.
    """
    prompts = torch.from_numpy(batch["attention_mask"]).bool().flatten()
    masks = {len(prompts): prompts}
    if task == "text2text-generation":
        answers = torch.from_numpy(batch["labels"] != IGNORED).flatten()
        masks[len(answers)] = answers | masks.get(len(answers), torch.zeros_like(answers))
    return masks


def _gram(inputs: Tensor) -> Tensor:
    """Return inputsᵀ inputs [K, K] of inputs [n, K]; its upper half is not computed but copied."""
    columns = inputs.shape[1]
    found, size = torch.empty(columns, columns), -(-columns // _GRAM_PARTS)
    for start in range(0, columns, size):
        end = min(start + size, columns)
        torch.matmul(inputs[:, start:end].T, inputs[:, :end], out=found[start:end, :end])
        found[:start, start:end] = found[start:end, :start].T
    return found
