"""The tables of docs/claims.md, from the kept results; a cell that was not measured reads "not run"."""

from collections.abc import Callable, Iterator
from typing import Any

from edge_ft.bench.report import markdown_table
from edge_ft.bench.studies.claim_cases import CASES, CLAIMS, MODELS, ROWS, Case

__all__ = ["document"]

Results = dict[str, dict[str, Any]]
Row = tuple[str, ...]

NOT_RUN = "not run"
COLUMNS = ("base", "tuned", "shipped")
METRICS = {
    "departments": ("accuracy", "macro_f1"),
    "tags": ("span_f1",),
    "transcripts": ("chrf", "verbatim_match"),
    "support": ("chrf", "rougeL"),
}
"""The metrics of each data set's task."""

INTRODUCTION = """# Base, tuned and shipped models compared

`make claims` (`python -m edge_ft.bench.studies claims`) trains and scores every case below on real rows and writes
this page. A stopped run resumes, and `--only NAME` measures one claim.

- *Base* is the model before tuning (a classifier's head is untrained then), *tuned* is the model as trained, in torch,
  and *shipped* is the int4 ONNX bundle.
- Figures are on test rows unless a column says otherwise, with 95% intervals over rows in brackets. Test rows were not
  used to choose weights or settings. Losses are in nats per target token.
- *Better* and *worse* mean that the intervals of base and shipped do not overlap; a dash, that the figure has no
  interval or no value.
- *Refused by the [gate](glossary.md#gate)*: export refused the bundle because of its scores on validation rows. It was
  scored on the test rows all the same.
- Minutes are CPU minutes of one training, on a machine with {cores} cores.
- *Not run*: the case was not finished when this page was written.
"""


def document(results: Results, cores: int) -> str:
    """The whole page."""
    parts = [INTRODUCTION.format(cores=cores)]
    for number, name in enumerate(CLAIMS, 1):
        title, about, table = TABLES[name]
        header, *rows = table(results)
        parts.append(f"## {number}. {title} (`--only {name}`)\n\n{about}\n\n{markdown_table(header, rows)}")
    return "\n".join(parts)


def understanding(results: Results) -> Iterator[Row]:
    """The task's metrics before and after."""
    yield ("model", "task", "test rows", "metric", *COLUMNS, "shipped against base")
    for case in _cases("understanding"):
        for metric in METRICS[case.data]:
            yield (_model(case), _task(case), str(case.test), metric, *_compared(case, results, metric))


def coherence(results: Results) -> Iterator[Row]:
    """Whether answers end, and how they repeat."""
    yield ("model", "task", "figure", *COLUMNS, "shipped against base")
    for case in _cases("coherence"):
        yield (_model(case), _task(case), "held-out loss", *_compared(case, results, "nll"))
        for metric in ("eos_rate", "distinct_1", "distinct_2", "repetition_4"):
            yield (_model(case), _task(case), metric, *_compared(case, results, metric))


def domains(results: Results) -> Iterator[Row]:
    """Loss and metric of each domain."""
    yield ("domain", "model", "train rows", "figure", *COLUMNS, "shipped against base")
    names = {"departments": "healthcare", "support": "technical support"}
    for case in _cases("domains"):
        for metric in ("nll", *METRICS[case.data]):
            title = "held-out loss" if metric == "nll" else metric
            yield (
                names[case.data],
                _model(case),
                str(case.train),
                title,
                *_compared(case, results, metric),
            )


def size(results: Results) -> Iterator[Row]:
    """Bytes and score of every format."""
    yield ("model", "weights", "MB", "size relative to fp32", "test loss", "metric", "value")
    for case in _cases("size"):
        whole = _found(results, case, "export-fp32", "files")
        for weights in case.weights:
            files = _found(results, case, f"export-{weights}", "files")
            test = _found(results, case, f"export-{weights}", "verification", "test")
            metric = _accuracy(case)
            share = f"{_bytes(files) / _bytes(whole):.0%}" if files and whole else NOT_RUN
            refused = _found(results, case, f"export-{weights}", "verification", "refused")
            yield (
                *(_model(case), weights + (" (refused by the gate)" if refused else "")),
                *(f"{_bytes(files) / 1e6:.1f}" if files else NOT_RUN, share),
                _number(test and test["nll"]["shipped"], "{:.3f}"),
                *(metric, _interval(test and test["metrics"][metric]["shipped"])),
            )


def overfitting(results: Results) -> Iterator[Row]:
    """The gap between train and validation loss on few rows."""
    yield (
        *("model", "train rows", "early stopping", "steps", "train loss", "best validation loss"),
        *("last validation loss", "best validation loss − train loss", "test loss", "CPU minutes"),
    )
    for case in _cases("overfitting"):
        report = _found(results, case, "tune")
        stopping = "--patience 2" if "--patience" in case.tune else "none (best weights kept)"
        if report is None:
            yield (_model(case), str(case.train), stopping, *[NOT_RUN] * 7)
            continue
        found, loss = report["overfitting"], report["nll"]
        yield (
            *(_model(case), str(case.train), stopping, str(report["steps"]), f"{found['train_nll']:.3f}"),
            *(f"{loss['best']:.3f}", _number(loss["last"], "{:.3f}"), f"{found['gap']:+.3f}"),
            *(_number(loss["test"], "{:.3f}"), f"{report['cpu_seconds'] / 60:.1f}"),
        )


def rows(results: Results) -> Iterator[Row]:
    """The same test rows after more and more train rows."""
    yield ("model", "train rows", "steps", "metric", *COLUMNS, "shipped against base")
    for case in _cases("rows"):
        steps = _number(_found(results, case, "tune", "steps"), "{}")
        metric = _accuracy(case)
        yield (_model(case), str(case.train), steps, metric, *_compared(case, results, metric, answers=False))


def compute(results: Results) -> Iterator[Row]:
    """What each training took."""
    yield ("case", "model", "trained weights (M)", "train rows", "steps", "CPU minutes", "peak memory (GB)")
    for case in _cases("compute"):
        found = _found(results, case, "tune") or {}
        yield (
            *(case.name, _model(case), _number(found.get("trainable_parameters"), "{:.2f}", 1e-6), str(case.train)),
            *(_number(found.get("steps"), "{}"), _number(found.get("cpu_seconds"), "{:.1f}", 1 / 60)),
            _number(found.get("peak_rss_bytes"), "{:.2f}", 1e-9),
        )


def recipe(results: Results) -> Iterator[Row]:
    """Final layers against all layers."""
    yield (
        "model",
        "recipe",
        "trained weights (M)",
        "metric",
        *COLUMNS[1:],
        "test loss",
        "CPU minutes",
        "peak memory (GB)",
    )
    for case in _cases("recipe"):
        found = _found(results, case, "tune") or {}
        metric = _accuracy(case)
        scores = _scores(case, results, answers=False)
        yield (
            *(_model(case), "--preset final-layers" if "--preset" in case.tune else "LoRA on all layers (default)"),
            *(_number(found.get("trainable_parameters"), "{:.2f}", 1e-6), metric),
            *(_interval(scores[column].get(metric)) for column in COLUMNS[1:]),
            *(_number(found.get("nll", {}).get("test"), "{:.3f}"), _number(found.get("cpu_seconds"), "{:.1f}", 1 / 60)),
            _number(found.get("peak_rss_bytes"), "{:.2f}", 1e-9),
        )


TABLES: dict[str, tuple[str, str, Callable[[Results], Iterator[Row]]]] = {
    "understanding": (
        "Improved contextual understanding",
        "The metric of a task before and after tuning. chrf is from 0 to 1; verbatim_match is the share of answers"
        " that equal the reference in every character.",
        understanding,
    ),
    "coherence": (
        "Coherence",
        "eos_rate is the share of answers that end by themselves within the requested length: 32 tokens for sentences,"
        " 128 for support, whose right answers have up to 98. distinct_n is the share of"
        " different phrases among an answer's phrases of n words; repetition_4 is the share of repeated phrases among"
        " its phrases of four words. The right answers of support have 0.89, 0.99 and 0.00.",
        coherence,
    ),
    "domains": (
        "Customisation to healthcare and technical support",
        "Healthcare is a classification, support are questions with written answers. Finance (Fiqa)"
        " is in [shipping.md](shipping.md), beside other tools' 4-bit files.",
        domains,
    ),
    "size": (
        "Reduced model size",
        "One training, exported to several formats. MB are of the whole bundle, tokenizer included.",
        size,
    ),
    "overfitting": (
        "Over-fitting",
        "Where rows are few, the validation loss stays above the train loss. The weights with the best validation loss"
        " are kept with or without early stopping, so stopping early saves only time. *Last* is the validation loss of"
        " the weights at the end.",
        overfitting,
    ),
    "rows": (
        "The size of the data set",
        "The same test rows, and at most the same number of steps; the smaller sets stop after two evaluations without"
        " a better loss.",
        rows,
    ),
    "compute": (
        "Compute",
        "Times include loading, validation and the report; memory is the peak of the process. A"
        " case is named after its model and its rows or settings: main is the model's main task, final-layers uses that"
        " preset, and rows-N has N rows. Speeds are in [training.md](training.md).",
        compute,
    ),
    "recipe": (
        "LoRA on the final layers or on all layers",
        "Textbook fine-tuning trains only the final layers. Here these layers get an adapter of a higher rank (see"
        " edge_ft/presets/final-layers.yaml).",
        recipe,
    ),
}
"""Claim -> title, what is shown, and its rows, the header first."""


def _cases(claim: str) -> list[Case]:
    return [CASES[name] for name in CLAIMS[claim]]


def _model(case: Case) -> str:
    return MODELS[case.model].title


def _task(case: Case) -> str:
    return ROWS[case.data].title


def _found(results: Results, case: Case, stage: str, *keys: str) -> Any:
    """A value inside a stage's result, or None where the stage was not run."""
    value: Any = results.get(case.name, {}).get(stage)
    for key in keys:
        value = None if value is None else value.get(key)
    return value


def _accuracy(case: Case) -> str:
    """The metric that needs no generated answers."""
    return "accuracy" if MODELS[case.model].kind == "encoder" else "token_accuracy"


def _scores(case: Case, results: Results, answers: bool) -> dict[str, dict[str, Any]]:
    """base, tuned, shipped -> figure -> value, of the answers or of the test rows."""
    if answers and case.answers:
        scores: dict[str, dict[str, Any]] = {}
        for column in COLUMNS:
            found = _found(results, case, f"answers-{column}")
            scores[column] = {} if found is None else {**found["metrics"], "nll": _loss(found)}
        return scores
    test = _found(results, case, f"export-{case.weights[0]}", "verification", "test") or {"nll": {}, "metrics": {}}
    return {
        column: {
            **{name: values[own] for name, values in test["metrics"].items()},
            **({"nll": {"value": test["nll"][own]}} if test["nll"] else {}),
        }
        for column, own in zip(COLUMNS, ("base", "trained", "shipped"), strict=True)
    }


def _loss(found: dict[str, Any]) -> dict[str, float]:
    low, high = found["nll_interval"]
    return {"value": found["nll"], "low": low, "high": high}


def _compared(case: Case, results: Results, metric: str, answers: bool = True) -> Row:
    """base, tuned and shipped, and whether shipped is better than base."""
    scores = _scores(case, results, answers)
    base, shipped = (scores[column].get(metric) for column in ("base", "shipped"))
    verdict = NOT_RUN
    if base is not None and shipped is not None:
        verdict = "-"
        if "low" in base and "low" in shipped:
            higher, lower = shipped["low"] > base["high"], shipped["high"] < base["low"]
            good, bad = (lower, higher) if metric in ("nll", "repetition_4") else (higher, lower)
            verdict = "better" if good else "worse" if bad else "no difference shown"
    cells = []
    for column in COLUMNS:
        # A figure can be missing although the stage ran: answers of three words have no phrases of four.
        cells.append("-" if scores[column] and metric not in scores[column] else _interval(scores[column].get(metric)))
    if verdict == NOT_RUN and all(cell == "-" for cell in cells):
        verdict = "-"
    if _found(results, case, f"export-{case.weights[0]}", "verification", "refused"):
        if verdict == NOT_RUN:  # a refused bundle is not scored on answers
            return (*cells[:-1], "-", "refused by the gate")
        verdict += " (bundle refused by the gate)"
    return (*cells, verdict)


def _interval(value: dict[str, float] | None) -> str:
    if value is None:
        return NOT_RUN
    bounds = f" [{value['low']:.3f}, {value['high']:.3f}]" if "low" in value else ""
    return f"{value['value']:.3f}{bounds}"


def _number(value: float | None, form: str, scale: float = 1) -> str:
    return NOT_RUN if value is None else form.format(value * scale)


def _bytes(files: dict[str, dict[str, Any]]) -> int:
    return sum(int(entry["bytes"]) for entry in files.values())
