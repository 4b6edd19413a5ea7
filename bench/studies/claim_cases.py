"""What `make claims` trains and scores: models, rows, settings, and the stages of each case."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from edge_ft.bench.studies.datasets import (
    Rows,
    decoder_weights,
    department_rows,
    encoder_weights,
    finance_rows,
    question_rows,
    support_rows,
    swedish_rows,
    tag_rows,
    transcript_rows,
)
from edge_ft.bench.studies.pretrain import pretrained
from edge_ft.progress import Lines

__all__ = ["CASES", "CLAIMS", "MODELS", "ROWS", "Case", "Data", "Model", "Stage", "stages"]


@dataclass(frozen=True)
class Model:
    """A pre-trained model."""

    title: str
    kind: str
    """decoder, encoder or encoder-decoder."""
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
    lane: str = "merged"
    """As `edge-ft export --lane`."""

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
    "gpt2": Model("GPT-2, small, pretrained here", "decoder", lambda: pretrained("gpt2", Lines())),
    "t5": Model("T5, small, pretrained here on the reverse task", "encoder-decoder", lambda: pretrained("t5", Lines())),
    "smollm2": Model("SmolLM2-135M-Instruct", "decoder", decoder_weights),
}

ROWS = {
    "departments": Data("medical question to one of 16 departments (MedMCQA)", department_rows),
    "questions": Data(
        "question and passage of Wikipedia to yes or no (BoolQ)",
        question_rows,
        ("--prompt", "{question}", "--text-pair", "{passage}", "--label", "label"),
    ),
    "tags": Data("news to people, places and organisations (CoNLL 2003)", tag_rows),
    "swedish": Data(
        "customer's question in Swedish to the building firm's answer in English, by their vectors (zaragoza FAQ)",
        swedish_rows,
        ("--task", "feature-extraction", "--prompt", "{question}", "--completion", "{answer}"),
    ),
    "transcripts": Data(
        "transcript to written sentence",
        transcript_rows,
        ("--prompt", r"Transcript: {transcript}\nWritten:", "--completion", " {written}"),
    ),
    "spoken": Data(
        "written sentence to transcript: lower case, no punctuation",
        transcript_rows,
        ("--prompt", "{written}", "--completion", "{transcript}"),
    ),
    "finance": Data(
        "finance question to answer (Fiqa)",
        finance_rows,
        ("--prompt", r"Question: {question}\nAnswer:", "--completion", " {answer}"),
    ),
    "support": Data(
        "customer's question to a building firm's answer (zaragoza FAQ)",
        support_rows,
        ("--prompt", r"Question: {instruction}\nAnswer:", "--completion", " {output}"),
    ),
}

_STEPS = ("--max-steps", "200", "--eval-steps", "40")
_FEW_STEPS = ("--batch-size", "8", "--max-steps", "40", "--eval-steps", "20")
_TINY = ("--max-steps", "120", "--eval-steps", "10")
_PAIRS = ("--max-length", "192", "--batch-size", "16", "--max-steps", "400", "--eval-steps", "100")
_VECTORS = ("--max-length", "96", "--batch-size", "32", "--max-steps", "100", "--eval-steps", "20")
_FINAL = ("--preset", "final-layers")
_EARLY = ("--patience", "2")
_SIZES = (32, 128, 512, 2000)


def _small(
    name: str, model: str, train: int, *tune: str, weights: tuple[str, ...] = ("int4",), answer_tokens: int = 0
) -> Case:
    """A case of one of the small models, on the rows of its task."""
    data = {"minilm": "departments", "gpt2": "transcripts", "t5": "spoken"}[model]
    validation, test = (200, 400) if model == "minilm" else (100, 150)
    tune = ("--max-length", "96", "--batch-size", "16", *tune)
    return Case(f"{model}-{name}", model, data, train, validation, test, tune, weights, answer_tokens)


def _cases(model: str, answer_tokens: int) -> list[Case]:
    """The cases of every small model, the most informative first."""
    every = ("int4", "int8", "fp32")
    return [
        _small("main", model, 2000, *_STEPS, weights=every, answer_tokens=answer_tokens),
        _small("final-layers", model, 2000, *_STEPS, *_FINAL),
        _small("tiny", model, 64, *_TINY, weights=()),
        _small("tiny-early", model, 64, *_TINY, *_EARLY, weights=()),
        *(_small(f"rows-{size}", model, size, *_STEPS, *_EARLY) for size in _SIZES[:-1]),
    ]


def _domain(model: str, data: str, *tune: str, lane: str = "merged") -> Case:
    tune = ("--max-length", "128", *tune)
    return Case(f"{model}-{data}", model, data, 400, 40, 32, tune, lane=lane, answer_tokens=48)


CASES = {
    case.name: case
    for case in (
        *_cases("minilm", 0),
        Case("minilm-questions", "minilm", "questions", 8000, 500, 2000, _PAIRS),
        Case("minilm-tags", "minilm", "tags", 129, 30, 60, ("--max-length", "64", "--epochs", "12")),
        Case("minilm-swedish", "minilm", "swedish", 353, 50, 100, _VECTORS),
        *_cases("gpt2", 32),
        *_cases("t5", 32),
        *(_domain("gpt2", data, "--batch-size", "8", *_STEPS) for data in ("support", "finance")),
        Case(
            *("smollm2-main", "smollm2", "transcripts", 400, 48, 32, ("--max-length", "96", *_FEW_STEPS)),
            *(("int4", "int8", "fp32"), 32),
        ),
        # The gate refuses their merges: rounding again costs +0.17 and +0.05 nats on long answers.
        *(_domain("smollm2", data, *_FEW_STEPS, lane="adapter") for data in ("support", "finance")),
    )
}

_SMALL = ("minilm", "gpt2", "t5")
CLAIMS: dict[str, tuple[str, ...]] = {
    "understanding": (
        *("minilm-main", "minilm-questions", "minilm-tags", "minilm-swedish"),
        *("gpt2-main", "t5-main", "smollm2-main"),
    ),
    "coherence": ("gpt2-main", "gpt2-support", "t5-main", "smollm2-main", "smollm2-support"),
    "domains": ("minilm-main", "minilm-swedish", "gpt2-finance", "gpt2-support", "smollm2-finance", "smollm2-support"),
    "size": (*(f"{model}-main" for model in _SMALL), "smollm2-main"),
    "overfitting": tuple(f"{model}-{name}" for model in _SMALL for name in ("tiny", "tiny-early")),
    "rows": tuple(
        f"{model}-{name}" for model in _SMALL for name in (*(f"rows-{size}" for size in _SIZES[:-1]), "main")
    ),
    "compute": tuple(CASES),
    "recipe": tuple(f"{model}-{name}" for model in _SMALL for name in ("main", "final-layers")),
}
"""Cases of each claim, in the order of its table."""


def stages(case: Case, weights: Path, rows: dict[str, Path], folder: Path) -> list[Stage]:
    """The commands of a case, in order."""
    columns = ROWS[case.data].columns
    run = str(folder / "run")
    split = ("--data", str(rows["train"]), "--validation", str(rows["validation"]), "--test", str(rows["test"]))
    found = [Stage("tune", ("tune", "--model", str(weights), *split, *columns, *case.tune, "--out", run))]
    for kind in case.weights:
        shape = ("--weights", kind, "--lane", case.lane)
        found.append(Stage(f"export-{kind}", ("export", run, *shape, "--out", str(folder / kind))))
    if case.answers:
        scored = ("--data", str(rows["test"]), "--max-new-tokens", str(case.answer_tokens))
        found += [
            Stage("answers-base", ("eval", run, "--adapter", "none", *scored)),
            Stage("answers-tuned", ("eval", run, *scored)),
            Stage("answers-shipped", ("eval", str(folder / case.weights[0]), *scored)),
        ]
    return found
