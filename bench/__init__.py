"""Bundles, runs and models measured side by side: a fresh process for each look, taken in turn A B A B.

This process imports neither torch nor onnxruntime; only its children do, and only what they measure.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from edge_ft import __version__
from edge_ft.artifacts import Bundle, kind_of
from edge_ft.bench.meters import MemoryLimit, cpu_count, machine, memory_limit
from edge_ft.bench.quality import SCORED, quality_records, settings_of
from edge_ft.bench.record import records_of
from edge_ft.bench.subprocess_job import run_worker
from edge_ft.config import TEXT_TASKS, BenchConfig
from edge_ft.errors import MissingExtra, UsageError, WillNotFit
from edge_ft.progress import Progress, Silent, track

__all__ = ["bench"]

ENGINES = {
    "edge-ft": ("onnxruntime",),
    "torch": ("torch", "transformers"),
    "openvino": ("openvino",),
    "ctranslate2": ("ctranslate2",),
}
"""By subject, the packages whose versions its figures depend on."""


@dataclass(frozen=True, eq=False)
class Case:
    """One subject, and the job that measures it."""

    subject: str
    """edge-ft, torch or openvino."""
    source: str
    """What the user named, or the name of a bundle's base."""
    task: str
    max_length: int
    """Most tokens that the model can read."""
    size_bytes: int
    job: dict[str, Any]
    """What `edge_ft.bench.worker` reads."""
    variant: str = ""
    """Short name of the source, unique among the cases."""

    @property
    def name(self) -> str:
        return f"{self.subject} {self.variant}"


def bench(subjects: Sequence[str], config: BenchConfig, progress: Progress | None = None) -> list[dict[str, Any]]:
    """Measure every subject `config.repeats` times.

    Args:
        subjects: Bundles (onnxruntime), run folders and models (torch eager, float32).
        config: What to measure; its budgets are judged by `edge_ft.bench.report.budget_failures`.
        progress: RecordedProgress of each process that ended.

    Returns:
        Records `{subject, variant, metric, unit, value, samples, environment}`: `value` is the median of the
        samples, of which there is one a repeat. For a subject that did not fit into `config.memory_limit`,
        `value` is None and `note` says what happened.

    Raises:
        UsageError: a subject that cannot be opened, or a prompt that is longer than a model can read.
        EdgeFTError: a measuring process died.
    """
    progress = progress or Silent()
    if not subjects:
        raise UsageError("name at least one bundle, run folder or model to measure")
    threads = config.threads or cpu_count()
    limit = memory_limit(config.memory_limit * 10**6) if config.memory_limit is not None else None
    cases = _cases(subjects, config, threads)
    results: dict[Case, list[dict[str, float]]] = {case: [] for case in cases}
    notes: dict[Case, str] = {}
    rounds = [case for _ in range(config.repeats) for case in cases]
    for case in track(progress, "bench", rounds, len(rounds)):
        if case in notes:
            continue  # that it does not fit is a result, and need not be shown again
        try:
            results[case].append(run_worker(case.job, f"measuring {case.name}", threads, limit))
        except WillNotFit as error:
            notes[case] = str(error)
            progress.say(f"{case.name}: {error}")
    here = machine()
    records = []
    for case in cases:
        environment = here | _conditions(case, limit)
        records += records_of(
            case.subject, case.variant, case.task, results[case], case.size_bytes, environment, notes.get(case)
        )
        if config.data is not None and case.subject in SCORED and case not in notes:
            progress.say(f"scoring {case.name}")
            asked = case.job | {"score": settings_of(config, threads)}
            found = run_worker(asked, f"scoring {case.name}", threads) | {"data": config.data}
            records += quality_records(case.subject, case.variant, found, environment)
    return records


def short_names(sources: Sequence[str]) -> list[str]:
    """A name for each source: as much of the end of its path as tells it from the others.

    A source that is named twice gets a number: measured against itself it shows the noise of the machine.
    """
    parts = [Path(source).resolve().parts if Path(source).exists() else Path(source).parts for source in sources]
    depth = 1
    while len({part[-depth:] for part in parts}) < len(set(parts)):
        depth += 1
    names: list[str] = []
    for at, part in enumerate(parts):
        name = Path(*part[-depth:]).as_posix()
        before = parts[:at].count(part)
        names.append(f"{name}#{before + 1}" if before else name)
    return names


def _cases(subjects: Sequence[str], config: BenchConfig, threads: int) -> list[Case]:
    """The subjects as they were named, then the peers that are not among them."""
    asked = {"prompt_tokens": config.prompt_tokens, "new_tokens": config.new_tokens, "threads": threads}
    bundles = {source: _bundle_case(source, config.accuracy_level, asked) for source in subjects if _is_bundle(source)}
    wanted = [{"source": source} for source in subjects if source not in bundles]
    if "torch" in config.peers:
        wanted += [{"bundle": source} for source in bundles]
    if "ctranslate2" in config.peers:
        seq2seq = [source for source, case in bundles.items() if case.task == "text2text-generation"]
        if not seq2seq:
            raise UsageError("--peers ctranslate2 is for text2text-generation bundles, and none of these is one")
        wanted += [{"bundle": source, "compute_type": kind} for source in seq2seq for kind in ("int8", "float32")]
    # One process finds them all: it takes seconds to import torch.
    job = {"do": "find", "wanted": wanted}
    found = iter(run_worker(job, "looking for the models", threads)["found"] if wanted else ())
    cases = [bundles[source] if source in bundles else _torch_case(source, next(found), asked) for source in subjects]
    for peer in [_peer_case(model, asked) for model in found]:
        if not any(_same_model(peer, case) for case in cases):
            cases.append(peer)
    for case in cases:
        tokens = config.prompt_tokens + (config.new_tokens if case.task == "text-generation" else 0)
        if case.task == "text2text-generation":  # each side has its own
            tokens = max(config.prompt_tokens, config.new_tokens)
        if tokens > case.max_length:
            raise UsageError(
                f"{case.source} can read {case.max_length} tokens and would be given {tokens}: "
                "lower --prompt-tokens or --new-tokens"
            )
    names = short_names([case.source for case in cases])
    named = [replace(case, variant=name) for case, name in zip(cases, names, strict=True)]
    if "openvino" in config.peers:
        named += [_openvino_case(case) for case in named if case.subject == "edge-ft"]
    return named


def _is_bundle(source: str) -> bool:
    return kind_of(source) == "bundle"


def _bundle_case(source: str, level: int | None, asked: dict[str, int]) -> Case:
    bundle = Bundle.open(Path(source))
    graph = bundle.graph(level).relative_to(bundle.path).as_posix()
    level = next((int(key) for key, path in bundle.manifest["graphs"].items() if path == graph), level)
    job = {"do": "bundle", "bundle": source, "task": bundle.task, "accuracy_level": level, **asked}
    return Case("edge-ft", source, bundle.task, int(bundle.manifest["max_length"]), bundle.size_bytes, job)


def _openvino_case(bundle: Case) -> Case:
    """Its own graph, opened by OpenVINO.

    Raises:
        UsageError: a decoder, or OpenVINO is not installed.
    """
    if bundle.task != "text-classification":
        raise UsageError(f"--peers openvino measures classifiers, and {bundle.source} is for {bundle.task}")
    if find_spec("openvino") is None:
        raise MissingExtra("--peers openvino needs the package 'openvino': pip install 'edge-ft[peers]'")
    return replace(bundle, subject="openvino", job={**bundle.job, "do": "openvino"})


def _torch_case(source: str, found: dict[str, Any], asked: dict[str, int]) -> Case:
    job = {"do": "torch", **found, **asked}
    return Case("torch", source, found["task"], found["max_length"], found["size_bytes"], job)


def _peer_case(found: dict[str, Any], asked: dict[str, int]) -> Case:
    """The float model of a bundle under torch, or converted for CTranslate2."""
    if "compute_type" not in found:
        return _torch_case(found["base"]["name"], found, asked)
    job = {"do": "ctranslate2", **found, **asked}
    name = f"{found['base']['name']}-{found['compute_type']}"
    return Case("ctranslate2", name, found["task"], found["max_length"], found["size_bytes"], job)


def _same_model(a: Case, b: Case) -> bool:
    """Whether two cases measure the same weights in the same other engine."""
    if a.subject != b.subject or a.subject == "edge-ft":
        return False
    same_base = a.job["base"]["content_sha256"] == b.job["base"]["content_sha256"]
    return same_base and all(a.job.get(key) == b.job.get(key) for key in ("adapter", "compute_type"))


def _conditions(case: Case, limit: MemoryLimit | None) -> dict[str, Any]:
    """What a figure depends on, besides the machine."""
    engine = ENGINES[case.subject]
    return {
        "threads": case.job["threads"],
        "prompt_tokens": case.job["prompt_tokens"],
        "new_tokens": case.job["new_tokens"] if case.task in TEXT_TASKS else None,
        "accuracy_level": case.job.get("accuracy_level"),
        "memory_limit_bytes": limit.size if limit else None,
        "memory_limiter": limit.kind if limit else None,
        "edge-ft": __version__,
        **{name: version(name) for name in engine},
    }
