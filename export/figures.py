"""What every verification says of the models that it compares, with torch and without."""

from dataclasses import asdict, dataclass, replace
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
    """Training rows for the ranges of int8-static or the codes of int4; none for other weights."""
    read: list[Row]
    """The validation rows as they were given, with those that have no answer to score."""

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


def test_scores(source: Scored, scorer: Scorer, progress: Progress) -> dict[str, Any] | None:
    """Return what ships on the run's test rows, beside the run's own scores of base and trained model.

    Args:
        source: What is exported.
        scorer: What ships.
        progress: Receives the rows that are done.

    Returns:
        The manifest's `test`; None without such rows.
    """
    test = source.rows.test
    if source.run is None or not test:
        return None
    report = source.run.report()
    scores = score_rows(source, scorer, test, progress, "test rows, as shipped")
    shipped = summary(scores, test, source.task, source.rendering.labels)
    return {
        "rows": len(test),
        "nll": {"base": report["nll"]["test_base"], "trained": report["nll"]["test"], "shipped": shipped["nll"]},
        "metrics": {
            name: {
                # A metric that its rows left undefined is missing from reports of earlier versions.
                "base": report["metrics"].get(name, {}).get("test_base"),
                "trained": report["metrics"].get(name, {}).get("test"),
                "shipped": value,
            }
            for name, value in shipped["metrics"].items()
        },
    }
