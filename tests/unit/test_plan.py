"""A plan estimates time, memory and disk of a training, recommends a choice that fits, and refuses what does not."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.numpy import load_file
from tiny_models import tiny_encoder_config, write_encoder

from edge_ft.config import PlanConfig
from edge_ft.errors import AuditRefused, WillNotFit
from edge_ft.models.base_model import find_base
from edge_ft.progress import Silent
from edge_ft.quant import devices
from edge_ft.system import Available
from edge_ft.tune import memory_mode
from edge_ft.tune import plan as planning
from edge_ft.tune.measure import Curve, Measured
from edge_ft.tune.memory_mode import refuse_large_base, resolve_base_format, resolve_memory, settle_memory
from edge_ft.tune.plan import plan
from edge_ft.tune.prepare import Job, prepare_job
from edge_ft.tune.report import BATCH_COST, SAMPLE_TOKENS
from edge_ft.tune.schedule import FINISHING_STEP, finishing_steps
from edge_ft.tune.units import duration

AMPLE = Available(memory_bytes=2**50, disk_bytes=2**50)
SCARCE = Available(memory_bytes=600_000, disk_bytes=2**50)
"""The dequantized weights of the tiny model take more than an eighth of it."""


@pytest.fixture(scope="module")
def job(llama: Path, sums: Path) -> Job:
    """24 train, 8 validation and 8 test rows; 12 steps of 4 rows."""
    settings = PlanConfig(model=str(llama), data=str(sums), split=(0.6, 0.2, 0.2), memory="normal", batch_size=4)
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
    # 12 steps; five evaluations of one batch, before the first step and every third; the test rows twice, and the
    # prompts of the answers, in float32; train rows.
    found = planning._seconds(job, measured())
    # as many as there are validation rows: one batch of the three that the train rows make
    report = {"scores": 3 * 2 * 0.5 + 0.5, "answers": 3 * 2 * 0.5}
    assert found == pytest.approx({"train": 24.0, "validation": 2.5, **report})
    accumulated = with_settings(job, gradient_accumulation=2, max_steps=12)
    assert planning._seconds(accumulated, measured()) == pytest.approx({**found, "train": 48.0})
    finish = 3 * FINISHING_STEP * 2.0 + 2 * 0.5  # validation rows before and after
    finished = planning._seconds(with_settings(job, finish_steps=3), measured())
    assert finished == pytest.approx({**found, "finish": finish})
    frequent = with_settings(job, eval_steps=1)
    assert planning._seconds(frequent, measured()) == {**found, "validation": 13 * 0.5}
    generating = planning._seconds(job, measured(token=0.1))["answers"] - found["answers"]
    assert 0.1 * BATCH_COST < generating <= 0.1 * BATCH_COST * 2 * SAMPLE_TOKENS


def test_most_evaluations_take_the_time_of_the_watched_rows(job: Job) -> None:
    """One batch of 8 rows, or the batch of 2 rows that is watched."""
    lengths = [len(row.input_ids) for row in job.prepared.examples["validation"]]
    watching = with_settings(job, eval_rows=2)
    assert len(watching.watched) == 2
    growing = measured(evaluation=Curve([0, 1000], [0.0, 1000.0]))
    whole, part = 8 * max(lengths), 2 * max(lengths[row] for row in watching.watched)
    seconds, every = planning._seconds(watching, growing), planning._seconds(job, growing)
    assert seconds["validation"] == pytest.approx(whole + 4 * part)
    # the report needs the base's loss of the others, too
    rest = [length for row, length in enumerate(lengths) if row not in watching.watched]
    assert seconds["scores"] - every["scores"] == pytest.approx(len(rest) * max(rest))


def test_max_minutes_limits_the_estimated_time(job: Job) -> None:
    long = with_settings(job, max_steps=10**6)
    limited = with_settings(long, max_minutes=1)
    assert planning._seconds(long, measured())["train"] > 10**6
    seconds = planning._seconds(limited, measured())
    assert seconds["train"] + seconds["validation"] == pytest.approx(60)


def test_the_peak_is_that_of_loading_of_the_longest_batch_beside_the_merged_model_or_of_the_report(job: Job) -> None:
    state = 3 * 4 * 1000
    longest = max(job.batch_tokens)
    step = measured(memory=Curve([0, longest], [1e9, 2e9]))
    merged = planning.FINISHING_BYTES * planning.count_weights(job.base)
    assert planning._peak_bytes(job, step) == round((2e9 + state) * planning.FRAGMENTATION)
    finished = with_settings(job, finish_steps=3)
    assert planning._peak_bytes(finished, step) == round((2e9 + merged + state) * planning.FRAGMENTATION)
    report = replace(step, answering=3 * 10**9)
    assert planning._peak_bytes(job, report) == round((4e9 + state) * planning.FRAGMENTATION)
    assert planning._peak_bytes(job, replace(step, loading=5 * 10**9)) == 5 * 10**9


def test_a_card_must_hold_what_a_step_takes_there(job: Job) -> None:
    """Weights of 1 GB, and 1 GB of activations in a batch of 4 rows; AdamW keeps two moments of each trained weight."""
    longest = max(job.batch_tokens)
    card = measured(device=Curve([0, longest], [1e9, 2e9]))
    needed = round((2e9 + 2 * 4 * 1000) * planning.DEVICE_FRAGMENTATION)
    roomy, tight = (replace(AMPLE, device_bytes=size) for size in (10 * 10**9, 2 * 10**9))
    fitting = planning._choice(job, card, {}, roomy)
    assert (fitting["peak_device_bytes"], fitting["fits"], fitting["largest_batch"]) == (needed, True, 28)
    refused = planning._choice(job, card, {}, tight)
    assert (refused["fits"], refused["largest_batch"]) == (False, 2)
    message = planning._does_not_fit(refused, tight)
    assert "takes 2200 MB of the GPU and 2000 MB are free: give --memory low, or --batch-size 2 or a smaller" in message
    assert planning._choice(job, measured(), {}, AMPLE)["peak_device_bytes"] is None


def test_a_base_that_a_card_cannot_hold_is_refused_before_it_is_loaded(job: Job) -> None:
    refuse_large_base(job.base, job.config, replace(AMPLE, device_bytes=10**9))
    with pytest.raises(WillNotFit, match=r"weights, which take \d+ MB of the GPU as int4: 0 MB are available"):
        refuse_large_base(job.base, job.config, replace(AMPLE, device_bytes=10_000))


def test_the_disk_holds_rows_tokenizer_adapter_and_checkpoint_each_twice(job: Job) -> None:
    alone = with_settings(job, finish_steps=0, calibration_rows=0)
    fixed = planning._disk_bytes(alone, measured(trainable=0))
    tokenizer = sum(file.stat().st_size for file in job.tokenizer.files())
    assert 1_000_000 + tokenizer < fixed < 1_100_000 + tokenizer
    assert planning._disk_bytes(alone, measured(trainable=1000)) - fixed == 2 * 5 * 4 * 1000


@pytest.mark.parametrize(
    ("settings", "copies"),
    [({"base_format": "int4"}, 1), ({"finish_steps": 6}, 3), ({"base_format": "bf16", "finish_steps": 6}, 2)],
)
def test_the_disk_holds_codes_of_the_base_and_twice_those_of_the_merged_model(
    job: Job, settings: dict[str, Any], copies: int
) -> None:
    without = planning._disk_bytes(with_settings(job, finish_steps=0, calibration_rows=0), measured())
    codes = copies * planning.BYTES_PER_WEIGHT["int4"] * planning.count_weights(job.base)
    assert planning._disk_bytes(with_settings(job, **settings), measured()) - without == round(codes)


@pytest.mark.parametrize(
    ("available", "fits"),
    [(AMPLE, True), (Available(10**9, 2**50), False), (Available(2**50, 10**6), False)],
)
def test_a_choice_fits_into_memory_and_disk(job: Job, available: Available, fits: bool) -> None:
    job = with_settings(job, finish_steps=3)
    choice = planning._choice(job, measured(), {"load": 7.0}, available)
    assert choice["fits"] is fits
    assert (choice["layers"], choice["memory"], choice["trainable_parameters"]) == ("all", "normal", 1000)
    stages = {"load": 7.0, **planning._seconds(job, measured()), "write": planning.FINAL_SECONDS}
    stages["finish"] += 7.0  # the merged model is loaded as the base was
    assert choice["stages"] == pytest.approx(stages) and choice["seconds"] == pytest.approx(sum(stages.values()))
    known = planning._choice(job, measured(choosing=3.0), {"load": 7.0, "calibrate": 9.0}, AMPLE)
    # codes that were read from a cache took less to load
    assert known["stages"]["finish"] == pytest.approx(stages["finish"] - 7.0 + 3.0)
    assert choice["disk_bytes"] == planning._disk_bytes(job, measured())


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
    monkeypatch.setattr(planning, "_measure_choices", lambda *_, **__: choices)


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
    monkeypatch.setattr(memory_mode, "resident_bytes", lambda: 0)
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


def test_settings_of_an_earlier_release_have_no_finishing_steps(job: Job) -> None:
    """It wrote `finish_steps: null` for a share of the steps; a stopped run goes on without."""
    assert finishing_steps(with_settings(job, finish_steps=None).config) == 0


@pytest.mark.parametrize(
    ("settings", "available", "expected"),
    [
        ({}, AMPLE, "high"),
        ({}, SCARCE, "normal"),
        ({"compute": "fp32"}, AMPLE, "high"),
        ({"base_format": "nf4"}, AMPLE, "high"),
        ({"base_format": "fp32"}, AMPLE, "normal"),  # floats anyway
        ({"base_format": "bf16"}, AMPLE, "normal"),
        ({"memory": "low"}, AMPLE, "low"),
        ({"memory": "high"}, Available(1, 1), "high"),
    ],
)
def test_memory_is_high_where_it_is_ample(
    settings: dict[str, Any], available: Available, expected: str, llama: Path, sums: Path
) -> None:
    job = prepare_job(PlanConfig(model=str(llama), data=str(sums), **settings), Silent())
    assert resolve_memory(job, available, torch.device("cpu")).config.memory == expected


@pytest.mark.parametrize(
    ("settings", "available", "expected"),
    [
        ({"compute": "fp32"}, AMPLE, "fp32"),
        ({"compute": "fp32", "memory": "high"}, AMPLE, "fp32"),
        ({"memory": "normal"}, AMPLE, "int4"),  # float weights take more of it
        ({"memory": "low"}, AMPLE, "int4"),
        ({}, SCARCE, "int4"),
        ({"base_format": "int8"}, AMPLE, "int8"),
    ],
)
def test_a_decoder_trains_over_float_weights_where_memory_is_ample(
    settings: dict[str, Any], available: Available, expected: str, llama: Path, sums: Path
) -> None:
    job = prepare_job(PlanConfig(model=str(llama), data=str(sums), **settings), Silent())
    chosen = resolve_base_format(job, available, torch.device("cpu")).config
    assert chosen.base_format == expected


def test_float_weights_are_bfloat16_where_the_processor_multiplies_those(
    llama: Path, sums: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = prepare_job(PlanConfig(model=str(llama), data=str(sums)), Silent())
    for narrow, expected in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(devices, "has_bf16", lambda _, narrow=narrow: narrow)
        assert resolve_base_format(job, AMPLE, torch.device("cpu")).config.base_format == expected


def test_encoders_train_over_the_codes(bert: Path, reviews: Path) -> None:
    job = prepare_job(PlanConfig(model=str(bert), data=str(reviews)), Silent())
    assert resolve_base_format(job, AMPLE, torch.device("cpu")).config.base_format == "int4"


@pytest.mark.parametrize(("dequantizing", "expected"), [(0.3, "high"), (0.2, "normal")])
def test_weights_stay_cached_only_if_that_saves_a_twentieth_of_a_step(
    job: Job, dequantizing: float, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step of 10 s without cached weights dequantizes each of them twice, as one of fewer rows does."""
    now, calls = [0.0], list[str]()

    def taking(seconds: float) -> Any:
        return lambda *_: now.__setitem__(0, now[0] + seconds)

    def step(batch: Any, _: int) -> None:
        share = len(batch["rows"]) / max(map(len, job.batches))
        now[0] += 2 * dequantizing + (10 - 2 * dequantizing) * share

    compute = SimpleNamespace(
        dequantize=taking(dequantizing),
        cache_weights=lambda dtype: calls.append(f"cache {dtype}"),
        stop_caching=lambda: calls.append("stop"),
    )
    backend = SimpleNamespace(compute=compute, dtype="bf16", gradient=step, discard=lambda: None, unshared=nullcontext)
    monkeypatch.setattr(memory_mode.time, "perf_counter", lambda: now[0])
    model: Any = SimpleNamespace(backend=backend)
    assert settle_memory(with_settings(job, memory="high"), model).config.memory == expected
    assert calls == ["cache None", "cache bf16" if expected == "high" else "stop"]
    assert settle_memory(job, model) is job  # --memory normal


def test_a_curve_goes_through_its_points_and_on_from_them() -> None:
    curve = Curve([10, 20, 40], [3.0, 5.0, 6.0])
    assert [curve.at(tokens) for tokens in (1, 10, 15, 20, 30, 40, 60)] == [3.0, 3.0, 4.0, 5.0, 5.5, 6.0, 7.0]
    assert Curve([10, 20], [5.0, 4.0]).at(100) == 5.0  # noise


def test_times_are_printed_in_seconds_minutes_or_hours() -> None:
    assert [duration(seconds) for seconds in (12, 600, 9000)] == ["12 s", "10 min", "2.5 h"]
