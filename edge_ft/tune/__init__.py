"""Train a LoRA adapter over a frozen base: model and rows in, run folder out."""

import time

from edge_ft.artifacts import RunFolder
from edge_ft.config import TuneConfig
from edge_ft.models.libraries import import_libraries
from edge_ft.progress import Progress, Silent
from edge_ft.tune.opening import open_run
from edge_ft.tune.plot import plot_losses

__all__ = ["tune"]


def tune(config: TuneConfig, progress: Progress | None = None) -> RunFolder:
    """Train a LoRA adapter and write the run folder, or resume an interrupted run.

    The test rows are read once, after the best weights were chosen on the validation rows.

    Args:
        config: The settings.
        progress: Gets messages and the state of long steps; None is silent.

    Returns:
        The finished run folder at `config.out`.

    Raises:
        UsageError: a model, rows or options that cannot be used, or that are not those of the run to resume.
        AuditRefused: the rows would train nothing, or overlap between splits.
        WillNotFit: it takes more memory or disk than is available, or the disk is full; saved files are whole.
        Interrupted: stopped by Ctrl-C or SIGTERM; the folder holds a checkpoint and the best adapter so far.
    """
    progress = progress or Silent()
    import_libraries(progress, "peft")
    from edge_ft.tune import run as steps
    from edge_ft.tune.distributed import Processes

    started = time.monotonic()
    processes = Processes.from_environment(progress)
    if not processes.is_main:
        progress = Silent()

    opened = open_run(config.out, config.resume)
    run = opened.folder
    if opened.is_finished:
        progress.say(f"{run.path} is finished: nothing was changed")
        return run
    job = steps.prepare(config, opened, processes, progress)
    job, model = steps.load(job, opened, processes, progress)
    with steps.explain_stop(opened, processes.is_main):
        if processes.is_main:
            steps.begin(run, job, model)
            if opened.checkpoint is None:
                steps.estimate(run, job, model, progress, time.monotonic() - started)
        fitted = steps.train(opened, job, model, processes, progress)
        evaluated = steps.evaluate(job, model, fitted, progress)
        if processes.is_main:
            plot_losses(run, progress)
            steps.write_report(opened, job, model, processes, fitted, evaluated, time.monotonic() - started)
        processes.wait()
    return run
