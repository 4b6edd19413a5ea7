"""Codes chosen over rows: each layer's when it is first called, over what it then reads.

One pass of all rows through the model is enough. When a layer's turn comes, those before it compute with their new
codes already, so that it is fitted to what it will really read; and only its own float weight is in memory.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from edge_ft.config import Task
from edge_ft.data import Batch, Example, collate
from edge_ft.data.example import IGNORED
from edge_ft.errors import ModelError
from edge_ft.progress import Progress, Silent, track
from edge_ft.quant.bf16 import has_bf16
from edge_ft.quant.blockwise import Codes
from edge_ft.quant.gptq import error_factor, round_over
from edge_ft.quant.layers import QuantEmbedding, QuantLinear

__all__ = ["Calibration", "calibrate", "choose_rows", "float_reader", "spread"]

T = TypeVar("T")

MOST_TOKENS = 4096
"""Padded tokens of the rows together: they pass through the model at once. Twice as many gave no more (015)."""
_ROWS = 4096
"""Rows of a head's weight that are float at a time."""


@dataclass
class Calibration:
    """Rows to choose codes over, and what that took."""

    batch: Batch
    progress: Progress
    seconds: float = 0.0
    cpu_seconds: float = 0.0

    def to_dict(self) -> dict[str, float]:
        """As the report holds it."""
        return {
            "rows": len(self.batch["rows"]),
            "seconds": round(self.seconds, 2),
            "cpu_seconds": round(self.cpu_seconds, 2),
        }


def spread(items: Sequence[T], count: int) -> list[T]:
    """At most `count` of the items, from the first to the last at even distances."""
    count = min(count, len(items))
    return [items[index * len(items) // count] for index in range(count)]


def choose_rows(
    examples: Sequence[Example], rows: int, pad_id: int, task: Task, progress: Progress | None = None
) -> Calibration | None:
    """At most so many of the examples, from all over them, and fewer where they are long; None where it is 0."""
    if rows == 0:
        return None

    def chosen(count: int) -> tuple[list[Example], int]:
        found = spread(examples, count)
        return found, max(len(ids) for e in found for ids in (e.input_ids, e.labels, e.pair_ids))

    found, longest = chosen(rows)
    while len(found) > 1 and len(found) * longest > MOST_TOKENS:
        found, longest = chosen(max(1, min(len(found) - 1, MOST_TOKENS // longest)))
    if task == "feature-extraction":  # only the first texts pass before all codes are chosen: let both kinds be there
        found[1::2] = [replace(e, input_ids=e.pair_ids, pair_ids=e.input_ids) for e in found[1::2]]
    batch = collate(found, pad_id, task)
    if task == "text-generation":  # the head is to be right about prompts too: of short answers there are few tokens
        batch["labels"] = np.where(batch["attention_mask"] == 1, batch["input_ids"], IGNORED)
    return Calibration(batch, progress or Silent())


@torch.no_grad()
def calibrate(
    model: Any,
    task: Task,
    read: Callable[[str, slice], Tensor],
    calibration: Calibration,
    forward: Callable[[Any, Batch], Tensor | None],
) -> None:
    """Choose the 4-bit codes of the linear layers of `model` anew, in place.

    The codes that a language model's embedding and head share are chosen as the head's, last: it is there that their
    errors cost most. An embedding by itself keeps its codes.

    Args:
        model: A task model with codes, on the CPU, without an adapter.
        task: Of the model and the rows.
        read: Gives some rows of the float parameter of a name.
        calibration: Rows that the model is to be right about: train rows.
        forward: Runs the model over a batch; returns what the head over the vocabulary reads [targets, hidden],
            or None where the model has no such head.

    Raises:
        ModelError: the model computes something that is not a number.
    """
    batch, began, cpu_began = calibration.batch, time.monotonic(), time.process_time()
    head = model.get_output_embeddings()
    layers = {
        name: module for name, module in model.named_modules() if isinstance(module, QuantLinear) and module is not head
    }
    masks = _masks(batch, task)
    waiting = iter(track(calibration.progress, "choosing codes", range(len(layers)), len(layers)))
    last: tuple[Any, Tensor] | None = None
    narrow = torch.bfloat16 if has_bf16(torch.device("cpu")) else torch.float32

    def first_call(name: str, layer: QuantLinear, x: Tensor) -> Tensor:
        nonlocal last
        if last is None or last[0] is not x:  # several projections read the same
            seen = x.reshape(-1, x.shape[-1])
            real = masks.get(len(seen))
            last = (x, _factor(seen if real is None else seen[real], narrow, name))
        layer.hold(round_over(read(f"{name}.weight", slice(None)), last[1], layer.codes()))
        next(waiting, None)
        return x.to(narrow)  # the product with the new codes goes on to the next layers only

    def forget(name: str) -> None:
        for handle in handles.pop(name):
            handle.remove()

    def done(name: str, y: Tensor) -> Tensor:
        forget(name)
        return y.float()

    handles: dict[str, list[RemovableHandle]] = {}
    for name, layer in layers.items():
        handles[name] = [
            layer.register_forward_pre_hook(lambda _, x, name=name, layer=layer: first_call(name, layer, x[0])),
            layer.register_forward_hook(lambda _, __, y, name=name: done(name, y)),
        ]
    try:
        hidden = forward(model, batch)
    finally:
        for name in list(handles):
            forget(name)
    if hidden is not None and isinstance(head, QuantLinear):
        _choose_head(model, head, _factor(hidden, narrow, "the head"), read)
    calibration.seconds = time.monotonic() - began
    calibration.cpu_seconds = time.process_time() - cpu_began


def _factor(inputs: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """`error_factor` of what a layer reads, float32 [inputs, K], in that dtype."""
    inputs, before = inputs.to(dtype).float(), torch.get_float32_matmul_precision()
    # Nothing is lost of numbers that bfloat16 holds: their products are added in float32, three times as fast.
    torch.set_float32_matmul_precision("medium" if dtype == torch.bfloat16 else before)
    try:
        return error_factor(inputs.T @ inputs)
    except ValueError as error:
        raise ModelError(f"what {name} reads is not a number: the model's weights are damaged") from error
    finally:
        torch.set_float32_matmul_precision(before)


def _choose_head(model: Any, head: QuantLinear, factor: Tensor, read: Callable[[str, slice], Tensor]) -> None:
    embedding = model.get_input_embeddings()
    tied = isinstance(embedding, QuantEmbedding) and embedding.qweight is head.qweight
    source = embedding if tied else head
    name = next(name for name, module in model.named_modules() if module is source)
    nearest = head.codes()
    parts = []
    for start in range(0, head.out_features, _ROWS):
        rows = slice(start, start + _ROWS)
        parts.append(round_over(read(f"{name}.weight", rows), factor, nearest.rows(rows)))
    head.hold(Codes.of_rows(parts))
    if tied:
        for buffer in ("qweight", "scales", "zero_points"):
            setattr(embedding, buffer, getattr(head, buffer))


def _masks(batch: Batch, task: Task) -> dict[int, Tensor]:
    """Which positions are no padding, by how many there are: those of the prompts, and of an encoder-decoder's answers.

    Where they are as many, what is padding in both.
    """
    prompts = torch.from_numpy(batch["attention_mask"]).bool().flatten()
    masks = {len(prompts): prompts}
    if task == "text2text-generation":
        answers = torch.from_numpy(batch["labels"] != IGNORED).flatten()
        masks[len(answers)] = answers | masks.get(len(answers), torch.zeros_like(answers))
    return masks


def float_reader(model: Any) -> Callable[[str, slice], Tensor]:
    """Gives some rows of a parameter that `model` has now, also after it was rounded."""
    floats = dict(model.named_parameters())
    return lambda name, rows: floats[name].detach()[rows]
