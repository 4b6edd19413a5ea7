"""Two trainers raced on the same rows: PEFT + Trainer with its learning rate swept, and edge-ft with its defaults.

`python -m edge_ft.bench.studies training --model M --data D` runs each training in a fresh process, in turn, and keeps
its result in the --out folder; docs/studies.md describes the method.
"""

import json
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from shutil import rmtree
from statistics import median
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from edge_ft.bench.meters import machine
from edge_ft.bench.studies.curves import best_nll, compare, largest_difference, plot_curves, text_of
from edge_ft.bench.studies.kept_jobs import KeptJobs
from edge_ft.config import Task, TuneConfig
from edge_ft.errors import BudgetFailed, UsageError, require
from edge_ft.files import write_json
from edge_ft.progress import Lines, Progress, Silent
from edge_ft.system import default_threads

__all__ = ["Race", "Trainings", "main", "run"]

LIBRARY_RATE = 5e-5
"""`TrainingArguments.learning_rate` of transformers."""
BASELINE_EPOCHS = 2.0
AGREEMENT = 0.02
"""Nats that two curves of the same recipe may differ by."""
SAME_RECIPE = {
    "alpha": 16.0,
    "dropout": 0.0,
    "target_modules": ["all-linear"],
    "calibration_rows": 0,
    "layers": "all",
    "compute": "auto",
    "learning_rate": 1e-3,
    "schedule": "cosine",
    "warmup": 0.05,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "gradient_accumulation": 1,
}
"""Settings of both with --same-recipe, whatever our defaults are."""


@dataclass(frozen=True, kw_only=True)
class Race:
    """What is trained on what: the same for every training of an --out folder."""

    model: str
    """Hub id, local folder or GGUF file."""
    data: str
    """Rows, as edge-ft tune takes them; a fifth of them is held out unless --validation is given."""
    validation: str | None = None
    """Held-out rows."""
    prompt: str | None = None
    """As in edge-ft tune."""
    completion: str | None = None
    """As in edge-ft tune."""
    label: str | None = None
    """As in edge-ft tune."""
    task: Task | None = None
    """As in edge-ft tune."""
    train_rows: int | None = None
    """Number of training rows, sampled once; default: all."""
    eval_rows: int | None = None
    """Number of held-out rows, sampled once; default: all."""
    epochs: float | None = None
    """Epochs of both trainers; default: that of edge-ft tune, and 2 for the baseline."""
    rank: int = 8
    """Rank of both adapters."""
    batch_size: int | None = None
    """Rows in a batch of both trainers; default: that of edge-ft tune, and 8 for the baseline."""
    max_length: int | None = None
    """As in edge-ft tune."""
    eval_steps: int | None = None
    """Steps of edge-ft between evaluations; the baseline is evaluated after as many rows. Default: 12 evaluations."""
    base_format: Literal["int4", "int8", "fp32"] | None = None
    """Base format of edge-ft; default: that of edge-ft tune. With --same-recipe the baseline trains over the
    dequantized weights."""
    threads: int | None = None
    """CPU threads of both; default: all CPUs that the process may use."""

    def __post_init__(self) -> None:
        """Refuse numbers below 1."""
        if (self.threads or 1) < 1 or (self.eval_steps or 1) < 1:
            raise UsageError("--threads and --eval-steps must be at least 1")

    def tune_settings(self, rows: Path) -> dict[str, Any]:
        """The `TuneConfig` of ours, without what differs between trainings; options left out keep their defaults."""
        given = {name: getattr(self, name) for name in ("epochs", "batch_size", "base_format")}
        return {
            **{name: getattr(self, name) for name in ("model", "prompt", "completion", "label", "task")},
            **{name: getattr(self, name) for name in ("rank", "max_length")},
            **{name: value for name, value in given.items() if value is not None},
            "data": str(rows / "train.jsonl"),
            "validation": str(rows / "validation.jsonl"),
            "split": [1.0, 0.0, 0.0],
        }


@dataclass(frozen=True, kw_only=True)
class Trainings:
    """Which trainings of a race are done."""

    seeds: int = 3
    """Number of seeds: training runs of each trainer on the same rows."""
    baseline_rates: str = "2e-4,5e-4,1e-3,2e-3"
    """Learning rates of the baseline's sweep on seed 0, separated by commas."""
    same_recipe: bool = False
    """Train the baseline with the batches, schedule and layers of edge-ft: the curves must agree, and only the speed
    differs."""
    quick: bool = False
    """Train the baseline once, on seed 0 with the default learning rate of transformers' Trainer."""

    def __post_init__(self) -> None:
        """Refuse rates that are not numbers, and numbers that are not positive."""
        try:
            rates = self.rates
        except ValueError as error:
            raise UsageError(f"--baseline-rates {self.baseline_rates}: give numbers with commas between") from error
        if self.seeds < 1 or min(rates) <= 0:
            raise UsageError("--seeds and --baseline-rates must be above 0")

    @property
    def rates(self) -> tuple[float, ...]:
        """The learning rates of the sweep."""
        return tuple(float(rate) for rate in self.baseline_rates.split(","))


class _Trainers:
    """Trains either side of a race once for each seed and rate."""

    def __init__(self, race: Race, out: Path, same_recipe: bool, progress: Progress) -> None:
        self.race, self.out, self.same_recipe, self.progress = race, out.resolve(), same_recipe, progress
        self.threads = race.threads or default_threads()
        # The format is in the names of the jobs that depend on it.
        shared = {name: value for name, value in asdict(race).items() if name != "base_format"}
        self.jobs = KeptJobs(out, shared | {"threads": self.threads}, self.threads)
        rows = self.out / "rows"
        self.tune = race.tune_settings(rows) | (SAME_RECIPE if same_recipe else {})
        self.base_format = TuneConfig(**self.tune, out=Path("unused")).base_format
        self.epochs = race.epochs or (None if same_recipe else BASELINE_EPOCHS)  # None: as ours
        self.prefix = f"same-recipe-{self.base_format}-" if same_recipe else ""
        has_codes = same_recipe and self.base_format != "fp32"
        self.weights = str(self.out / f"weights-{self.base_format}.safetensors") if has_codes else None
        job = {
            "do": "prepare",
            "tune": self.tune,
            "rows": str(rows),
            "folder": str(self.out),
            "same_recipe": same_recipe,
            "weights": self.weights,
            **{name: getattr(race, name) for name in ("data", "validation", "train_rows", "eval_rows", "eval_steps")},
        }
        self.case = self.jobs.once(f"{self.prefix}case", job)
        self.tune |= {name: self.case[name] for name in ("model", "task", "eval_steps")}

    def baseline(self, seed: int, learning_rate: float) -> dict[str, Any]:
        """The baseline's result, new or kept."""
        job = {
            "do": "baseline",
            "learning_rate": learning_rate,
            "batch_size": self.race.batch_size or 8,
            "epochs": self.epochs,
            "same_recipe": self.same_recipe,
            "weights": self.weights,
        }
        return self._train(f"{self.prefix}baseline-s{seed}-lr{learning_rate:g}", seed, job)

    def ours(self, seed: int) -> dict[str, Any]:
        """The result of edge-ft, new or kept."""
        name = f"{self.prefix}ours-{self.base_format}-s{seed}"
        folder = self.out / "runs" / name
        if not self.jobs.file(name).is_file() and folder.exists():
            rmtree(folder)  # of a training that did not end
        return self._train(name, seed, {"do": "ours", "out": str(folder)})

    def _train(self, name: str, seed: int, job: dict[str, Any]) -> dict[str, Any]:
        """Train unless the result is kept; the machine's speed, which varies, is measured before each training."""
        job |= {"tune": self.tune, "seed": seed, "threads": self.threads}
        if self.jobs.file(name).is_file():
            return self.jobs.once(name, job)
        measured = self.jobs.run("sgemm", {"do": "sgemm", "threads": self.threads, "shape": self.case["sgemm_shape"]})
        self.progress.say(f"training {name}; sgemm {measured['sgemm_gflops']:.1f} GFLOP/s")
        result = self.jobs.once(name, job, measured)
        seconds, best = result["curve"][-1]["seconds"], best_nll(result["curve"])
        self.progress.say(f"{name}: {result['steps']} steps in {seconds:.1f} s, best loss {best:.4f}")
        return result


def run(race: Race, out: Path, trainings: Trainings, progress: Progress | None = None) -> dict[str, Any]:
    """Do the trainings whose results `out` lacks, and report on all of them.

    The baseline's best rate is found on seed 0 and used for the others.

    Args:
        race: Model, rows and settings of both trainers.
        out: Folder of results.
        trainings: Seeds, learning rates and recipe.
        progress: Reports each training.

    Returns:
        What `curves.compare` returns, with `machine`, `case`, `sweep`, `sweep_at_edge` (the best rate is the lowest or
        highest one) and `same_recipe` (whether the curves agree, or None).
    """
    require("scipy.stats", "metrics")  # before hours of training, not after
    trainers = _Trainers(race, out, trainings.same_recipe, progress or Silent())
    done = (_same_recipe if trainings.same_recipe else _swept)(trainers, trainings)
    every = {id(result): result for result in [*done.sweep, *done.baseline, *done.unswept, *done.ours]}
    samples = [result["sgemm_gflops"] for result in every.values()]
    work = {"flops_per_token": trainers.case["flops_per_token"], "sgemm_gflops": median(samples)}
    rates = [result["learning_rate"] for result in done.sweep]
    return {
        "machine": machine()
        | {
            "threads": trainers.threads,
            "sgemm_gflops": work["sgemm_gflops"],
            "sgemm_samples": samples,
            "sgemm_shape": "x".join(map(str, trainers.case["sgemm_shape"])),
            "versions": {name: version(name) for name in ("edge-ft", "torch", "transformers", "peft", "accelerate")},
        },
        "case": {
            **asdict(replace(race, threads=trainers.threads)),
            **trainers.case,
            "model": race.model,
            "base_format": trainers.base_format,
        },
        **compare(done.baseline, done.unswept, done.ours, work, same_recipe=trainings.same_recipe),
        "sweep": [{"learning_rate": r["learning_rate"], "best_nll": best_nll(r["curve"])} for r in done.sweep],
        "sweep_at_edge": len(rates) > 1 and done.baseline[0]["learning_rate"] in (min(rates), max(rates)),
        "same_recipe": _agreement(done, trainers.base_format) if trainings.same_recipe else None,
    }


@dataclass(frozen=True)
class _Done:
    """Results of a race's trainings, by seed."""

    baseline: list[dict[str, Any]] = field(default_factory=list)
    """At the best rate of the sweep."""
    ours: list[dict[str, Any]] = field(default_factory=list)
    unswept: list[dict[str, Any]] = field(default_factory=list)
    """The baseline at its library's rate."""
    sweep: list[dict[str, Any]] = field(default_factory=list)
    """The baseline at each rate, on seed 0."""


def _same_recipe(trainers: _Trainers, trainings: Trainings) -> _Done:
    done = _Done()
    for seed in range(trainings.seeds):
        done.baseline.append(trainers.baseline(seed, float(trainers.tune["learning_rate"])))
        done.ours.append(trainers.ours(seed))
    return done


def _swept(trainers: _Trainers, trainings: Trainings) -> _Done:
    done = _Done()
    first, *rates = trainings.rates
    done.sweep.append(trainers.baseline(0, first))
    done.ours.append(trainers.ours(0))
    done.sweep.extend(trainers.baseline(0, rate) for rate in rates)
    done.unswept.append(trainers.baseline(0, LIBRARY_RATE))
    best = min(done.sweep, key=lambda result: best_nll(result["curve"]))
    done.baseline.append(best)
    for seed in range(1, trainings.seeds):
        done.baseline.append(trainers.baseline(seed, best["learning_rate"]))
        done.ours.append(trainers.ours(seed))
        if not trainings.quick:
            done.unswept.append(trainers.baseline(seed, LIBRARY_RATE))
    return done


def _agreement(done: _Done, base_format: str) -> dict[str, Any]:
    pairs = zip(done.baseline, done.ours, strict=True)
    largest = max(largest_difference(first["curve"], second["curve"]) for first, second in pairs)
    known = largest if largest < float("inf") else None
    return {
        "base_format": base_format,
        "compute": done.ours[0]["config"]["compute"],
        "max_difference": known,
        "limit": AGREEMENT,
        "agrees": largest <= AGREEMENT,
    }


def main(
    *,
    race: Annotated[Race, Parameter(name="*")],
    trainings: Annotated[Trainings, Parameter(name="*")] = Trainings(),
    json: str | None = None,
    plot: Path | None = None,
    out: Path = Path("out/training"),
    quiet: bool = False,
) -> None:
    """Compare the training speed of edge-ft and of PEFT + transformers' Trainer: same base, rows, rank and threads.

    Args:
        race: Model, rows and settings of both trainers.
        trainings: Seeds, learning rates and recipe.
        json: Write the report to this file; - is stdout, which then gets nothing else.
        plot: File for a plot of loss over seconds.
        out: Folder of results; trainings with a result there are skipped.
        quiet: Do not report progress.

    Raises:
        BudgetFailed: with --same-recipe, the curves differ.
    """
    report = run(race, out, trainings, Silent() if quiet else Lines())
    _show(report, json)
    if plot is not None:
        plot_curves(report, plot)
    agreement = report["same_recipe"]
    if agreement and not agreement["agrees"]:
        raise BudgetFailed(
            f"the curves of the same recipe differ by {agreement['max_difference']} nats, more than {AGREEMENT}: "
            "these are not the same recipe"
        )


def _show(report: dict[str, Any], target: str | None) -> None:
    if target == "-":
        print(json.dumps(report, indent=2, ensure_ascii=False))
        return
    if target is not None:
        write_json(Path(target), report)
    print(text_of(report))
