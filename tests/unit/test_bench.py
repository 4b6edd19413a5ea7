"""Names, records, table and budgets of a bench; memory limits and the description of the machine."""

import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from record_schema import misfits
from recorded_benches import classifiers, decoders
from small_tokenizers import write_bpe
from tiny_bundle import write_classifier

from edge_ft.bench import bench
from edge_ft.bench.device_profiles import read_profile
from edge_ft.bench.limits import add_shares, measure_limits
from edge_ft.bench.meters import DecodeTimings, MemoryLimit, group_parents
from edge_ft.bench.report import (
    DECODER_UNITS,
    budget_failures,
    classifier_lengths,
    markdown_table,
    records_of,
    table,
    units_of,
)
from edge_ft.bench.subjects import Subject, short_names
from edge_ft.bench.worker import _starter, at_depths, classifier_ids, measure_decoder, prompt_ids
from edge_ft.config import BenchConfig
from edge_ft.data import TextTokenizer
from edge_ft.errors import UsageError

ENVIRONMENT = {"prompt_tokens": 128, "memory_limit_bytes": None}


def decoder_records(
    subject: str = "edge-ft", variant: str = "b", scale: float = 1.0, note: str | None = None
) -> list[dict[str, Any]]:
    results = [dict.fromkeys(DECODER_UNITS, scale * repeat) for repeat in (1.0, 5.0, 2.0)]
    measured = Subject(subject, variant, "text-generation", 512, 10**7, {}, variant)
    return records_of(measured, [] if note else results, ENVIRONMENT, note)


def classifier_records(note: str) -> list[dict[str, Any]]:
    return records_of(Subject("edge-ft", "c", "text-classification", 512, 1, {}, "c"), [], ENVIRONMENT, note)


def value(records: list[dict[str, Any]], metric: str) -> float | None:
    (found,) = (record["value"] for record in records if record["metric"] == metric)
    return None if found is None else float(found)


def test_a_record_holds_the_median_of_its_samples_and_the_conditions() -> None:
    records = decoder_records()
    assert [record["metric"] for record in records] == list(DECODER_UNITS)
    for record in records:
        keys = {"subject", "variant", "metric", "unit", "value", "samples", "environment"}
        assert record.keys() == keys
        assert len(record["samples"]) == 3
        assert record["environment"] == ENVIRONMENT
    assert value(records, "ttft_s") == 2.0
    assert value(records, "size_bytes") == 10**7


def test_what_did_not_fit_has_a_size_a_note_and_no_values() -> None:
    records = decoder_records(note="does not fit into 100 MB")
    assert value(records, "size_bytes") == 10**7
    for record in records:
        if record["metric"] != "size_bytes":
            assert (record["value"], record["samples"], record["note"]) == (None, [], "does not fit into 100 MB")


def test_a_classifiers_metrics_carry_the_length() -> None:
    assert classifier_lengths(128) == [32, 128]
    assert classifier_lengths(16) == [16]
    assert list(units_of("text-classification", 20)) == [
        "load_s",
        "cold_start_s",
        "latency_s_20",
        "latency_s_p99_20",
        "rows_per_s_20",
        "peak_rss_bytes",
        "size_bytes",
    ]


def test_the_table_puts_subjects_side_by_side_with_their_spread() -> None:
    peer = decoder_records("torch", "m", note="does not fit")
    for record in peer:
        record["environment"] = ENVIRONMENT | {"memory_limit_bytes": 10**8}
    header, *rows = table([*decoder_records(), *peer])
    assert header == ("median [min–max]", "edge-ft b", "torch m")
    assert ("ttft_s", "2.00 [1.00–5.00]", "did not fit") in rows
    assert ("size (MB)", "10.0", "10.0") in rows


def test_a_metric_that_a_subject_lacks_is_a_dash() -> None:
    classifier = classifier_records("does not fit")
    rows = {row[0]: row[1:] for row in table([*decoder_records(), *classifier])}
    assert rows["decode_tps (tok/s)"][1] == rows["latency_s_128"][0] == "-"


def test_a_table_in_markdown() -> None:
    assert markdown_table(("a", "b"), [("1", "2")]) == "| a | b |\n| --- | --- |\n| 1 | 2 |\n"


def test_budgets_hold_or_name_what_did_not() -> None:
    records = decoder_records()
    kept = BenchConfig(max_ttft_ms=2000, min_decode_tps=2, max_rss_mb=1, max_size_mb=10)
    assert budget_failures(records, kept) == []
    broken = BenchConfig(max_ttft_ms=1999, min_decode_tps=2.1, max_rss_mb=1e-6, max_size_mb=9.9)
    assert budget_failures(records, broken) == [
        "--max-ttft-ms 1999: edge-ft b has a latency of 2000 ms",
        "--min-decode-tps 2.1: edge-ft b has a speed of 2.00 tok/s",
        "--max-rss-mb 1e-06: edge-ft b has a peak memory of 0.00000200 MB",
        "--max-size-mb 9.9: edge-ft b has a size of 10.0 MB",
    ]


def test_budgets_are_for_bundles_and_not_for_peers() -> None:
    slow_peer = decoder_records("torch", "m", scale=100)
    budget = BenchConfig(max_ttft_ms=2000)
    assert budget_failures([*decoder_records(), *slow_peer], budget) == []
    assert len(budget_failures(slow_peer, budget)) == 1


def test_a_budget_that_nothing_was_measured_for_fails() -> None:
    budget = BenchConfig(max_rss_mb=1000)
    assert budget_failures(decoder_records(note="does not fit into 100 MB"), budget) == [
        "--max-rss-mb 1000: edge-ft b does not fit into 100 MB"
    ]
    classifier = classifier_records("does not fit")
    (failure,) = budget_failures(classifier, BenchConfig(min_decode_tps=1))
    assert "none of the subjects has decode_tps" in failure
    assert len(budget_failures(classifier, BenchConfig(max_ttft_ms=1))) == 1  # the latency at 128 tokens


def test_names_are_as_short_as_they_can_be() -> None:
    assert short_names(["a/bundle", "b/bundle", "b/other"]) == ["a/bundle", "b/bundle", "b/other"]
    assert short_names(["out/int4", "org/model"]) == ["int4", "model"]
    assert short_names(["x/b", "x/b"]) == ["b", "b#2"]


@given(st.lists(st.sampled_from(["a/x", "b/x", "c/b/x", "y", "a/y", "x"]), min_size=1))
def test_names_are_unique(sources: list[str]) -> None:
    assert len(set(short_names(sources))) == len(sources)


@pytest.mark.parametrize("length", [1, 7, 128, 1000])
@pytest.mark.parametrize("bos", [None, "<|im_start|>"])
def test_every_subject_reads_the_same_prompt_of_exactly_the_requested_length(
    tmp_path: Path, length: int, bos: str | None
) -> None:
    tokenizer = TextTokenizer.load(write_bpe(tmp_path, bos=bos))
    ids = prompt_ids(tokenizer, length)
    assert len(ids) == length
    assert ids == prompt_ids(tokenizer, length + 1)[:length]
    assert (ids[0] == tokenizer.bos_id) == (bos is not None)


def test_a_classifiers_text_keeps_the_tokens_around_it(tmp_path: Path) -> None:
    tokenizer = TextTokenizer.load(write_classifier(tmp_path / "classifier"))
    ids = classifier_ids(tokenizer, 2000)
    assert len(ids) == 2000
    assert (ids[0], ids[-1]) == tuple(tokenizer.encode_framed("", 2).ids)
    with pytest.raises(UsageError, match="--prompt-tokens 1 is too few"):
        classifier_ids(tokenizer, 1)


def test_no_subject_is_refused() -> None:
    with pytest.raises(UsageError, match="at least one"):
        bench([], BenchConfig())


@pytest.mark.parametrize(
    ("own", "metered", "expected"),
    [
        ("0::/user/app/shell\n", ["user/app"], ["user/app"]),  # a delegated session: beside our own group
        ("0::/\n", ["."], ["."]),  # the root, which may hold processes and groups
        ("0::/user/session\n", [], []),  # memory is not metered below: nothing to be made
        ("4:memory:/x\n0::/\n", [], []),  # cgroup v1 holds the memory controller
        ("4:memory:/x\n", ["."], []),
    ],
)
def test_where_a_cgroup_may_be_made(tmp_path: Path, own: str, metered: list[str], expected: list[str]) -> None:
    (tmp_path / "user/app/shell").mkdir(parents=True)
    for folder in (".", "user", "user/app", "user/app/shell"):
        (tmp_path / folder / "cgroup.subtree_control").write_text("cpu memory\n" if folder in metered else "cpu\n")
    (tmp_path / "own").write_text(own)
    assert group_parents(tmp_path / "own", tmp_path) == [tmp_path / folder for folder in expected]


def test_a_cgroup_has_the_limit_and_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "rmdir", lambda folder: shutil.rmtree(folder))  # the kernel's files go with the group
    limit = MemoryLimit(5 * 10**6, tmp_path)
    with limit.group() as group:
        assert group is not None
        assert (group / "memory.max").read_text() == "5000000"
    assert not group.exists()
    assert (limit.kind, MemoryLimit(1, None).kind) == ("cgroup v2", "polled RSS")


def test_speeds_carry_the_names_of_llama_bench() -> None:
    where = ENVIRONMENT | {"new_tokens": 64, "depths": (0, 2048)}
    units = units_of("text-generation", 128, (0, 2048))
    subject = Subject("edge-ft", "b", "text-generation", 4096, 1, {}, "b")
    records = records_of(subject, [dict.fromkeys(units, 1.0)], where, None)
    assert {record["metric"]: record["known_as"] for record in records if "known_as" in record} == {
        "prefill_tps": "pp128",
        "decode_tps": "tg64 @ d128",
        "decode_tps_d0": "tg64",
        "prefill_tps_d2048": "pp128 @ d2048",
        "decode_tps_d2048": "tg64 @ d2048",
    }
    assert ("prefill_tps_d2048 = pp128 @ d2048 (tok/s)", "1.00") in table(records)
    assert [row[0] for row in table(records)][-3:-1] == [
        "prefill_tps_d2048 = pp128 @ d2048 (tok/s)",
        "decode_tps_d2048 = tg64 @ d2048 (tok/s)",
    ]
    assert table(records)[-1][0] == "peak_rss_d2048 (MB)"  # and so the page, which shows this table, has it too


def test_throughput_in_batches_is_shown_of_engines_that_have_it() -> None:
    subject = Subject("edge-ft", "b", "text-generation", 4096, 1, {}, "b")
    results: dict[str, Any] = dict.fromkeys(DECODER_UNITS, 1.0)
    batches = {"batch_tps_1": 1.0, "batch_tps_4": 3.0, "batch_tps_8": None}
    assert not any("batch" in record["metric"] for record in records_of(subject, [results], ENVIRONMENT, None))
    records = {record["metric"]: record for record in records_of(subject, [results | batches], ENVIRONMENT, None)}
    assert records["batch_tps_4"]["value"] == 3 and "known_as" not in records["batch_tps_4"]
    assert records["batch_tps_8"]["note"] == "memory is too short for this batch"


def test_a_context_that_the_model_cannot_read_is_a_note() -> None:
    deep = ("decode_tps_d9", "prefill_tps_d9", "peak_rss_d9_bytes")
    results: dict[str, Any] = dict.fromkeys(units_of("text-generation", 128), 1.0) | dict.fromkeys(deep)
    subject = Subject("edge-ft", "b", "text-generation", 4096, 1, {}, "b")
    records = records_of(subject, [results], ENVIRONMENT | {"depths": (9,)}, None)
    notes = {record["metric"]: record["note"] for record in records if "note" in record}
    assert notes == dict.fromkeys(deep, "the context is too long for this model")


@pytest.mark.parametrize("depth", ["-1", "x", "1.5"])
def test_a_depth_is_a_number_of_tokens(depth: str) -> None:
    assert BenchConfig(depths=("0,2048",)).depths == ("0", "2048")
    with pytest.raises(UsageError, match=f"--depths {depth}: give numbers of tokens"):
        BenchConfig(depths=(depth,))


class Sleeper:
    """A subject that needs a known time: to read a prompt, and for each further token."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self.tokenizer = tokenizer
        self.slept = 0.0

    def time_decode(self, ids: list[int], new_tokens: int) -> DecodeTimings:
        marks = [time.perf_counter()]
        for seconds in [0.001 * len(ids), *[0.01] * (new_tokens - 1)]:
            time.sleep(seconds)
            marks.append(time.perf_counter())
        self.slept = marks[-1] - marks[0]
        return DecodeTimings.between(marks)


def test_a_known_sleep_is_what_the_meter_shows(tmp_path: Path) -> None:
    job = {"task": "text-generation", "prompt_tokens": 40, "new_tokens": 6, "started": time.monotonic()}
    job |= {"depths": [0, 30], "max_length": 512}
    sleeper = Sleeper(TextTokenizer.load(write_bpe(tmp_path)))
    found = measure_decoder(sleeper, job)  # type: ignore[arg-type]
    # No sleep is shorter than asked for; on a busy machine it may be longer.
    assert found["ttft_s"] >= 0.04
    assert found["itl_s_p50"] >= 0.01
    assert found["decode_tps"] <= 100
    assert found["prefill_tps"] <= 1000
    assert len(found["times"]["itl_s_p50"]) == 5
    timed = found["ttft_s"] + sum(found["times"]["itl_s_p50"])
    assert timed == pytest.approx(sleeper.slept, rel=1e-3)  # the sleeper's own clock, of the same run
    assert found["cold_start_s"] >= found["ttft_s"]
    deep = at_depths(sleeper, job)
    assert deep.keys() == {
        *("decode_tps_d0", "decode_tps_d30", "prefill_tps_d30"),
        *("peak_rss_d0_bytes", "peak_rss_d30_bytes"),
    }
    assert 0 < (deep["decode_tps_d30"] or 0) <= 100
    cut = at_depths(sleeper, job | {"max_length": 75})
    assert {name for name, value in cut.items() if value is None} == {name for name in deep if "d30" in name}


def test_a_speed_is_given_as_a_share_of_the_machines_limit() -> None:
    records = decoder_records()
    limits = {"read_bytes_per_s": 1e10, "sgemm_flop_per_s": 1e11}
    add_shares(records, (1e8, 2e8), limits)
    shares = {record["metric"]: record["share"] for record in records if "share" in record}
    assert shares == {
        "prefill_tps": {"of": "sgemm_flop_per_s", "value": 2.0 * 2e8 / 1e11},
        "decode_tps": {"of": "read_bytes_per_s", "value": 2.0 * 1e8 / 1e10},
    }
    assert ("decode_tps (tok/s)", "2.00 [1.00–5.00] (2%)") in table(records)
    unknown = decoder_records()
    add_shares(unknown, None, limits)
    assert unknown == decoder_records()


def test_the_machines_limits_are_above_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edge_ft.bench.limits._READ_BYTES", 2**20)
    monkeypatch.setattr("edge_ft.bench.limits._SIDE", 64)
    limits = measure_limits({"threads": 2})
    assert limits.keys() == {"read_bytes_per_s", "sgemm_flop_per_s"}
    assert min(limits.values()) > 1e6


def test_records_follow_the_published_schema() -> None:
    assert misfits([*decoders(), *classifiers()]) == []
    for change in ({"value": "1"}, {"odd": 1}, {"unit": "furlong"}, {"environment": {}}, {"samples": [None]}):
        assert misfits([decoders()[0] | change])
    assert misfits([{"subject": "edge-ft"}])


@pytest.mark.parametrize("name", ["container-512m", "phone-small", "pi-class"])
def test_profiles_that_come_with_edge_ft_are_read(name: str) -> None:
    profile = read_profile(name)
    assert profile.memory_mb <= 1000
    assert profile.threads == profile.cpus <= 4


@pytest.mark.parametrize(
    ("written", "says"),
    [
        ("threads: 1\ncpus: 1\n", "lacks 'memory_mb'"),
        ("threads: 0\ncpus: 1\nmemory_mb: 1\n", "the profile.threads is 0, below 1"),
        ("threads: 1\ncpus: 1\nmemory_mb: 1\ncpu_quota: 0.0\n", "cpu_quota is 0.0: give a number of CPUs above 0"),
        ("threads: 1\ncpus: 1\nmemory_mb: 1\nspeed: 2\n", "'speed', which this edge-ft does not know"),
        ("- 1", r"the profile is \[1\], not an object"),
        ("a: [", "cannot be read as YAML"),
    ],
)
def test_a_file_that_is_no_profile_is_refused(tmp_path: Path, written: str, says: str) -> None:
    (tmp_path / "p.yaml").write_text(written)
    with pytest.raises(UsageError, match=says):
        read_profile(str(tmp_path / "p.yaml"))


def test_an_unknown_profile_is_refused() -> None:
    with pytest.raises(UsageError, match="--profile phone: choose from container-512m, phone-small, pi-class"):
        read_profile("phone")


def test_a_quota_is_written_where_the_cgroup_has_the_controller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "rmdir", lambda folder: shutil.rmtree(folder))
    limit = MemoryLimit(10**6, tmp_path, cpu_quota=1.5)
    assert not limit.holds_quota
    (tmp_path / "cgroup.subtree_control").write_text("cpu memory")
    assert limit.holds_quota
    with limit.group() as group:
        assert group is not None
        assert (group / "cpu.max").read_text() == "150000 100000"


@pytest.mark.parametrize(("engine", "found"), [("llama.cpp", None), ("bundle", "PASSIVE")])
def test_threads_of_a_peer_wait_as_its_users_have_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, engine: str, found: str | None
) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")  # as edge-ft sets them
    monkeypatch.setenv("GOMP_SPINCOUNT", "2000")
    paths = {"bundle": str(tmp_path), "file": "model.gguf"}
    _starter({"do": engine, "threads": 1, "prompt_tokens": 8, "new_tokens": 2, **paths})
    assert os.environ.get("OMP_WAIT_POLICY") == found
    assert ("GOMP_SPINCOUNT" in os.environ) == (found is not None)
