"""Benches in fresh processes over tiny bundles, runs and models."""

import html
import json
import os
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytest
import torch
from record_schema import misfits
from tiny_bundle import write_classifier, write_decoder
from tiny_models import write_decoder as write_family
from transformers import LlamaForCausalLM

from edge_ft.artifacts import Bundle, RunFolder
from edge_ft.bench import bench
from edge_ft.bench.answers import answer, answer_records, answer_settings
from edge_ft.bench.divergence import reference_of
from edge_ft.bench.limits import weight_reads
from edge_ft.bench.meters import machine
from edge_ft.bench.page import page_of
from edge_ft.bench.report import BATCH_UNITS, DECODER_UNITS, table, units_of
from edge_ft.bench.subjects import Subject, Workload, bundle_subject, torch_subject
from edge_ft.bench.subprocess_job import run_worker
from edge_ft.bench.torch_peer import TorchDecoder, find, find_bundle_base
from edge_ft.config import BenchConfig, EvalConfig, ExportConfig
from edge_ft.data import TextTokenizer
from edge_ft.errors import BundleError, EdgeFTError, ModelError, UsageError
from edge_ft.evaluate import evaluate
from edge_ft.export import export
from edge_ft.runtime import load as open_bundle

SHORT = BenchConfig(repeats=2, threads=1, prompt_tokens=12, new_tokens=4)


def by_metric(records: list[dict[str, Any]], subject: str, variant: str) -> dict[str, Any]:
    return {
        record["metric"]: record for record in records if (record["subject"], record["variant"]) == (subject, variant)
    }


def check_engine(found: dict[str, Any]) -> dict[str, Any]:
    """The records without that of the engine's loss, which a bundle with verified graphs has; both say the same."""
    engine = next(iter(found.values()))["environment"]["engine"]
    timed = {metric: record for metric, record in found.items() if metric != "nll_above_exact"}
    if engine is not None:
        assert set(engine) == {"prefill", "decode", "nll_above_exact"}
        assert (engine["nll_above_exact"] is None) == (timed == found)
    return timed


def check_decoder(found: dict[str, Any], repeats: int, *, batches: bool = True) -> None:
    """Batches are measured of our own bundles alone, and not within a memory limit, which they would reach first."""
    found = check_engine(found)
    ours = next(iter(found.values()))["subject"] == "edge-ft"
    assert list(found) == [*DECODER_UNITS, *(BATCH_UNITS if ours and batches else ())]
    for record in found.values():
        assert len(record["samples"]) == repeats
        assert record["value"] == median(record["samples"]) > 0
    assert found["itl_s_p50"]["value"] <= found["itl_s_p90"]["value"] <= found["itl_s_p99"]["value"]
    for cold, load in zip(found["cold_start_s"]["samples"], found["load_s"]["samples"], strict=True):
        assert cold > load


def test_the_machine_is_described() -> None:
    here = machine()
    assert here["cpu"] and here["os"] and here["python"]
    assert int(here["cores"] or 0) >= 1


def test_bundles_of_both_tasks(tmp_path: Path) -> None:
    decoder, classifier = write_decoder(tmp_path / "decoder"), write_classifier(tmp_path / "classifier")
    records = bench([str(decoder), str(classifier)], SHORT)
    check_decoder(by_metric(records, "edge-ft", "decoder"), 2)
    found = by_metric(records, "edge-ft", "classifier")
    assert list(found) == list(units_of("text-classification", 12))
    assert found["size_bytes"]["value"] == Bundle.open(classifier).size_bytes
    environment = found["latency_s_12"]["environment"]
    assert environment["threads"] == 1
    assert environment["accuracy_level"] == 1
    way = {"accuracy_level": 1, "threads": 1}
    assert environment["engine"] == {"prefill": way, "decode": way, "nll_above_exact": None}
    assert environment["onnxruntime"]
    assert "torch" not in environment
    assert misfits(json.loads(json.dumps(records, allow_nan=False))) == []
    assert environment["read_bytes_per_s"] > 1e8
    assert environment["sgemm_flop_per_s"] > 1e8


def test_a_decoder_is_measured_after_a_context_too(tmp_path: Path) -> None:
    bundle = write_decoder(tmp_path / "b")
    settings = replace(SHORT, repeats=1, depths=("0", "64", "100000"))
    found = by_metric(bench([str(bundle)], settings), "edge-ft", "b")
    assert found["decode_tps_d0"]["value"] > 0 < found["decode_tps_d64"]["value"]
    assert found["peak_rss_d64_bytes"]["value"] >= found["peak_rss_d0_bytes"]["value"] > 0
    assert found["decode_tps_d100000"]["value"] is None
    assert found["decode_tps_d100000"]["note"] == "the context is too long for this model"


def test_a_profile_limits_the_process_and_the_record_says_what_was_not_enforced(tmp_path: Path) -> None:
    (tmp_path / "device.yaml").write_text("threads: 1\ncpus: 1\nmemory_mb: 900\ncpu_quota: 0.9\n")
    bundle = str(write_decoder(tmp_path / "b"))
    settings = replace(SHORT, repeats=1, threads=None, profile=str(tmp_path / "device.yaml"))
    where = by_metric(bench([bundle], settings), "edge-ft", "b")["decode_tps"]["environment"]
    assert (where["threads"], where["memory_limit_bytes"], where["cpu_quota"]) == (1, 900 * 10**6, 0.9)
    assert len(where["affinity"]) == 1
    assert set(where["not_enforced"]) <= {"cpu_quota"}
    if where["memory_limiter"] == "polled RSS":
        assert where["not_enforced"] == ["cpu_quota"]
    # What the user names wins, and what does not fit is a result.
    tight = replace(settings, memory_limit=20)
    assert by_metric(bench([bundle], tight), "edge-ft", "b")["decode_tps"]["value"] is None


def test_a_worker_runs_on_the_cores_that_it_is_given() -> None:
    core = min(os.sched_getaffinity(0))
    work = "import os; from edge_ft.bench.worker import answer_job; " + (
        "answer_job(lambda job: {'cores': sorted(os.sched_getaffinity(0))})"
    )
    done = subprocess.run(
        [sys.executable, "-c", work], input=json.dumps({"affinity": [core]}), capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == {"result": {"cores": [core]}}


def test_peak_memory_is_that_of_the_measuring_process(tmp_path: Path) -> None:
    ballast = bytearray(b"x") * 400_000_000  # resident here, where the child is forked
    result = run_worker(_bundle_job(write_decoder(tmp_path / "decoder")), "a bundle", 1)
    assert len(ballast) > 3 * result["peak_rss_bytes"]


def test_a_bundle_needs_no_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "path").mkdir()
    for name in ("torch", "transformers", "peft", "onnx"):
        (tmp_path / "path" / f"{name}.py").write_text("raise RuntimeError('imported')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "path"))
    assert run_worker(_bundle_job(write_decoder(tmp_path / "decoder")), "a bundle", 1)["decode_tps"] > 0


def test_a_file_of_the_users_named_like_a_library_is_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "numpy.py").write_text("raise RuntimeError('imported')")
    monkeypatch.chdir(tmp_path)
    assert run_worker(_bundle_job(write_decoder(tmp_path / "decoder")), "a bundle", 1)["decode_tps"] > 0


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="a limit needs /proc")
def test_not_fitting_is_a_result_and_is_reported_once(tmp_path: Path) -> None:
    news: list[str] = []

    class Listener:
        def say(self, text: str) -> None:
            news.append(text)

        def advance(self, stage: str, done: int, total: int, detail: str = "") -> None:
            pass

    settings = BenchConfig(repeats=2, threads=1, prompt_tokens=12, new_tokens=4, memory_limit=20)
    found = by_metric(bench([str(write_decoder(tmp_path / "b"))], settings, Listener()), "edge-ft", "b")
    assert found["decode_tps"]["value"] is None
    assert "does not fit into 20 MB" in found["decode_tps"]["note"]
    assert found["size_bytes"]["value"] > 0
    assert found["size_bytes"]["environment"]["memory_limiter"] in ("cgroup v2", "polled RSS")
    assert len(news) == 1
    roomy = BenchConfig(repeats=1, threads=1, prompt_tokens=12, new_tokens=4, memory_limit=2000)
    check_decoder(by_metric(bench([str(tmp_path / "b")], roomy), "edge-ft", "b"), 1, batches=False)


def test_a_process_that_dies_is_one_clear_error() -> None:
    with pytest.raises(EdgeFTError, match="the look at it ended with exit code 1: KeyError: 'bundle'"):
        run_worker({"do": "bundle"}, "the look at it", 1)


def test_subjects_that_cannot_be_measured_are_refused(tmp_path: Path) -> None:
    bundle = write_decoder(tmp_path / "bundle", max_length=15)
    with pytest.raises(UsageError, match="can read 15 tokens and would be given 16"):
        bench([str(bundle)], SHORT)
    with pytest.raises(BundleError, match="accuracy level 4"):
        bench([str(bundle)], BenchConfig(accuracy_level=4))
    with pytest.raises(ModelError, match="did you mean 'bundle'"):
        bench([str(tmp_path / "bundel")], SHORT)
    (bundle / "tokenizer.json").write_text("{}")
    with pytest.raises(BundleError, match="sha256"):
        bench([str(bundle)], SHORT)


def test_a_broken_budget_is_exit_code_1_with_the_records_written(tmp_path: Path) -> None:
    bundle = write_decoder(tmp_path / "bundle")
    command = [sys.executable, "-m", "edge_ft", "bench", str(bundle), "--json", "-", "--quiet", "--max-rss-mb", "1"]
    small = ["--repeats", "1", "--threads", "1", "--prompt-tokens", "12", "--new-tokens", "4"]
    done = subprocess.run([*command, *small], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "--max-rss-mb 1: edge-ft bundle has a peak memory of" in done.stderr
    check_decoder(by_metric(json.loads(done.stdout), "edge-ft", "bundle"), 1)


def test_a_bundle_beside_its_run_and_its_base(llama_bundle: Bundle, llama_run: RunFolder, llama: Path) -> None:
    settings = BenchConfig(repeats=1, threads=1, prompt_tokens=12, new_tokens=4, peers=("torch",))
    another_name = f"{llama.parent}/../{llama.parent.name}/{llama.name}"
    records = bench([str(llama_bundle.path), str(llama_run.path), another_name], settings)
    subjects = dict.fromkeys((record["subject"], record["variant"]) for record in records)
    # The peer is the base, which was named already: it is measured once.
    assert list(subjects) == [("edge-ft", "llama-bundle"), ("torch", "llama-run"), ("torch", "llama")]
    for subject, variant in subjects:
        check_decoder(by_metric(records, subject, variant), 1)
        assert 0 < by_metric(records, subject, variant)["decode_tps"]["share"]["value"] < 1
    run, model = (by_metric(records, "torch", name) for name in ("llama-run", "llama"))
    assert run["size_bytes"]["value"] > model["size_bytes"]["value"]
    assert model["load_s"]["environment"]["torch"] == torch.__version__


def test_a_classifier_beside_its_base(bert_bundle: Bundle) -> None:
    settings = BenchConfig(repeats=1, threads=1, prompt_tokens=12, peers=("torch",))
    records = bench([str(bert_bundle.path)], settings)
    for subject, variant in (("edge-ft", bert_bundle.path.name), ("torch", "bert")):
        found = check_engine(by_metric(records, subject, variant))
        assert list(found) == list(units_of("text-classification", 12))
        assert all(record["value"] > 0 for record in found.values())


def test_openvino_measures_the_graph_of_each_encoder_bundle(bert_bundle: Bundle) -> None:
    openvino = pytest.importorskip("openvino")
    settings = BenchConfig(repeats=1, threads=1, prompt_tokens=12, peers=("torch,openvino",))
    records = bench([str(bert_bundle.path)], settings)
    subjects = dict.fromkeys((record["subject"], record["variant"]) for record in records)
    assert list(subjects) == [("edge-ft", "bert-bundle"), ("torch", "bert"), ("openvino", "bert-bundle")]
    found = by_metric(records, "openvino", "bert-bundle")
    assert list(found) == list(units_of("text-classification", 12))
    assert all(record["value"] > 0 for record in found.values())
    assert found["load_s"]["environment"]["openvino"] in openvino.__version__


@pytest.mark.parametrize(("engine", "package"), [("openvino", "openvino"), ("genai", "onnxruntime_genai")])
def test_other_engines_measure_the_graph_of_each_decoder_bundle(
    llama_bundle: Bundle, engine: str, package: str
) -> None:
    pytest.importorskip(package)
    settings = BenchConfig(repeats=1, threads=1, prompt_tokens=12, new_tokens=4, peers=(engine,))
    found = by_metric(bench([str(llama_bundle.path)], settings), engine, llama_bundle.path.name)
    assert list(found) == list(units_of("text-generation", 12))
    assert all(record["value"] > 0 for record in found.values())


def test_openvino_decodes_the_tokens_that_the_bundle_decodes(llama_bundle: Bundle) -> None:
    pytest.importorskip("openvino")
    from edge_ft.bench.openvino_peer import OpenVINODecoder

    peer, ids = OpenVINODecoder(llama_bundle.path, 1, 1), [5, 6, 7, 8]
    for _ in range(2):  # the second time from an empty cache again
        assert len(peer.time_decode(ids, 4).decode_s) == 3
    logits = peer.last_logits
    cache = open_bundle(llama_bundle, accuracy_level=1).open_cache()
    ours = cache.extend(ids)
    for _ in range(3):
        ours = cache.extend([int(ours.argmax())])
    assert np.abs(logits - ours.reshape(-1)).max() < 0.1 * np.abs(ours).max()  # it may compute in bfloat16


def test_a_peers_own_clock_agrees_with_ours(llama_bundle: Bundle) -> None:
    pytest.importorskip("openvino")
    from edge_ft.bench.openvino_peer import OpenVINODecoder

    peer = OpenVINODecoder(llama_bundle.path, 1, 1)
    request, own = peer._request, []

    class Timed:
        reset_state = request.reset_state

        def infer(self, *arguments: Any, **options: Any) -> Any:
            found = request.infer(*arguments, **options)
            own.append(request.latency / 1e3)
            return found

    peer.time_decode([5, 6, 7, 8], 4)
    peer._request = Timed()
    timings = peer.time_decode([5, 6, 7, 8] * 16, 32)
    ours = [timings.prefill_s, *timings.decode_s]
    assert len(own) == len(ours)
    # Ours adds what is between two calls: making the inputs, and the choice of the token.
    assert all(theirs <= mine for theirs, mine in zip(own, ours, strict=True))
    assert median(mine - theirs for theirs, mine in zip(own, ours, strict=True)) < 0.002


def test_an_engine_that_is_not_installed_or_unknown_is_named(
    bert_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge_ft.bench.subjects.find_spec", lambda _: None)
    with pytest.raises(UsageError, match=r"pip install 'edge-ft\[peers\]'"):
        bench([str(bert_bundle.path)], BenchConfig(repeats=1, prompt_tokens=12, peers=("openvino",)))
    with pytest.raises(
        UsageError, match=r"--peers openvine: choose from torch, .*openvino, genai, .*did you mean 'openvino'"
    ):
        BenchConfig(peers=("openvine",))


def test_a_peer_that_is_no_longer_the_bundles_base_is_refused(
    tmp_path: Path, llama_bundle: Bundle, llama: Path
) -> None:
    manifest = json.loads(json.dumps(llama_bundle.manifest))
    for identity in ({"model": str(tmp_path / "gone")}, {"model": str(llama), "content_sha256": "0"}):
        folder = tmp_path / f"bundle-{len(identity)}"
        folder.mkdir()
        for name in manifest["files"]:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).hardlink_to(llama_bundle.path / name)
        manifest["provenance"]["base"] |= identity
        (folder / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(UsageError, match="name the model or the run folder as another argument"):
            bench([str(folder)], BenchConfig(repeats=1, peers=("torch",)))


def test_torch_decodes_a_token_at_a_time_from_its_cache(llama: Path) -> None:
    read: list[int] = []
    model = LlamaForCausalLM.from_pretrained(llama)

    def recorded(**inputs: Any) -> Any:
        read.append(inputs["input_ids"].shape[1])
        return model(**inputs)

    timings = TorchDecoder(recorded, TextTokenizer.load(llama)).time_decode([1, 2, 3, 4, 5], 4)
    assert read == [5, 1, 1, 1]
    assert len(timings.decode_s) == 3
    assert all(before <= after for before, after in pairwise((0, timings.prefill_s, timings.ttft_s)))


def _bundle_job(bundle: Path) -> dict[str, Any]:
    asked = {"prompt_tokens": 12, "new_tokens": 4, "threads": 1}
    return {
        "do": "bundle",
        "bundle": str(bundle),
        "task": "text-generation",
        "accuracy_level": None,
        "batches": True,
        **asked,
    }


def test_quality_is_recorded_beside_speed(
    llama_bundle: Bundle, llama_run: RunFolder, bert_bundle: Bundle, bert_run: RunFolder
) -> None:
    data = str(llama_run.split("test"))
    once = replace(SHORT, repeats=1, data=data, limit=5)
    records = bench([str(llama_bundle.path), str(llama_run.path)], replace(once, peers=("torch",)))
    scored = {
        (subject, variant): by_metric(records, subject, variant)
        for subject, variant in {(record["subject"], record["variant"]) for record in records}
    }
    assert len(scored) == 3
    for found in scored.values():
        low, high = found["nll"]["interval"]
        assert low <= found["nll"]["value"] <= high
        assert found["nll"]["environment"]["rows"] == 5
        assert found["nll"]["environment"]["data"] == "test.jsonl"
        assert {"decode_tps", "peak_rss_bytes", "perplexity", "token_accuracy", "rougeL", "eos_rate"} <= set(found)
    config = EvalConfig(data=data, limit=5, max_new_tokens=4)
    shipped = evaluate(str(llama_bundle.path), config)
    assert scored["edge-ft", "llama-bundle"]["nll"]["value"] == pytest.approx(shipped["nll"], abs=1e-6)
    [untuned] = [found for (subject, name), found in scored.items() if subject == "torch" and name != "llama-run"]
    assert untuned["nll"]["value"] > scored["torch", "llama-run"]["nll"]["value"]
    assert "exact_match" in dict.fromkeys(row[0] for row in table(records))

    classes = bench([str(bert_bundle.path)], replace(SHORT, repeats=1, data=str(bert_run.split("test"))))
    assert by_metric(classes, "edge-ft", "bert-bundle")["accuracy"]["value"] > 0.5


def test_rows_of_the_user_are_in_the_page_only_where_they_are_asked_for(
    tmp_path: Path, llama_bundle: Bundle, llama_run: RunFolder
) -> None:
    settings = replace(SHORT, data=str(llama_run.split("test")), limit=2, html=tmp_path / "page.html")
    prompts = [json.loads(line)["prompt"] for line in llama_run.split("test").read_text().splitlines()][:2]
    work = {"prompt_tokens": 12, "new_tokens": 4, "threads": 1}
    jobs = {"edge-ft": _bundle_job(llama_bundle.path), "torch": {"do": "torch", **find(str(llama_run.path)), **work}}
    for include in (False, True):
        records = []
        for engine, job in jobs.items():
            subject = Subject(engine, "llama", "text-generation", 512, 1, job, "llama")
            asked = answer_settings(subject, replace(settings, include_samples=include), 1)
            records += answer_records(subject, answer(job | {"answer": asked})["answers"], {"threads": 1, "cpu": "a"})
        ours, theirs = ([one["prompt"] for one in record["answers"]] for record in records)
        assert ours == theirs
        assert [row in prompt for row, prompt in zip(prompts, ours, strict=False)] == [include] * 2
        assert [html.escape(prompt) in page_of(records) for prompt in prompts] == [include] * 2


def test_nothing_is_asked_without_a_page() -> None:
    subject = Subject("edge-ft", "b", "text-generation", 512, 1, {}, "b")
    assert answer_settings(subject, SHORT, 1) is None
    classifier = replace(subject, task="text-classification")
    assert answer_settings(classifier, replace(SHORT, html=Path("p.html")), 1) is None  # it has nothing to continue


def test_a_worker_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    work = "import time; from edge_ft.bench.worker import answer_job; answer_job(lambda job: time.sleep(600) or {})"
    command = [sys.executable, "-c", work]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=[reader]) as worker:
        assert worker.stdin is not None
        worker.stdin.write(json.dumps({"parent": reader}).encode())
        worker.stdin.close()
        os.close(reader)
        with pytest.raises(subprocess.TimeoutExpired):
            worker.wait(timeout=1)
        os.close(writer)  # as when the process ends, however it does
        assert worker.wait(timeout=30) == 1


def test_a_tuned_bundle_is_compared_with_its_run(
    llama_run: RunFolder, llama_bundle: Bundle, llama_adapter_bundle: Bundle
) -> None:
    settings = replace(SHORT, repeats=1, data=str(llama_run.split("test")))
    sources = [str(llama_bundle.path), str(llama_adapter_bundle.path), str(llama_run.path)]
    records = bench(sources, settings)
    assert misfits(json.loads(json.dumps(records))) == []
    kl = {record["variant"]: record for record in records if record["metric"] == "kl_divergence"}
    assert kl.keys() == {
        llama_bundle.path.name,
        llama_adapter_bundle.path.name,
    }  # the run is what they are compared with
    for record in kl.values():
        assert record["value"] > 0
        assert record["environment"]["reference"].startswith("torch ")
        assert 0 < record["environment"]["positions"] <= 128
    top = {record["variant"]: record["value"] for record in records if record["metric"] == "same_top_token"}
    assert all(0.5 < share <= 1 for share in top.values())


def test_the_float_model_of_a_tuned_bundle_is_its_run_and_not_its_untuned_base(llama_bundle: Bundle) -> None:
    workload = Workload(12, 4, 1)
    tuned = bundle_subject(str(llama_bundle.path), None, workload)
    base = torch_subject("base", find_bundle_base(str(llama_bundle.path)), workload)
    run = replace(base, job=base.job | {"adapter": "run/adapter"})
    other = replace(run, job=run.job | {"base": run.job["base"] | {"content_sha256": "another"}})
    assert reference_of(tuned, [tuned, base, other]) is None
    assert reference_of(tuned, [tuned, base, other, run]) is run
    assert reference_of(replace(tuned, engine="genai"), [run]) is None  # gives no distributions
    assert reference_of(run, [run]) is None


def test_llama_cpp_is_measured_beside_a_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("xllamacpp", reason="xllamacpp is not installed: pip install 'edge-ft[peers]'")
    monkeypatch.setenv("EDGE_FT_CACHE", str(tmp_path / "cache"))
    model = write_family(tmp_path / "model", "llama")
    bundle = export(str(model), ExportConfig(out=tmp_path / "bundle", threads=1))
    settings = replace(SHORT, peers=("llama.cpp",), threads=1)
    records = bench([str(bundle.path)], settings)
    found = [record for record in records if record["subject"] == "llama.cpp" and record["metric"] == "decode_tps"]
    assert len(found) == 2
    rounded, own = found
    assert len(rounded["environment"]["faster_of"]) == 2
    assert own["variant"].endswith("(own codes)")
    assert all(record["value"] > 0 and record["environment"]["settings"]["repack"] for record in found)


def test_the_weights_of_a_bundle_and_of_its_float_base_are_counted_alike(
    llama_bundle: Bundle, llama: Path, bert_bundle: Bundle
) -> None:
    work = Workload(12, 4, 1)
    ours = weight_reads(bundle_subject(str(llama_bundle.path), None, work))
    theirs = weight_reads(torch_subject(str(llama), find(str(llama)), work))
    assert ours is not None and theirs is not None
    assert ours[1] == pytest.approx(theirs[1], rel=0.3)  # of a tiny model, float32 norms are a large part
    assert theirs[0] > 4 * ours[0]  # float32 against 4 bits and their scales
    assert weight_reads(bundle_subject(str(bert_bundle.path), None, work)) is None
