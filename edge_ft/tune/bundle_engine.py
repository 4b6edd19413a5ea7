"""Training over a bundle, by ONNX Runtime and numpy: the base install alone is enough."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from edge_ft.adapter import PEFT_TASKS
from edge_ft.artifacts import Bundle, RunFolder
from edge_ft.config import TEXT_TASKS, TuneConfig, last_layers
from edge_ft.data import stop_ids
from edge_ft.errors import UsageError, did_you_mean
from edge_ft.progress import Progress
from edge_ft.quant.blockwise import Grid
from edge_ft.system import Available, default_threads
from edge_ft.tune.block_model import BlockModel
from edge_ft.tune.bundle_answers import BundleAnswers
from edge_ft.tune.bundle_base import BundleBase
from edge_ft.tune.classes import join_classes
from edge_ft.tune.loop import Fit
from edge_ft.tune.onnx_backend import OnnxBackend, fresh_adapter
from edge_ft.tune.opening import OpenedRun
from edge_ft.tune.prepare import Job
from edge_ft.tune.processes import Processes

__all__ = ["BundleEngine", "BundleModel"]

FIXED: dict[str, tuple[Any, ...]] = {
    "compute": ("auto", "fp32"),
    "dropout": (0.0,),
    "memory": (None, "normal", "low"),
    "vocabulary": ("all",),
}
"""Options of which a training over a bundle knows some values only."""


@dataclass(frozen=True)
class BundleModel:
    """A bundle with a fresh adapter; see `edge_ft.tune.engine.TrainableModel`."""

    backend: OnnxBackend
    codes_sha256: str | None
    """Of the bundle's weights."""
    grid: Grid
    """With the block size of the bundle."""
    compute: Literal["fp32"] = "fp32"
    calibration: None = None

    def estimate_choosing(self, tokens: int, forward: Callable[[float], float]) -> None:
        """Return nothing: a bundle's codes stay."""

    def untuned(self) -> AbstractContextManager[None]:
        """Answer and score as the base without the adapter, inside this block."""
        return self.backend.untuned()

    def write_codes(self, file: Path) -> None:
        """Write nothing: no codes were chosen."""


class BundleEngine:
    """See `edge_ft.tune.engine.Engine`."""

    packages: tuple[str, ...] = ("onnxruntime", "numpy")

    def resolve(self, config: TuneConfig) -> TuneConfig:
        """Return the settings with the format of the bundle's weights.

        Args:
            config: As the user gave it.

        Returns:
            The settings.

        Raises:
            UsageError: an option that a training over a bundle does not know; the message names it.
        """
        own = _of_bundle(Bundle.open(Path(config.model)))
        known = FIXED | {name: (_default(name), value) for name, value in own.items()}
        for name, values in known.items():
            if (value := getattr(config, name)) not in values:
                raise UsageError(
                    f"--{name.replace('_', '-')} {value}: a bundle is trained over the weights that it holds, in "
                    "float32; leave it out, or train the original model"
                )
        return replace(config, **own)

    def join(self, progress: Progress) -> Processes:
        """Return this process alone."""
        return Processes()

    def alone(self) -> Processes:
        """Return this process alone."""
        return Processes()

    def use_threads(self, threads: int | None) -> int:
        """Return the number of CPU threads; the graphs are opened with it."""
        return threads or default_threads()

    def choose_memory(self, job: Job, available: Available, processes: Processes) -> Job:
        """Choose --memory normal."""
        return job.with_settings(memory=job.config.memory or "normal")

    def refuse_large(self, job: Job, available: Available) -> None:
        """Refuse nothing: the weights are memory-mapped, and the plan measures what a step takes."""

    def load(
        self, job: Job, processes: Processes, progress: Progress, known: OpenedRun | None = None, *, keep: bool = False
    ) -> BundleModel:
        """Map the bundle's weights, with a fresh adapter.

        Args:
            job: The settings, the base and its rows.
            processes: This one.
            progress: Unused: it takes no time.
            known: Unused: the bundle has its codes.
            keep: Unused.

        Returns:
            The model.

        Raises:
            UsageError: --target-modules or --layers names nothing in it, or its head has other classes than the rows.
        """
        config, base = job.config, job.base
        assert isinstance(base, BundleBase) and config.threads is not None
        rendering = job.prepared.rendering
        if rendering.labels != (own := base.labels(rendering.task)):
            raise UsageError(
                f"{config.data} has the classes {join_classes(rendering.labels)}, and the head of {base.name} has "
                f"{join_classes(own)}: name the rows' classes as the head does, or export the model "
                "with --class-names"
            )
        model = BlockModel(base.bundle, config.threads, rendering.problem_type)
        head = base.family.trained_head(rendering.task)
        linears = _chosen(model.linears, config, base)
        settings = {
            "peft_type": "LORA",
            "task_type": PEFT_TASKS[rendering.task],
            "base_model_name_or_path": base.name,
            "r": config.rank,
            "lora_alpha": config.alpha,
            "lora_dropout": 0.0,
            "target_modules": sorted(linears),
            "modules_to_save": [name.rpartition(".")[2] for name in head] or None,
            "bias": "none",
            "fan_in_fan_out": base.family.fan_in_fan_out,
            "inference_mode": True,
        }
        answers = None
        if rendering.task in TEXT_TASKS:
            answers = BundleAnswers(base.bundle, config.threads, stop_ids(rendering, job.tokenizer))
        adapter = fresh_adapter(linears, config.rank, config.seed)
        return BundleModel(
            OnnxBackend(model, adapter, config, settings, answers), base.content_sha256, Grid(config.block_size)
        )

    def finish(self, run: RunFolder, job: Job, model: BundleModel, fitted: Fit, progress: Progress) -> None:
        """Do nothing: the adapter is not merged into the bundle's codes."""

    def settle_memory(self, job: Job, model: BundleModel) -> Job:
        """Return the job as it is."""
        return job


def _default(name: str) -> Any:
    return next(field.default for field in fields(TuneConfig) if field.name == name)


def _of_bundle(bundle: Bundle) -> dict[str, Any]:
    """Return the settings that the bundle's weights decide."""
    quantization = bundle.manifest["quantization"]
    bits = {4: "int4", 8: "int8", 16: "fp32", 32: "fp32"}
    return {
        "base_format": bits[quantization["bits"]],
        "block_size": quantization["block_size"] or _default("block_size"),
        "calibration_rows": 0,
        "finish_steps": 0,
    }


def _chosen(linears: Mapping[str, tuple[int, int]], config: TuneConfig, base: BundleBase) -> dict[str, tuple[int, int]]:
    """Return the linear layers to adapt.

    Raises:
        UsageError: target_modules or layers name nothing in this model.
    """
    chosen = dict(linears)
    if config.target_modules != ("all-linear",):
        for wanted in config.target_modules:
            if not any(_ends_in(name, wanted) for name in linears):
                endings = sorted({name.rpartition(".")[2] for name in linears})
                raise UsageError(
                    f"--target-modules {wanted}: no linear layer has this name{did_you_mean(wanted, endings)}; choose "
                    f"from {', '.join(endings)}"
                )
        chosen = {
            name: sizes for name, sizes in linears.items() if any(_ends_in(name, w) for w in config.target_modules)
        }
    count = last_layers(config.layers)
    if count is not None:
        stacks = {stack: _layers(linears, stack) for stack in base.family.stacks}
        fewest = min(stacks.values())
        if count > fewest:
            where = " in its smaller stack" if len(stacks) > 1 else ""
            raise UsageError(f"--layers {config.layers}: this model has {fewest} layers{where}")
        last = tuple(f"{stack}.{index}." for stack, layers in stacks.items() for index in range(layers - count, layers))
        chosen = {name: sizes for name, sizes in chosen.items() if name.startswith(last)}
    return chosen


def _layers(linears: Iterable[str], stack: str) -> int:
    """Return the number of layers in a list of them."""
    numbers = (name.removeprefix(f"{stack}.").partition(".")[0] for name in linears if name.startswith(f"{stack}."))
    return 1 + max(map(int, numbers))


def _ends_in(name: str, ending: str) -> bool:
    return name == ending or name.endswith(f".{ending}")
