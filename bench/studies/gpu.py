"""Our trainer over each base beside PEFT + Trainer + bitsandbytes, on one GPU: speed, memory and loss.

`python -m edge_ft.bench.studies gpu --model M --data ROWS` runs each training in a fresh process, one after the other,
over the same rows, batches, seed and schedule. Without a GPU it runs too, and measures no device memory.
"""

from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from edge_ft.bench.report import markdown_table
from edge_ft.bench.studies.kept_jobs import KeptJobs
from edge_ft.errors import EdgeFTError, UsageError
from edge_ft.files import write_json
from edge_ft.progress import Lines, Progress, Silent
from edge_ft.system import usable_cpus

__all__ = ["GpuRace", "main", "run", "table"]

TRAININGS = (("ours", "int4"), ("ours", "nf4"), ("ours", "bf16"), ("baseline", "nf4"), ("baseline", "bf16"))
"""Trainer and base of each training."""
NAMES = {"ours": "edge-ft", "baseline": "PEFT + Trainer"}
LIBRARIES = ("edge-ft", "torch", "transformers", "peft", "accelerate", "bitsandbytes")


@dataclass(frozen=True, kw_only=True)
class GpuRace:
    """What is trained: the same for every training of an --out folder."""

    model: str
    """Decoder: hub id, local folder or GGUF file."""
    data: str
    """Rows, as edge-ft tune takes them; a fifth of them is held out."""
    prompt: str | None = None
    """As in edge-ft tune."""
    completion: str | None = None
    """As in edge-ft tune."""
    steps: int = 100
    """Optimizer steps of each training."""
    warm_up: int = 20
    """Steps at the start that are not timed."""
    max_length: int = 256
    """As in edge-ft tune."""
    rank: int = 8
    """As in edge-ft tune."""
    learning_rate: float = 1e-3
    """As in edge-ft tune."""
    seed: int = 0
    """As in edge-ft tune."""

    def __post_init__(self) -> None:
        """Refuse a warm-up that leaves no step to time."""
        if not 0 < self.warm_up < self.steps:
            raise UsageError(f"--warm-up {self.warm_up} must lie between 0 and --steps {self.steps}")

    def tune_settings(self) -> dict[str, Any]:
        """Settings of `TuneConfig` that all trainings share."""
        names = ("model", "data", "prompt", "completion", "max_length", "rank", "learning_rate", "seed")
        given = {name: getattr(self, name) for name in names}
        fixed = {"task": "text-generation", "split": [0.8, 0.2, 0.0]}
        return {**given, **fixed, "max_steps": self.steps, "eval_steps": self.steps}


def run(
    race: GpuRace, out: Path, batch_sizes: tuple[int, ...], progress: Progress | None = None
) -> list[dict[str, Any]]:
    """Do every training whose result `out` lacks. One that fails is reported, and the others are done.

    Args:
        race: What is trained.
        out: Folder of results.
        batch_sizes: Each training is done for each of them.
        progress: Reports each training.

    Returns:
        For each training `trainer`, `base_format`, `batch_size`, and its figures or `error`.
    """
    progress = progress or Silent()
    jobs = KeptJobs(out, asdict(race), usable_cpus())
    results: list[dict[str, Any]] = []
    for batch_size, (trainer, base_format) in product(batch_sizes, TRAININGS):
        settings = {"base_format": base_format, "batch_size": batch_size}
        job = {"do": "gpu", "trainer": trainer, "warm_up": race.warm_up, "tune": race.tune_settings() | settings}
        name = f"{NAMES[trainer]} over {base_format}, {batch_size} rows"
        try:
            found = jobs.once(f"{trainer}-{base_format}-b{batch_size}", job)
            progress.say(f"{name}: {found['tokens_per_second']:.0f} tok/s, loss {found['nll_after']:.4f}")
        except EdgeFTError as error:
            found = {"error": str(error)}
            progress.say(f"{name}: {error}")
        results.append({"trainer": trainer, **settings, **found})
    return results


def table(results: list[dict[str, Any]]) -> str:
    """The results as a Markdown table."""
    header = (
        "trainer",
        "base",
        "rows",
        "tokens/s",
        "device memory before, at most (MB)",
        "held-out loss before",
        "after",
    )
    return markdown_table(header, map(_cells, results))


def _cells(result: dict[str, Any]) -> tuple[str, ...]:
    start = (NAMES[result["trainer"]], result["base_format"], str(result["batch_size"]))
    if "error" in result:
        return (*start, "failed", "", "", "")
    sizes = (result["held_bytes"], result["peak_bytes"])
    memory = ", ".join("not measured" if size is None else f"{size / 1e6:,.0f}" for size in sizes)
    losses = (f"{result['nll_before']:.4f}", f"{result['nll_after']:.4f}")
    return (*start, f"{result['tokens_per_second']:,.0f}", memory, *losses)


def main(
    *,
    race: Annotated[GpuRace, Parameter(name="*")],
    out: Path = Path("out/gpu"),
    batch_sizes: str = "8",
    json: Path | None = None,
    quiet: bool = False,
) -> None:
    """Train over int4, nf4 and bf16 bases beside PEFT + Trainer + bitsandbytes, and print the table.

    Args:
        race: What is trained.
        out: Folder of results; trainings with a result there are skipped.
        batch_sizes: Rows in a batch; several with commas, each training is done for each.
        json: Write the results to this file.
        quiet: No progress.

    Raises:
        UsageError: the batch sizes are not numbers.
    """
    try:
        sizes = tuple(int(size) for size in batch_sizes.split(","))
    except ValueError as error:
        raise UsageError(f"--batch-sizes {batch_sizes}: give numbers with commas between") from error
    results = run(race, out, sizes, Silent() if quiet else Lines())
    if json is not None:
        versions = {library: version(library) for library in LIBRARIES}
        write_json(json, {"race": asdict(race), "versions": versions, "results": results})
    print(table(results), end="")
