"""A run that is stopped at any moment resumes from its checkpoint and ends as one that was not stopped."""

import errno
import json
import shutil
import signal
import threading
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from recorded_progress import RecordedProgress
from resumed_runs import adapter, lines, settings, stopped_at
from tiny_models import write_bert, write_llama, write_sums

from edge_ft.artifacts import RunFolder, kind_of
from edge_ft.config import TuneConfig
from edge_ft.errors import Interrupted, UsageError, WillNotFit
from edge_ft.tune import checkpoint as checkpoints
from edge_ft.tune import tune
from edge_ft.tune.checkpoint import find_checkpoint, read_checkpoint
from edge_ft.tune.torch_backend import TorchBackend


@pytest.fixture
def stopped(llama: Path, sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TuneConfig:
    """Settings that resume a run stopped at step 7."""
    config = settings(llama, sums, tmp_path / "run")
    stopped_at(config, 7, monkeypatch)
    return replace(config, resume=True)


def test_a_resumed_run_ends_as_one_that_was_not_stopped(stopped: TuneConfig, whole: RunFolder) -> None:
    assert kind_of(str(stopped.out)) == "run"
    calibration = RunFolder(stopped.out).base()["calibration"]
    with pytest.raises(UsageError, match=r"resume it with edge-ft tune --config .* --resume"):
        RunFolder.open(stopped.out)
    run = tune(stopped)
    assert run.report()["resumed_from_step"] == 7
    assert run.report()["calibration"] == calibration
    assert calibration["rows"] == whole.report()["calibration"]["rows"]
    assert adapter(run) == adapter(whole)
    assert lines(run) == lines(whole)
    assert not find_checkpoint(run.path)
    for name in ("nll", "metrics", "best_step", "steps", "overfitting", "samples"):
        assert run.report()[name] == whole.report()[name]


def test_a_classifier_resumes_too(bert: Path, reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    once = tune(settings(bert, reviews, tmp_path / "once"))
    config = settings(bert, reviews, tmp_path / "run")
    stopped_at(config, 5, monkeypatch)
    again = tune(replace(config, resume=True))
    assert again.report()["resumed_from_step"] == 5
    assert adapter(again) == adapter(once)


def test_checkpoints_are_written_every_so_many_steps_and_minutes(
    llama: Path, sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped_at(settings(llama, sums, tmp_path / "steps", checkpoint_steps=3), 8, monkeypatch)
    assert read_checkpoint(tmp_path / "steps").state.steps == 6  # type: ignore[union-attr]
    often = settings(llama, sums, tmp_path / "minutes", checkpoint_steps=None, checkpoint_minutes=1e-9)
    stopped_at(often, 8, monkeypatch)
    assert read_checkpoint(tmp_path / "minutes").state.steps == 8  # type: ignore[union-attr]
    never = settings(llama, sums, tmp_path / "never", checkpoint_steps=None, checkpoint_minutes=0)
    stopped_at(never, 8, monkeypatch)
    assert not find_checkpoint(tmp_path / "never")


def test_without_a_checkpoint_it_starts_at_the_first_step(
    llama: Path, sums: Path, tmp_path: Path, whole: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(llama, sums, tmp_path / "run", checkpoint_steps=None)
    stopped_at(config, 7, monkeypatch)
    run = tune(replace(config, resume=True))
    assert run.report()["resumed_from_step"] == 0
    assert (adapter(run), lines(run)) == (adapter(whole), lines(whole))


def test_without_a_run_it_starts_one(llama: Path, sums: Path, tmp_path: Path, whole: RunFolder) -> None:
    run = tune(settings(llama, sums, tmp_path / "run", resume=True))
    assert run.report()["resumed_from_step"] is None
    assert adapter(run) == adapter(whole)


def test_a_finished_run_is_not_touched(whole: RunFolder, llama: Path, sums: Path) -> None:
    def content() -> dict[Path, tuple[int, bytes]]:
        return {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in whole.path.rglob("*") if p.is_file()}

    before = content()
    assert tune(settings(llama, sums, whole.path, resume=True)) == whole
    assert content() == before


def test_a_folder_that_is_no_run_is_not_written_to(llama: Path, sums: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("meow")
    with pytest.raises(UsageError, match="not a run folder"):
        tune(settings(llama, sums, tmp_path / "photos", resume=True))
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["cat.jpg"]


def test_an_unfinished_run_is_not_overwritten(stopped: TuneConfig) -> None:
    with pytest.raises(UsageError, match=r"exists already.*--resume"):
        tune(replace(stopped, resume=False))


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"learning_rate": 1e-4}, "--learning-rate 0.005 and not 0.0001"),
        ({"split": (0.5, 0.3, 0.2)}, "--split 0.6 0.2 0.2 and not"),
        ({"max_steps": 100}, "--max-steps 12 and not 100"),
        ({"threads": 2}, "--threads 1 and not 2"),
        ({"patience": 3}, "--patience None and not 3"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_other_settings_are_refused_by_name(stopped: TuneConfig, other: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        tune(replace(stopped, **other))
    assert find_checkpoint(stopped.out)


def test_other_settings_in_the_runs_own_file_are_refused_too(stopped: TuneConfig) -> None:
    file = stopped.out / "config.yaml"
    edited = {**yaml.safe_load(file.read_text()), "rank": 4, "resume": True}
    with pytest.raises(UsageError, match="--rank 8 and not 4"):
        tune(TuneConfig(**edited))


def test_settings_that_were_left_open_are_those_of_the_run(
    llama: Path, sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def config(out: str) -> TuneConfig:
        open_ = {"epochs": None, "batch_size": None, "gradient_accumulation": None, "max_steps": None, "threads": None}
        return settings(llama, sums, tmp_path / out, checkpoint_minutes=0, **open_)

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr("edge_ft.tune.defaults.PASS_TOKENS", 100)  # the rows count as long ones
    once = tune(config("once"))
    stopped_at(config("run"), 5, monkeypatch)
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (saved["max_steps"], saved["threads"], saved["task"]) == (6, 1, "text-generation")
    assert (saved["batch_size"], saved["gradient_accumulation"]) == (2, 4)
    assert saved["memory"] in ("high", "normal")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    # What memory is used for changes nothing of the result.
    again = tune(replace(config("run"), resume=True, checkpoint_steps=5, memory="low"))
    assert again.report()["threads"] == 1
    assert adapter(again) == adapter(once)


def test_another_model_is_refused_by_name(stopped: TuneConfig, tmp_path: Path) -> None:
    other = write_llama(tmp_path / "other", seed=1)
    with pytest.raises(UsageError, match="--model holds other weights"):
        tune(replace(stopped, model=str(other)))
    with pytest.raises(UsageError, match="--model holds other weights"):
        tune(replace(stopped, model=str(write_bert(tmp_path / "bert"))))


def test_other_rows_are_refused_by_name(stopped: TuneConfig, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--data holds other rows"):
        tune(replace(stopped, data=str(write_sums(tmp_path / "more.jsonl", rows=41))))


def test_another_tokenizer_is_refused(llama: Path, sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = shutil.copytree(llama, tmp_path / "llama")
    config = settings(own, sums, tmp_path / "run")
    stopped_at(config, 3, monkeypatch)
    template = own / "chat_template.jinja"
    template.write_text("hello " + template.read_text())
    with pytest.raises(UsageError, match="--data reads differently"):
        tune(replace(config, resume=True))


def test_model_rows_and_run_may_have_moved(
    llama: Path, sums: Path, tmp_path: Path, whole: RunFolder, stopped: TuneConfig
) -> None:
    model, rows = shutil.copytree(llama, tmp_path / "there"), shutil.copy(sums, tmp_path / "rows.jsonl")
    stopped.out.rename(tmp_path / "elsewhere")
    run = tune(replace(stopped, model=str(model), data=str(rows), out=tmp_path / "elsewhere"))
    assert run.report()["resumed_from_step"] == 7
    assert adapter(run) == adapter(whole)


def test_a_damaged_checkpoint_is_refused(stopped: TuneConfig) -> None:
    weights = stopped.out / "checkpoint" / "state.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(UsageError, match="not the file that was written"):
        tune(stopped)


@pytest.mark.parametrize("call", range(13))
def test_a_stop_between_any_two_file_operations_leaves_a_whole_checkpoint(
    stopped: TuneConfig, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    """The process ends at the `call`th operation of the writing, and does nothing more."""
    older = read_checkpoint(stopped.out)
    assert older is not None
    calls = [0]

    class Killed(BaseException):
        pass

    def mortal(function: Any) -> Any:
        def counted(*arguments: Any, **named: Any) -> Any:
            if calls[0] == call:
                raise Killed
            calls[0] += 1
            return function(*arguments, **named)

        return counted

    newer = replace(older, state=replace(older.state, steps=8))
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save_file", mortal(checkpoints.save_file))
        patch.setattr(checkpoints, "write_json", mortal(checkpoints.write_json))
        patch.setattr(checkpoints, "_sync", mortal(checkpoints._sync))
        patch.setattr(checkpoints.shutil, "rmtree", mortal(shutil.rmtree))
        patch.setattr(checkpoints.Path, "rename", mortal(Path.rename))
        with suppress(Killed):
            checkpoints.write_checkpoint(stopped.out, newer)
    found = read_checkpoint(stopped.out)
    assert found is not None
    assert found.state.steps in (7, 8)
    assert all(np.array_equal(found.backend[name], array) for name, array in older.backend.items())


def test_ctrl_c_while_the_validation_rows_are_read_saves_the_step_before(
    llama: Path, sums: Path, tmp_path: Path, whole: RunFolder
) -> None:
    class Impatient:
        def say(self, text: str) -> None:
            pass

        def advance(self, stage: str, done: int, total: int, detail: str = "") -> None:
            if stage == "validation at step 8" and done == 1:
                raise KeyboardInterrupt

    config = settings(llama, sums, tmp_path / "run", checkpoint_steps=None)
    with pytest.raises(Interrupted, match=r"best adapter so far.*from step 8: edge-ft tune --config .* --resume"):
        tune(config, Impatient())
    run = tune(replace(config, resume=True))
    assert run.report()["resumed_from_step"] == 8
    assert (adapter(run), lines(run)) == (adapter(whole), lines(whole))


def test_ctrl_c_between_two_gradients_of_a_step_saves_the_step_before(
    llama: Path, sums: Path, tmp_path: Path, whole: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    update, gradient, updates = TorchBackend.update, TorchBackend.gradient, [0]

    def counted(self: TorchBackend, *arguments: Any) -> float:
        updates[0] += 1
        return update(self, *arguments)

    def signalled(self: TorchBackend, *arguments: Any) -> float:
        if updates[0] == 5:
            signal.raise_signal(signal.SIGTERM)
        return gradient(self, *arguments)

    config = settings(llama, sums, tmp_path / "run", checkpoint_steps=None)
    with monkeypatch.context() as patch, pytest.raises(Interrupted, match="from step 5"):
        patch.setattr(TorchBackend, "update", counted)
        patch.setattr(TorchBackend, "gradient", signalled)
        tune(config)
    assert adapter(tune(replace(config, resume=True))) == adapter(whole)


def test_a_thread_trains_without_signals(llama: Path, sums: Path, tmp_path: Path, whole: RunFolder) -> None:
    runs: list[RunFolder] = []
    thread = threading.Thread(target=lambda: runs.append(tune(settings(llama, sums, tmp_path / "run"))))
    thread.start()
    thread.join()
    assert adapter(runs[0]) == adapter(whole)


def test_a_full_disk_during_a_checkpoint_is_reported_once_and_training_continues(
    stopped: TuneConfig, whole: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    told = RecordedProgress()
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save_file", full)
        updates = [0]
        update = TorchBackend.update

        def failing(self: TorchBackend, *arguments: Any) -> float:
            updates[0] += 1
            if updates[0] == 4:
                raise ZeroDivisionError
            return update(self, *arguments)

        patch.setattr(TorchBackend, "update", failing)
        with pytest.raises(ZeroDivisionError):
            tune(stopped, told)
    assert sum("disk is full" in line for line in told.lines) == 1
    assert read_checkpoint(stopped.out).state.steps == 7  # type: ignore[union-attr]
    monkeypatch.setattr(checkpoints, "save_file", full)
    run = tune(stopped)
    assert run.report()["resumed_from_step"] == 7
    assert (adapter(run), lines(run)) == (adapter(whole), lines(whole))


def test_when_nothing_can_be_written_the_run_ends_and_can_be_resumed(
    stopped: TuneConfig, whole: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:

        def full(self: Any, line: dict[str, Any]) -> None:
            self.write(json.dumps(line).encode()[:9])  # what still went in
            raise OSError(errno.ENOSPC, "No space left on device")

        patch.setattr("edge_ft.tune.train.Metrics.log", full)
        with pytest.raises(WillNotFit, match=r"disk is full.*edge-ft tune --config .* --resume"):
            tune(stopped)
    run = tune(stopped)
    assert run.report()["resumed_from_step"] == 7
    assert (adapter(run), lines(run)) == (adapter(whole), lines(whole))


def test_max_minutes_are_summed_over_resumes_and_the_steps_stay(
    llama: Path, sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(llama, sums, tmp_path / "run", max_minutes=5.0)
    stopped_at(config, 7, monkeypatch)
    state = tmp_path / "run" / "checkpoint" / "state.json"
    document = json.loads(state.read_text())
    document["loop"]["elapsed"] = 301.0  # as if it had taken so long
    state.write_text(json.dumps(document))
    report = tune(replace(config, resume=True)).report()
    assert (report["steps"], report["stopped"]) == (8, "minutes")
    assert report["seconds"] > 301
