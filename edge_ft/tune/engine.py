"""What trains a model: torch, or ONNX Runtime over a bundle. The steps of a tune ask it where the two differ."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal, Protocol

from edge_ft.artifacts import RunFolder, kind_of
from edge_ft.config import TuneConfig
from edge_ft.models.libraries import import_libraries
from edge_ft.progress import Progress
from edge_ft.quant.blockwise import Grid
from edge_ft.system import Available
from edge_ft.tune.backend import Backend
from edge_ft.tune.loop import Fit
from edge_ft.tune.opening import OpenedRun
from edge_ft.tune.prepare import Job
from edge_ft.tune.processes import Processes

__all__ = ["Engine", "TrainableModel", "TrainingBackend", "engine_of"]


class TrainingBackend(Backend, Protocol):
    """A backend that a run can be planned and reported with."""

    def unshared(self) -> AbstractContextManager[None]:
        """Work on whole batches in this process alone, inside this block."""

    def in_float32(self) -> AbstractContextManager[None]:
        """Score and answer in float32 inside this block."""

    def answer(self, prompt_ids: list[int], max_new_tokens: int) -> list[int]:
        """Return the greedy continuation of one prompt, without its stop token."""


class TrainableModel(Protocol):
    """A loaded base with a fresh adapter."""

    @property
    def backend(self) -> Any:
        """The `TrainingBackend` that trains and scores it, and answers."""

    @property
    def compute(self) -> Literal["fp32", "bf16"]:
        """What the steps compute in."""

    @property
    def calibration(self) -> Any:
        """Rows over which the int4 codes were chosen; None where they were not chosen now."""

    def estimate_choosing(self, tokens: int, forward: Callable[[float], float]) -> float | None:
        """Return the seconds in which int4 codes would be chosen over so many tokens of rows; None where none are.

        Args:
            tokens: As far as they are used.
            forward: Tokens -> seconds in which they pass through the model.
        """

    @property
    def grid(self) -> Grid:
        """How the weights were rounded."""

    @property
    def codes_sha256(self) -> str | None:
        """Hex sha256 of the rounded weights; None of a base in float32."""

    def untuned(self) -> AbstractContextManager[Any]:
        """Answer and score as the base without the adapter, inside this block."""

    def write_codes(self, file: Path) -> None:
        """Write the codes that were chosen."""


class Engine(Protocol):
    """The parts of a tune that depend on what does the arithmetic."""

    @property
    def packages(self) -> tuple[str, ...]:
        """What the report names the versions of."""

    def resolve(self, config: TuneConfig) -> TuneConfig:
        """Return the settings with those that the model itself decides.

        Raises:
            UsageError: an option that the engine does not know; the message names it.
        """

    def join(self, progress: Progress) -> Processes:
        """Return the processes that train together."""

    def alone(self) -> Processes:
        """Return this process as the only one."""

    def use_threads(self, threads: int | None) -> int:
        """Set the number of CPU threads; None is the default. Return it."""

    def choose_memory(self, job: Job, available: Available, processes: Any) -> Job:
        """Return the job with its memory mode chosen if it was left open."""

    def refuse_large(self, job: Job, available: Available) -> None:
        """Refuse a base whose weights alone exceed the available memory.

        Raises:
            WillNotFit: they do.
        """

    def load(
        self, job: Job, processes: Any, progress: Progress, known: OpenedRun | None = None, *, keep: bool = False
    ) -> Any:
        """Return the `TrainableModel` of a job.

        Args:
            job: The settings, the base and its rows.
            processes: Those that train together.
            progress: Gets what takes time.
            known: The run folder, which may hold codes that were chosen before.
            keep: Keep codes that are chosen now in the cache.
        """

    def finish(self, run: RunFolder, job: Job, model: Any, fitted: Fit, progress: Progress) -> dict[str, Any] | None:
        """Make the merged model that ships, if there is a finishing phase; return `finish` of report.json."""

    def settle_memory(self, job: Job, model: Any) -> Job:
        """Return the job with another memory mode if a measurement says that it is the better one."""


def engine_of(model: str, progress: Progress) -> Engine:
    """Return the engine of --model: a bundle is trained by ONNX Runtime, also where torch is installed.

    Raises:
        MissingExtra: it is no bundle, and torch, transformers or PEFT is not installed.
    """
    if kind_of(model) == "bundle":
        from edge_ft.tune.bundle_engine import BundleEngine

        return BundleEngine()
    import_libraries(progress, "peft")
    from edge_ft.tune.torch_engine import TorchEngine

    return TorchEngine()
