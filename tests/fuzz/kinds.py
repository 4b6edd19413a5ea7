"""The kinds of input, and how many of a session's cases each gets."""

import math
from collections.abc import Callable
from pathlib import Path
from random import Random

from fuzz.bundles import manifest_case, onnx_case, prompt_case, tokenizer_case
from fuzz.child import Box, Case
from fuzz.commands import command_line_case, config_case
from fuzz.models import adapter_case, gguf_case, safetensors_case
from fuzz.rows import agreement_case, rows_case
from fuzz.templates import template_case

__all__ = ["KINDS", "make_case", "schedule"]

KINDS: dict[str, tuple[Callable[[Random, Box], Case], float]] = {
    "rows": (rows_case, 16),
    "agreement": (agreement_case, 0.5),
    "configs": (config_case, 9),
    "command lines": (command_line_case, 7),
    "manifests": (manifest_case, 9),
    "onnx": (onnx_case, 9),
    "tokenizers": (tokenizer_case, 10),
    "safetensors": (safetensors_case, 9),
    "gguf": (gguf_case, 7),
    "adapters": (adapter_case, 7),
    "templates": (template_case, 8),
    "prompts": (prompt_case, 10),
}
"""How a case is made, and its share of all cases in percent, rounded; `agreement` trains, and takes seconds."""


def make_case(kind: str, seed: int, index: int, root: Path, seeds: Path) -> tuple[Case, Box]:
    """Write the inputs of a case into `root`; the same numbers give the same case."""
    box = Box(root, seeds)
    return KINDS[kind][0](Random(f"{seed}:{kind}:{index}"), box), box


def schedule(cases: int, kinds: list[str]) -> list[tuple[str, int]]:
    """Kind and index of every case, the kinds mixed evenly, so that a session that is stopped has seen them all."""
    total = sum(KINDS[kind][1] for kind in kinds)
    counts = {kind: math.ceil(cases * KINDS[kind][1] / total) for kind in kinds}
    places = [(index / counts[kind], kind, index) for kind in kinds for index in range(counts[kind])]
    return [(kind, index) for _, kind, index in sorted(places)]
