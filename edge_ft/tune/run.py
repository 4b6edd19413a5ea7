"""A tune as the list of its steps."""

from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from typing import Any

from edge_ft.artifacts import RunFolder
from edge_ft.config import TuneConfig
from edge_ft.files import locked
from edge_ft.progress import Progress, Silent, heartbeat
from edge_ft.system import Available
from edge_ft.tune.engine import Engine
from edge_ft.tune.opening import OpenedRun, explain_stop, finished_note, open_run
from edge_ft.tune.plan import estimate, measure_batches
from edge_ft.tune.prepare import Job, prepare_job, refuse_other
from edge_ft.tune.processes import Processes
from edge_ft.tune.report import complete_base, results
from edge_ft.tune.report_parts import ReportParts, kept_parts
from edge_ft.tune.run_files import begin, write_report
from edge_ft.tune.stopwatch import Timings
from edge_ft.tune.train import train
from edge_ft.tune.vocabulary_cost import measure_cut

__all__ = ["run_steps"]


def run_steps(config: TuneConfig, engine: Engine, progress: Progress, timings: Timings) -> RunFolder:
    """Do what `edge_ft.tune.tune` documents; the libraries of training are imported.

    Args:
        config: The settings.
        engine: What trains.
        progress: Gets messages and the state of long steps.
        timings: Has the seconds of the import; gets those of the other stages.

    Returns:
        The finished run folder.
    """
    config = engine.resolve(config)
    processes = engine.join(progress)
    if not processes.is_main:
        progress = Silent()

    with locked(config.out) if processes.is_main else nullcontext():
        opened = open_run(config)
        if opened.is_finished:
            progress.say(finished_note(config))
        else:
            with explain_stop(opened, processes.is_main):
                _train_and_report(opened, engine, processes, progress, timings)
    return opened.folder


def _train_and_report(
    opened: OpenedRun, engine: Engine, processes: Processes, progress: Progress, timings: Timings
) -> None:
    """Do the rest of a run that is not finished."""
    run, config = opened.folder, replace(opened.config, threads=engine.use_threads(opened.config.threads))
    with timings.stage("rows"), processes.main_first():  # it downloads and converts, the others find the result
        job = prepare_job(config, progress, opened.identity)

    available = Available.here(run.path).on(processes.device)
    job = engine.choose_memory(job, available, processes)
    engine.refuse_large(job, available)
    loading = heartbeat(progress, f"loading {job.base.name} as {job.config.frozen_format} on {processes.device}")
    with timings.stage("load"), loading:
        model = engine.load(job, processes, progress, opened, keep=processes.is_main)
        refuse_other(opened.identity, {"codes_sha256": model.codes_sha256}, str(run.path))
    if model.calibration is not None:
        timings.move(model.calibration.seconds, "load", "calibrate")
    job = job.with_settings(compute=model.compute)
    if config.memory is None:
        with timings.stage("measure"), heartbeat(progress, "measuring a batch"):
            job = engine.settle_memory(job, model)
    processes.wait()  # the main process is about to write: all have seen what was there

    if processes.is_main:
        with timings.stage("write"), run.changed():
            begin(run, job, model)
        if opened.checkpoint is None:
            with timings.stage("measure"):
                measured = measure_batches(job, model, available, progress)
            estimate(run, job, measured, available, progress, dict(timings.seconds))
    with timings.stage("train"):
        fitted = train(opened, job, model, processes, progress, timings)
    finished = None
    if processes.is_main:
        with timings.stage("finish"):
            finished = engine.finish(run, job, model, fitted, progress)
    parts = kept_parts(run, job) if processes.is_main else ReportParts(None)
    fitted = complete_base(job, model, fitted, progress, parts, timings)
    evaluated = results(job, model, fitted, progress, parts, timings)
    if processes.is_main:
        cut = _vocabulary(job, parts, progress, timings)
        with heartbeat(progress, "writing the report"):
            versions = {name: version(name) for name in ("edge-ft", *engine.packages)}
            evaluated |= {"finish": finished, "vocabulary": cut, **_energy(timings), "versions": versions}
            write_report(opened, job, model, processes, fitted, evaluated, timings.seconds)
        progress.say(f"seconds: {timings.text}")
    processes.wait()


def _vocabulary(job: Job, parts: ReportParts, progress: Progress, timings: Timings) -> dict[str, Any] | None:
    """Return what a smaller vocabulary saves and costs; None of a run with the whole one."""
    if job.cut is None:
        return None
    with timings.stage("vocabulary"):
        found: dict[str, Any] = parts.value("vocabulary", partial(measure_cut, job.cut, job, progress))
        return found


def _energy(timings: Timings) -> dict[str, float]:
    """Return `energy_joules` of the processor during this command, where the machine counts it."""
    joules = timings.energy.read()
    return {} if joules is None else {"energy_joules": round(joules, 1)}
