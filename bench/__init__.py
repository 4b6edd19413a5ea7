"""Bundles, runs and models measured side by side: a fresh process for each measurement, taken in turn A B A B.

This process imports neither torch nor onnxruntime; only its child processes do, and only what they measure.
"""

from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import Any

from edge_ft import __version__
from edge_ft.artifacts import kind_of
from edge_ft.bench.answers import answer_records, answer_settings
from edge_ft.bench.device_profiles import DeviceProfile, read_profile, usable_cores
from edge_ft.bench.divergence import divergence_records
from edge_ft.bench.limits import add_shares, weight_reads
from edge_ft.bench.meters import MemoryLimit, machine, memory_limit
from edge_ft.bench.quality import SCORED, engine_records, quality_records, score_settings
from edge_ft.bench.report import records_of
from edge_ft.bench.subjects import (
    GRAPH_ENGINES,
    LLAMA_CPP,
    Subject,
    Workload,
    bundle_subject,
    check_lengths,
    drop_slower,
    graph_peers,
    llama_cpp_peers,
    name_variants,
    peer_requests,
    peer_subjects,
    torch_subject,
)
from edge_ft.bench.subprocess_job import run_worker
from edge_ft.config import TEXT_TASKS, BenchConfig
from edge_ft.errors import UsageError, WillNotFit
from edge_ft.progress import Progress, Silent, track
from edge_ft.system import default_threads

__all__ = ["bench"]

PACKAGES = {
    "edge-ft": ("onnxruntime",),
    "torch": ("torch", "transformers"),
    "openvino": ("openvino",),
    "genai": ("onnxruntime-genai",),
    "ctranslate2": ("ctranslate2",),
    "llama.cpp": ("xllamacpp",),
}
"""By engine, the packages whose versions its figures depend on."""


def bench(subjects: Sequence[str], config: BenchConfig, progress: Progress | None = None) -> list[dict[str, Any]]:
    """Measure every subject `config.repeats` times.

    Args:
        subjects: Bundles (measured under onnxruntime), run folders and models (torch eager, float32).
        config: What to measure; its budgets are checked by `edge_ft.bench.report.budget_failures`.
        progress: Reports each finished measurement.

    Returns:
        Records `{subject, variant, metric, unit, value, samples, environment}`: `value` is the median of the
        samples, of which there is one a repeat. For a subject that did not fit into `config.memory_limit`,
        `value` is None and `note` says what happened.

    Raises:
        UsageError: no subject, one that cannot be opened, or a prompt that is longer than a model can read.
        EdgeFTError: a measuring process died.
    """
    progress = progress or Silent()
    if not subjects:
        raise UsageError("name at least one bundle, run folder or model to measure")
    profile = read_profile(config.profile) if config.profile is not None else None
    threads = config.threads or (profile.threads if profile is not None else default_threads())
    depths = tuple(sorted({int(depth) for depth in config.depths}))
    workload = Workload(config.prompt_tokens, config.new_tokens, threads, depths)
    limit = _limit(config, profile)
    measured = _open_subjects(subjects, config, workload, limit)
    # Before and after: other work on the machine would make its limits too low.
    before = _machine_limits(threads, limit)
    samples, notes = _measure(measured, config.repeats, limit, progress)
    after = _machine_limits(threads, limit)
    limits = {name: max(before[name], after[name]) for name in before}
    here = machine() | limits | _profile_conditions(config.profile, profile, limit)
    measured, choices = drop_slower(measured, samples)
    records, environments = [], {}
    for subject in measured:
        said = samples[subject][0].get("settings") if samples[subject] else None
        environment = here | _conditions(subject, limit) | ({"settings": said} if said else {})
        environments[subject] = environment = environment | choices.get(subject, {})
        found = records_of(subject, samples[subject], environment, notes.get(subject))
        add_shares(found, weight_reads(subject), limits)
        records += found
        if subject.engine == "edge-ft":
            records += engine_records(subject, environment)
        if config.data is not None and subject.engine in SCORED and subject not in notes:
            progress.say(f"scoring {subject.name}")
            job = subject.job | {"score": score_settings(config, workload.threads)}
            scores = run_worker(job, f"scoring {subject.name}", workload.threads) | {"data": config.data}
            records += quality_records(subject, scores, environment)
        asked = answer_settings(subject, config, workload.threads)
        if asked is not None and subject.engine in SCORED and subject not in notes:
            progress.say(f"sample answers of {subject.name}")
            answers = run_worker(subject.job | {"answer": asked}, f"sample answers of {subject.name}", workload.threads)
            records += answer_records(subject, answers["answers"], environment)
    if config.data is not None:
        fitted = [subject for subject in measured if subject not in notes]
        records += divergence_records(fitted, score_settings(config, workload.threads), environments, progress)
    return records


def _limit(config: BenchConfig, profile: DeviceProfile | None) -> MemoryLimit | None:
    """The limits of each measured process, or None."""
    megabytes = config.memory_limit or (profile.memory_mb if profile is not None else None)
    if megabytes is None:
        return None
    limit = memory_limit(megabytes * 10**6)
    if profile is None:
        return limit
    return replace(limit, cores=tuple(usable_cores(profile.cpus)), cpu_quota=profile.cpu_quota)


def _machine_limits(threads: int, limit: MemoryLimit | None) -> dict[str, float]:
    """What the machine could do with the cores and the CPU time of the measured processes."""
    roomy = replace(limit, size=10**9) if limit is not None else None  # it reads more memory than a small limit allows
    return run_worker({"do": "limits", "threads": threads}, "measuring the machine", threads, roomy)


def _profile_conditions(name: str | None, profile: DeviceProfile | None, limit: MemoryLimit | None) -> dict[str, Any]:
    """What a profile asked for, and which part of it this system could not enforce."""
    if profile is None or limit is None:
        return {}
    open_ends = {
        "cpus": len(limit.cores) < profile.cpus,
        "cpu_quota": profile.cpu_quota is not None and not limit.holds_quota,
    }
    return {
        "profile": name,
        "affinity": list(limit.cores),
        "cpu_quota": profile.cpu_quota,
        "not_enforced": [name for name, is_open in open_ends.items() if is_open],
    }


def _open_subjects(
    sources: Sequence[str], config: BenchConfig, workload: Workload, limit: MemoryLimit | None
) -> list[Subject]:
    """The subjects in the order in which they were named, then the peers that are not among them."""
    bundles = {
        source: bundle_subject(source, config.accuracy_level, workload)
        for source in sources
        if kind_of(source) == "bundle"
    }
    for source, subject in bundles.items():
        if subject.job["engine"] == "auto":  # chosen before the first measurement, which it would lengthen
            subject.job["engine"] = _choose(source, workload.threads, limit)
    requests = [{"source": source} for source in sources if source not in bundles]
    requests += peer_requests(config.peers, list(bundles.values()))
    # One process finds all models, since importing torch takes seconds.
    job = {"do": "find", "wanted": requests}
    found = iter(run_worker(job, "looking for the models", workload.threads)["found"] if requests else ())
    subjects = [
        bundles[source] if source in bundles else torch_subject(source, next(found), workload) for source in sources
    ]
    subjects += peer_subjects(found, subjects, workload)
    for subject in subjects:
        check_lengths(subject)
    subjects = name_variants(subjects)
    ours = [subject for subject in subjects if subject.engine == "edge-ft"]
    peers = [peer for engine in GRAPH_ENGINES if engine in config.peers for peer in graph_peers(engine, ours)]
    return [*subjects, *peers, *(_llama_cpp(ours, workload) if LLAMA_CPP in config.peers else ())]


def _choose(bundle: str, threads: int, limit: MemoryLimit | None) -> dict[str, Any] | None:
    """How a bundle runs with the cores, the CPU time and the memory of the measured processes.

    On other cores it would be chosen again, within the first measurement.

    Returns:
        `Engine.plain`.
    """
    job, doing = {"do": "choose", "bundle": bundle, "threads": threads}, f"choosing how {bundle} runs"
    try:
        return run_worker(job, doing, threads, limit)["engine"]  # type: ignore[no-any-return]
    except WillNotFit:
        return run_worker(job, doing, threads)["engine"]  # type: ignore[no-any-return]


def _llama_cpp(bundles: Sequence[Subject], workload: Workload) -> list[Subject]:
    """Make the files of the bundles of decoders in the cache.

    Returns:
        The bundles under llama.cpp.

    Raises:
        UsageError: there is no such bundle, or GGUF cannot hold one.
        MissingExtra: xllamacpp or gguf is not installed.
    """
    decoders = [bundle for bundle in bundles if bundle.task == "text-generation"]
    if not decoders:
        raise UsageError(f"--peers {LLAMA_CPP} is for text-generation bundles, and none of these is one")
    jobs = [{"do": "gguf", "bundle": bundle.source} for bundle in decoders]
    made = [run_worker(job, f"writing {job['bundle']} as GGUF", workload.threads) for job in jobs]
    return llama_cpp_peers(decoders, made)


def _measure(
    subjects: Sequence[Subject], repeats: int, limit: MemoryLimit | None, progress: Progress
) -> tuple[dict[Subject, list[dict[str, Any]]], dict[Subject, str]]:
    """The samples of each subject, and why one did not fit into the limit."""
    samples: dict[Subject, list[dict[str, Any]]] = {subject: [] for subject in subjects}
    notes: dict[Subject, str] = {}
    rounds = [subject for _ in range(repeats) for subject in subjects]
    for subject in track(progress, "bench", rounds, len(rounds)):
        if subject in notes:
            continue  # not fitting is a result, and one sample of it is enough
        try:
            samples[subject].append(
                run_worker(
                    subject.job | {"max_length": subject.max_length, "batches": limit is None},
                    f"measuring {subject.name}",
                    subject.job["threads"],
                    limit,
                )
            )
        except WillNotFit as error:
            notes[subject] = str(error)
            progress.say(f"{subject.name}: {error}")
    return samples, notes


def _conditions(subject: Subject, limit: MemoryLimit | None) -> dict[str, Any]:
    """What a figure depends on, besides the machine."""
    return {
        "threads": subject.job["threads"],
        "prompt_tokens": subject.job["prompt_tokens"],
        "new_tokens": subject.job["new_tokens"] if subject.task in TEXT_TASKS else None,
        "depths": subject.job.get("depths", ()),
        "accuracy_level": subject.job.get("accuracy_level"),
        "engine": subject.job.get("engine") if subject.engine == "edge-ft" else None,
        "memory_limit_bytes": limit.size if limit else None,
        "memory_limiter": limit.kind if limit else None,
        "edge-ft": __version__,
        **{name: version(name) for name in PACKAGES[subject.engine]},
    }
