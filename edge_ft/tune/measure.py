"""What training on a few batches takes: seconds and bytes by the padded tokens of a batch.

A few rows, a typical batch and the longest batch of the run's own are trained on and forgotten. Time and memory grow
about evenly with the padded tokens of a batch (attention is computed in tiles, logits where there is a label), so
these sizes give both for every batch of the run; where the longest would not fit, it is foreseen from the others.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from edge_ft.config import TEXT_TASKS, Task, TuneConfig
from edge_ft.data import Batch, Example, collate, train_batches
from edge_ft.evaluate.scoring import Answerer
from edge_ft.system import Available, PeakMemory, release_memory, resident_bytes
from edge_ft.tune.loop import Backend, planned_steps
from edge_ft.tune.prepare import Prepared

__all__ = ["Curve", "Measured", "batches_of", "measure", "padded"]


@dataclass(frozen=True)
class Curve:
    """Something that grows with the padded tokens of a batch: measured at some sizes, straight between and beyond."""

    sizes: list[int]
    """Tokens, growing."""
    values: list[float]

    def at(self, tokens: float) -> float:
        sizes, values = self.sizes, self.values
        if tokens <= sizes[0]:
            return values[0]
        if tokens <= sizes[-1]:
            return float(np.interp(tokens, sizes, values))
        slope = max((values[-1] - values[-2]) / (sizes[-1] - sizes[-2]), 0.0) if len(sizes) > 1 else 0.0
        return max(values) + slope * (tokens - sizes[-1])


@dataclass(frozen=True)
class Measured:
    """What was found out about one setting on this machine."""

    step: Curve
    """Seconds of forward and backward over a batch."""
    look: Curve
    """Seconds of a forward pass that scores a batch."""
    report: float
    """How many times as long as that the report takes over it, in float32."""
    token: float
    """Seconds of a generated token."""
    memory: Curve
    """Resident bytes at the peak of a step."""
    held: int
    """The most resident bytes before the first step: where loading takes more than training."""
    answering: int
    """Bytes that scoring and answering for the report come to, on top of what is held then."""
    trainable: int
    """Parameters."""


def batches_of(config: TuneConfig, train: Sequence[Example]) -> list[list[int]]:
    """The batches that the run will train on, those of at most three epochs: later ones are like them."""
    lengths = [len(example.input_ids) for example in train]
    count = planned_steps(len(train), config) * config.gradient_accumulation
    found: list[list[int]] = []
    for epoch in range(3):
        if len(found) < count:
            found += train_batches(lengths, config.rows_at_once, config.seed, epoch)
    return found[:count]


def padded(batch: Sequence[int], examples: Sequence[Example], task: Task) -> int:
    """Tokens of a batch with its padding: of both texts, or of what is read and what is answered to it."""
    rows = [examples[index] for index in batch]
    longest = max(len(row.input_ids) for row in rows) + max(len(row.pair_ids) for row in rows)
    if task == "text2text-generation":
        longest += max(len(row.labels) for row in rows)
    return len(batch) * longest


def measure(
    backend: Backend,
    scorer: Answerer,
    prepared: Prepared,
    config: TuneConfig,
    pad_id: int,
    available: Available,
    held: int,
) -> Measured:
    """Train on a few short rows, a typical batch and the longest, or as much of them as surely fits, and forget it."""
    train = prepared.examples["train"]

    def size(indices: Sequence[int]) -> int:
        return padded(indices, train, prepared.task)

    batches = sorted(batches_of(config, train), key=size)
    few, typical, longest = batches[0][: max(1, len(batches[0]) // 4)], batches[len(batches) // 2], batches[-1]

    def collated(indices: Sequence[int]) -> Batch:
        return collate([train[index] for index in indices], pad_id, prepared.task)

    def timed(work: Callable[[], object]) -> tuple[float, int]:
        """Seconds, and the bytes that were held in between on top of what was held before."""
        before = resident_bytes()
        with PeakMemory() as peak:
            began = time.perf_counter()
            work()
            seconds = time.perf_counter() - began
        return seconds, peak.bytes - before

    def trained(batch: Batch) -> tuple[float, int]:
        before = resident_bytes()
        seconds, more = timed(lambda: backend.gradient(batch, 1))
        backend.discard()
        return seconds, before + more

    trained(collated(few))  # the first pass also pays for what is set up once, and dequantizes what is kept
    release_memory()
    idle = resident_bytes()
    taken: list[Batch] = []
    sizes, steps, looks, memory = [0], [0.0], [0.0], [float(idle)]
    for indices in (few, typical, longest):
        if len(sizes) > 1:
            # No more rows than would fit if all that was taken so far were due to the tokens.
            tokens = sizes[-1] * (available.memory_bytes - idle) / max(memory[-1] - idle, 1)
            indices = indices[: max(int(tokens * len(indices) / size(indices)), 0)]
            if not indices or size(indices) <= sizes[-1]:
                continue
        batch = collated(indices)
        seconds, most = trained(batch)
        sizes.append(size(indices))
        steps.append(seconds)
        memory.append(most)
        looks.append(timed(lambda scored=batch: backend.token_nll(scored))[0])  # type: ignore[misc]
        taken.append(batch)
    scorer.token_nll(taken[0])
    seconds, answering = timed(lambda: scorer.token_nll(taken[len(taken) // 2]))
    report, token = seconds / looks[1 + len(taken) // 2], 0.0
    if prepared.task in TEXT_TASKS:
        example = train[few[0]]
        answers: list[list[int]] = []
        prompt = example.input_ids[: example.prompt_length]
        seconds, more = timed(lambda: answers.append(scorer.answer(prompt, 4)))
        token, answering = seconds / (len(answers[0]) + 1), max(answering, more)
    trainable = sum(array.size for name, array in backend.state().items() if name.startswith("parameters."))
    first = 1 if len(sizes) > 2 else 0  # of no tokens only memory is known; it takes the place of a second size
    return Measured(
        Curve(sizes[first:], steps[first:]),
        Curve(sizes[first:], looks[first:]),
        report,
        token,
        Curve(sizes, memory),
        held,
        answering,
        trainable,
    )
