"""What every verification says of the models that it compares, with torch and without."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

from edge_ft.artifacts import RunFolder
from edge_ft.config import Task
from edge_ft.data import Example, Rendering, Row, TextTokenizer, fingerprint
from edge_ft.evaluate.gate import Limits
from edge_ft.evaluate.scoring import Batching, RowScores, Scorer, score, summary
from edge_ft.progress import Progress

__all__ = ["ExportRows", "Scored", "compared_figures", "score_rows", "test_scores"]


@dataclass(frozen=True)
class ExportRows:
    """The rows that an export reads."""

    validation: list[Example]
    """Scored by verification, and decide whether the export is refused."""
    test: list[Example]
    calibration: list[Example]
    """Train rows for the ranges of int8-static or the codes of int4; none for other weights."""
    read: list[Row]
    """The validation rows as they were given, with those that have no answer to score."""
    train: list[Example] = field(default_factory=list)
    """What --finish trains on."""
    split: tuple[float, float, float] | None = None
    """Shares by which the rows were split here; None: the validation rows are those that were given, or the run's."""

    @property
    def sha256(self) -> str | None:
        """Fingerprint of the validation rows."""
        return fingerprint(self.read) if self.read else None

    def first(self, count: int) -> "ExportRows":
        """Return the same rows with the first validation rows alone."""
        if count >= len(self.validation):
            return self
        last = self.validation[count - 1].row
        read = [row for row in self.read if row.number <= last]
        return replace(self, validation=self.validation[:count], read=read)


class Scored(Protocol):
    """What is exported, as far as its rows are scored."""

    @property
    def task(self) -> Task:
        """The task."""

    @property
    def tokenizer(self) -> TextTokenizer:
        """What reads texts."""

    @property
    def rendering(self) -> Rendering:
        """How rows are read."""

    @property
    def rows(self) -> ExportRows:
        """What is scored."""

    @property
    def run(self) -> RunFolder | None:
        """The run; None for a model or adapter from elsewhere."""


def score_rows(source: Scored, scorer: Scorer, examples: list[Example], progress: Progress, stage: str) -> RowScores:
    """Return the scores of examples of the source's rows; `stage` names the work for `progress`."""
    return score(scorer, examples, Batching(source.task, source.tokenizer.pad_id), progress, stage)


def compared_figures(source: Scored, compared: dict[str, RowScores | None], limits: Limits) -> dict[str, Any]:
    """Return what every `verification` has of the models that are compared; the gate's figures are None until known."""
    return {
        "rows": len(source.rows.validation),
        "rows_sha256": source.rows.sha256,
        "rows_read": len(source.rows.read),
        "rows_split": source.rows.split and list(source.rows.split),
        "nll": {name: None if found is None else found.mean_nll for name, found in compared.items()},
        "quantization_tax": None,
        "tax_interval": None,
        "retained_gain": None,
        "argmax_agreement": None,
        "metrics": _compared_metrics(source, compared),
        "limits": asdict(limits),
    }


def _compared_metrics(source: Scored, compared: dict[str, RowScores | None]) -> dict[str, dict[str, Any]]:
    """Return each task metric on the validation rows, of all that is compared."""
    metrics = {
        column: summary(scores, source.rows.validation, source.task, source.rendering.labels)["metrics"]
        for column, scores in compared.items()
        if scores is not None
    }
    names = dict.fromkeys(name for found in metrics.values() for name in found)
    return {name: {column: found[name] for column, found in metrics.items() if name in found} for name in names}


def test_scores(
    source: Scored, scorer: Scorer, compared: Mapping[str, RowScores], progress: Progress
) -> dict[str, Any] | None:
    """Return what ships on the test rows, beside the scores of base and trained model.

    Args:
        source: What is exported.
        scorer: What ships.
        compared: Scores of `base` and `trained` on the test rows of a model; a run has them in its report.
        progress: Receives the rows that are done.

    Returns:
        The manifest's `test`; None without such rows.
    """
    test, labels = source.rows.test, source.rendering.labels
    if not test:
        return None
    nll: dict[str, float | None] = {name: scores.mean_nll for name, scores in compared.items()}
    columns = {name: summary(scores, test, source.task, labels)["metrics"] for name, scores in compared.items()}
    if source.run is not None:
        report = source.run.report()
        for name, column in (("base", "test_base"), ("trained", "test")):
            nll[name] = report["nll"][column]
            # A metric that its rows left undefined is missing from reports of earlier versions.
            columns[name] = {metric: values.get(column) for metric, values in report["metrics"].items()}
    shipped = summary(score_rows(source, scorer, test, progress, "test rows, as shipped"), test, source.task, labels)
    return {
        "rows": len(test),
        "nll": {"base": nll.get("base"), "trained": nll.get("trained"), "shipped": shipped["nll"]},
        "metrics": {
            name: {**{column: columns.get(column, {}).get(name) for column in ("base", "trained")}, "shipped": value}
            for name, value in shipped["metrics"].items()
        },
    }
