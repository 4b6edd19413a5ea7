"""After the adapter a run makes the merged model, trains its scales and keeps it; an export ships those bytes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from foreign_adapters import save_foreign
from recorded_progress import RecordedProgress
from safetensors.numpy import load_file
from tiny_models import write_decoder, write_llama

from edge_ft.artifacts import Bundle, RunFolder
from edge_ft.config import ExportConfig, TuneConfig
from edge_ft.errors import UsageError
from edge_ft.export import export
from edge_ft.export.finishing import load_finished
from edge_ft.export.lowering import lower
from edge_ft.export.opening import open_export_source
from edge_ft.export.trace import trace
from edge_ft.progress import Silent
from edge_ft.quant import calibration
from edge_ft.tune import finish as finishing
from edge_ft.tune import tune

LOOSE: dict[str, Any] = {"max_tax": 1.0, "min_retained": 0.0, "max_metric_drop": 1.0}


@pytest.fixture(scope="module", params=["int4", "fp32"])
def settings(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("finish")
    rows = [{"prompt": f"What is {i} and {i + 1}? ", "completion": f"seven and {i % 5}"} for i in range(60)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = write_llama(folder / "llama")
    return {
        "model": str(model),
        "data": str(folder / "rows.jsonl"),
        "max_steps": 12,
        "batch_size": 4,
        "learning_rate": 1e-2,
        "finish_steps": 6,
        "base_format": request.param,
        "compute": "fp32",
    }


def trained(settings: dict[str, Any], out: Path, **more: Any) -> RunFolder:
    return tune(TuneConfig(**{**settings, **more}, out=out))


@pytest.fixture(scope="module")
def run(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return trained(settings, tmp_path_factory.mktemp("finished") / "run")


def merged_codes(run: RunFolder) -> bytes:
    return (run.merged / "codes.safetensors").read_bytes()


def test_the_adapter_is_that_of_a_run_without_the_phase_and_the_report_has_both_losses(
    run: RunFolder, settings: dict[str, Any], tmp_path: Path
) -> None:
    without = trained(settings, tmp_path / "without", finish_steps=0)
    weights = "adapter_model.safetensors"
    assert (without.adapter / weights).read_bytes() == (run.adapter / weights).read_bytes()
    assert (without.report()["finish"], without.merged.exists()) == (None, False)
    found = run.report()["finish"]
    assert (found["steps"], run.report()["timings"]["finish"] > 0) == (6, True)
    assert found["nll"]["finished"] <= found["nll"]["merged"]
    assert found["quantization_tax"] == pytest.approx(found["nll"]["finished"] - found["nll"]["trained"])
    assert not (run.path / ".finish").exists()
    run.check_files()  # merged/ is listed


def test_an_export_ships_the_bytes_that_were_evaluated_last_and_chooses_no_codes(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "gptq_quantize", None)
    bundle = export(str(run.path), ExportConfig(out=tmp_path / "bundle", **LOOSE))
    graph = onnx.load(bundle.graph(1))
    arrays = [onnx.numpy_helper.to_array(tensor) for tensor in graph.graph.initializer]
    wide = (array.astype(np.float32) if array.dtype == np.float16 else array for array in arrays)  # exact for scales
    weights = b"".join(array.tobytes() for array in wide)
    stored = load_file(run.merged_codes)
    assert len(stored) >= 3 * 14  # q, k and v lie one after the other in the graph
    assert [name for name, array in stored.items() if array.tobytes() not in weights] == []
    assert bundle.manifest["verification"]["by_accuracy_level"]["1"]["shipped_minus_last_evaluated"] < 1e-5


def test_only_scales_are_trained(run: RunFolder, settings: dict[str, Any], tmp_path: Path) -> None:
    """A run of steps that change nothing keeps the codes as they were chosen; the finished ones differ by scales."""
    stopped = RunFolder(tmp_path / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finishing, "RATE", 1e-30)
        trained(settings, stopped.path)
    chosen, finished = (load_file(folder.merged / "codes.safetensors") for folder in (stopped, run))
    changed = {name.rpartition(".")[2] for name in chosen if not np.array_equal(chosen[name], finished[name])}
    assert changed == {"scales"}
    assert stopped.report()["finish"]["best_step"] == 0


class Stopped(Exception):
    pass


@pytest.mark.parametrize("at", ["codes", "step", "written"])
def test_a_run_that_is_killed_in_the_phase_ends_with_the_same_bytes(
    at: str, run: RunFolder, settings: dict[str, Any], tmp_path: Path
) -> None:
    out, steps = tmp_path / "run", 0

    def stop(*_: Any, **__: Any) -> Any:
        raise Stopped

    update = finishing.FinishBackend.update

    def stop_at_the_fourth(self: Any, *arguments: Any) -> float:
        nonlocal steps
        steps += 1
        return stop() if steps == 4 else update(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        if at == "codes":
            patch.setattr(finishing, "FinishBackend", stop)
        elif at == "step":
            patch.setattr(finishing.FinishBackend, "update", stop_at_the_fourth)
        else:
            patch.setattr("edge_ft.tune.run.results", stop)
        with pytest.raises(Stopped):
            trained(settings, out, checkpoint_steps=1)
    with pytest.MonkeyPatch.context() as patch:
        if at != "codes":  # these are chosen once
            patch.setattr(calibration, "gptq_quantize", None)
        resumed = trained(settings, out, checkpoint_steps=1, resume=True)
    assert merged_codes(resumed) == merged_codes(run)
    assert resumed.report()["finish"]["nll"] == run.report()["finish"]["nll"]


def test_codes_of_another_adapter_are_not_taken(run: RunFolder, settings: dict[str, Any], tmp_path: Path) -> None:
    copy = RunFolder(tmp_path / "run")
    trained(settings, copy.path, seed=5)
    (copy.merged / "merged.json").write_bytes((run.merged / "merged.json").read_bytes())
    (copy.path / "files.json").unlink()
    progress = RecordedProgress()
    export(str(copy.path), ExportConfig(out=tmp_path / "bundle", **LOOSE), progress)
    assert any("chosen again" in line for line in progress.lines)


def test_another_block_size_chooses_codes_anew(run: RunFolder, tmp_path: Path) -> None:
    bundle = export(str(run.path), ExportConfig(out=tmp_path / "bundle", block_size=16, **LOOSE))
    assert bundle.manifest["quantization"]["block_size"] == 16


@pytest.mark.parametrize("base_format", ["int8", "nf4"])
def test_a_base_of_another_quantized_format_has_no_phase(
    base_format: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=f"--finish-steps 3 makes an int4 model, and the base is {base_format}"):
        TuneConfig(**{**settings, "finish_steps": 3, "base_format": base_format}, out=tmp_path)


def test_a_run_whose_minutes_are_over_is_finished_without(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finishing, "MINUTE", 1e-9)  # each second of the training counts as many minutes
    run, progress = TuneConfig(**settings, max_minutes=10, out=tmp_path / "run"), RecordedProgress()
    assert tune(run, progress).report()["finish"] is None
    assert any("--max-minutes 10 are over" in line for line in progress.lines)


# An adapter from elsewhere


@pytest.fixture(scope="module")
def foreign(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_foreign(Path(settings["model"]), tmp_path_factory.mktemp("foreign") / "adapter")


def test_an_export_of_an_adapter_that_was_trained_over_float_loses_less_with_trained_scales(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    rows = [{"prompt": f"What is {i} and {i + 1}? ", "completion": f"seven and {i % 5}"} for i in range(300)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = trained({**settings, "finish_steps": 0}, tmp_path / "run", data=str(data), base_format="fp32", max_steps=40)

    def exported(finish: int) -> dict[str, Any]:
        own = {"adapter": run.adapter, "data": str(data), "finish": finish}
        bundle = export(settings["model"], ExportConfig(out=tmp_path / str(finish), **own, **LOOSE))
        found: dict[str, Any] = bundle.manifest["verification"]
        return found

    before, after = exported(0), exported(60)
    assert after["nll"]["trained"] == before["nll"]["trained"]
    assert before["quantization_tax"] > 0
    assert abs(after["quantization_tax"]) < before["quantization_tax"]
    assert before["rows_split"] == [0.8, 0.1, 0.1]
    assert (after["rows"], after["test"]["rows"]) == (30, 30)
    assert None not in after["test"]["nll"].values()


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_trained_scales_leave_the_graph_its_operators(name: str, sums: Path, tmp_path: Path) -> None:
    base = write_decoder(tmp_path / "base", name)
    adapter = save_foreign(base, tmp_path / "adapter")
    graphs = []
    for finish in (0, 1):
        config = ExportConfig(out=tmp_path / "none", adapter=adapter, data=str(sums), finish=finish)
        source = open_export_source(str(base), config)
        graph = trace(load_finished(source, config, Silent()), source.base.family)
        lower(graph)
        graphs.append([node.op_type for node in graph.graph])
    assert graphs[0] == graphs[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": None}, "give --adapter and --data"),
        ({"adapter": None}, "give --adapter and --data"),
        ({"lane": "adapter"}, "--lane merged, not int4 and adapter"),
        ({"weights": "int8"}, "--weights int4 and --lane merged, not int8"),
    ],
)
def test_finish_refuses_what_it_cannot_train(
    options: dict[str, Any], message: str, settings: dict[str, Any], foreign: Path, tmp_path: Path
) -> None:
    given = {"adapter": foreign, "data": settings["data"], "finish": 2, **options}
    with pytest.raises(UsageError, match=message):
        export(settings["model"], ExportConfig(out=tmp_path / "bundle", **given))


def test_a_model_that_writes_no_text_has_no_phase(bert: Path, reviews: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--finish-steps is for models that write text"):
        tune(TuneConfig(model=str(bert), data=str(reviews), finish_steps=2, out=tmp_path / "run"))


def test_finish_is_not_for_a_run(run: RunFolder, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--finish is for a model: the run folder"):
        export(str(run.path), ExportConfig(out=tmp_path / "bundle", finish=2))


def test_the_plan_foretells_the_phase(run: RunFolder) -> None:
    plan = json.loads((run.path / "plan.json").read_text())
    assert plan["recommended"]["stages"]["finish"] > 0


def test_the_lanes_come_from_one_run(run: RunFolder, tmp_path: Path) -> None:
    merged, adapter = (
        export(str(run.path), ExportConfig(out=tmp_path / lane, lane=lane, **LOOSE))  # type: ignore[arg-type]
        for lane in ("merged", "adapter")
    )
    assert isinstance(merged, Bundle)
    held = run.base()["format"] == "int4"  # over float weights the codes of the base are chosen now
    assert (abs(adapter.manifest["verification"]["quantization_tax"]) < 1e-4) == held
    assert adapter.manifest["quantization"]["bits"] == 4
    assert adapter.manifest["verification"]["adapter_changes_logits"]
    assert merged.manifest["verification"]["quantization_tax"] != 0
