"""What `bench` measures: bundles, run folders, models, and other engines over these (`--peers`).

Each subject has the job that its measuring process reads.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

from edge_ft.artifacts import Bundle
from edge_ft.errors import MissingExtra, UsageError

__all__ = [
    "LLAMA_CPP",
    "Subject",
    "Workload",
    "bundle_subject",
    "check_lengths",
    "drop_slower",
    "graph_peers",
    "llama_cpp_peers",
    "name_variants",
    "peer_requests",
    "peer_subjects",
    "short_names",
    "torch_subject",
]

LLAMA_CPP = "llama.cpp"
GRAPH_ENGINES: dict[str, tuple[str, tuple[str, ...]]] = {
    "openvino": ("openvino", ("text-classification", "text-generation")),
    "genai": ("onnxruntime_genai", ("text-generation",)),
}
"""Engines that run a bundle's own graph: their package, and the tasks that they are measured on."""


@dataclass(frozen=True)
class Workload:
    """What every subject computes, so that their figures compare."""

    prompt_tokens: int
    new_tokens: int
    threads: int
    """CPU threads."""
    depths: tuple[int, ...] = ()
    """Tokens of context after which a decoder is measured too."""


@dataclass(frozen=True, eq=False)
class Subject:
    """One engine over one model, and the job that measures it."""

    engine: str
    """edge-ft, torch, openvino, genai, ctranslate2 or llama.cpp: `subject` in the records."""
    source: str
    """What the user named, or the name of a bundle's base."""
    task: str
    max_length: int
    """Most tokens that the model can read."""
    size_bytes: int
    job: dict[str, Any]
    """What `edge_ft.bench.worker` reads."""
    variant: str = ""
    """Short name of the source, unique among the subjects."""

    @property
    def name(self) -> str:
        """Engine and variant, for messages."""
        return f"{self.engine} {self.variant}"


def bundle_subject(source: str, accuracy_level: int | None, workload: Workload) -> Subject:
    """A bundle, run by onnxruntime.

    Args:
        source: Folder of the bundle.
        accuracy_level: Graph to measure; None is the engine that `edge_ft.runtime.load` chooses.
        workload: What it computes.

    Returns:
        The subject; its job names the accuracy level of the exact graph where none was asked for: it is what is scored,
        and what other engines run.
    """
    bundle = Bundle.open(Path(source))
    graph = bundle.graph(accuracy_level).relative_to(bundle.path).as_posix()
    levels = (int(key) for key, path in bundle.manifest["graphs"].items() if path == graph)
    job = {
        "do": "bundle",
        "bundle": source,
        "task": bundle.task,
        "accuracy_level": next(levels, accuracy_level),
        "engine": "auto" if accuracy_level is None else None,
        **asdict(workload),
    }
    return Subject("edge-ft", source, bundle.task, bundle.max_length, bundle.size_bytes, job)


def torch_subject(source: str, found: dict[str, Any], workload: Workload) -> Subject:
    """A run folder or a model, run by torch in float32.

    Args:
        source: What the user named, or the name of a bundle's base.
        found: What `edge_ft.bench.torch_peer.find` returned for it.
        workload: What it computes.

    Returns:
        The subject.
    """
    job = {"do": "torch", **found, **asdict(workload)}
    return Subject("torch", source, found["task"], found["max_length"], found["size_bytes"], job)


def check_lengths(subject: Subject) -> None:
    """Check that the model can read the prompt and the tokens that it decodes.

    Raises:
        UsageError: its positions are too few.
    """
    prompt, new = subject.job["prompt_tokens"], subject.job["new_tokens"]
    # An encoder-decoder reads them on two sides, a decoder one after the other; a classifier decodes none.
    tokens = {"text-generation": prompt + new, "text2text-generation": max(prompt, new)}.get(subject.task, prompt)
    if tokens > subject.max_length:
        raise UsageError(
            f"{subject.source} can read {subject.max_length} tokens and would be given {tokens}: "
            "lower --prompt-tokens or --new-tokens"
        )


def name_variants(subjects: Sequence[Subject]) -> list[Subject]:
    """The same subjects, each with its `variant`."""
    names = short_names([subject.source for subject in subjects])
    return [replace(subject, variant=name) for subject, name in zip(subjects, names, strict=True)]


def short_names(sources: Sequence[str]) -> list[str]:
    """Shorten each source to the end of its path that distinguishes it from the others.

    Args:
        sources: Paths and hub ids. A source that is named twice gets a number: measured against itself, it shows how
            much the machine's figures vary.

    Returns:
        A unique name for each source.
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


def peer_requests(peers: Sequence[str], bundles: Sequence[Subject]) -> list[dict[str, str]]:
    """List the models that peers need, as the worker's job `find` reads them.

    Args:
        peers: Names of the engines.
        bundles: The bundles to compare with.

    Returns:
        For torch one request a bundle, for CTranslate2 two (int8 and float32) for each bundle of an encoder-decoder.

    Raises:
        UsageError: CTranslate2 is named, and no bundle is of an encoder-decoder.
    """
    requests = [{"bundle": bundle.source} for bundle in bundles] if "torch" in peers else []
    if "ctranslate2" in peers:
        seq2seq = [bundle.source for bundle in bundles if bundle.task == "text2text-generation"]
        if not seq2seq:
            raise UsageError("--peers ctranslate2 is for text2text-generation bundles, and none of these is one")
        requests += [{"bundle": source, "compute_type": kind} for source in seq2seq for kind in ("int8", "float32")]
    return requests


def peer_subjects(found: Iterable[dict[str, Any]], measured: Sequence[Subject], workload: Workload) -> list[Subject]:
    """Make the peers out of what the worker found for `peer_requests`.

    Args:
        found: A model for each request.
        measured: Subjects that the user named.
        workload: What each peer computes.

    Returns:
        The peers; a model that is measured in the same engine already is left out.
    """
    peers: list[Subject] = []
    for model in found:
        name = model["base"]["name"]
        if "compute_type" in model:
            job = {"do": "ctranslate2", **model, **asdict(workload)}
            name = f"{name}-{model['compute_type']}"
            peer = Subject("ctranslate2", name, model["task"], model["max_length"], model["size_bytes"], job)
        else:
            peer = torch_subject(name, model, workload)
        if not any(_same_model(peer, subject) for subject in [*measured, *peers]):
            peers.append(peer)
    return peers


def graph_peers(engine: str, bundles: Sequence[Subject]) -> list[Subject]:
    """The bundles' own graphs, run by another engine.

    Args:
        engine: One of `GRAPH_ENGINES`.
        bundles: Bundles, already named.

    Returns:
        A subject for each bundle whose task the engine measures, of the same name.

    Raises:
        UsageError: there is no such bundle.
        MissingExtra: the engine is not installed.
    """
    package, tasks = GRAPH_ENGINES[engine]
    measured = [bundle for bundle in bundles if bundle.task in tasks]
    if not measured:
        raise UsageError(f"--peers {engine} is for {' and '.join(tasks)} bundles, and none of these is one")
    if find_spec(package) is None:
        raise MissingExtra(f"--peers {engine} needs the package {package!r}: pip install 'edge-ft[peers]'")
    return [replace(bundle, engine=engine, job={**bundle.job, "do": engine}) for bundle in measured]


def llama_cpp_peers(bundles: Sequence[Subject], files: Sequence[dict[str, Any]]) -> list[Subject]:
    """The bundles' weights as GGUF files, run by llama.cpp.

    Args:
        bundles: Bundles of decoders, already named.
        files: For each, what `edge_ft.bench.llama_cpp_peer.make_files` returned.

    Returns:
        A subject for each file; its variant names the bundle and the types of its weights.
    """
    peers = []
    for bundle, made in zip(bundles, files, strict=True):
        for weights, file in made["files"].items():
            job = {**bundle.job, "do": LLAMA_CPP, "file": file["path"], "weights": weights, "accuracy_level": None}
            job["rounded_from"] = file["rounded_from"]
            name = f"{bundle.variant} ({weights})"
            peers.append(replace(bundle, engine=LLAMA_CPP, job=job, size_bytes=file["size_bytes"], variant=name))
    return peers


def drop_slower(
    subjects: Sequence[Subject], samples: Mapping[Subject, Sequence[Mapping[str, Any]]]
) -> tuple[list[Subject], dict[Subject, dict[str, Any]]]:
    """Leave out the slower one of llama.cpp's Q4_0 files of a bundle, with a 4-bit and with an 8-bit head.

    Args:
        subjects: All that was measured.
        samples: Their results; none for one that did not fit.

    Returns:
        The others; and by each that stays, what was faster than what: weights and median `decode_tps`.
    """
    pairs: dict[str, list[Subject]] = {}
    for subject in subjects:
        if subject.engine == LLAMA_CPP and subject.job["weights"].startswith("Q4_0") and samples[subject]:
            pairs.setdefault(subject.job["bundle"], []).append(subject)
    speeds = {
        subject: median(sample["decode_tps"] for sample in samples[subject])
        for pair in pairs.values()
        for subject in pair
    }
    slower, notes = set(), {}
    for pair in pairs.values():
        fastest = max(pair, key=speeds.__getitem__)
        slower |= set(pair) - {fastest}
        notes[fastest] = {"faster_of": {subject.job["weights"]: round(speeds[subject], 2) for subject in pair}}
    return [subject for subject in subjects if subject not in slower], notes


def _same_model(a: Subject, b: Subject) -> bool:
    """Whether two subjects measure the same weights in the same engine other than ours."""
    return (
        a.engine == b.engine != "edge-ft"
        and a.job["base"]["content_sha256"] == b.job["base"]["content_sha256"]
        and all(a.job.get(key) == b.job.get(key) for key in ("adapter", "compute_type"))
    )
