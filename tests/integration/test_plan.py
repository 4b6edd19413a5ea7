"""The plan that a tune makes before its first step."""

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.numpy import load_file
from tiny_models import write_t5

from edge_ft.artifacts import RunFolder
from edge_ft.config import PlanConfig, TuneConfig
from edge_ft.errors import WillNotFit
from edge_ft.progress import Silent
from edge_ft.system import Available
from edge_ft.tune import measure as measuring
from edge_ft.tune import trainable_model as loading
from edge_ft.tune import tune
from edge_ft.tune.distributed import Processes
from edge_ft.tune.plan import plan
from edge_ft.tune.prepare import prepare_job
from edge_ft.tune.report import ANSWERS

AMPLE = Available(memory_bytes=2**50, disk_bytes=2**50)

FAST: dict[str, Any] = {"max_steps": 3, "learning_rate": 1e-2, "split": (0.6, 0.2, 0.2), "compute": "fp32"}


class Reports:
    """A progress that keeps messages and stages in their order."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)

    def advance(self, stage: str, done: int, total: int, detail: str = "") -> None:
        self.lines.append(f"{stage} {done}")


@pytest.fixture(scope="module")
def planned(llama: Path, sums: Path) -> dict[str, Any]:
    return plan(PlanConfig(model=str(llama), data=str(sums), split=(0.6, 0.2, 0.2), memory="normal"), available=AMPLE)


def test_a_plan_counts_rows_tokens_steps_and_parameters(planned: dict[str, Any], llama_run: RunFolder) -> None:
    assert planned["rows"] == {"train": 24, "validation": 8, "test": 8} == llama_run.report()["rows"]
    assert planned["steps"] == 24 * 2 // 8
    tokens = planned["tokens"]
    assert 0 < tokens["p50"] <= tokens["p95"] <= tokens["max"] < tokens["total"] <= 24 * tokens["max"]
    assert planned["trainable_parameters"] == llama_run.report()["trainable_parameters"]
    assert planned["findings"] == []
    json.dumps(planned, allow_nan=False)


def test_a_base_that_exceeds_the_memory_is_refused_before_it_is_loaded(
    llama: Path, sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Available, "here", classmethod(lambda cls, out: Available(1000, AMPLE.disk_bytes)))
    monkeypatch.setattr(loading, "load_model", None)
    with pytest.raises(WillNotFit, match="take a smaller model"):
        tune(TuneConfig(model=str(llama), data=str(sums), out=tmp_path / "run", **FAST))
    assert not (tmp_path / "run").exists()


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
    assert planned["reason"].startswith("--layers all --memory normal fits")


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


def test_the_given_settings_are_among_the_choices(llama: Path, sums: Path) -> None:
    found = plan(PlanConfig(model=str(llama), data=str(sums), layers="last:2", memory="low"), available=AMPLE)
    assert {choice["layers"] for choice in found["choices"]} == {"last:2", "last:1"}


def test_layers_without_a_target_module_are_no_choice(llama: Path, sums: Path) -> None:
    first = ("model.layers.0.self_attn.q_proj",)
    found = plan(PlanConfig(model=str(llama), data=str(sums), target_modules=first, max_steps=2), available=AMPLE)
    assert {choice["layers"] for choice in found["choices"]} == {"all"}


def test_the_longest_answers_of_an_encoder_decoder_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All sources have the same length."""
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


def test_the_answers_of_the_report_need_memory_for_the_keys_and_values_of_each(
    llama: Path, sums: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything that is measured takes 1,000 bytes."""
    monkeypatch.setattr(measuring, "_timed", lambda work: (work(), (1.0, 1000))[1])
    job = prepare_job(PlanConfig(model=str(llama), data=str(sums), batch_size=2, compute="fp32"), Silent())
    model = loading.load_trainable_model(job, Processes(torch.device("cpu")), Silent())
    row = job.prepared.examples["test"][0]

    def answering(rows: int, prompt_length: int) -> int:
        answered = [replace(row, prompt_length=prompt_length)] * rows
        prepared = replace(job.prepared, examples={**job.prepared.examples, "test": answered})
        return measuring.measure(replace(job, prepared=prepared), model, AMPLE, 0).answering

    dims = job.base.dims
    a_token = 4 * 2 * dims.layers * dims.kv_heads * dims.head_dim
    few, more, longer = answering(2, 100), answering(4, 100), answering(4, 1000)
    assert more - few > 2 * 100 * a_token
    assert longer - more > 4 * 900 * a_token
    assert answering(ANSWERS, 100) == answering(2 * ANSWERS, 100)  # the report has no more


def test_a_short_step_is_timed_again_since_the_first_of_its_size_waits_for_memory(
    llama: Path, sums: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = prepare_job(PlanConfig(model=str(llama), data=str(sums), compute="fp32"), Silent())
    model = loading.load_trainable_model(job, Processes(torch.device("cpu")), Silent())

    def longest_step() -> float:
        sizes: set[int] = set()

        def step(batch: list[int], *_: Any) -> None:
            if len(batch) not in sizes:
                time.sleep(0.2)
            sizes.add(len(batch))

        monkeypatch.setattr(measuring, "_step", step)
        return max(measuring.measure(job, model, AMPLE, 0).step.values)

    assert longest_step() < 0.1
    monkeypatch.setattr(measuring, "SHORT", 0.1)
    assert longest_step() >= 0.2


def test_a_plan_of_a_classifier(bert: Path, reviews: Path) -> None:
    found = plan(PlanConfig(model=str(bert), data=str(reviews)), available=AMPLE)
    assert found["recommended"]["layers"] == "all"
    assert [finding["code"] for finding in found["findings"]] in ([], ["duplicated"])


@pytest.fixture(scope="module")
def with_plan(llama: Path, sums: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[RunFolder, Reports]]:
    reports = Reports()
    settings = TuneConfig(
        model=str(llama), data=str(sums), out=tmp_path_factory.mktemp("planned") / "run", dropout=0.3, show=1, **FAST
    )
    yield tune(settings, reports), reports


def test_a_tune_reports_its_plan_before_its_first_step_and_writes_it(with_plan: tuple[RunFolder, Reports]) -> None:
    run, reports = with_plan
    written = json.loads((run.path / "plan.json").read_text())
    assert written["choices"] == [written["recommended"]]
    assert written["steps"] == 3 == run.report()["steps"]
    plan_at = next(at for at, line in enumerate(reports.lines) if line.startswith("plan: "))
    assert "3 steps" in reports.lines[plan_at]
    assert plan_at < next(at for at, line in enumerate(reports.lines) if line.startswith("train "))
    assert any("⟦" in line for line in reports.lines)


def test_a_plan_does_not_change_the_adapter(
    with_plan: tuple[RunFolder, Reports], llama: Path, sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge_ft.tune.run.estimate", lambda *_, **__: {})
    without = tune(TuneConfig(model=str(llama), data=str(sums), out=tmp_path / "run", dropout=0.3, **FAST))
    adapters = [load_file(run.adapter / "adapter_model.safetensors") for run in (with_plan[0], without)]
    assert all((adapters[0][name] == adapters[1][name]).all() for name in adapters[1])


def test_a_tune_that_does_not_fit_is_refused_and_leaves_nothing(
    llama: Path, sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Available, "here", classmethod(lambda cls, out: Available(AMPLE.memory_bytes, 1000)))
    with pytest.raises(WillNotFit, match="free some"):
        tune(TuneConfig(model=str(llama), data=str(sums), out=tmp_path / "run", **FAST))
    assert list(tmp_path.iterdir()) == []


class CountedTensors:
    """Stands for the memory of a GPU on a CPU: the bytes of the model's tensors, and of what a step saves."""

    model: Any = None

    def __init__(self, device: Any) -> None:
        self.bytes: int | None = None

    def __enter__(self) -> "CountedTensors":
        self.saved: dict[int, int] = {}
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.count, lambda tensor: tensor)
        self.hooks.__enter__()
        return self

    def count(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        self.saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    def __exit__(self, *_: object) -> None:
        self.hooks.__exit__()
        self.bytes = held(self.model) + sum(self.saved.values())


def held(model: Any) -> int:
    """Bytes of a model's weights, codes and adapters."""
    tensors = [*model.peft_model.parameters(), *model.peft_model.buffers()]
    return sum({tensor.data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


@pytest.mark.parametrize("memory", ["normal", "low"])
def test_the_memory_of_a_card_is_foreseen_as_its_tensors_are_counted(
    llama: Path, sums: Path, monkeypatch: pytest.MonkeyPatch, memory: Any
) -> None:
    """Of the longest batch, which is not tried where it might not fit."""
    settings = PlanConfig(model=str(llama), data=str(sums), memory=memory, compute="fp32", batch_size=16)
    job = prepare_job(settings, Silent())
    model = CountedTensors.model = loading.load_trainable_model(job, Processes(torch.device("cpu")), Silent())
    monkeypatch.setattr(measuring, "DevicePeak", CountedTensors)
    counted = measuring.measure(job, model, AMPLE, 0)
    assert counted.device is not None
    assert counted.device.values[0] == held(model)
    longest = max(job.batch_tokens)
    assert counted.device.tokens[-1] == longest
    few = counted.device.tokens[1]
    # Room for half of what the longest batch takes: fewer of its rows are measured, and the rest is foreseen.
    room = held(model) + (counted.device.at(longest) - held(model)) / 2
    foreseen = measuring.measure(job, model, replace(AMPLE, device_bytes=int(room)), 0)
    assert foreseen.device is not None and few <= foreseen.device.tokens[-1] < longest
    assert foreseen.device.at(longest) == pytest.approx(counted.device.at(longest), rel=0.1)


def test_low_memory_is_recommended_where_only_that_fits_a_card(
    llama: Path, sums: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = loading.load_trainable_model

    def loaded(*given: Any) -> Any:
        CountedTensors.model = load(*given)
        return CountedTensors.model

    monkeypatch.setattr(loading, "load_trainable_model", loaded)
    monkeypatch.setattr(measuring, "DevicePeak", CountedTensors)
    settings = PlanConfig(model=str(llama), data=str(sums), memory="normal", compute="fp32", split=(0.6, 0.2, 0.2))
    normal, low = plan(settings, available=replace(AMPLE, device_bytes=2**50))["choices"][:2]
    assert low["peak_device_bytes"] < normal["peak_device_bytes"]
    between = int((low["peak_device_bytes"] + normal["peak_device_bytes"]) / 2 / 0.9)
    tight = plan(settings, available=replace(AMPLE, device_bytes=between))
    assert (tight["recommended"]["layers"], tight["recommended"]["memory"]) == ("all", "low")
    assert "of the GPU, on which --batch-size" in tight["reason"]
    with pytest.raises(WillNotFit, match="of the GPU"):
        plan(settings, available=replace(AMPLE, device_bytes=held(CountedTensors.model)))
