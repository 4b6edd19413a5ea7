"""Our trainer over each base beside PEFT + Trainer + bitsandbytes, on one GPU: speed, memory and loss.

`python -m edge_ft.bench.studies gpu --model M --data ROWS --out results.json` runs each training in a fresh process,
one after the other, over the same rows, batches, seed and schedule. Without a GPU it runs too, and measures no device
memory.
"""

from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

from edge_ft.artifacts import write_json
from edge_ft.bench.subprocess_job import run_worker
from edge_ft.errors import EdgeFTError, UsageError
from edge_ft.progress import Lines, Progress, Silent
from edge_ft.system import default_threads

__all__ = ["main", "run", "table"]

TRAININGS = (("ours", "int4"), ("ours", "nf4"), ("ours", "bf16"), ("rival", "nf4"), ("rival", "bf16"))
"""Trainer and base of each training."""
NAMES = {"ours": "edge-ft", "rival": "PEFT + Trainer"}
LIBRARIES = ("edge-ft", "torch", "transformers", "peft", "accelerate", "bitsandbytes")


def run(
    tune: dict[str, Any], out: Path, *, batch_sizes: tuple[int, ...], warm_up: int, progress: Progress | None = None
) -> list[dict[str, Any]]:
    """Do every training; `out` holds what there is after each. One that fails is told, and the others go on.

    Args:
        tune: Settings of `TuneConfig` that all share; `max_steps` is among them.
        warm_up: Steps at the start that are not timed.
    """
    progress = progress or Silent()
    results: list[dict[str, Any]] = []
    for batch_size, (trainer, base_format) in product(batch_sizes, TRAININGS):
        settings = {"base_format": base_format, "batch_size": batch_size}
        job = {"trainer": trainer, "warm_up": warm_up, "tune": tune | settings}
        name = f"{NAMES[trainer]} over {base_format}, {batch_size} rows"
        try:
            found = run_worker(job, name, default_threads(), module="edge_ft.bench.studies.gpu_worker")
            progress.say(f"{name}: {found['tokens_per_second']:.0f} tok/s, loss {found['nll_after']:.4f}")
        except EdgeFTError as error:
            found = {"error": str(error)}
            progress.say(f"{name}: {error}")
        results.append({"trainer": trainer, **settings, **found})
        versions = {library: version(library) for library in LIBRARIES}
        write_json(out, {"tune": tune, "warm_up": warm_up, "versions": versions, "results": results})
    return results


def table(results: list[dict[str, Any]]) -> str:
    """The results as a Markdown table."""
    lines = [
        "| trainer | base | rows | tokens/s | device memory before, at most (MB) | held-out loss before | after |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for result in results:
        start = f"| {NAMES[result['trainer']]} | {result['base_format']} | {result['batch_size']} "
        if "error" in result:
            lines.append(f"{start}| failed | | | |")
            continue
        sizes = (result["held_bytes"], result["peak_bytes"])
        memory = ", ".join("not measured" if size is None else f"{size / 1e6:,.0f}" for size in sizes)
        lines.append(
            f"{start}| {result['tokens_per_second']:,.0f} | {memory} "
            f"| {result['nll_before']:.4f} | {result['nll_after']:.4f} |"
        )
    return "\n".join(lines)


def main(
    *,
    model: str,
    data: str,
    prompt: str | None = None,
    completion: str | None = None,
    out: Path = Path("out/gpu.json"),
    steps: int = 100,
    warm_up: int = 20,
    batch_sizes: str = "8",
    max_length: int = 256,
    rank: int = 8,
    learning_rate: float = 1e-3,
    seed: int = 0,
    quiet: bool = False,
) -> None:
    """Train over int4, nf4 and bf16 bases beside PEFT + Trainer + bitsandbytes, and print the table.

    Parameters
    ----------
    model
        Decoder: hub id, local folder or GGUF file.
    data
        Rows, as edge-ft tune takes them; a fifth of them is held out.
    prompt, completion, max_length, rank, learning_rate, seed
        As in edge-ft tune.
    out
        JSON file of the results.
    steps
        Optimizer steps of each training.
    warm_up
        Steps at the start that are not timed.
    batch_sizes
        Rows in a batch; several with commas, each training is done for each.
    quiet
        No progress.
    """
    try:
        sizes = tuple(int(size) for size in batch_sizes.split(","))
    except ValueError as error:
        raise UsageError(f"--batch-sizes {batch_sizes}: give numbers with commas between") from error
    if not 0 < warm_up < steps:
        raise UsageError(f"--warm-up {warm_up} must lie between 0 and --steps {steps}")
    tune: dict[str, Any] = {
        **{"model": model, "data": data, "prompt": prompt, "completion": completion, "task": "text-generation"},
        **{"max_length": max_length, "rank": rank, "learning_rate": learning_rate, "seed": seed},
        **{"split": [0.8, 0.2, 0.0], "max_steps": steps, "eval_steps": steps},
    }
    results = run(tune, out, batch_sizes=sizes, warm_up=warm_up, progress=Silent() if quiet else Lines())
    print(table(results))
