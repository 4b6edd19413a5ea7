"""Settings of `edge-ft bench`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from edge_ft.config.shared import Group, Minimum, RowsConfig, Threads, check
from edge_ft.errors import did_you_mean

__all__ = ["PEERS", "BenchConfig"]

PEERS = ("torch", "openvino", "genai", "ctranslate2", "llama.cpp")
"""Engines that `bench` can measure besides ONNX Runtime."""


@dataclass(frozen=True, kw_only=True)
class BenchConfig(RowsConfig):
    """Settings of a measurement, and budgets that it must keep; the fields of `RowsConfig` need `data`."""

    data: Annotated[str | None, Group.INPUT] = None
    """Rows on which to score every bundle, run and model too: loss, task metrics and answers."""
    limit: Annotated[int | None, Group.INPUT, Minimum(1)] = None
    """Score only the first N rows of --data."""
    accuracy_level: Annotated[Literal[1, 4] | None, Group.INPUT] = None
    """Graph of a bundle to measure: 1 computes in float, 4 with int8 activations; default: the manifest's choice."""
    peers: Annotated[tuple[str, ...], Group.MEASUREMENT] = ()
    """Other engines to measure in turn with the bundles: torch (eager, float32), openvino (the same graph of
    classifiers and decoders), genai (the same graph of decoders), ctranslate2 (encoder-decoders), llama.cpp (the
    weights of decoders as Q4_0, and their own codes as Q4_1)."""
    repeats: Annotated[int, Group.MEASUREMENT, Minimum(1)] = 5
    """Fresh processes per bundle, run or model, which are measured alternately."""
    prompt_tokens: Annotated[int, Group.MEASUREMENT, Minimum(1)] = 128
    """Length of the prompt, or of the text to classify, in tokens."""
    new_tokens: Annotated[int, Group.MEASUREMENT, Minimum(2)] = 32
    """Tokens to generate; also the maximum length of an answer to --data."""
    depths: Annotated[tuple[str, ...], Group.MEASUREMENT] = ()
    """Also measure a decoder's prefill and decode after so many tokens of context, e.g. 0,2048."""
    markdown: Annotated[Path | None, Group.OUTPUT] = None
    """Also write the table in Markdown to this file, for a pull request."""
    html: Annotated[Path | None, Group.OUTPUT] = None
    """Also write one HTML page to this file: the table, plots and sample answers."""
    include_samples: Annotated[bool, Group.OUTPUT] = False
    """Show answers to the first rows of --data in the page, with these rows; default: to texts of edge-ft's own."""
    max_ttft_ms: Annotated[float | None, Group.BUDGETS] = None
    """Highest median time to the first token in milliseconds; for classifiers, the time of one text."""
    min_decode_tps: Annotated[float | None, Group.BUDGETS] = None
    """Lowest median number of generated tokens per second."""
    max_rss_mb: Annotated[float | None, Group.BUDGETS] = None
    """Highest median of the peak resident memory, in MB."""
    max_size_mb: Annotated[float | None, Group.BUDGETS] = None
    """Largest size on disk, in MB."""
    threads: Threads = None
    """CPU threads of every measured process; default: OMP_NUM_THREADS, or all CPUs that the process may use."""
    profile: Annotated[str | None, Group.RESOURCES] = None
    """Device to imitate: container-512m, phone-small, pi-class, or a YAML file with threads, cpus, memory_mb and
    cpu_quota; --threads and --memory-limit win over it."""
    memory_limit: Annotated[int | None, Group.RESOURCES, Minimum(1)] = None
    """Memory limit of each measured process in MB; what needs more is reported as not fitting."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for depth in self.depths:
            check(depth.isdecimal(), f"--depths {depth}: give numbers of tokens, e.g. 0,2048")
        check(
            not self.include_samples or (self.html is not None and self.data is not None),
            "--include-samples shows rows of --data in the page of --html: give both",
        )
        for name in self.peers:
            check(name in PEERS, f"--peers {name}: choose from {', '.join(PEERS)}{did_you_mean(name, list(PEERS))}")
