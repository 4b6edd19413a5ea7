"""What `bench` measures: bundles, run folders and models, each with the job that its measuring process reads."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from edge_ft.artifacts import Bundle
from edge_ft.errors import UsageError

__all__ = ["Subject", "Workload", "bundle_subject", "check_lengths", "name_variants", "short_names", "torch_subject"]


@dataclass(frozen=True)
class Workload:
    """What every subject computes, so that their figures compare."""

    prompt_tokens: int
    new_tokens: int
    threads: int
    """CPU threads."""


@dataclass(frozen=True, eq=False)
class Subject:
    """One engine over one model, and the job that measures it."""

    engine: str
    """edge-ft, torch, openvino or ctranslate2: `subject` in the records."""
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
        accuracy_level: Graph to measure; None is the manifest's default.
        workload: What it computes.

    Returns:
        The subject; its job names the accuracy level that the default stands for.
    """
    bundle = Bundle.open(Path(source))
    graph = bundle.graph(accuracy_level).relative_to(bundle.path).as_posix()
    levels = (int(key) for key, path in bundle.manifest["graphs"].items() if path == graph)
    job = {
        "do": "bundle",
        "bundle": source,
        "task": bundle.task,
        "accuracy_level": next(levels, accuracy_level),
        **asdict(workload),
    }
    return Subject("edge-ft", source, bundle.task, int(bundle.manifest["max_length"]), bundle.size_bytes, job)


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
