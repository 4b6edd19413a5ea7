"""What a finished `edge-ft tune` was worth, for a race: its clocks, its stages, and its loss on the held-out rows."""

from pathlib import Path
from typing import Any

from edge_ft.artifacts import RunFolder
from edge_ft.bench.studies.baseline_curve import held_out_nll
from edge_ft.config import TuneConfig
from edge_ft.evaluate.loading import open_run_model
from edge_ft.progress import Silent
from edge_ft.tune.prepare import prepare_job

__all__ = ["read_run", "stage_seconds"]

SCORING = ("validation", "scores", "answers")
"""Stages of report.json's `timings` in which rows are scored or answered."""


def stage_seconds(timings: dict[str, float], whole: float) -> dict[str, float]:
    """Share a whole run out among steps, scoring and everything else.

    Args:
        timings: Seconds by stage, from report.json.
        whole: Seconds of the process.

    Returns:
        `seconds_steps`, `seconds_scoring` and `seconds_other`.
    """
    scoring = sum(timings.get(stage, 0.0) for stage in SCORING)
    return {
        "seconds_steps": timings["train"],
        "seconds_scoring": scoring,
        "seconds_other": whole - timings["train"] - scoring,
    }


def read_run(job: dict[str, Any]) -> dict[str, Any]:
    """Read a run folder, and score the weights that were kept on its way.

    Args:
        job: `out` (the run folder), `ran` (a `whole_command.Ran` as a dict), `tune`, `seed`, and `held_out`: test, the
            rows that nothing was chosen by, or validation, where two curves are compared point by point.

    Returns:
        `curve`, `steps`, `tokens`, `config`, `test_nll`, `peak_rss_bytes`, `stages` and the seconds of the whole.
    """
    run, ran = RunFolder.open(Path(job["out"])), job["ran"]
    report, settings = run.report(), run.settings()
    evaluations = [line for line in ran["lines"] if "validation_nll" in line]
    kept = {int(step): Path(file) for step, file in ran["kept"].items()}
    if job["held_out"] == "validation":
        losses = {line["step"]: line["validation_nll"] for line in evaluations}
    else:
        best = report["best_step"]
        early = {step: file for step, file in kept.items() if step < best}
        losses = {0: report["nll"]["test_base"], **(_score(job, run, early) if early else {})}
        # From the best step on, the run would end with its weights.
        losses |= {line["step"]: report["nll"]["test"] for line in evaluations if line["step"] >= best}
    # The time to a loss includes that of choosing the codes.
    before = report["calibration"] or {"seconds": 0.0, "cpu_seconds": 0.0}
    curve = [
        {
            "step": line["step"],
            **{key: line[key] + before[key] for key in ("seconds", "cpu_seconds")},
            "whole_seconds": line["whole_seconds"],
            "nll": losses.get(line["step"]),
            "validation_nll": line["validation_nll"],
        }
        for line in evaluations
    ]
    return {
        "learning_rate": settings["learning_rate"],
        "curve": curve,
        "steps": evaluations[-1]["step"],
        "tokens": sum(line.get("tokens", 0) for line in ran["lines"]),
        "config": settings,
        "stopped": "minutes" if _is_shorter(report, settings) else report["stopped"],
        "test_nll": report["nll"]["test"],
        "peak_rss_bytes": report["peak_rss_bytes"],
        "process_seconds": ran["seconds"],
        "seconds_whole": ran["seconds"],
        "cpu_seconds_whole": ran["cpu_seconds"],
        "seconds_to_first_line": ran["seconds_to_first_line"],
        "seconds_to_first_step": _first_step(ran["lines"]),
        **stage_seconds(report["timings"], ran["seconds"]),
        "stages": report["timings"],
    }


def _is_shorter(report: dict[str, Any], settings: dict[str, Any]) -> bool:
    """Whether --max-minutes left fewer steps than the epochs have; the report counts a planned end as one."""
    batch = settings["batch_size"] * settings["gradient_accumulation"]
    of_epochs = max(1, round(settings["epochs"] * report["rows"]["train"] / batch))
    return settings.get("max_minutes") is not None and report["steps"] < of_epochs and report["stopped"] == "steps"


def _first_step(lines: list[dict[str, Any]]) -> float | None:
    """When the first step began."""
    first = next((line for line in lines if "loss" in line), None)
    return None if first is None else float(first["whole_seconds"] - first["seconds"])


def _score(job: dict[str, Any], run: RunFolder, kept: dict[int, Path]) -> dict[int, float]:
    """Held-out loss of the weights that were the best ones after each evaluation."""
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    prepared = prepare_job(TuneConfig(out=Path("unused"), **job["tune"] | {"seed": job["seed"]}), Silent())
    model, _ = open_run_model(run)
    losses = {}
    for step, file in sorted(kept.items()):
        set_peft_model_state_dict(model, load_file(str(file)))
        losses[step] = held_out_nll(model, prepared, job["held_out"])
    return losses
