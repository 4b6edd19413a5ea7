"""Each step of a tune by itself, with no more than it needs: nothing is trained here."""

import errno
import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from recorded_progress import RecordedProgress

from edge_ft.artifacts import RunFolder
from edge_ft.config import TuneConfig, as_plain
from edge_ft.data import Batch, collate, target_mask
from edge_ft.errors import Interrupted, UsageError, WillNotFit
from edge_ft.evaluate.scoring import RowScores
from edge_ft.models.scorer import TorchScorer
from edge_ft.progress import Silent
from edge_ft.quant.blockwise import Grid
from edge_ft.system import Available
from edge_ft.tune.checkpoint import Checkpoint, find_checkpoint, write_checkpoint
from edge_ft.tune.distributed import Processes
from edge_ft.tune.loop import Fit
from edge_ft.tune.measure import Curve, Measured
from edge_ft.tune.opening import OpenedRun, explain_stop, finished_note, open_run
from edge_ft.tune.plan import estimate
from edge_ft.tune.prepare import Job, prepare_job, refuse_other
from edge_ft.tune.report import results
from edge_ft.tune.run_files import begin, write_report
from edge_ft.tune.stopwatch import Timings
from edge_ft.tune.train import train
from edge_ft.tune.trainable_model import load_trainable_model

ONE = Processes(torch.device("cpu"))


def config(out: Path, **settings: Any) -> TuneConfig:
    return TuneConfig(model="m", data="d", out=out, **settings)


@pytest.fixture(scope="module")
def job(llama: Path, sums: Path) -> Job:
    settings: dict[str, Any] = {"max_steps": 4, "eval_steps": 2, "split": (0.6, 0.2, 0.2), "compute": "fp32"}
    given = TuneConfig(model=str(llama), data=str(sums), out=Path("unused"), memory="normal", threads=1, **settings)
    return prepare_job(given, Silent())


def scores(nll: float, rows: int = 2) -> RowScores:
    tokens = np.full(rows, 3)
    return RowScores(np.full(rows, 3 * nll), tokens, tokens, [np.array([1, 2, 3])] * rows)


def fitted(steps: int = 4) -> Fit:
    return Fit(planned=4, base=scores(2.0), best=scores(1.0), last_nll=1.5, steps=steps, best_step=2, seconds=2.0)


def saved(run: Path, settings: TuneConfig, identity: dict[str, Any]) -> Checkpoint:
    """A checkpoint of step 4 in the folder of a run."""
    (run / "splits").mkdir(parents=True)
    checkpoint = Checkpoint(identity, as_plain(settings), 0, fitted(), {"parameters.0": np.zeros(2)})
    write_checkpoint(run, checkpoint)
    return checkpoint


# Open the run.


def test_a_new_folder_is_opened_with_the_given_settings(tmp_path: Path) -> None:
    given = config(tmp_path / "run")
    opened = open_run(given)
    assert opened == OpenedRun(RunFolder(tmp_path / "run"), given, is_new=True)
    assert (opened.resumed_from, opened.identity, opened.codes) == (None, None, None)
    assert not (tmp_path / "run").exists()


def test_a_folder_with_a_checkpoint_is_opened_to_resume_it(tmp_path: Path) -> None:
    saved(tmp_path / "run", config(tmp_path / "run", epochs=2.0, batch_size=4), {"model": "m"})
    opened = open_run(config(tmp_path / "run", batch_size=4, resume=True))
    assert (opened.resumed_from, opened.identity, opened.is_new) == (4, {"model": "m"}, False)
    assert (opened.config.epochs, opened.config.batch_size) == (2.0, 4)
    with pytest.raises(UsageError, match="was started with --batch-size 4 and not 8"):
        open_run(config(tmp_path / "run", batch_size=8, resume=True))
    with pytest.raises(UsageError, match="unfinished run: resume it with --resume"):
        open_run(config(tmp_path / "run"))


def test_a_retired_option_of_an_old_checkpoint_is_accepted_with_its_default_alone(tmp_path: Path) -> None:
    given = config(tmp_path / "run", resume=True)
    (tmp_path / "run" / "splits").mkdir(parents=True)
    for value, accepted in ((1.0, True), (4.0, False)):
        old = {**as_plain(given), "loraplus_lr_ratio": value}
        write_checkpoint(tmp_path / "run", Checkpoint({}, old, 0, fitted(), {}))
        if accepted:
            assert open_run(given).config == given
        else:
            with pytest.raises(UsageError, match="loraplus_lr_ratio no longer exists"):
                open_run(given)


def test_a_run_without_a_checkpoint_keeps_its_settings_and_starts_again(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    run.adapter.mkdir(parents=True)
    run.split("train").parent.mkdir()
    run.write_settings(as_plain(config(run.path, epochs=2.0)))
    opened = open_run(config(run.path, resume=True))
    assert (opened.resumed_from, opened.checkpoint, opened.config.epochs) == (0, None, 2.0)
    assert not run.adapter.exists()


def test_a_finished_run_is_opened_as_such(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text("{}")
    assert open_run(config(tmp_path, resume=True)).is_finished
    with pytest.raises(UsageError, match="exists already"):
        open_run(config(tmp_path))


def test_a_finished_run_says_which_given_settings_are_not_its_own(tmp_path: Path) -> None:
    RunFolder(tmp_path).write_settings(as_plain(config(tmp_path, rank=8, epochs=2.0, seed=3)))
    assert finished_note(config(tmp_path, rank=8, seed=3)) == f"{tmp_path} is finished: nothing was changed"
    note = finished_note(config(tmp_path, rank=4, seed=3, epochs=5.0))
    assert "it was trained with --rank 8 and not 4, --epochs 2.0 and not 5.0: give another --out" in note


# Prepare the rows.


def test_a_job_has_resolved_settings_and_knows_its_batches(job: Job) -> None:
    assert (job.config.task, job.config.batch_size, job.config.epochs) == ("text-generation", 8, 2.0)
    assert job.config.max_length == job.prepared.rendering.max_length
    assert job.prepared.counts == {"train": 24, "validation": 8, "test": 8}
    assert (job.steps, len(job.batches), len(job.batch_tokens)) == (4, 4, 4)
    longest = max(len(job.prepared.examples["train"][index].input_ids) for index in job.batches[0])
    assert job.batch_tokens[0] == 8 * longest


def test_a_job_is_refused_where_it_is_not_the_interrupted_one(job: Job) -> None:
    given = TuneConfig(model=job.config.model, data=job.config.data, out=Path("run"), split=(0.6, 0.2, 0.2))
    assert prepare_job(given, Silent(), job.identity).identity == job.identity
    for name, says in (
        ("content_sha256", "--model holds other weights than at the start of run"),
        ("data_fingerprint", "--data holds other rows"),
        ("examples_sha256", "--data reads differently"),
    ):
        with pytest.raises(UsageError, match=says):
            prepare_job(given, Silent(), {**job.identity, name: "other"})
    refuse_other(None, {"codes_sha256": "x"}, "run")
    with pytest.raises(UsageError, match="--model rounds to other codes"):
        refuse_other({**job.identity, "codes_sha256": "y"}, {"codes_sha256": "x"}, "run")
    with pytest.raises(UsageError, match="rounds to other codes"):
        refuse_other({}, {"codes_sha256": "x"}, "run")  # of a damaged checkpoint


# Load the model.


def test_only_the_adapter_of_a_loaded_model_is_trained(job: Job) -> None:
    model = load_trainable_model(job, ONE, Silent())
    trained = [name for name, parameter in model.peft_model.named_parameters() if parameter.requires_grad]
    assert len(trained) == len(model.backend.parameters) == 2 * 2 * 7  # A and B of 7 linear layers in 2 blocks
    assert all("lora_" in name for name in trained)
    assert (model.compute, model.codes_sha256 is None) == ("fp32", False)
    assert model.calibration is not None and model.calibration.to_dict()["rows"] == 24
    batch = collate(job.prepared.examples["validation"], job.tokenizer.pad_id, "text-generation")
    plain = TorchScorer(model.peft_model, "text-generation")
    np.testing.assert_allclose(model.backend.token_nll(batch)[0], plain.token_nll(batch)[0], atol=1e-4)


def test_vectors_of_a_batch_cannot_be_shared_out(job: Job) -> None:
    embedding = SimpleNamespace(prepared=SimpleNamespace(task="feature-extraction"))
    with pytest.raises(UsageError, match="in one process"):
        load_trainable_model(embedding, Processes(torch.device("cpu"), 0, 2), Silent())  # type: ignore[arg-type]


# Begin and estimate.


def test_a_begun_run_holds_all_but_what_is_learned(job: Job, tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    begin(run, job, SimpleNamespace(grid=Grid(16), calibration=None, codes_sha256="abc"))  # type: ignore[arg-type]
    assert run.is_begun()
    assert {path.name for path in run.path.iterdir()} == {
        *("base.json", "config.yaml", "rendering.json", "splits", "tokenizer")
    }
    assert len(run.split("train").read_text().splitlines()) == 24
    assert (run.base()["codes_sha256"], run.base()["calibration"]) == ("abc", None)
    assert yaml.safe_load(run.config_path.read_text())["max_steps"] == 4


@pytest.mark.parametrize(("memory", "fits"), [(2**50, True), (10, False)])
def test_an_estimate_is_written_unless_the_run_does_not_fit(job: Job, tmp_path: Path, memory: int, fits: bool) -> None:
    curve = Curve([1], [1.0])
    measured = Measured(curve, curve, 1.0, 0.1, curve, loading=100, answering=100, trainable=10)
    said = RecordedProgress()
    with nullcontext() if fits else pytest.raises(WillNotFit):
        estimate(RunFolder(tmp_path), job, measured, Available(memory, 2**50), said, {"load": 1.0})
    assert (tmp_path / "plan.json").is_file() == fits
    assert any(line.startswith("plan: ") for line in said.lines)


# Train.


class CountingBackend:
    """No arithmetic: each evaluation is better than the one before, and every call is counted."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.nll = 4.0

    def token_nll(self, batch: Batch) -> Any:
        self.nll -= 0.5
        at = target_mask(batch["labels"], "text-generation")
        return np.where(at, self.nll, 0.0), batch["labels"]

    def gradient(self, batch: Batch, targets: int) -> float:
        return 1.0

    def update(self, learning_rate: float, max_grad_norm: float) -> float:
        self.calls.append("update")
        return 1.0

    def save(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self.calls.append("save")

    def state(self) -> dict[str, Any]:
        return {"parameters.0": np.zeros(2)}

    def restore(self, state: dict[str, Any]) -> None:
        self.calls.append("restore")

    def __getattr__(self, name: str) -> Any:
        return lambda *_: None


def test_training_writes_metrics_settings_and_the_best_adapter(job: Job, tmp_path: Path) -> None:
    run, backend = RunFolder(tmp_path), CountingBackend()
    model: Any = SimpleNamespace(backend=backend, codes_sha256="abc")
    result = train(OpenedRun(run, job.config, is_new=True), job, model, ONE, Silent(), Timings())
    assert (result.steps, result.best_step, result.stopped) == (4, 4, "steps")
    assert backend.calls == ["update", "update", "save", "update", "update", "save", "save"]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], "loss" in line) for line in lines] == [
        *((0, False), (1, True), (2, True), (2, False), (3, True), (4, True), (4, False))
    ]
    assert yaml.safe_load(run.config_path.read_text())["max_steps"] == 4
    assert find_checkpoint(tmp_path)


def test_training_starts_at_the_checkpoint(job: Job, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    state = Fit(4, scores(4.0, 8), scores(4.0, 8), 4.0, steps=3)
    opened = OpenedRun(RunFolder(tmp_path), job.config, Checkpoint({}, {}, 12, state, {}))
    backend = CountingBackend()
    result = train(opened, job, SimpleNamespace(backend=backend, codes_sha256="abc"), ONE, Silent(), Timings())  # type: ignore[arg-type]
    assert backend.calls[0] == "restore" and backend.calls.count("update") == 1
    assert (result.steps, state.steps) == (4, 3)
    lines = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [1, 4, 4]


# Evaluate and report.


class Scripted:
    """A model that answers what a row says, with a lower loss while it is tuned."""

    def __init__(self, job: Job) -> None:
        self.tuned = True
        rows = job.prepared.examples["test"]
        self.right = {tuple(row.input_ids[: row.prompt_length]): row.input_ids[row.prompt_length : -1] for row in rows}

    def token_nll(self, batch: Batch) -> Any:
        at = target_mask(batch["labels"], "text-generation")
        return np.where(at, 1.0 if self.tuned else 2.0, 0.0), batch["labels"]

    def answer(self, prompt_ids: list[int], max_new_tokens: int) -> list[int]:
        return self.right[tuple(prompt_ids)] if self.tuned else []

    def in_float32(self) -> Any:
        return nullcontext()

    unshared = in_float32

    @contextmanager
    def base(self) -> Iterator[None]:
        self.tuned = False
        yield
        self.tuned = True


def test_results_compare_the_tuned_model_with_its_base(job: Job) -> None:
    scripted = Scripted(job)
    model: Any = SimpleNamespace(backend=scripted, untuned=scripted.base)
    outcome = fitted()
    outcome.base, outcome.best = scores(2.0, 8), scores(1.0, 8)
    found = results(job, model, outcome, Silent(), timings=(timings := Timings()))
    assert list(timings.seconds) == ["scores", "answers"]
    assert found["scored_in"] == {"validation": job.config.compute, "test": "fp32"}
    assert found["nll"] == {"base": 2.0, "best": 1.0, "last": 1.5, "test_base": 2.0, "test": 1.0}
    assert found["overfitting"]["train_nll"] == 1.0
    assert found["answers"]["rows"] == 8
    exact = found["answers"]["metrics"]["exact_match"]
    assert (exact["base"]["value"], exact["tuned"]["value"]) == (0.0, 1.0)
    assert [sample["tuned"] for sample in found["samples"]] == [sample["reference"] for sample in found["samples"]]


def test_a_report_ends_the_run(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.platform", lambda: "here")  # it starts a process
    monkeypatch.setattr("edge_ft.tune.run_files.page_of_run", lambda *_, **__: "the page")
    run = RunFolder(tmp_path / "run")
    checkpoint = saved(run.path, job.config, job.identity)
    (run.path / "base.json").write_text('{"calibration": {"rows": 24}}')
    checkpoint.state.elapsed = 100.0
    opened = OpenedRun(run, job.config, checkpoint)
    state = {"parameters.0": np.zeros((3, 2)), "parameters.1": np.zeros(4), "best.0": np.zeros((3, 2))}
    model: Any = SimpleNamespace(backend=SimpleNamespace(state=lambda: state))
    seconds = {"load": 2.0, "train": 3.0}
    write_report(opened, job, model, ONE, fitted(steps=8), {"nll": {"best": 1.0}}, seconds)
    report = run.report()
    assert (report["resumed_from_step"], report["seconds"], report["steps"]) == (4, 105.0, 8)
    assert report["timings"] == {"before resuming": 100.0, "load": 2.0, "train": 3.0}
    assert (report["trainable_parameters"], report["calibration"], report["nll"]) == (10, {"rows": 24}, {"best": 1.0})
    assert run.page_path.read_text() == "the page"
    assert not find_checkpoint(run.path)


# Stop.


def stopped(run: Path, error: BaseException, is_main: bool = True) -> None:
    with explain_stop(OpenedRun(RunFolder(run), config(run), is_new=True), is_main):
        raise error


def test_an_interrupted_run_says_what_is_saved_and_how_to_resume(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(Interrupted, match=r"nothing is saved yet: the same command starts again"):
        stopped(run, KeyboardInterrupt())
    RunFolder(run).write_settings({})
    with pytest.raises(
        Interrupted, match=r"no adapter is saved yet; to start again from step 0, .*run/config.yaml --res"
    ):
        stopped(run, KeyboardInterrupt())
    saved(run, config(run), {})
    (run / "adapter").mkdir()
    with pytest.raises(
        Interrupted, match=r"best adapter so far is in .*; to resume from step 4: edge-ft tune --config"
    ):
        stopped(run, KeyboardInterrupt())
    with pytest.raises(Interrupted, match=r"^stopped$"):
        stopped(run, KeyboardInterrupt(), is_main=False)


def test_a_failed_run_that_learned_nothing_leaves_nothing(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    with pytest.raises(ZeroDivisionError):
        stopped(run, ZeroDivisionError(), is_main=False)
    assert run.is_dir()
    with pytest.raises(WillNotFit, match=r"disk is full.*run the same command again"):
        stopped(run, OSError(errno.ENOSPC, ""))
    assert not run.exists()
    with pytest.raises(WillNotFit, match="GPU's memory is too small"):
        stopped(run, torch.OutOfMemoryError())
