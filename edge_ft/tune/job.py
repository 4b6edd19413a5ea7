"""A training before its weights are loaded: settings, base, tokenizer and rows, found and checked."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from edge_ft.config import TuneConfig
from edge_ft.data import TextTokenizer, batch_tokens, train_batches
from edge_ft.errors import ModelError, UsageError
from edge_ft.evaluate.scoring import Batching
from edge_ft.progress import Progress
from edge_ft.tune.loop import planned_steps
from edge_ft.tune.prepare import Prepared, prepare

if TYPE_CHECKING:
    from edge_ft.models.base_model import Base

__all__ = ["Job", "prepare_job", "refuse_other"]

IDENTITY = {
    "content_sha256": "--model holds other weights",
    "codes_sha256": "--model rounds to other codes",
    "data_fingerprint": "--data holds other rows",
    "rows": "--data is split differently",
    "examples_sha256": "--data reads differently (another tokenizer or template)",
}
"""Values of a run's identity that must not change, and the message if they do."""


@dataclass(frozen=True)
class Job:
    """A training that could begin."""

    config: TuneConfig
    """The settings; what the user left open is resolved, but for `memory` and `compute`."""
    base: "Base"
    tokenizer: TextTokenizer
    prepared: Prepared

    def with_settings(self, **settings: Any) -> "Job":
        """Return the job with some settings replaced."""
        return replace(self, config=replace(self.config, **settings))

    @property
    def identity(self) -> dict[str, Any]:
        """Names and hashes of model and rows, by which a resumed run is recognized."""
        return {
            "model": self.base.name,
            "data": self.config.data,
            "content_sha256": self.base.content_sha256,
            "data_fingerprint": self.prepared.fingerprint,
            "rows": self.prepared.counts,
            "examples_sha256": self.prepared.examples_sha256,
        }

    @property
    def steps(self) -> int:
        """Optimizer steps, before any limit of time."""
        return planned_steps(len(self.prepared.examples["train"]), self.config)

    @property
    def batching(self) -> Batching:
        """How the rows become batches."""
        return Batching(self.prepared.task, self.tokenizer.pad_id, self.config.rows_at_once)

    @cached_property
    def batches(self) -> list[list[int]]:
        """The batches of the first three epochs, as indices of train rows; those of later epochs are alike."""
        lengths = [len(example.input_ids) for example in self.prepared.examples["train"]]
        count = self.steps * self.config.gradient_accumulation
        found: list[list[int]] = []
        for epoch in range(3):
            if len(found) < count:
                found += train_batches(lengths, self.config.rows_at_once, self.config.seed, epoch)
        return found[:count]

    @cached_property
    def batch_tokens(self) -> list[int]:
        """`batch_tokens` of each of `batches`."""
        train, task = self.prepared.examples["train"], self.prepared.task
        return [batch_tokens(batch, train, task) for batch in self.batches]


def prepare_job(config: TuneConfig, progress: Progress, saved: Mapping[str, Any] | None = None) -> Job:
    """Find the base, complete the settings with its family's recipe, and prepare the rows for it.

    Args:
        config: As the user gave it, or as an interrupted run saved it.
        progress: Gets the inferred task, the audit's findings and the number of rows.
        saved: `Job.identity` of the interrupted run to resume, if any.

    Returns:
        The job.

    Raises:
        ModelError: no such model, a family or task that is not supported, or a tokenizer of another model.
        DataError: rows that cannot be read or mapped, or a split that stays empty.
        AuditRefused: a finding that refuses the rows and that --allow does not name.
        UsageError: options that do not fit the rows, or a model or rows that are not those of `saved`.
    """
    from edge_ft.models.base_model import find_base

    # The task of an interrupted run is not required here: another model is to be refused as such.
    base = find_base(config.model, config.task if saved is None else None)
    refuse_other(saved, {"content_sha256": base.content_sha256}, str(config.out))
    config, tokenizer = base.family.resolve(config), TextTokenizer.load(base.path)
    prepared = prepare(config, base, tokenizer, progress)
    longest = max(max(example.input_ids) for rows in prepared.examples.values() for example in rows)
    if longest >= base.dims.vocabulary:
        raise ModelError(f"{base.path}: its tokenizer gives id {longest}, its model knows {base.dims.vocabulary}")
    job = Job(config, base, tokenizer, prepared)
    refuse_other(saved, job.identity, str(config.out))
    return job.with_settings(task=prepared.task, max_length=prepared.rendering.max_length)


def refuse_other(saved: Mapping[str, Any] | None, found: Mapping[str, Any], run: str) -> None:
    """Refuse to resume a run with another model or other rows.

    Args:
        saved: `Job.identity` of the interrupted run; None where there is none.
        found: Some or all of these values today.
        run: Path of the run folder, for the message.

    Raises:
        UsageError: a value differs; the message names it.
    """
    if saved is None:
        return
    for name, what in IDENTITY.items():
        if name in found and found[name] != saved[name]:
            raise UsageError(
                f"{what} than at the start of {run} ({saved['model']}, {saved['data']}): "
                "resume it with the same model and rows, or give another --out"
            )
