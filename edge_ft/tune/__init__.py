"""Train a LoRA adapter over a frozen base: model and rows in, run folder out."""

from edge_ft.artifacts import RunFolder
from edge_ft.config import TuneConfig
from edge_ft.progress import Progress, Silent
from edge_ft.stopping import watched
from edge_ft.tune.stopwatch import Timings

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
        MissingExtra: torch, transformers or PEFT is not installed, and the model is no bundle.
        UsageError: a model, rows or options that cannot be used, or that are not those of the run to resume.
        AuditRefused: the rows would train nothing, or overlap between splits.
        WillNotFit: it takes more memory or disk than is available, or the disk is full; saved files are whole.
        Interrupted: stopped by Ctrl-C, SIGTERM or SIGHUP; the message says what is saved and how to go on.
    """
    progress = progress or Silent()
    timings = Timings()
    with watched():
        with timings.stage("import"):
            from edge_ft.tune.engine import engine_of
            from edge_ft.tune.run import run_steps

            engine = engine_of(config.model, progress)

        return run_steps(config, engine, progress, timings)
