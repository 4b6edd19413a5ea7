"""A plan estimates time, memory and disk of a training, recommends a choice that fits, and refuses what does not."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.numpy import load_file
from tiny_models import tiny_encoder_config, write_encoder, write_t5

from edge_ft.config import PlanConfig
from edge_ft.errors import AuditRefused, WillNotFit
from edge_ft.progress import Silent
from edge_ft.system import Available
from edge_ft.tune import measure as measuring
from edge_ft.tune import plan as planning
from edge_ft.tune import trainable_model as loading
from edge_ft.tune.job import prepare_job
from edge_ft.tune.measure import Curve
from edge_ft.tune.plan import duration, plan, resolve_memory


class Loaded(Exception):
    """The base was about to be loaded."""


def refuse_to_load(*_: object) -> None:
    raise Loaded


AMPLE = Available(memory_bytes=2**50, disk_bytes=2**50)
SCARCE = Available(memory_bytes=600_000, disk_bytes=2**50)
"""The dequantized weights of the tiny model take more than an eighth of it."""


@pytest.fixture(scope="module")
def planned(llama: Path, sums: Path) -> dict[str, Any]:
    return plan(PlanConfig(model=str(llama), data=str(sums), split=(0.6, 0.2, 0.2), memory="normal"), available=AMPLE)


def test_the_best_choice_that_fits_is_recommended_with_a_reason(planned: dict[str, Any]) -> None:
    assert [(choice["layers"], choice["memory"]) for choice in planned["choices"]] == [
        ("all", "normal"),
        ("all", "low"),
        ("last:1", "normal"),
        ("last:1", "low"),
    ]
    for choice in planned["choices"]:
        assert choice["fits"] and min(choice[key] for key in ("seconds", "peak_rss_bytes", "disk_bytes")) > 0
    assert planned["recommended"] == planned["choices"][0]
    assert "layers all with normal memory is the best of the choices" in planned["reason"]


def test_fewer_layers_are_recommended_where_more_do_not_fit(planned: dict[str, Any], llama: Path, sums: Path) -> None:
    all_layers, half = planned["choices"][0]["disk_bytes"], planned["choices"][2]["disk_bytes"]
    assert half < all_layers
    available = Available(AMPLE.memory_bytes, (all_layers + half) // 2 * 10 // 9)
    found = plan(PlanConfig(model=str(llama), data=str(sums), split=(0.6, 0.2, 0.2)), available=available)
    assert [choice["fits"] for choice in found["choices"]] == [False, False, True, True]
    assert found["recommended"]["layers"] == "last:1"
    assert "best of the choices that fit" in found["reason"]


@pytest.mark.parametrize(
    ("available", "says"),
    [(Available(AMPLE.memory_bytes, 10), "of disk and"), (Available(10, AMPLE.disk_bytes), "of memory as int4")],
)
def test_a_training_that_fits_with_no_choice_is_refused(
    llama: Path, sums: Path, available: Available, says: str
) -> None:
    with pytest.raises(WillNotFit, match=says):
        plan(PlanConfig(model=str(llama), data=str(sums)), available=available)


def test_steps_that_do_not_fit_are_refused_without_taking_them(
    llama: Path, sums: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The longest batch would need more memory than is available, which a few of its rows show."""
    rows = measuring.resident_bytes() + 2**28  # enough for the weights and a few rows of this tiny model
    taken: list[int] = []
    watched = measuring.PeakMemory.__exit__

    def heavy(self: Any, *arguments: object) -> None:
        """As if every pass took 200 MB."""
        watched(self, *arguments)
        self.bytes = measuring.resident_bytes() + 200_000_000

    def collated(examples: Any, *arguments: Any) -> Any:
        taken.append(len(examples))
        return collate(examples, *arguments)

    collate = measuring.collate
    monkeypatch.setattr(measuring.PeakMemory, "__exit__", heavy)
    monkeypatch.setattr(measuring, "collate", collated)
    with pytest.raises(WillNotFit, match=r"of memory and .* are free: give .*--batch-size"):
        plan(PlanConfig(model=str(llama), data=str(sums), batch_size=16), available=Available(rows, AMPLE.disk_bytes))
    assert max(taken) < 16


def test_dequantized_weights_count_before_a_base_is_loaded(
    llama: Path, sums: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "resident_bytes", lambda: 0)
    monkeypatch.setattr(loading, "load_model", refuse_to_load)
    weights = sum(array.size for file in llama.glob("*.safetensors") for array in load_file(file).values())
    settings: dict[str, Any] = {"model": str(llama), "data": str(sums), "memory": "high"}
    with pytest.raises(WillNotFit, match=r"as int4 and dequantized: .* give --memory normal, or take a smaller model"):
        plan(PlanConfig(**settings), available=Available(2 * weights, AMPLE.disk_bytes))
    with pytest.raises(Loaded):
        plan(PlanConfig(**settings), available=Available(4 * weights, AMPLE.disk_bytes))
    with pytest.raises(WillNotFit, match="and dequantized"):
        plan(PlanConfig(**settings, compute="fp32"), available=Available(4 * weights, AMPLE.disk_bytes))


def test_rows_that_train_nothing_are_refused_by_a_plan_too(llama: Path, sums: Path) -> None:
    with pytest.raises(AuditRefused):
        plan(PlanConfig(model=str(llama), data=str(sums), max_length=10), available=AMPLE)


def test_the_given_settings_are_among_the_choices(llama: Path, sums: Path) -> None:
    found = plan(PlanConfig(model=str(llama), data=str(sums), layers="last:2", memory="low"), available=AMPLE)
    assert {choice["layers"] for choice in found["choices"]} == {"last:2", "last:1"}


def test_a_model_that_repeats_its_layers_has_one_choice_of_layers(reviews: Path, tmp_path: Path) -> None:
    albert = write_encoder(tmp_path / "albert", tiny_encoder_config("albert"))
    found = plan(PlanConfig(model=str(albert), data=str(reviews), max_steps=2, memory="high"), available=AMPLE)
    assert [(choice["layers"], choice["memory"]) for choice in found["choices"]] == [("all", "high"), ("all", "low")]


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
    monkeypatch.setattr("edge_ft.quant.bf16.has_bf16", lambda device: bf16)
    job = prepare_job(PlanConfig(model=str(llama), data=str(sums), **settings), Silent())
    assert resolve_memory(job, available, torch.device("cpu")).memory == expected


def test_fewer_layers_are_no_choice_where_none_of_them_is_trained(llama: Path, sums: Path) -> None:
    first = ("model.layers.0.self_attn.q_proj",)
    found = plan(PlanConfig(model=str(llama), data=str(sums), target_modules=first, max_steps=2), available=AMPLE)
    assert {choice["layers"] for choice in found["choices"]} == {"all"}


def test_an_encoder_decoders_answers_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sources of one length and answers of several: the longest answers are among what is measured."""
    rows = tmp_path / "rows.jsonl"
    answers = [" ".join(["two"] * (1 + n % 8)) for n in range(40)]
    rows.write_text(
        "".join(json.dumps({"prompt": f"one {n:02d}", "completion": a}) + "\n" for n, a in enumerate(answers))
    )
    lengths = []

    def collated(examples: Any, *arguments: Any) -> Any:
        lengths.append(max(len(example.labels) for example in examples))
        return collate(examples, *arguments)

    collate = measuring.collate
    monkeypatch.setattr(measuring, "collate", collated)
    model = write_t5(tmp_path / "t5")
    plan(PlanConfig(model=str(model), data=str(rows), batch_size=2, memory="low", layers="last:1"), available=AMPLE)
    assert max(lengths) > 2 * min(lengths)


def test_max_minutes_limits_the_estimated_time(llama: Path, sums: Path) -> None:
    settings: dict[str, Any] = {"model": str(llama), "data": str(sums), "max_steps": 10**6}
    free, limited = (
        plan(PlanConfig(**settings, max_minutes=minutes), available=AMPLE)["choices"][0]["seconds"]
        for minutes in (None, 1)
    )
    assert free > 1000 > limited > 60


def test_a_plan_shows_as_many_rows_as_requested(llama: Path, sums: Path, planned: dict[str, Any]) -> None:
    assert "shown" not in planned
    found = plan(PlanConfig(model=str(llama), data=str(sums), show=2), available=AMPLE)
    assert len(found["shown"]) == 2 and all("⟦" in text for text in found["shown"])


def test_a_classifier_is_planned_too(bert: Path, reviews: Path) -> None:
    found = plan(PlanConfig(model=str(bert), data=str(reviews)), available=AMPLE)
    assert found["recommended"]["layers"] == "all"
    assert [finding["code"] for finding in found["findings"]] in ([], ["duplicated"])


def test_a_curve_goes_through_its_points_and_on_from_them() -> None:
    curve = Curve([10, 20, 40], [3.0, 5.0, 6.0])
    assert [curve.at(tokens) for tokens in (1, 10, 15, 20, 30, 40, 60)] == [3.0, 3.0, 4.0, 5.0, 5.5, 6.0, 7.0]
    assert Curve([10, 20], [5.0, 4.0]).at(100) == 5.0  # noise


def test_times_are_printed_in_seconds_minutes_or_hours() -> None:
    assert [duration(seconds) for seconds in (12, 600, 9000)] == ["12 s", "10 min", "2.5 h"]
