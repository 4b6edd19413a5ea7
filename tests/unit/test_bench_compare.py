"""Two reports of a bench compared: what is beyond the noise, and which direction is better."""

import json
from pathlib import Path
from typing import Any

import pytest
from in_process import run_cli

from edge_ft.bench.compare import compare, read_records
from edge_ft.errors import UsageError

UNITS = {"ttft_s": "s", "decode_tps": "tok/s", "size_bytes": "bytes", "nll": "nats/token", "exact_match": ""}
ENVIRONMENT = {"cpu": "a", "cores": 2, "threads": 2, "prompt_tokens": 8, "new_tokens": 4, "memory_limit_bytes": None}


def record(metric: str, samples: list[float], **more: Any) -> dict[str, Any]:
    value = sorted(samples)[len(samples) // 2] if samples else None
    known = {"subject": "edge-ft", "variant": "b", "metric": metric, "unit": UNITS[metric]}
    return known | {"value": value, "samples": samples, "environment": ENVIRONMENT} | more


def verdict(old: dict[str, Any], new: dict[str, Any]) -> str:
    (change,) = compare([old], [new])
    return change.verdict


@pytest.mark.parametrize(
    ("metric", "less", "more"),
    [
        ("ttft_s", "better", "worse"),
        ("decode_tps", "worse", "better"),
        ("size_bytes", "better", "worse"),
        ("nll", "better", "worse"),
        ("exact_match", "worse", "better"),
    ],
)
def test_the_direction_that_is_better(metric: str, less: str, more: str) -> None:
    low, high = record(metric, [1.0, 1.1, 1.2]), record(metric, [1.3, 1.4, 1.5])
    assert (verdict(high, low), verdict(low, high)) == (less, more)


def test_samples_that_overlap_are_the_same() -> None:
    assert verdict(record("ttft_s", [1.0, 1.1, 1.3]), record("ttft_s", [1.25, 1.4, 1.5])) == "same"


def test_a_small_difference_is_the_same_however_little_the_samples_vary() -> None:
    assert verdict(record("size_bytes", [1000.0]), record("size_bytes", [1010.0])) == "same"


def test_a_score_has_changed_where_the_intervals_do_not_overlap() -> None:
    old = record("exact_match", [0.5], interval=[0.4, 0.6])
    assert verdict(old, record("exact_match", [0.55], interval=[0.45, 0.65])) == "same"
    assert verdict(old, record("exact_match", [0.7], interval=[0.61, 0.79])) == "better"


def test_what_no_longer_fits_is_worse_and_what_fits_now_is_better() -> None:
    fits, does_not = record("ttft_s", [1.0]), record("ttft_s", [], note="does not fit")
    assert (verdict(fits, does_not), verdict(does_not, fits), verdict(does_not, does_not)) == (
        "worse",
        "better",
        "same",
    )


def test_metrics_of_one_report_only_are_listed() -> None:
    shared = record("ttft_s", [1.0])
    changes = compare([shared, record("nll", [1.0])], [shared, record("decode_tps", [1.0])])
    assert {change.metric: change.verdict for change in changes} == {
        "ttft_s": "same",
        "decode_tps": "new",
        "nll": "gone",
    }


@pytest.mark.parametrize("name", ["cpu", "threads", "prompt_tokens"])
def test_other_conditions_are_refused(name: str) -> None:
    other = record("ttft_s", [1.0], environment=ENVIRONMENT | {name: "other"})
    with pytest.raises(UsageError, match=f"{name} .* now: measure both under the same conditions"):
        compare([record("ttft_s", [1.0])], [other])


def test_reports_without_a_common_subject_are_refused() -> None:
    with pytest.raises(UsageError, match="no subject in common: edge-ft b in the old one, edge-ft c in the new one"):
        compare([record("ttft_s", [1.0])], [record("ttft_s", [1.0], variant="c")])


@pytest.mark.parametrize("content", ["{}", "[1]", '[{"subject": "edge-ft"}]', "no"])
def test_a_file_that_is_no_report_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "r.json").write_text(content)
    with pytest.raises(UsageError, match=r"r\.json .*edge-ft bench --json wrote"):
        read_records(tmp_path / "r.json")


def test_the_command_lists_what_changed_and_fails_where_something_is_worse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, seconds in (("old", 1.0), ("new", 2.0)):
        (tmp_path / name).write_text(json.dumps([record("ttft_s", [seconds]), record("nll", [1.0])]))
    old, new = str(tmp_path / "old"), str(tmp_path / "new")
    code, out = run_cli(monkeypatch, "bench", "compare", old, new)
    assert code == 1
    assert "worse: edge-ft b ttft_s" in capsys.readouterr().err
    assert out.decode().split("\n")[1].split() == ["edge-ft", "b", "ttft_s", "1.00", "2.00", "2.00", "worse"]
    assert "1 figures are the same" in out.decode()
    assert run_cli(monkeypatch, "bench", "compare", new, old)[0] == 0


def test_the_table_of_a_bench_is_written_in_markdown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edge_ft.bench.bench", lambda subjects, config, progress: [record("ttft_s", [1.0, 2.0, 3.0])])
    assert run_cli(monkeypatch, "bench", "b", "--markdown", str(tmp_path / "table.md"))[0] == 0
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert lines == ["| median [min–max] | edge-ft b |", "| --- | --- |", "| ttft_s | 2.00 [1.00–3.00] |"]
