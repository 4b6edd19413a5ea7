"""Two trainers raced on the same rows: PEFT + Trainer with its learning rate swept, and edge-ft with its defaults.

`python -m edge_ft.bench.studies training --model M --data D` runs each training in a fresh process, in turn, and keeps
its result in the --out folder. Ours is the whole command `edge-ft tune`; docs/studies.md describes the method.
"""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from shutil import rmtree
from statistics import median
from typing import Annotated, Any

from cyclopts import Parameter

from edge_ft.bench.meters import cpu_flags, machine
from edge_ft.bench.studies.curves import best_nll, compare, largest_difference, plot_curves, text_of
from edge_ft.bench.studies.kept_jobs import KeptJobs
from edge_ft.bench.studies.race_settings import Race, Trainings
from edge_ft.bench.studies.whole_command import tune_command
from edge_ft.errors import BudgetFailed, UsageError, require
from edge_ft.files import write_json
from edge_ft.progress import Lines, Progress, Silent
from edge_ft.system import default_threads

__all__ = ["main", "run"]

LIBRARY_RATE = 5e-5
"""`TrainingArguments.learning_rate` of transformers."""
BASELINE_EPOCHS = 2.0
AGREEMENT = 0.02
"""Nats that two curves of the same recipe may differ by."""
YARDSTICK = "whole command"
"""What results of today measure; those of earlier versions held no clock of the whole, and no test rows."""
OURS_ALONE = ("base_format", "compute", "memory")
"""Settings of a race that the baseline does not have."""
SAME_RECIPE = {
    "alpha": 16.0,
    "dropout": 0.0,
    "target_modules": ["all-linear"],
    "calibration_rows": 0,
    "finish_steps": 0,
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


class _Trainers:
    """Trains either side of a race once for each seed and rate."""

    def __init__(self, race: Race, out: Path, same_recipe: bool, progress: Progress) -> None:
        self.race, self.out, self.same_recipe, self.progress = race, out.resolve(), same_recipe, progress
        self.threads = race.threads or default_threads()
        # The settings of ours alone are in the names of the jobs that depend on them.
        shared = {name: value for name, value in asdict(race).items() if name not in OURS_ALONE}
        self.jobs = KeptJobs(out, shared | {"threads": self.threads, "yardstick": YARDSTICK}, self.threads)
        rows = self.out / "rows"
        self.tune = race.tune_settings(rows)
        if same_recipe:
            self.tune = {"base_format": "int4"} | self.tune | SAME_RECIPE
        self.base_format = self.tune.get("base_format", "default")
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
            **{name: getattr(race, name) for name in ("data", "validation", "test", "eval_steps")},
            **{name: getattr(race, name) for name in ("train_rows", "validation_rows", "eval_rows")},
        }
        self.case = self.jobs.once(f"{self.prefix}case", job)
        self.tune |= {name: self.case[name] for name in ("model", "task")}
        if same_recipe:  # the curves are compared point by point, on the validation rows
            self.tune |= {"eval_steps": self.case["eval_steps"], "test": None}

    def baseline(self, seed: int, learning_rate: float) -> dict[str, Any]:
        """The baseline's result, new or kept."""
        job = {
            "do": "baseline",
            "tune": self.tune,
            "seed": seed,
            "threads": self.threads,
            "learning_rate": learning_rate,
            "batch_size": self.race.batch_size or 8,
            "max_minutes": self.race.max_minutes,
            "epochs": self.epochs,
            "eval_steps": self.case["eval_steps"],
            "same_recipe": self.same_recipe,
            "weights": self.weights,
        }
        return self._kept(f"{self.prefix}baseline-s{seed}-lr{learning_rate:g}", lambda: job)

    def ours(self, seed: int, kind: str = "ours", **changes: Any) -> dict[str, Any]:
        """The result of edge-ft, new or kept; `changes` are of its settings (None: default), named by `kind`."""
        name = f"{self.prefix}{kind}-{'-'.join(filter(None, (self.base_format, self.race.compute, self.race.memory)))}"
        name = f"{name}-s{seed}"

        def train() -> dict[str, Any]:
            changed = {**self.tune, "seed": seed, **changes}
            folder, settings = self.out / "runs" / name, {k: v for k, v in changed.items() if v is not None}
            for old in (folder, folder.with_name(f"{name}-kept")):
                rmtree(old, ignore_errors=True)  # of a training that did not end
            ran = tune_command(settings, folder, self.threads)
            held_out = "validation" if self.same_recipe else "test"
            return {"do": "ours", "tune": settings, "seed": seed, "out": str(folder), "held_out": held_out} | {
                "ran": asdict(ran)
            }

        return self._kept(name, train)

    def onnx(self, seed: int) -> dict[str, Any]:
        """The result of edge-ft over a bundle of the model, new or kept."""
        bundle = self.out / f"bundle-{self.base_format}"
        if not bundle.is_dir():
            job = {"do": "bundle", "model": self.case["model"], "out": str(bundle), "weights": self.base_format}
            self.jobs.run("bundle", job | {"threads": self.threads})
        # What the bundle itself decides is left out.
        return self.ours(seed, "onnx", model=str(bundle), base_format=None, calibration_rows=None, finish_steps=None)

    def _kept(self, name: str, train: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The kept result, or that of the job that `train` returns.

        The machine's speed, which varies, is measured before each training.

        Returns:
            The result.
        """
        if self.jobs.file(name).is_file():
            return self.jobs.once(name, {})
        measured = self.jobs.run("sgemm", {"do": "sgemm", "threads": self.threads, "shape": self.case["sgemm_shape"]})
        self.progress.say(f"training {name}; sgemm {measured['sgemm_gflops']:.1f} GFLOP/s")
        result = self.jobs.once(name, train(), measured)
        best = best_nll(result["curve"])
        self.progress.say(
            f"{name}: {result['steps']} steps in {result['seconds_steps']:.1f} s of {result['seconds_whole']:.1f} s, "
            f"best loss {best:.4f}"
        )
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

    Raises:
        UsageError: options that exclude each other, or results in `out` that were made with others.
    """
    require("scipy.stats", "metrics")  # before hours of training, not after
    if trainings.same_recipe and race.max_minutes is not None:
        raise UsageError(
            "--same-recipe takes the same steps in both trainers, however long they take: leave --max-minutes out"
        )
    trainers = _Trainers(race, out, trainings.same_recipe, progress or Silent())
    done = (_same_recipe if trainings.same_recipe else _swept)(trainers, trainings)
    others = {"ours_fp32": done.fp32, "ours_onnx": done.onnx}
    trained = [*done.sweep, *done.baseline, *done.unswept, *done.ours, *done.fp32, *done.onnx]
    every = {id(result): result for result in trained}
    samples = [result["sgemm_gflops"] for result in every.values()]
    bf16 = [result["bf16_gflops"] for result in every.values() if result["bf16_gflops"] is not None]
    work = {"flops_per_token": trainers.case["flops_per_token"], "sgemm_gflops": median(samples)}
    rates = [result["learning_rate"] for result in done.sweep]
    return {
        "machine": machine()
        | {
            "threads": trainers.threads,
            "sgemm_gflops": work["sgemm_gflops"],
            "sgemm_samples": samples,
            "bf16_gflops": median(bf16) if bf16 else None,
            "bf16_samples": bf16,
            "flags": cpu_flags(),
            "sgemm_shape": "x".join(map(str, trainers.case["sgemm_shape"])),
            "versions": {name: version(name) for name in ("edge-ft", "torch", "transformers", "peft", "accelerate")},
        },
        "case": {
            **asdict(replace(race, threads=trainers.threads)),
            **trainers.case,
            "model": race.model,
            "base_format": trainers.base_format,
        },
        **compare(done.baseline, done.unswept, done.ours, work, others, same_recipe=trainings.same_recipe),
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
    fp32: list[dict[str, Any]] = field(default_factory=list)
    """Ours in float32, where it computes in bfloat16 otherwise."""
    onnx: list[dict[str, Any]] = field(default_factory=list)
    """Ours over a bundle."""
    sweep: list[dict[str, Any]] = field(default_factory=list)
    """The baseline at each rate, on seed 0."""


def _same_recipe(trainers: _Trainers, trainings: Trainings) -> _Done:
    done = _Done()
    for seed in range(trainings.seeds):
        done.baseline.append(trainers.baseline(seed, float(trainers.tune["learning_rate"])))
        done.ours.append(trainers.ours(seed))
        if trainings.bundle:
            if done.ours[-1]["config"]["compute"] != "fp32":
                done.fp32.append(trainers.ours(seed, "fp32", compute="fp32"))
            done.onnx.append(trainers.onnx(seed))
    return done


def _swept(trainers: _Trainers, trainings: Trainings) -> _Done:
    done = _Done()
    first, *rates = trainings.rates
    done.sweep.append(trainers.baseline(0, first))
    done.ours.append(trainers.ours(0))
    done.sweep.extend(trainers.baseline(0, rate) for rate in rates)
    best = min(done.sweep, key=lambda result: best_nll(result["curve"]))
    done.baseline.append(best)
    for seed in range(1, trainings.seeds):
        done.baseline.append(trainers.baseline(seed, best["learning_rate"]))
        done.ours.append(trainers.ours(seed))
    unswept = trainings.seeds if trainings.library_seeds is None else trainings.library_seeds
    done.unswept.extend(trainers.baseline(seed, LIBRARY_RATE) for seed in range(unswept))
    return done


def _agreement(done: _Done, base_format: str) -> dict[str, Any]:
    def largest(trained: list[dict[str, Any]]) -> float:
        pairs = zip(done.baseline, trained, strict=True)
        return max(largest_difference(first["curve"], second["curve"]) for first, second in pairs)

    own, over = largest(done.ours), largest(done.onnx) if done.onnx else math.inf
    return {
        "base_format": base_format,
        "compute": done.ours[0]["config"]["compute"],
        "max_difference": own if own < math.inf else None,
        "max_difference_onnx": over if over < math.inf else None,
        "limit": AGREEMENT,
        "agrees": own <= AGREEMENT,
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
        plot: File for a plot of loss over seconds of training, and of the whole.
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
