"""Settings of `edge-ft bench`."""

from dataclasses import dataclass
from typing import Literal

from edge_ft.config.fields import check
from edge_ft.config.rows import RowsConfig
from edge_ft.errors import did_you_mean

__all__ = ["PEERS", "BenchConfig"]

PEERS = ("torch", "openvino", "ctranslate2")
"""Engines that `bench` knows besides ONNX Runtime."""


@dataclass(frozen=True, kw_only=True)
class BenchConfig(RowsConfig):
    """What `edge-ft bench` measures, and the budgets that turn it into a gate; the rows' fields go with --data."""

    peers: tuple[str, ...] = ()
    """Other engines to measure in turn with the bundles: torch (eager, float), openvino (encoders: the bundle's own
    graph), ctranslate2 (encoder-decoders: the float base, converted to int8 and to float32)."""
    repeats: int = 5
    """Fresh processes per subject, taken in turn A B A B."""
    threads: int | None = None
    """CPU threads of every subject; default all cores."""
    memory_limit: int | None = None
    """MB that a subject may use; not fitting is a result."""
    prompt_tokens: int = 128
    """Length of the prompt, or of the text to classify, in tokens."""
    new_tokens: int = 32
    """Tokens to decode; with --data also the longest answer."""
    data: str | None = None
    """Rows to score every subject on in the same run: loss, task metrics and answers stand beside its speed."""
    limit: int | None = None
    """Score only the first so many rows of --data."""
    accuracy_level: Literal[1, 4] | None = None
    """Graph of a bundle to measure; default the manifest's."""
    max_ttft_ms: float | None = None
    """Budget: median time to first token (classifiers: latency of one text), milliseconds."""
    min_decode_tps: float | None = None
    """Budget: median decoded tokens per second."""
    max_rss_mb: float | None = None
    """Budget: median peak resident memory, MB."""
    max_size_mb: float | None = None
    """Budget: size on disk, MB."""

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "peers", tuple(name for names in self.peers for name in names.split(",") if name))
        for name in self.peers:
            check(name in PEERS, f"--peers {name}: there are {', '.join(PEERS)}{did_you_mean(name, list(PEERS))}")
        check(self.repeats >= 1, "--repeats must be at least 1")
        check(self.prompt_tokens >= 1, "--prompt-tokens must be at least 1")
        check(self.new_tokens >= 2, "--new-tokens must be at least 2")
        check(self.limit is None or self.limit >= 1, "--limit must be at least 1")
        check(self.threads is None or self.threads >= 1, "--threads must be at least 1")
        check(self.memory_limit is None or self.memory_limit >= 1, "--memory-limit must be at least 1 MB")
