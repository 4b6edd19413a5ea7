"""The figures of a race of two trainers: times to a loss, intervals and ratios."""

import math
from typing import Any

import pytest

from edge_ft.bench.studies.curves import best_nll, compare, interval, largest_difference, text_of, time_to
from edge_ft.bench.studies.ours import stage_seconds

WORK = {"flops_per_token": 1e6, "sgemm_gflops": 10.0}


def curve(*nlls: float | None, pace: float = 10.0) -> list[dict[str, Any]]:
    return [
        {"step": n, "seconds": pace * n, "cpu_seconds": 2 * pace * n, "whole_seconds": 5 + pace * n, "nll": nll}
        for n, nll in enumerate(nlls)
    ]


def result(points: list[dict[str, Any]], seed: int = 0, peak: int = 10**9, test_nll: float = 2.0) -> dict[str, Any]:
    return {
        "test_nll": test_nll,
        "seconds_whole": 50.0,
        "seconds_whole_without_evaluation": 40.0,
        "seconds_steps": points[-1]["seconds"],
        "seconds_scoring": 10.0,
        "seconds_other": 40.0 - points[-1]["seconds"],
        "stopped": "steps",
        "seed": seed,
        "learning_rate": 1e-3,
        "curve": points,
        "steps": points[-1]["step"],
        "tokens": 1000,
        "peak_rss_bytes": peak,
        "process_seconds": 50.0,
    }


def test_the_time_to_a_loss_lies_between_two_evaluations() -> None:
    points = curve(4.0, 2.0, 3.0, 1.0)
    assert time_to(points, 3.0, "seconds") == 5.0
    assert time_to(points, 3.0, "cpu_seconds") == 10.0
    assert time_to(points, 2.0, "seconds") == 10.0  # the first time, though it rose again
    assert time_to(points, 1.5, "seconds") == 27.5
    assert time_to(points, 0.9, "seconds") is None
    assert time_to(points, 5.0, "seconds") == 0.0


def test_a_loss_that_is_no_number_is_never_a_best_nor_reached_by_interpolation() -> None:
    points = curve(4.0, None, 2.0)
    assert best_nll(points) == 2.0
    assert time_to(points, 3.0, "seconds") == 20.0


def test_curves_are_compared_at_the_same_steps_only() -> None:
    assert largest_difference(curve(4.0, 2.0), curve(4.5, 2.25)) == 0.5
    assert largest_difference(curve(4.0, 2.0), curve(4.0)) == math.inf
    assert largest_difference(curve(4.0, 2.0), curve(4.0, None)) == math.inf


def test_the_interval_is_students() -> None:
    assert interval([2.0]) is None
    assert interval([1.0, 2.0, 3.0]) == pytest.approx((2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5))


def test_ratios_are_ours_over_the_baselines_with_each_seeds_own_target() -> None:
    baseline = [result(curve(4.0, 2.0), peak=3 * 10**9), result(curve(4.0, 3.0), seed=1, peak=3 * 10**9)]
    ours = [result(curve(4.0, 2.0, pace=5.0)), result(curve(4.0, 2.0, pace=5.0), seed=1)]
    report = compare(baseline, [], ours, WORK)
    assert report["ratio_per_seed"]["time_to_baseline_best"] == [0.5, 0.25]
    assert report["ratio"]["time_to_baseline_best"] == 0.375
    assert report["ratio"]["peak_rss"] == pytest.approx(1 / 3)
    assert report["ratio"]["speed"] == report["ratio"]["cpu_speed"] == 2.0
    assert report["ratio"]["same_recipe_speed"] is None
    low, high = report["ratio_interval"]["time_to_baseline_best"]
    assert low < 0.375 < high
    assert report["ours"][0]["tokens_per_second"] == 200
    assert report["ours"][0]["percent_of_sgemm"] == pytest.approx(2.0)  # 200 of 10 GFLOP/s / 1 MFLOP
    assert report["ours"][1]["seconds_to_50%_of_gain"] == 1.25  # 3.5 nats


def test_a_target_that_was_not_reached_has_no_time_and_no_ratio() -> None:
    baseline = [result(curve(4.0, 2.0)), result(curve(4.0, 2.0), seed=1)]
    ours = [result(curve(4.0, 1.0)), result(curve(4.0, 2.5), seed=1)]
    report = compare(baseline, [], ours, WORK)
    assert report["ours"][1]["seconds_to_baseline_best"] is None
    assert report["ratio"]["time_to_baseline_best"] is None
    assert report["ratio_interval"]["time_to_baseline_best"] is None
    assert report["ratio_per_seed"]["time_to_baseline_best"] == [pytest.approx(2 / 3), None]
    assert report["ratio"]["time_to_50%_of_gain"] is not None
    report |= {"sweep": [], "sweep_at_edge": False, "same_recipe": None, "case": {"flops_per_token": 1e6}}
    report["machine"] = {"sgemm_gflops": 10.0, "bf16_gflops": 20.0, "threads": 1, "sgemm_shape": "1x1x1"}
    text = text_of(report)
    assert "ours ÷ baseline, time_to_baseline_best: not reached by 1 of 2 seeds" in text
    assert "sgemm 10.0 GFLOP/s, bf16 20.0" in text


def test_the_whole_command_counts_when_its_last_weights_reached_the_baselines_best() -> None:
    baseline = [result(curve(4.0, 2.0)), result(curve(4.0, 2.0, 3.0), seed=1)]
    ours = [result(curve(4.0, 1.0), test_nll=1.9), result(curve(4.0, 1.0), seed=1, test_nll=2.1)]
    report = compare(baseline, [], ours, WORK)
    assert [row["whole_seconds_to_baseline_best"] for row in report["ours"]] == [50.0, None]
    assert [row["nll_above_baseline_best"] for row in report["ours"]] == pytest.approx([-0.1, 0.1])
    # Our whole command, against the other one's training alone until its best.
    assert report["ratio_per_seed"]["whole_time_to_baseline_best"] == [5.0, None]
    assert report["ratio"]["whole_time_to_baseline_best"] is None
    assert report["ratio"]["whole_time_reached_or_not"] == 5.0
    assert report["ratio"]["whole_time"] == 1.0
    assert report["ratio"]["whole_time_without_evaluation"] == 1.25
    assert report["ratio"]["share_of_steps"] == 0.2


def test_stages_are_steps_scoring_or_the_rest() -> None:
    timings = {"import": 5.0, "load": 10.0, "train": 50.0, "validation": 20.0, "scores": 10.0, "answers": 3.0}
    found = stage_seconds(timings, whole=100.0)
    assert found == {"seconds_steps": 50.0, "seconds_scoring": 33.0, "seconds_other": 17.0}
