"""A plan estimates time, memory and disk of a training, recommends a choice that fits, and refuses what does not."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.numpy import load_file
from tiny_models import tiny_encoder_config, write_encoder

from edge_ft.config import PlanConfig
from edge_ft.errors import AuditRefused, WillNotFit
from edge_ft.models.base_model import find_base
from edge_ft.progress import Silent
from edge_ft.system import Available
from edge_ft.tune import plan as planning
from edge_ft.tune.measure import Curve, Measured
from edge_ft.tune.plan import duration, plan, refuse_large_base, resolve_memory
from edge_ft.tune.prepare import Job, prepare_job
from edge_ft.tune.report import BATCH_COST, SAMPLE_TOKENS

AMPLE = Available(memory_bytes=2**50, disk_bytes=2**50)
SCARCE = Available(memory_bytes=600_000, disk_bytes=2**50)
"""The dequantized weights of the tiny model take more than an eighth of it."""


@pytest.fixture(scope="module")
def job(llama: Path, sums: Path) -> Job:
    """24 train, 8 validation and 8 test rows; 12 steps of 4 rows."""
    settings = PlanConfig(model=str(llama), data=str(sums), split=(0.6, 0.2, 0.2), memory="normal")
    return prepare_job(settings, Silent())


def measured(**changes: Any) -> Measured:
    """A batch of any size takes 2 s to train on and 0.5 s to score, a token of an answer 0.1 s."""
    values: dict[str, Any] = {
        "step": Curve([1], [2.0]),
        "evaluation": Curve([1], [0.5]),
        "report": 3.0,
        "token": 0.0,
        "memory": Curve([0, 10], [1e9, 1e9]),
        "loading": 10**6,
        "answering": 0,
        "trainable": 1000,
    }
    return Measured(**values | changes)


def with_settings(job: Job, **settings: Any) -> Job:
    return replace(job, config=replace(job.config, **settings))


def test_the_time_is_that_of_all_steps_evaluations_and_the_report(job: Job) -> None:
    assert [len(batch) for batch in job.batches] == [4] * 12
    # 12 steps; six evaluations of two batches; the test rows twice and eight train rows, in float32.
    steps, evaluations, report = 12 * 2.0, 6 * 1.0, 3 * (2 * 1.0 + 1.0)
    evaluations = 5 * 1.0  # before the first step, and every third
    assert planning._seconds(job, measured()) == pytest.approx(steps + evaluations + report)
    accumulated = with_settings(job, gradient_accumulation=2, max_steps=12)
    assert planning._seconds(accumulated, measured()) == pytest.approx(2 * steps + evaluations + report)
    frequent = with_settings(job, eval_steps=1)
    assert planning._seconds(frequent, measured()) == pytest.approx(steps + 13 * 1.0 + report)
    bf16 = with_settings(job, compute="bf16")
    assert planning._seconds(bf16, measured()) == pytest.approx(steps + evaluations + report + 3 * 2 * 1.0)
    generating = planning._seconds(job, measured(token=0.1)) - planning._seconds(job, measured())
    assert 0.1 * BATCH_COST * SAMPLE_TOKENS < generating <= 0.1 * BATCH_COST * 2 * SAMPLE_TOKENS


def test_max_minutes_limits_the_estimated_time(job: Job) -> None:
    long = with_settings(job, max_steps=10**6)
    limited = with_settings(long, max_minutes=1)
    assert planning._seconds(long, measured()) > 10**6 > 70 > planning._seconds(limited, measured()) > 60


def test_the_peak_is_that_of_loading_or_of_the_longest_batch_or_of_the_report(job: Job) -> None:
    state = 3 * 4 * 1000
    longest = max(job.batch_tokens)
    step = measured(memory=Curve([0, longest], [1e9, 2e9]))
    assert planning._peak_bytes(job, step) == round((2e9 + state) * planning.FRAGMENTATION)
    report = replace(step, answering=3 * 10**9)
    assert planning._peak_bytes(job, report) == round((4e9 + state) * planning.FRAGMENTATION)
    assert planning._peak_bytes(job, replace(step, loading=5 * 10**9)) == 5 * 10**9


def test_the_disk_holds_rows_tokenizer_adapter_and_checkpoint_each_twice(job: Job) -> None:
    fixed = planning._disk_bytes(job, measured(trainable=0))
    tokenizer = sum(file.stat().st_size for file in job.tokenizer.files())
    assert 1_000_000 + tokenizer < fixed < 1_100_000 + tokenizer
    assert planning._disk_bytes(job, measured(trainable=1000)) - fixed == 2 * 5 * 4 * 1000


@pytest.mark.parametrize(
    ("available", "fits"),
    [(AMPLE, True), (Available(10**9, 2**50), False), (Available(2**50, 10**6), False)],
)
def test_a_choice_fits_into_memory_and_disk(job: Job, available: Available, fits: bool) -> None:
    choice = planning._choice(job, measured(), 7.0, 5000, available)
    assert choice["fits"] is fits
    assert (choice["layers"], choice["memory"], choice["trainable_parameters"]) == ("all", "normal", 1000)
    assert choice["seconds"] == pytest.approx(7 + planning._seconds(job, measured()) + planning.FINAL_SECONDS)
    assert choice["disk_bytes"] == 5000 + planning._disk_bytes(job, measured())


def options(llama: Path, **settings: Any) -> list[tuple[str, str | None]]:
    config = PlanConfig(model=str(llama), data="rows", **settings)
    return [(option.layers, option.memory) for option in planning._options(config, find_base(str(llama)))]


def test_the_choices_are_all_layers_half_of_them_and_the_given_ones(llama: Path, tmp_path: Path) -> None:
    assert options(llama, memory="normal") == [
        *(("all", "normal"), ("all", "low"), ("last:1", "normal"), ("last:1", "low"))
    ]
    assert options(llama, layers="last:2", memory="high") == [
        *(("last:2", "high"), ("last:2", "low"), ("last:1", "high"), ("last:1", "low"))
    ]
    albert = write_encoder(tmp_path / "albert", tiny_encoder_config("albert"))  # it repeats one layer
    assert options(albert, memory="high") == [("all", "high"), ("all", "low")]


def chosen(monkeypatch: pytest.MonkeyPatch, *fitting: bool) -> None:
    """Let a plan find choices of which these fit, each with less memory than the one before."""
    names = [("all", "high"), ("all", "low"), ("last:1", "low")]
    choices = [
        {"layers": layers, "memory": memory, "trainable_parameters": 9, "seconds": 600.0, "fits": fits}
        | {"peak_rss_bytes": (9 - at) * 10**9, "disk_bytes": 10**6}
        for at, ((layers, memory), fits) in enumerate(zip(names, fitting, strict=False))
    ]
    monkeypatch.setattr(planning, "_measure_choices", lambda *_: choices)


def test_the_first_choice_that_fits_is_recommended(llama: Path, sums: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = PlanConfig(model=str(llama), data=str(sums), show=2)
    chosen(monkeypatch, True, True)
    best = plan(config, available=AMPLE)
    assert best["recommended"] is best["choices"][0]
    assert (
        "--layers all --memory high fits, with the most layers and the faster memory mode: it takes 9000 MB of "
        in best["reason"]
    )
    assert best["reason"].endswith(" available disk and 10 min")
    assert len(best["shown"]) == 2 and all("⟦" in text for text in best["shown"])
    chosen(monkeypatch, False, False, True)
    found = plan(replace(config, show=0), available=AMPLE)
    assert found["recommended"] is found["choices"][2]
    assert "--layers last:1 --memory low is the first choice that fits" in found["reason"]
    assert "shown" not in found
    chosen(monkeypatch, True)
    assert "the only setting requested" in plan(config, available=AMPLE)["reason"]


@pytest.mark.parametrize(
    ("available", "message"),
    [
        (Available(2**50, 10), "layers last:1 with low memory takes 1 MB of disk and 0 MB are free: free some"),
        (Available(10, 2**50), "takes 7000 MB of memory and 0 MB are free: give a smaller --batch-size"),
    ],
)
def test_a_training_that_fits_with_no_choice_is_refused(
    llama: Path, sums: Path, available: Available, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen(monkeypatch, False, False, False)
    with pytest.raises(WillNotFit, match=message):
        plan(PlanConfig(model=str(llama), data=str(sums)), available=available)


def test_a_base_whose_weights_exceed_the_memory_is_refused(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "resident_bytes", lambda: 0)
    base, config = find_base(str(llama)), PlanConfig(model=str(llama), data="rows", memory="normal")
    weights = sum(array.size for file in llama.glob("*.safetensors") for array in load_file(file).values())
    high = replace(config, memory="high", compute="bf16")  # 0.65 and 2.05 bytes a weight
    with pytest.raises(WillNotFit, match=r"of memory as int4: .*; take a smaller model"):
        refuse_large_base(base, config, Available(weights // 2, 2**50))
    refuse_large_base(base, config, Available(weights, 2**50))
    with pytest.raises(WillNotFit, match=r"as int4 and dequantized: .* give --memory normal, or take a smaller model"):
        refuse_large_base(base, high, Available(2 * weights, 2**50))
    refuse_large_base(base, high, Available(4 * weights, 2**50))
    with pytest.raises(WillNotFit, match="and dequantized"):
        refuse_large_base(base, replace(high, compute="fp32"), Available(4 * weights, 2**50))


def test_rows_that_train_nothing_are_refused_by_a_plan_too(llama: Path, sums: Path) -> None:
    with pytest.raises(AuditRefused):
        plan(PlanConfig(model=str(llama), data=str(sums), max_length=10), available=AMPLE)


@pytest.mark.parametrize(
    ("settings", "available", "bf16", "expected"),
    [
        ({}, AMPLE, True, "high"),
        ({}, AMPLE, False, "normal"),
        ({}, SCARCE, True, "normal"),
        ({"batch_size": 16}, AMPLE, True, "normal"),  # steps of more than 512 tokens
        ({"base_format": "fp32"}, AMPLE, True, "normal"),  # floats anyway
        ({"base_format": "bf16"}, AMPLE, True, "normal"),
        ({"base_format": "nf4"}, AMPLE, True, "high"),
        ({"compute": "fp32"}, AMPLE, True, "normal"),
        ({"memory": "low"}, AMPLE, True, "low"),
        ({"memory": "high"}, Available(1, 1), False, "high"),
    ],
)
def test_memory_is_high_where_steps_are_short_and_memory_is_ample(
    settings: dict[str, Any],
    available: Available,
    bf16: bool,
    expected: str,
    llama: Path,
    sums: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("edge_ft.quant.layers.has_bf16", lambda device: bf16)
    job = prepare_job(PlanConfig(model=str(llama), data=str(sums), **settings), Silent())
    assert resolve_memory(job, available, torch.device("cpu")).config.memory == expected


def test_a_curve_goes_through_its_points_and_on_from_them() -> None:
    curve = Curve([10, 20, 40], [3.0, 5.0, 6.0])
    assert [curve.at(tokens) for tokens in (1, 10, 15, 20, 30, 40, 60)] == [3.0, 3.0, 4.0, 5.0, 5.5, 6.0, 7.0]
    assert Curve([10, 20], [5.0, 4.0]).at(100) == 5.0  # noise


def test_times_are_printed_in_seconds_minutes_or_hours() -> None:
    assert [duration(seconds) for seconds in (12, 600, 9000)] == ["12 s", "10 min", "2.5 h"]
