"""What a training is of: settings, base, tokenizer and rows, found and checked before any weight is loaded."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from edge_ft.config import TuneConfig
from edge_ft.data import TextTokenizer
from edge_ft.errors import ModelError
from edge_ft.families import family_of
from edge_ft.progress import Progress
from edge_ft.tune.prepare import Prepared, prepare

if TYPE_CHECKING:
    from edge_ft.models.base_model import Base

__all__ = ["Job", "prepare_job"]


@dataclass(frozen=True)
class Job:
    """A training that could begin."""

    config: TuneConfig
    """The settings, with the family's recipe where the user left them open."""
    base: "Base"
    tokenizer: TextTokenizer
    prepared: Prepared


def prepare_job(config: TuneConfig, progress: Progress, base: "Base | None" = None) -> Job:
    """Find the base, complete the settings with its family's recipe, and prepare the rows for it.

    Args:
        config: As the user gave it.
        progress: Gets the task that was guessed, the audit's findings and the number of rows.
        base: The model of `config`, where the caller has found it already.

    Returns:
        The job.

    Raises:
        ModelError: no such model, a family or task that is not supported, or a tokenizer of another model.
        DataError: rows that cannot be read or mapped, or a split that stays empty.
        AuditRefused: a finding that refuses the rows and that --allow does not name.
        UsageError: options that do not fit the rows.
    """
    if base is None:
        from edge_ft.models.base_model import find_base

        base = find_base(config.model, config.task)
    config, tokenizer = base.family.resolve(config), TextTokenizer.load(base.path)
    prepared = prepare(config, base, tokenizer, progress)
    family_of(base.family.name, prepared.task)  # a guessed task too
    longest = max(max(example.input_ids) for rows in prepared.examples.values() for example in rows)
    if longest >= base.dims.vocabulary:
        raise ModelError(f"{base.path}: its tokenizer gives id {longest}, its model knows {base.dims.vocabulary}")
    return Job(config, base, tokenizer, prepared)
