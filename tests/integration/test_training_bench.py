"""The race of two trainers on tiny models."""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_models import write_decoder

from edge_ft.artifacts import RunFolder
from edge_ft.bench.meters import cpu_flags
from edge_ft.bench.studies import kept_jobs, race_worker, races, training
from edge_ft.bench.studies.curves import text_of
from edge_ft.bench.studies.kept_jobs import KeptJobs
from edge_ft.bench.studies.race_settings import Race, Trainings
from edge_ft.bench.studies.training import LIBRARY_RATE, main, run
from edge_ft.bench.studies.whole_command import Ran, tune_command
from edge_ft.bench.subprocess_job import run_worker
from edge_ft.config import TuneConfig
from edge_ft.errors import BudgetFailed, EdgeFTError, UsageError
from edge_ft.tune import defaults, tune

RATIOS = {
    *("time_to_baseline_best", "cpu_time_to_baseline_best", "peak_rss", "same_recipe_speed"),
    *("whole_time_to_baseline_best", "whole_time_reached_or_not", "whole_time", "whole_time_without_evaluation"),
    "share_of_steps",
}
RUN = {
    *(
        "seed",
        "learning_rate",
        "curve",
        "best_nll",
        "final_nll",
        "seconds_to_baseline_best",
        "cpu_seconds_to_baseline_best",
    ),
    *("peak_rss_bytes", "tokens_per_second", "percent_of_sgemm", "process_seconds", "seconds_to_50%_of_gain"),
    *("seconds_whole", "cpu_seconds_whole", "seconds_steps", "seconds_scoring", "seconds_other", "share_of_steps"),
    *("test_nll", "nll_above_baseline_best", "whole_seconds_to_baseline_best", "stopped"),
}


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Trainings in this process instead of one each, which takes seconds to import; holds the jobs that were done."""
    done: list[dict[str, Any]] = []

    def here(job: dict[str, Any], doing: str, threads: int, module: str) -> dict[str, Any]:
        assert module == "edge_ft.bench.studies.race_worker"
        done.append(job)
        return dict(json.loads(json.dumps(race_worker.work(job | {"started": time.monotonic()}))))

    def tuned_here(settings: dict[str, Any], out: Path, threads: int) -> Ran:
        done.append({"do": "tune"} | settings)
        began = time.monotonic()
        run = tune(TuneConfig(**settings, out=out, threads=threads))
        lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        stamped = [line | {"whole_seconds": 5.0 + at} for at, line in enumerate(lines)]
        # Of each evaluation the weights were kept; here they are those of the end.
        kept = {line["step"]: str(run.adapter / "adapter_model.safetensors") for line in lines if line["step"]}
        return Ran(time.monotonic() - began, 1.0, 0.5, stamped, kept)

    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")  # the baseline takes it away
    monkeypatch.setattr(kept_jobs, "run_worker", here)
    monkeypatch.setattr(training, "tune_command", tuned_here)
    monkeypatch.setattr(race_worker, "SGEMM_SECONDS", 0.01)
    return done


def trained(jobs: list[dict[str, Any]]) -> list[tuple[str, int, float | None]]:
    names = {"baseline": "baseline", "tune": "ours"}
    return [(names[job["do"]], job["seed"], job.get("learning_rate")) for job in jobs if job["do"] in names]


def test_a_race_sweeps_the_baseline_and_does_only_what_is_missing(
    jobs: list[dict[str, Any]], llama: Path, sums: Path, tmp_path: Path
) -> None:
    settings = Race(model=str(llama), data=str(sums), train_rows=16, eval_rows=4, eval_steps=2, epochs=2.0)
    settings = replace(settings, validation_rows=3)
    rates = (1e-5, 3e-2)
    trainings = Trainings(seeds=2, baseline_rates="1e-5,3e-2")
    report = run(settings, tmp_path / "race", trainings)
    assert trained(jobs) == [
        *(("baseline", 0, 1e-5), ("ours", 0, None), ("baseline", 0, 3e-2)),
        *(("baseline", 1, 3e-2), ("ours", 1, None)),
        *(("baseline", 0, LIBRARY_RATE), ("baseline", 1, LIBRARY_RATE)),
    ]
    assert [row["learning_rate"] for row in report["sweep"]] == list(rates)
    assert report["sweep"][1]["best_nll"] < report["sweep"][0]["best_nll"]
    assert report["sweep_at_edge"]
    for name, count in (("baseline", 2), ("baseline_unswept", 2), ("ours", 2)):
        assert [row["seed"] for row in report[name]] == list(range(count))
        for row in report[name]:
            assert row.keys() >= RUN
            assert [point["step"] for point in row["curve"]] == [0, 2, 4]
            keys = {"step", "seconds", "cpu_seconds", "whole_seconds", "nll"}
            keys.add("validation_nll" if name == "ours" else "whole_seconds_without_evaluation")
            assert all(point.keys() == keys for point in row["curve"])
            assert row["tokens"] == 2 * report["case"]["tokens_per_epoch"]
            assert 0 < row["seconds_steps"] < row["seconds_whole"]
            assert row["share_of_steps"] == row["seconds_steps"] / row["seconds_whole"]
            if name != "ours":
                parts = row["seconds_steps"] + row["seconds_scoring"] + row["seconds_other"]
                assert parts == pytest.approx(row["seconds_whole"])
                assert row["seconds_scoring"] > 0  # of the validation rows, by Trainer after each epoch
                without = row["seconds_whole"] - row["seconds_whole_without_evaluation"]
                assert without == pytest.approx(row["seconds_scoring"])
    assert {row["learning_rate"] for row in report["baseline_unswept"]} == {LIBRARY_RATE}
    assert report["baseline"][0]["seconds_to_baseline_best"] > 0
    assert report["ours"][0]["config"]["learning_rate"] == report["ours"][0]["learning_rate"]
    assert report["ratio"].keys() >= RATIOS
    # Both are scored on the same rows before any step; ours over its 4-bit codes.
    assert report["baseline"][0]["curve"][0]["nll"] == report["baseline_unswept"][1]["curve"][0]["nll"]
    assert report["ours"][0]["curve"][0]["nll"] == pytest.approx(report["baseline"][0]["curve"][0]["nll"], abs=0.3)
    assert report["ours"][0]["curve"][0]["nll"] != report["ours"][0]["curve"][0]["validation_nll"]
    assert report["ours"][0]["curve"][-1]["nll"] == report["ours"][0]["test_nll"]
    # The kept weights are scored as the report scored them.
    assert report["ours"][0]["curve"][1]["nll"] == pytest.approx(report["ours"][0]["test_nll"], abs=1e-5)
    assert len(report["machine"]["sgemm_samples"]) == 7
    assert report["machine"].keys() >= {"bf16_gflops", "flags"}
    assert report["case"]["rows"] == {"train": 16, "validation": 3, "test": 4}
    json.dumps(report, allow_nan=False)
    assert "baseline's sweep" in text_of(report)

    jobs.clear()
    again = run(settings, tmp_path / "race", trainings)
    assert not jobs
    assert again["ours"] == report["ours"]
    (tmp_path / "race" / "results" / "ours-default-s1.json").unlink()
    run(settings, tmp_path / "race", Trainings(seeds=2, baseline_rates="1e-5,3e-2,5e-2", library_seeds=1))
    assert ("ours", 1, None) in trained(jobs)
    assert ("baseline", 0, 5e-2) in trained(jobs)
    assert ("baseline", 0, 1e-5) not in trained(jobs)
    # Ours again in another way; the baseline, which has no such settings, is kept.
    jobs.clear()
    other = run(replace(settings, compute="fp32", memory="low"), tmp_path / "race", trainings)
    assert trained(jobs) == [("ours", 0, None), ("ours", 1, None)]
    assert other["case"]["compute"] == other["ours"][0]["config"]["compute"] == "fp32"
    assert other["ours"][0]["config"]["memory"] == "low"
    assert [row["curve"] for row in other["baseline"]] == [row["curve"] for row in again["baseline"]]
    with pytest.raises(UsageError, match="holds results with train_rows 16, not 8"):
        run(Race(model=str(llama), data=str(sums), train_rows=8), tmp_path / "race", Trainings(seeds=1))


def test_the_baseline_is_scored_after_as_many_rows_where_a_step_of_ours_has_several_passes(
    jobs: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, llama: Path, sums: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr(defaults, "PASS_TOKENS", 1)
    settings = Race(model=str(llama), data=str(sums), train_rows=16, eval_rows=4, eval_steps=2, epochs=2.0)
    report = run(settings, tmp_path / "race", Trainings(seeds=1, baseline_rates="1e-3", library_seeds=0))
    assert report["ours"][0]["config"]["gradient_accumulation"] > 1
    for name in ("baseline", "ours"):
        assert [point["step"] for point in report[name][0]["curve"]] == [0, 2, 4]


@pytest.mark.parametrize("base_format", ["fp32", "int4"])
def test_the_same_recipe_gives_the_same_curve(
    jobs: list[dict[str, Any]],
    llama: Path,
    sums: Path,
    tmp_path: Path,
    base_format: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(training.SAME_RECIPE, "compute", "fp32")  # on every processor
    settings = Race(model=str(llama), data=str(sums), train_rows=16, eval_rows=6, eval_steps=1, base_format=base_format)
    report = run(settings, tmp_path / "race", Trainings(seeds=1, same_recipe=True))
    agreement = report["same_recipe"]
    assert agreement["base_format"] == base_format
    assert agreement["compute"] == "fp32"
    assert agreement["agrees"]
    assert agreement["max_difference"] < 1e-3
    first, *_, last = report["ours"][0]["curve"]
    assert last["nll"] < first["nll"] - 0.1  # they agree on something that was learned
    assert report["ratio"]["same_recipe_speed"] > 0
    assert report["ratio"]["time_to_baseline_best"] is None


def test_a_bundle_trains_by_the_same_recipe(
    jobs: list[dict[str, Any]], llama: Path, sums: Path, tmp_path: Path
) -> None:
    settings = Race(model=str(llama), data=str(sums), train_rows=16, eval_rows=6, eval_steps=1, threads=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(training.SAME_RECIPE, "compute", "fp32")  # on every processor
        report = run(settings, tmp_path / "race", Trainings(seeds=1, same_recipe=True, bundle=True))
    (trained,) = report["ours_onnx"]
    assert trained.keys() >= RUN
    assert trained["config"]["model"].endswith("bundle-int4")
    assert report["ours_fp32"] == []  # ours is in float32 already
    assert report["same_recipe"]["max_difference_onnx"] < 0.2  # another A to begin with
    assert report["ratio_others"]["ours_onnx"].keys() == {"speed", "cpu_speed", "peak_rss", "whole_time"}
    assert "ours over a bundle, without torch ÷ baseline: speed " in text_of(report)
    with pytest.raises(UsageError, match="--bundle compares trainings of --same-recipe"):
        Trainings(bundle=True)


def test_the_same_recipe_of_a_classifier_is_without_dropout(
    jobs: list[dict[str, Any]], bert: Path, reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(training.SAME_RECIPE, "compute", "fp32")
    settings = Race(model=str(bert), data=str(reviews), train_rows=24, eval_rows=8, eval_steps=2)
    report = run(settings, tmp_path / "race", Trainings(seeds=1, same_recipe=True))
    assert report["same_recipe"]["max_difference"] < 1e-3
    # Two linear layers of a head read one position a row, the others every token.
    layer = 4 * 64 * 64 + 2 * 64 * 96
    case = report["case"]
    head = (64 * 64 + 2 * 64) * case["targets_per_epoch"] / case["tokens_per_epoch"]
    assert case["flops_per_token"] == pytest.approx(4 * (2 * layer + head))


def test_curves_that_differ_are_refused(
    jobs: list[dict[str, Any]], llama: Path, sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "AGREEMENT", -1.0)
    files = {"json": str(tmp_path / "report.json"), "plot": tmp_path / "loss.png", "out": tmp_path / "race"}
    with pytest.raises(BudgetFailed, match="not the same recipe"):
        main(
            race=Race(model=str(llama), data=str(sums), train_rows=16, eval_rows=6, threads=1),
            trainings=Trainings(seeds=1, same_recipe=True),
            **files,
        )
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["same_recipe"]["agrees"] is False
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_task_that_the_baseline_does_not_learn_is_refused(bert: Path, tmp_path: Path) -> None:
    rows = tmp_path / "stars.jsonl"
    rows.write_text("".join(json.dumps({"text": f"the film was {n}", "label": n / 7}) + "\n" for n in range(40)))
    job = {"tune": {"model": str(bert)}, "data": str(rows), "validation": None, "test": None, "train_rows": 20}
    job |= {"eval_rows": 5, "validation_rows": None}
    with pytest.raises(UsageError, match="of one label, not regression"):
        race_worker.work(job | {"do": "prepare", "rows": str(tmp_path / "rows"), "same_recipe": False})


def test_gpt2s_dropout_and_its_layers_have_other_names(sums: Path, tmp_path: Path) -> None:
    model = write_decoder(tmp_path / "gpt2", "gpt2", attn_pdrop=0.1, embd_pdrop=0.1)
    rows = tmp_path / "rows"
    job = {"do": "prepare", "tune": Race(model=str(model), data=str(sums)).tune_settings(rows), "data": str(sums)}
    job |= {"rows": str(rows), "folder": str(tmp_path), "same_recipe": True, "weights": None, "validation": None}
    job |= {"test": None, "validation_rows": None}
    case = race_worker.work(job | {"train_rows": 8, "eval_rows": 4, "eval_steps": 1})
    config = json.loads((Path(case["model"]) / "config.json").read_text())
    assert (config["attn_pdrop"], config["embd_pdrop"], config["resid_pdrop"]) == (0.0, 0.0, 0.0)
    hidden, layers = config["n_embd"], config["n_layer"]
    assert case["flops_per_token"] > 4 * layers * (4 * hidden**2 + 2 * hidden * config["n_inner"])


@pytest.mark.parametrize(
    ("option", "named"),
    [
        ({"baseline_rates": "fast"}, "--baseline-rates fast"),
        ({"seeds": 0}, "--seeds"),
        ({"library_seeds": -1}, "--lib"),
    ],
)
def test_seeds_and_rates_are_positive_numbers(option: dict[str, Any], named: str) -> None:
    with pytest.raises(UsageError, match=named):
        Trainings(**option)


def test_results_that_are_named_as_before_are_refused_with_what_to_rename(tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "same-recipe-int4-rival-s0-lr0.001.json").write_text("{}")
    with pytest.raises(UsageError, match="rename rival-… to baseline-…"):
        KeptJobs(tmp_path, {}, 1)


def test_results_without_the_clock_of_the_whole_are_refused(tmp_path: Path) -> None:
    KeptJobs(tmp_path, {"model": "m"}, 1)
    with pytest.raises(UsageError, match="yardstick None, not whole command: give another --out"):
        KeptJobs(tmp_path, {"model": "m", "yardstick": training.YARDSTICK}, 1)


def test_minutes_end_both_trainings_before_their_epochs(
    jobs: list[dict[str, Any]], llama: Path, sums: Path, tmp_path: Path
) -> None:
    settings = Race(model=str(llama), data=str(sums), train_rows=16, eval_rows=4, epochs=1000.0, max_minutes=0.01)
    report = run(settings, tmp_path / "race", Trainings(seeds=1, baseline_rates="1e-3"))
    for name in ("baseline", "baseline_unswept", "ours"):
        assert report[name][0]["steps"] < 2000
        assert report[name][0]["seconds_steps"] < 10
        assert report[name][0]["stopped"] == "minutes"
    assert "--max-minutes 0.01" in text_of(report)
    with pytest.raises(UsageError, match="leave --max-minutes out"):
        run(settings, tmp_path / "same", Trainings(seeds=1, same_recipe=True))


def test_rows_of_which_none_can_be_held_out_are_refused(
    jobs: list[dict[str, Any]], llama: Path, tmp_path: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "hello", "completion": " seven"}\n' * 2)
    with pytest.raises(UsageError, match=r"rows\.jsonl"):
        run(Race(model=str(llama), data=str(rows)), tmp_path / "race", Trainings(seeds=1))


def test_the_standard_cases_make_one_table_and_go_on_where_they_were_stopped(
    jobs: list[dict[str, Any]], llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"passage": f"hello {n}", "question": "the answer", "answer": "seven"} for n in range(30)]
    case = races.Case(lambda: rows, "{passage} {question}", " {answer}", 16, 4, seeds=1)
    monkeypatch.setattr(races, "CASES", {"few": case, "more": replace(case, train=20)})
    races.main(chosen=races.Chosen(cases="few", rates="1e-3"), out=tmp_path, model=str(llama), threads=1, quiet=True)
    assert trained(jobs) == [("baseline", 0, 1e-3), ("ours", 0, None)]
    jobs.clear()
    races.main(
        chosen=races.Chosen(cases="few", seeds=2, rates="1e-3,1e-5"),
        out=tmp_path,
        model=str(llama),
        threads=1,
        quiet=True,
    )
    assert {("baseline", 0, 1e-5), ("ours", 1, None)} < set(trained(jobs))
    jobs.clear()
    races.main(chosen=races.Chosen(cases="more", rates="1e-3"), out=tmp_path, model=str(llama), threads=1, quiet=True)
    assert {job["tune"]["data"] for job in jobs if job["do"] == "baseline"} == {f"{tmp_path}/more/rows/train.jsonl"}
    text = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert [line.split(" | ")[0] for line in text.splitlines() if line.startswith(("| few", "| more"))] == [
        *("| few", "| few", "| more", "| more"),
        *("| few", "| more"),
    ]
    report = json.loads((tmp_path / "few" / "report.json").read_text(encoding="utf-8"))
    assert report["case"]["rows"] == {"train": 16, "validation": 4, "test": 4}
    assert (tmp_path / "few" / "report.png").is_file()
    with pytest.raises(UsageError, match=r"--cases fewer: there is no such case \(did you mean 'few'\?\)"):
        races.main(chosen=races.Chosen(cases="fewer"), out=tmp_path, model=str(llama))
    with pytest.raises(UsageError, match="--seeds and --baseline-rates must be above 0"):
        races.main(chosen=races.Chosen(cases="few", seeds=0), out=tmp_path, model=str(llama), quiet=True)


def test_the_machine_is_measured_in_a_process_of_its_own() -> None:
    job = {"do": "sgemm", "threads": 1, "shape": [64, 64, 64]}
    measured = run_worker(job, "sgemm", 1, module="edge_ft.bench.studies.race_worker")
    assert measured["sgemm_gflops"] > 0
    assert ("avx512_bf16" in cpu_flags() or "amx_bf16" in cpu_flags()) <= (measured["bf16_gflops"] is not None)


def test_the_command_is_timed_from_outside_and_its_best_weights_are_kept(
    llama: Path, sums: Path, tmp_path: Path
) -> None:
    settings = {"model": str(llama), "data": str(sums), "split": [0.8, 0.1, 0.1], "compute": "fp32", "seed": 1}
    out = tmp_path / "run"
    began = time.monotonic()
    ran = tune_command(settings | {"epochs": 12.0, "eval_steps": 30, "chat_template": None}, out, 1)
    assert 0 < ran.seconds < time.monotonic() - began
    assert ran.cpu_seconds > 0
    assert ran.seconds_to_first_line is not None
    stamps = [line["whole_seconds"] for line in ran.lines]
    assert stamps == sorted(stamps)
    assert ran.seconds_to_first_line <= stamps[0] <= stamps[-1] <= ran.seconds
    logged = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [{name: line[name] for name in line if name != "whole_seconds"} for line in ran.lines] == logged
    final = (out / "adapter" / "adapter_model.safetensors").read_bytes()
    best = RunFolder.open(out).report()["best_step"]
    assert ran.kept.keys() <= {30, 60, 90}
    assert all((Path(file).read_bytes() == final) == (step >= best) for step, file in ran.kept.items())


def test_a_command_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(EdgeFTError, match=r"exit code 2: edge-ft.*speed"):
        tune_command({"model": "model", "data": "rows.jsonl", "speed": 9}, tmp_path / "run", 1)
