"""Tiny models, and what the whole pipeline makes of them, built once per session."""

import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
from resumed_runs import settings
from tiny_models import T5_SHAPES, write_bert, write_llama, write_reviews, write_sums, write_t5

from edge_ft.artifacts import Bundle, RunFolder
from edge_ft.bench.studies.datasets import (
    decoder_weights,
    department_rows,
    encoder_weights,
    transcript_rows,
    write_splits,
)
from edge_ft.config import ExportConfig, TuneConfig
from edge_ft.export import export
from edge_ft.tune import tune


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of several workers, one takes all that needs real weights, and first: what they share is made once."""

    def needs_weights(item: pytest.Item) -> bool:
        asked = getattr(item, "callspec", None)  # a parameter may name a fixture
        names = [*item.fixturenames, *(map(str, asked.params.values()) if asked else ())]  # type: ignore[attr-defined]
        return any("smollm2" in name or "minilm" in name for name in names)

    shared = {item: needs_weights(item) for item in items}
    items.sort(key=lambda item: not shared[item])
    for item in items:
        item.add_marker(pytest.mark.xdist_group("real weights" if shared[item] else str(item.path)))


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """A test that sets torch's number of threads does not set it for the next one."""
    before = sys.modules["torch"].get_num_threads() if "torch" in sys.modules else None
    yield
    if before is not None:
        sys.modules["torch"].set_num_threads(before)


@pytest.fixture(scope="session")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="session")
def llama(work: Path) -> Path:
    return write_llama(work / "llama")


@pytest.fixture(scope="session")
def bert(work: Path) -> Path:
    return write_bert(work / "bert")


@pytest.fixture(scope="session")
def t5(work: Path) -> Callable[[str], Path]:
    """The tiny model of a shape in `T5_SHAPES`, written once."""
    return cache(lambda shape: write_t5(work / "t5" / shape.replace(", ", "-"), **T5_SHAPES[shape]))


@pytest.fixture(scope="session")
def sums(work: Path) -> Path:
    return write_sums(work / "sums.jsonl")


@pytest.fixture(scope="session")
def reviews(work: Path) -> Path:
    return write_reviews(work / "reviews.jsonl")


@pytest.fixture(scope="session")
def whole(work: Path, llama: Path, sums: Path) -> RunFolder:
    """The run of `resumed_runs.settings` that was never stopped."""
    return tune(settings(llama, sums, work / "whole"))


@pytest.fixture(scope="session")
def llama_run(work: Path, llama: Path, sums: Path) -> RunFolder:
    """A decoder that has learned something."""
    settings = TuneConfig(
        model=str(llama), data=str(sums), out=work / "llama-run", epochs=30, learning_rate=1e-2, split=(0.6, 0.2, 0.2)
    )
    return tune(settings)


@pytest.fixture(scope="session")
def bert_run(work: Path, bert: Path, reviews: Path) -> RunFolder:
    """An encoder that has learned something."""
    settings = TuneConfig(
        model=str(bert), data=str(reviews), out=work / "bert-run", epochs=8, learning_rate=1e-2, split=(0.6, 0.2, 0.2)
    )
    return tune(settings)


@pytest.fixture(scope="session")
def llama_bundle(work: Path, llama_run: RunFolder) -> Bundle:
    return export(
        str(llama_run.path), ExportConfig(out=work / "llama-bundle", max_tax=1, min_retained=0.5, max_metric_drop=1)
    )


@pytest.fixture(scope="session")
def llama_adapter_bundle(work: Path, llama_run: RunFolder) -> Bundle:
    return export(str(llama_run.path), ExportConfig(out=work / "llama-adapter", lane="adapter"))


@pytest.fixture(scope="session")
def bert_bundle(work: Path, bert_run: RunFolder) -> Bundle:
    return export(
        str(bert_run.path), ExportConfig(out=work / "bert-bundle", max_tax=1, min_retained=0.5, max_metric_drop=1)
    )


@pytest.fixture(scope="session")
def bert_adapter_bundle(work: Path, bert_run: RunFolder) -> Bundle:
    return export(str(bert_run.path), ExportConfig(out=work / "bert-adapter", lane="adapter"))


@pytest.fixture(scope="session")
def smollm2_rows(work: Path) -> dict[str, Path]:
    return write_splits(transcript_rows(), work / "transcripts", train=160, validation=40, test=40)


@pytest.fixture(scope="session")
def smollm2_run(work: Path, smollm2_rows: dict[str, Path]) -> RunFolder:
    """The real decoder over real rows, for a minute."""
    return tune(
        TuneConfig(
            model=str(decoder_weights()),
            data=str(smollm2_rows["train"]),
            validation=str(smollm2_rows["validation"]),
            test=str(smollm2_rows["test"]),
            prompt="Transcript: {transcript}\\nWritten:",
            completion=" {written}",
            out=work / "smollm2-run",
            max_steps=20,
            eval_steps=10,
            learning_rate=2e-3,
        )
    )


@pytest.fixture(scope="session")
def smollm2_bundle(work: Path, smollm2_run: RunFolder) -> Bundle:
    return export(str(smollm2_run.path), ExportConfig(out=work / "smollm2-bundle"))


@pytest.fixture(scope="session")
def smollm2_adapter_bundle(work: Path, smollm2_run: RunFolder) -> Bundle:
    return export(str(smollm2_run.path), ExportConfig(out=work / "smollm2-adapter", lane="adapter"))


@pytest.fixture(scope="session")
def minilm_rows(work: Path) -> dict[str, Path]:
    return write_splits(department_rows(), work / "departments", train=800, validation=150, test=150)


@pytest.fixture(scope="session")
def minilm_run(work: Path, minilm_rows: dict[str, Path]) -> RunFolder:
    """The real encoder over real rows, for half a minute."""
    return tune(
        TuneConfig(
            model=str(encoder_weights()),
            data=str(minilm_rows["train"]),
            validation=str(minilm_rows["validation"]),
            test=str(minilm_rows["test"]),
            out=work / "minilm-run",
            max_length=96,
            batch_size=16,
            epochs=2,
            eval_steps=50,
        )
    )


@pytest.fixture(scope="session")
def minilm_bundle(work: Path, minilm_run: RunFolder) -> Bundle:
    return export(str(minilm_run.path), ExportConfig(out=work / "minilm-bundle", max_tax=0.05))
