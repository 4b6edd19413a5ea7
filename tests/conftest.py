"""Tiny and real models, and runs and bundles of them, made once for all workers of a test session."""

import gc
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported: idle threads wait without computing

import pytest
from once import once
from resumed_runs import settings
from tiny_models import T5_SHAPES, write_bert, write_llama, write_reviews, write_sums, write_t5

from edge_ft.artifacts import Bundle, RunFolder
from edge_ft.bench.studies.datasets import (
    Rows,
    decoder_weights,
    department_rows,
    encoder_weights,
    transcript_rows,
    write_splits,
)
from edge_ft.config import ExportConfig, TuneConfig
from edge_ft.export import export
from edge_ft.tune import tune

TIERS = ("integration", "e2e", "fuzz", "packaging", "gpu", "unit")
"""In the order in which they run. Small tests come last and fill the time in which another worker runs a long one."""


def _tier(item: pytest.Item) -> str:
    return item.path.relative_to(Path(__file__).parent).parts[0]


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The tests of a file run in one worker, but for those of each real model, which start first."""

    def real_model(item: pytest.Item) -> str | None:
        callspec = getattr(item, "callspec", None)  # a parameter may name a fixture
        names = [*item.fixturenames, *(map(str, callspec.params.values()) if callspec else ())]  # type: ignore[attr-defined]
        return next((model for model in ("smollm2", "minilm") for name in names if name.startswith(model)), None)

    models = {item: real_model(item) for item in items}
    items.sort(key=lambda item: (models[item] is None, TIERS.index(_tier(item)), item.path, models[item] == "minilm"))
    for item in items:
        item.add_marker(pytest.mark.xdist_group(f"{item.path} {models[item] or ''}"))


@pytest.fixture(scope="module", autouse=True)
def _frozen() -> None:
    """Garbage collections, of which a tune makes many, do not search what earlier imports and tests left alive."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """Restore torch's number of threads after each test."""
    before = sys.modules["torch"].get_num_threads() if "torch" in sys.modules else None
    yield
    if before is not None:
        sys.modules["torch"].set_num_threads(before)


@pytest.fixture(scope="session")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all workers share. Its files are written by `once`, and no test changes them."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def llama(work: Path) -> Path:
    return once(work / "llama", write_llama)


@pytest.fixture(scope="session")
def bert(work: Path) -> Path:
    return once(work / "bert", write_bert)


@pytest.fixture(scope="session")
def t5(work: Path) -> Callable[[str], Path]:
    """The tiny model of a shape in `T5_SHAPES`."""
    return lambda shape: once(work / shape.replace(", ", "-"), lambda folder: write_t5(folder, **T5_SHAPES[shape]))


@pytest.fixture(scope="session")
def sums(work: Path) -> Path:
    return once(work / "sums.jsonl", write_sums)


@pytest.fixture(scope="session")
def reviews(work: Path) -> Path:
    return once(work / "reviews.jsonl", write_reviews)


@pytest.fixture(scope="session")
def whole(work: Path, llama: Path, sums: Path) -> RunFolder:
    """The run of `resumed_runs.settings` that was never stopped."""
    return RunFolder.open(once(work / "whole", lambda out: tune(settings(llama, sums, out))))


LEARNING: dict[str, Any] = {"learning_rate": 1e-2, "split": (0.6, 0.2, 0.2), "compute": "fp32"}
"""Tiny models train in float32: compiling bfloat16 kernels would take longer than all steps."""


@pytest.fixture(scope="session")
def llama_run(work: Path, llama: Path, sums: Path) -> RunFolder:
    """A tiny decoder, tuned to a lower loss."""

    def run(out: Path) -> None:
        tune(
            TuneConfig(
                model=str(llama), data=str(sums), out=out, epochs=30, batch_size=4, base_format="int4", **LEARNING
            )
        )

    return RunFolder.open(once(work / "llama-run", run))


@pytest.fixture(scope="session")
def bert_run(work: Path, bert: Path, reviews: Path) -> RunFolder:
    """A tiny encoder, tuned to a lower loss."""

    def run(out: Path) -> None:
        tune(TuneConfig(model=str(bert), data=str(reviews), out=out, epochs=8, **LEARNING))  # type: ignore[arg-type]

    return RunFolder.open(once(work / "bert-run", run))


def exported(run: RunFolder, out: Path, **settings: Any) -> Bundle:
    """The bundle of `run`, exported once for all workers."""
    return Bundle.open(once(out, lambda folder: export(str(run.path), ExportConfig(out=folder, **settings))))


LOOSE: dict[str, Any] = {"max_tax": 1, "min_retained": 0.5, "max_metric_drop": 1}
"""Limits of the gate for tiny models, which lose more when merged weights are rounded again."""


@pytest.fixture(scope="session")
def llama_bundle(work: Path, llama_run: RunFolder) -> Bundle:
    return exported(llama_run, work / "llama-bundle", **LOOSE)


@pytest.fixture(scope="session")
def llama_adapter_bundle(work: Path, llama_run: RunFolder) -> Bundle:
    return exported(llama_run, work / "llama-adapter", lane="adapter")


@pytest.fixture(scope="session")
def bert_bundle(work: Path, bert_run: RunFolder) -> Bundle:
    return exported(bert_run, work / "bert-bundle", **LOOSE)


@pytest.fixture(scope="session")
def bert_adapter_bundle(work: Path, bert_run: RunFolder) -> Bundle:
    return exported(bert_run, work / "bert-adapter", lane="adapter")


def splits_of(rows: Callable[[], Rows], folder: Path, train: int, validation: int, test: int) -> dict[str, Path]:
    """Write `rows` as three files, keyed by split."""
    sizes = {"train": train, "validation": validation, "test": test}
    once(folder, lambda made: write_splits(rows(), made, **sizes))
    return {name: folder / f"{name}.jsonl" for name in sizes}


@pytest.fixture(scope="session")
def smollm2_rows(work: Path) -> dict[str, Path]:
    return splits_of(transcript_rows, work / "transcripts", train=160, validation=40, test=40)


def tune_smollm2(rows: dict[str, Path], out: Path, **settings: Any) -> None:
    """Tune SmolLM2 over transcripts for about a minute."""
    data, validation, test = (str(rows[name]) for name in ("train", "validation", "test"))
    tune(
        TuneConfig(
            model=str(decoder_weights()),
            data=data,
            validation=validation,
            test=test,
            prompt="Transcript: {transcript}\\nWritten:",
            completion=" {written}",
            out=out,
            max_steps=20,
            eval_steps=10,
            learning_rate=2e-3,
            **settings,
        )
    )


@pytest.fixture(scope="session")
def smollm2_run(work: Path, smollm2_rows: dict[str, Path]) -> RunFolder:
    """SmolLM2 tuned with the defaults: over float weights where memory is ample."""
    return RunFolder.open(once(work / "smollm2-run", lambda out: tune_smollm2(smollm2_rows, out)))


@pytest.fixture(scope="session")
def smollm2_int4_run(work: Path, smollm2_rows: dict[str, Path]) -> RunFolder:
    """SmolLM2 tuned over the codes that the adapter lane ships."""
    settings: dict[str, Any] = {"base_format": "int4", "finish_steps": 0}
    return RunFolder.open(once(work / "smollm2-int4", lambda out: tune_smollm2(smollm2_rows, out, **settings)))


@pytest.fixture(scope="session")
def smollm2_bundle(work: Path, smollm2_run: RunFolder) -> Bundle:
    return exported(smollm2_run, work / "smollm2-bundle")


@pytest.fixture(scope="session")
def smollm2_adapter_bundle(work: Path, smollm2_int4_run: RunFolder) -> Bundle:
    return exported(smollm2_int4_run, work / "smollm2-adapter", lane="adapter")


@pytest.fixture(scope="session")
def minilm_rows(work: Path) -> dict[str, Path]:
    return splits_of(department_rows, work / "departments", train=800, validation=150, test=150)


@pytest.fixture(scope="session")
def minilm_run(work: Path, minilm_rows: dict[str, Path]) -> RunFolder:
    """MiniLM tuned over support questions for about half a minute."""
    data, validation, test = (str(minilm_rows[name]) for name in ("train", "validation", "test"))

    def run(out: Path) -> None:
        tune(
            TuneConfig(
                model=str(encoder_weights()),
                data=data,
                validation=validation,
                test=test,
                out=out,
                max_length=96,
                batch_size=16,
                epochs=2,
                eval_steps=50,
            )
        )

    return RunFolder.open(once(work / "minilm-run", run))


@pytest.fixture(scope="session")
def minilm_bundle(work: Path, minilm_run: RunFolder) -> Bundle:
    return exported(minilm_run, work / "minilm-bundle", max_tax=0.05)
