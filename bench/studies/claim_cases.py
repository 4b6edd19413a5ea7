"""What `make claims` trains and scores: models, rows, settings, and the stages of each case."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from edge_ft.bench.studies.datasets import (
    Rows,
    decoder_weights,
    department_rows,
    encoder_weights,
    support_rows,
    tag_rows,
    transcript_rows,
)

__all__ = ["CASES", "CLAIMS", "MODELS", "ROWS", "Case", "Data", "Model", "Stage", "stages"]


@dataclass(frozen=True)
class Model:
    """A pre-trained model."""

    title: str
    kind: str
    """decoder or encoder."""
    weights: Callable[[], Path]


@dataclass(frozen=True)
class Data:
    """Rows, and how a decoder reads them."""

    title: str
    rows: Callable[[], Rows]
    columns: tuple[str, ...] = ()


@dataclass(frozen=True)
class Case:
    """One training, its exports, and the answers that are scored."""

    name: str
    model: str
    data: str
    train: int
    validation: int
    test: int
    tune: tuple[str, ...]
    """Flags of `edge-ft tune`."""
    weights: tuple[str, ...] = ("int4",)
    """Formats that it is exported to, the first one is what ships; none where only the training counts."""
    answer_tokens: int = 0
    """Longest answer to a test row, of base, tuned and shipped; 0: no answers are generated."""

    @property
    def answers(self) -> bool:
        """Whether answers to the test rows are scored."""
        return self.answer_tokens > 0


@dataclass(frozen=True)
class Stage:
    """One command of edge-ft; its JSON is kept as NAME.json in the case's folder."""

    name: str
    arguments: tuple[str, ...]
    """Paths are below the case's folder."""


MODELS = {
    "minilm": Model("MiniLM-L6 (BERT, 22.7 M)", "encoder", encoder_weights),
    "smollm2": Model("SmolLM2-135M-Instruct", "decoder", decoder_weights),
}

ROWS = {
    "departments": Data("medical question to one of 16 departments (MedMCQA)", department_rows),
    "tags": Data("news to people, places and organisations (CoNLL 2003)", tag_rows),
    "transcripts": Data(
        "transcript to written sentence",
        transcript_rows,
        ("--prompt", r"Transcript: {transcript}\nWritten:", "--completion", " {written}"),
    ),
    "support": Data(
        "customer's question to a building firm's answer (zaragoza FAQ)",
        support_rows,
        ("--prompt", r"Question: {instruction}\nAnswer:", "--completion", " {output}"),
    ),
}

_EVERY = ("int4", "int8", "fp32")
_TUNE = ("--max-length", "96", "--batch-size", "16", "--max-steps", "120")
"""The same number of steps for every case on departments, so that recipes and sizes can be compared."""
_SIZES = (32, 64, 128)


def _departments(name: str, train: int, *tune: str, weights: tuple[str, ...] = ("int4",)) -> Case:
    return Case(f"minilm-{name}", "minilm", "departments", train, 200, 400, (*_TUNE, *tune), weights)


CASES = {
    case.name: case
    for case in (
        # The right answers to test rows have at most 98 tokens: a limit below counts right answers as endless ones.
        Case(
            *("smollm2-support", "smollm2", "support", 400, 40, 32, ("--max-length", "128")),
            *(("int4",), 128),
        ),
        _departments("main", 2000, "--eval-steps", "20", weights=_EVERY),
        Case("minilm-tags", "minilm", "tags", 129, 30, 60, ("--max-length", "64", "--epochs", "12")),
        Case(
            *("smollm2-main", "smollm2", "transcripts", 400, 48, 32, ("--max-length", "96")),
            *(_EVERY, 32),
        ),
        *(_departments(f"rows-{size}", size, "--eval-steps", "10", "--patience", "2") for size in _SIZES),
        _departments("final-layers", 2000, "--eval-steps", "20", "--preset", "final-layers"),
    )
}

_GROWING = (*(f"minilm-rows-{size}" for size in _SIZES), "minilm-main")
CLAIMS: dict[str, tuple[str, ...]] = {
    "understanding": ("minilm-main", "minilm-tags", "smollm2-main"),
    "coherence": ("smollm2-main", "smollm2-support"),
    "domains": ("minilm-main", "smollm2-support"),
    "size": ("minilm-main", "smollm2-main"),
    "overfitting": _GROWING,
    "rows": _GROWING,
    "compute": tuple(CASES),
    "recipe": ("minilm-main", "minilm-final-layers"),
}
"""Cases of each claim, in the order of its table."""


def stages(case: Case, weights: Path, rows: dict[str, Path], folder: Path) -> list[Stage]:
    """The commands of a case, in order."""
    columns = ROWS[case.data].columns
    run = str(folder / "run")
    split = ("--data", str(rows["train"]), "--validation", str(rows["validation"]), "--test", str(rows["test"]))
    found = [Stage("tune", ("tune", "--model", str(weights), *split, *columns, *case.tune, "--out", run))]
    for kind in case.weights:
        shape = ("--weights", kind, "--lane", "merged", "--out", str(folder / kind))
        found.append(Stage(f"export-{kind}", ("export", run, *shape)))
    if case.answers:
        scored = ("--data", str(rows["test"]), "--max-new-tokens", str(case.answer_tokens))
        found += [
            Stage("answers-base", ("eval", run, "--adapter", "none", *scored)),
            Stage("answers-tuned", ("eval", run, *scored)),
            Stage("answers-shipped", ("eval", str(folder / case.weights[0]), *scored)),
        ]
    return found
