"""What a tune will take is said before it starts, refused where it is too much, and changes nothing of the run."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.numpy import load_file
from tiny_models import tiny_encoder_config, write_encoder, write_t5

from edge_ft.config import PlanConfig
from edge_ft.data import TextTokenizer
from edge_ft.errors import AuditRefused, WillNotFit
from edge_ft.models.base_model import find_base
from edge_ft.progress import Silent
from edge_ft.system import Available
from edge_ft.tune import measure as measuring
from edge_ft.tune import plan as planning
from edge_ft.tune import trainable_model as adapted
from edge_ft.tune.measure import Curve
from edge_ft.tune.plan import duration, plan, resolve_memory
from edge_ft.tune.prepare import prepare

PLENTY = Available(memory_bytes=2**50, disk_bytes=2**50)


@pytest.fixture(scope="module")
def planned(llama: Path, sums: Path) -> dict[str, Any]:
    return plan(PlanConfig(model=str(llama), data=str(sums), split=(0.6, 0.2, 0.2), memory="normal"), available=PLENTY)


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
    available = Available(PLENTY.memory_bytes, (all_layers + half) // 2 * 10 // 9)
    found = plan(PlanConfig(model=str(llama), data=str(sums), split=(0.6, 0.2, 0.2)), available=available)
    assert [choice["fits"] for choice in found["choices"]] == [False, False, True, True]
    assert found["recommended"]["layers"] == "last:1"
    assert "best of the choices that fit" in found["reason"]


@pytest.mark.parametrize(
    ("available", "says"),
    [(Available(PLENTY.memory_bytes, 10), "of disk and"), (Available(10, PLENTY.disk_bytes), "of memory as int4")],
)
def test_what_fits_nowhere_is_refused(llama: Path, sums: Path, available: Available, says: str) -> None:
    with pytest.raises(WillNotFit, match=says):
        plan(PlanConfig(model=str(llama), data=str(sums)), available=available)


def test_steps_that_do_not_fit_are_refused_without_taking_them(
    llama: Path, sums: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The largest batch would need more than there is: it is foreseen from a few rows of a batch."""
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
        plan(PlanConfig(model=str(llama), data=str(sums), batch_size=16), available=Available(rows, PLENTY.disk_bytes))
    assert max(taken) < 16


def test_floats_beside_the_codes_are_reckoned_with(llama: Path, sums: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "resident_bytes", lambda: 0)
    monkeypatch.setattr(adapted, "load_model", None)
    weights = sum(array.size for file in llama.glob("*.safetensors") for array in load_file(file).values())
    settings: dict[str, Any] = {"model": str(llama), "data": str(sums), "memory": "high"}
    with pytest.raises(WillNotFit, match=r"as int4 beside floats: .* give --memory normal, or take a smaller model"):
        plan(PlanConfig(**settings), available=Available(2 * weights, PLENTY.disk_bytes))
    with pytest.raises(TypeError):  # goes on to load it
        plan(PlanConfig(**settings), available=Available(4 * weights, PLENTY.disk_bytes))
    with pytest.raises(WillNotFit, match="beside floats"):
        plan(PlanConfig(**settings, compute="fp32"), available=Available(4 * weights, PLENTY.disk_bytes))


def test_rows_that_train_nothing_are_refused_by_a_plan_too(llama: Path, sums: Path) -> None:
    with pytest.raises(AuditRefused):
        plan(PlanConfig(model=str(llama), data=str(sums), max_length=10), available=PLENTY)


def test_settings_of_ones_own_are_among_the_choices(llama: Path, sums: Path) -> None:
    found = plan(PlanConfig(model=str(llama), data=str(sums), layers="last:2", memory="low"), available=PLENTY)
    assert {choice["layers"] for choice in found["choices"]} == {"last:2", "last:1"}


def test_layers_that_are_run_through_several_times_are_one_choice(reviews: Path, tmp_path: Path) -> None:
    albert = write_encoder(tmp_path / "albert", tiny_encoder_config("albert"))
    found = plan(PlanConfig(model=str(albert), data=str(reviews), max_steps=2, memory="high"), available=PLENTY)
    assert [(choice["layers"], choice["memory"]) for choice in found["choices"]] == [("all", "high"), ("all", "low")]


@pytest.mark.parametrize(
    ("settings", "available", "bf16", "expected"),
    [
        ({}, PLENTY, True, "high"),
        ({}, PLENTY, False, "normal"),
        (
            {},
            Available(600_000, PLENTY.disk_bytes),
            True,
            "normal",
        ),  # the model's weights are more than an eighth of it
        ({"batch_size": 16}, PLENTY, True, "normal"),  # steps of more than 512 tokens
        ({"base_format": "fp32"}, PLENTY, True, "normal"),  # floats anyway
        ({"base_format": "bf16"}, PLENTY, True, "normal"),
        ({"base_format": "nf4"}, PLENTY, True, "high"),
        ({"compute": "fp32"}, PLENTY, True, "normal"),
        ({"memory": "low"}, PLENTY, True, "low"),
        ({"memory": "high"}, Available(1, 1), False, "high"),
    ],
)
def test_float_weights_are_kept_where_steps_are_short_and_memory_is_plenty(
    settings: dict[str, Any],
    available: Available,
    bf16: bool,
    expected: str,
    llama: Path,
    sums: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("edge_ft.quant.bf16.has_bf16", lambda device: bf16)
    base = find_base(str(llama))
    config = base.family.resolve(PlanConfig(model=str(llama), data=str(sums), **settings))
    prepared = prepare(config, base, TextTokenizer.load(base.path), Silent())
    assert resolve_memory(base, config, prepared, available, torch.device("cpu")).memory == expected


def test_fewer_layers_are_no_choice_where_none_of_them_is_trained(llama: Path, sums: Path) -> None:
    first = ("model.layers.0.self_attn.q_proj",)
    found = plan(PlanConfig(model=str(llama), data=str(sums), target_modules=first, max_steps=2), available=PLENTY)
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
    plan(PlanConfig(model=str(model), data=str(rows), batch_size=2, memory="low", layers="last:1"), available=PLENTY)
    assert max(lengths) > 2 * min(lengths)


def test_a_limit_of_time_limits_the_predicted_time(llama: Path, sums: Path) -> None:
    settings: dict[str, Any] = {"model": str(llama), "data": str(sums), "max_steps": 10**6}
    free, limited = (
        plan(PlanConfig(**settings, max_minutes=minutes), available=PLENTY)["choices"][0]["seconds"]
        for minutes in (None, 1)
    )
    assert free > 1000 > limited > 60


def test_a_plan_shows_rows_as_asked(llama: Path, sums: Path, planned: dict[str, Any]) -> None:
    assert "shown" not in planned
    found = plan(PlanConfig(model=str(llama), data=str(sums), show=2), available=PLENTY)
    assert len(found["shown"]) == 2 and all("⟦" in text for text in found["shown"])


def test_a_classifier_is_planned_too(bert: Path, reviews: Path) -> None:
    found = plan(PlanConfig(model=str(bert), data=str(reviews)), available=PLENTY)
    assert found["recommended"]["layers"] == "all"
    assert [finding["code"] for finding in found["findings"]] in ([], ["duplicated"])


def test_a_curve_goes_through_its_points_and_on_from_them() -> None:
    curve = Curve([10, 20, 40], [3.0, 5.0, 6.0])
    assert [curve.at(tokens) for tokens in (1, 10, 15, 20, 30, 40, 60)] == [3.0, 3.0, 4.0, 5.0, 5.5, 6.0, 7.0]
    assert Curve([10, 20], [5.0, 4.0]).at(100) == 5.0  # noise


def test_times_are_said_in_their_own_unit() -> None:
    assert [duration(seconds) for seconds in (12, 600, 9000)] == ["12 s", "10 min", "2.5 h"]
