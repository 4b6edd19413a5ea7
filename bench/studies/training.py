"""Two trainers raced on the same rows: PEFT + Trainer with its learning rate swept, and edge-ft as it comes.

`python -m edge_ft.bench.studies training --model M --data D` runs each training in a fresh process, in turn, and keeps
its result in the --out folder: called again, it does only what is missing. docs/bench.md says what is measured.
"""

import json
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from shutil import rmtree
from statistics import median
from typing import Any, Literal

from edge_ft.artifacts import write_json
from edge_ft.bench.meters import machine
from edge_ft.bench.studies.curves import best_nll, largest_difference, plot_curves, race, table
from edge_ft.bench.subprocess_job import run_worker
from edge_ft.config import Task, TuneConfig
from edge_ft.errors import BudgetFailed, UsageError
from edge_ft.progress import Lines, Progress, Silent
from edge_ft.system import default_threads

__all__ = ["Race", "main", "run"]

LIBRARY_RATE = 5e-5
"""`TrainingArguments.learning_rate` of transformers."""
RIVAL_EPOCHS = 2.0
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
"""What both are told with --same-recipe, whatever our defaults are."""


@dataclass(frozen=True, kw_only=True)
class Race:
    """What is trained on what: the same for every training of an --out folder."""

    model: str
    data: str
    validation: str | None = None
    prompt: str | None = None
    completion: str | None = None
    label: str | None = None
    task: Task | None = None
    train_rows: int | None = None
    eval_rows: int | None = None
    epochs: float | None = None
    rank: int = 8
    batch_size: int | None = None
    max_length: int | None = None
    eval_steps: int | None = None
    base_format: Literal["int4", "int8", "fp32"] | None = None
    threads: int = 1

    def tune(self, rows: Path) -> dict[str, Any]:
        """The `TuneConfig` of ours, without what differs between trainings; what the user left out is its default."""
        given = {name: getattr(self, name) for name in ("epochs", "batch_size", "base_format")}
        return {
            **{name: getattr(self, name) for name in ("model", "prompt", "completion", "label", "task")},
            **{name: getattr(self, name) for name in ("rank", "max_length")},
            **{name: value for name, value in given.items() if value is not None},
            "data": str(rows / "train.jsonl"),
            "validation": str(rows / "validation.jsonl"),
            "split": [1.0, 0.0, 0.0],
        }


class Trainings:
    """The trainings of a folder: each is done once, in a process of its own, and its result is a file there."""

    def __init__(self, settings: Race, out: Path, same_recipe: bool, progress: Progress) -> None:
        self.settings, self.out, self.same_recipe, self.progress = settings, out, same_recipe, progress
        self._check_settings()
        rows = out.resolve() / "rows"
        self.tune = settings.tune(rows) | (SAME_RECIPE if same_recipe else {})
        ours = TuneConfig(**self.tune, out=Path("unused"))
        self.base_format = ours.base_format
        self.epochs = settings.epochs or (None if same_recipe else RIVAL_EPOCHS)  # None: as ours
        self.prefix = f"same-recipe-{self.base_format}-" if same_recipe else ""
        held = same_recipe and self.base_format != "fp32"
        self.weights = str(out.resolve() / f"weights-{self.base_format}.safetensors") if held else None
        job = {
            "do": "prepare",
            "tune": self.tune,
            "rows": str(rows),
            "folder": str(out.resolve()),
            "same_recipe": same_recipe,
            "weights": self.weights,
            **{name: getattr(settings, name) for name in ("data", "validation", "train_rows", "eval_rows")},
            "eval_steps": settings.eval_steps,
        }
        self.case = self._once(f"{self.prefix}case", job)
        self.tune |= {"model": self.case["model"], "task": self.case["task"], "eval_steps": self.case["eval_steps"]}

    def rival(self, seed: int, learning_rate: float) -> dict[str, Any]:
        """The rival, trained or remembered."""
        job = {
            "do": "rival",
            "learning_rate": learning_rate,
            "batch_size": self.settings.batch_size or 8,
            "epochs": self.epochs,
            "same_recipe": self.same_recipe,
            "weights": self.weights,
        }
        return self._train(f"{self.prefix}rival-s{seed}-lr{learning_rate:g}", seed, job)

    def ours(self, seed: int) -> dict[str, Any]:
        """edge-ft, trained or remembered."""
        name = f"{self.prefix}ours-{self.base_format}-s{seed}"
        folder = self.out.resolve() / "runs" / name
        if not self._file(name).is_file() and folder.exists():
            rmtree(folder)  # of a training that did not end
        return self._train(name, seed, {"do": "ours", "out": str(folder)})

    def _train(self, name: str, seed: int, job: dict[str, Any]) -> dict[str, Any]:
        """The machine's speed is measured before each training, since it drifts while others use it."""
        if not self._file(name).is_file():
            threads, shape = self.settings.threads, self.case["sgemm_shape"]
            gemm = {"do": "sgemm", "threads": threads, "shape": shape}
            measured = run_worker(gemm, "sgemm", threads, module="edge_ft.bench.studies.training_worker")
            self.progress.say(f"training {name}; sgemm {measured['sgemm_gflops']:.1f} GFLOP/s")
            result = self._once(name, job | {"tune": self.tune, "seed": seed, "threads": threads}, measured)
            last = result["curve"][-1]
            self.progress.say(
                f"{name}: {result['steps']} steps in {last['seconds']:.1f} s, best loss {best_nll(result['curve']):.4f}"
            )
        return dict(json.loads(self._file(name).read_text(encoding="utf-8")))

    def _once(self, name: str, job: dict[str, Any], more: dict[str, Any] | None = None) -> dict[str, Any]:
        file = self._file(name)
        if not file.is_file():
            result = run_worker(job, name, self.settings.threads, module="edge_ft.bench.studies.training_worker")
            write_json(file, result | (more or {}))
        return dict(json.loads(file.read_text(encoding="utf-8")))

    def _file(self, name: str) -> Path:
        return self.out / "results" / f"{name}.json"

    def _check_settings(self) -> None:
        file = self.out / "settings.json"
        wanted: dict[str, Any] = asdict(self.settings) | {"cpu": machine()["cpu"]}
        del wanted["base_format"]  # it is in the names of what depends on it
        if file.is_file():
            before = json.loads(file.read_text(encoding="utf-8"))
            for name, value in wanted.items():
                if before.get(name) != value:
                    raise UsageError(
                        f"{self.out} holds trainings with {name} {before.get(name)}, not {value}: give another --out"
                    )
        else:
            write_json(file, wanted)


def run(
    settings: Race,
    out: Path,
    *,
    seeds: int = 3,
    rival_rates: tuple[float, ...] = (2e-4, 5e-4, 1e-3, 2e-3),
    same_recipe: bool = False,
    quick: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Do the trainings that `out` lacks, and report on all of them.

    The rival's best rate is found on seed 0, and used for the others. `quick` leaves its untuned rate out of
    the other seeds.
    """
    trainings = Trainings(settings, out, same_recipe, progress or Silent())
    rival, unswept, ours, sweep = [], [], [], []
    if same_recipe:
        for seed in range(seeds):
            rival.append(trainings.rival(seed, float(trainings.tune["learning_rate"])))
            ours.append(trainings.ours(seed))
    else:
        sweep = [trainings.rival(0, rival_rates[0])]
        ours = [trainings.ours(0)]
        sweep += [trainings.rival(0, rate) for rate in rival_rates[1:]]
        unswept = [trainings.rival(0, LIBRARY_RATE)]
        best = min(sweep, key=lambda result: best_nll(result["curve"]))
        rival = [best]
        for seed in range(1, seeds):
            rival.append(trainings.rival(seed, best["learning_rate"]))
            ours.append(trainings.ours(seed))
            if not quick:
                unswept.append(trainings.rival(seed, LIBRARY_RATE))
    samples = [result["sgemm_gflops"] for result in {id(r): r for r in [*sweep, *rival, *unswept, *ours]}.values()]
    case = trainings.case
    work = {"flops_per_token": case["flops_per_token"], "sgemm_gflops": median(samples)}
    report = race(rival, unswept, ours, work, same_recipe=same_recipe)
    rates = [result["learning_rate"] for result in sweep]
    return {
        "machine": machine()
        | {
            "threads": settings.threads,
            "sgemm_gflops": work["sgemm_gflops"],
            "sgemm_samples": samples,
            "sgemm_shape": "x".join(map(str, case["sgemm_shape"])),
            "versions": {name: version(name) for name in ("edge-ft", "torch", "transformers", "peft", "accelerate")},
        },
        "case": {**asdict(settings), **case, "model": settings.model, "base_format": trainings.base_format},
        **report,
        "sweep": [{"learning_rate": r["learning_rate"], "best_nll": best_nll(r["curve"])} for r in sweep],
        "sweep_at_edge": len(rates) > 1 and rival[0]["learning_rate"] in (min(rates), max(rates)),
        "same_recipe": _agreement(rival, ours, trainings.base_format) if same_recipe else None,
    }


def _agreement(rival: list[dict[str, Any]], ours: list[dict[str, Any]], base_format: str) -> dict[str, Any]:
    largest = max(largest_difference(a["curve"], b["curve"]) for a, b in zip(rival, ours, strict=True))
    known = largest if largest < float("inf") else None
    return {
        "base_format": base_format,
        "compute": ours[0]["config"]["compute"],
        "max_difference": known,
        "limit": AGREEMENT,
        "agrees": largest <= AGREEMENT,
    }


def main(
    *,
    model: str,
    data: str,
    validation: str | None = None,
    prompt: str | None = None,
    completion: str | None = None,
    label: str | None = None,
    task: Task | None = None,
    seeds: int = 3,
    threads: int | None = None,
    train_rows: int | None = None,
    eval_rows: int | None = None,
    epochs: float | None = None,
    rank: int = 8,
    batch_size: int | None = None,
    max_length: int | None = None,
    eval_steps: int | None = None,
    base_format: Literal["int4", "int8", "fp32"] | None = None,
    rival_rates: str = "2e-4,5e-4,1e-3,2e-3",
    same_recipe: bool = False,
    quick: bool = False,
    json: str | None = None,
    plot: Path | None = None,
    out: Path = Path("out/training"),
    quiet: bool = False,
) -> None:
    """Race edge-ft's trainer against PEFT + transformers' Trainer: same base, rows, rank and threads.

    Parameters
    ----------
    model
        Hub id, local folder or GGUF file.
    data
        Rows, as edge-ft tune takes them; a fifth of them is held out unless --validation is given.
    validation
        Held-out rows.
    prompt, completion, label, task, max_length
        As in edge-ft tune.
    seeds
        Trainings of each; rows stay the same.
    threads
        CPU threads of both; default all cores.
    train_rows, eval_rows
        So many of the rows, drawn once; default all.
    epochs
        Of both; left out, ours takes its default and the rival 2.
    rank
        Of both.
    batch_size
        Of both; left out, ours takes its default and the rival 8.
    eval_steps
        Steps of ours between two looks at the held-out rows; the rival's come after as many rows. Default twelve.
    base_format
        Of ours; default what edge-ft tune takes. With --same-recipe the rival trains over what its codes stand for.
    rival_rates
        Learning rates that the rival is swept over on seed 0, with commas.
    same_recipe
        Feed the rival our batches, schedule and layers: the curves must agree, and only the speed differs.
    quick
        The rival at its library's rate on seed 0 only.
    json
        Write the report to this file; - is stdout, and then nothing else goes there.
    plot
        Picture of loss over seconds.
    out
        Folder of results; what is there is not trained again.
    quiet
        No progress.
    """
    try:
        rates = tuple(float(rate) for rate in rival_rates.split(","))
    except ValueError as error:
        raise UsageError(f"--rival-rates {rival_rates}: give numbers with commas between") from error
    if seeds < 1 or min(rates) <= 0 or (threads or 1) < 1 or (eval_steps or 1) < 1:
        raise UsageError("--seeds, --threads, --eval-steps and --rival-rates must be above 0")
    settings = Race(
        **{name: value for name, value in locals().items() if name in Race.__dataclass_fields__ and name != "threads"},
        threads=threads or default_threads(),
    )
    report = run(
        settings,
        out,
        seeds=seeds,
        rival_rates=rates,
        same_recipe=same_recipe,
        quick=quick,
        progress=Silent() if quiet else Lines(),
    )
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
    print(table(report))
