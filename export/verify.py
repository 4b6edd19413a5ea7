"""The half of a verification that needs no torch: a bundle's graphs scored again, on any device."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edge_ft.artifacts import Bundle
from edge_ft.config import VerifyConfig
from edge_ft.data import Example, Rendering, TextTokenizer, encode_rows, fingerprint, read_rows
from edge_ft.errors import GateRefused
from edge_ft.evaluate.metrics import paired_bootstrap
from edge_ft.evaluate.open import rendering_for
from edge_ft.evaluate.score import RowScores, Scorer, score, summary
from edge_ft.progress import Progress, Silent
from edge_ft.runtime import load

__all__ = ["SAME", "largest_difference", "probe_examples", "score_examples", "verify"]

SAME = 1e-3
"""Nats per target token within which two runs of the same weights agree, and which an adapter must exceed."""

PROBES = (
    "The quick brown fox jumps over the lazy dog.",
    "Question: How many days are there in three weeks? Answer:",
    "The patient was admitted with acute chest pain and shortness of breath.",
    "Interest rates rose again, and the bank lowered its forecast for the year.",
)
"""Texts of ours: any device can compare itself with the machine that exported, without a user's row."""


def verify(path: Path, config: VerifyConfig, progress: Progress | None = None) -> dict[str, Any]:
    """Check a bundle's files, its graphs on this machine, and with `config.data` its scores.

    The probe texts must score as they did where the bundle was written. Rows that are the export's own
    validation rows must too, and the limit on the tax is applied again; other rows are scored, and in the
    adapter lane the adapter must beat its base on them.

    Returns:
        `bundle`, `files`, `probe_difference` (by accuracy level, nats per token), and with rows `rows`,
        `same_rows`, `nll`, `metrics`.

    Raises:
        BundleError: the bundle cannot be opened.
        GateRefused: it does not score here as it did, or lost too much.
    """
    progress = progress or Silent()
    bundle = Bundle.open(path)
    recorded = bundle.manifest["verification"]
    tokenizer = TextTokenizer.load(path)
    rendering = Rendering.from_dict(bundle.manifest["rendering"])
    reasons: list[str] = []
    differences = {}
    for level in bundle.manifest["graphs"]:
        scorer = load(bundle, accuracy_level=int(level), threads=config.threads)
        probe = score_examples(scorer, probe_examples(tokenizer, rendering), tokenizer, rendering, progress, "probe")
        there = np.array(recorded["by_accuracy_level"][level]["probe_nll"])
        differences[level] = float((np.abs(probe.nll - there) / probe.tokens).max())
        # Level 4's int8 kernels round differently from processor to processor: it is held to the tax instead.
        if differences[level] > (SAME if level == "1" else config.max_tax):
            reasons.append(
                f"level {level} scores the probe texts {differences[level]:.4f} nats per token off its export"
            )
    result: dict[str, Any] = {
        "bundle": str(path),
        "files": len(bundle.manifest["files"]),
        "probe_difference": differences,
    }
    if config.data is not None:
        rows = read_rows(config.data)
        rendering = rendering_for(config, rows, tokenizer, rendering)
        examples = encode_rows(rendering, tokenizer, rows)
        scorer = load(bundle, threads=config.threads)
        scores = score_examples(scorer, examples, tokenizer, rendering, progress, "rows")
        same = fingerprint(rows) == recorded["rows_sha256"]
        result |= {
            "rows": len(examples),
            "same_rows": same,
            **summary(scores, examples, rendering.task, rendering.labels),
        }
        trained = recorded["nll"]["trained"]
        if same and abs(scores.mean_nll - recorded["nll"]["shipped"]) > SAME:
            reasons.append(
                f"the export's rows score {scores.mean_nll:.4f} here and {recorded['nll']['shipped']:.4f} there"
            )
        if same and trained is not None and scores.mean_nll - trained > config.max_tax:
            reasons.append(f"quantization tax {scores.mean_nll - trained:+.4f} is above --max-tax {config.max_tax:g}")
        if not same and bundle.manifest["lane"] == "adapter":
            without = load(bundle, threads=config.threads, adapter="none")
            base = score_examples(without, examples, tokenizer, rendering, progress, "rows, base")
            result["base_nll"] = base.mean_nll
            low, _ = paired_bootstrap(base.nll / base.tokens, scores.nll / scores.tokens, base.tokens)
            if low <= 0:
                reasons.append(
                    f"on these rows the adapter is no better than its base: {scores.mean_nll:.4f} nats per token"
                )
    if reasons:
        raise GateRefused(f"{path}: {'; '.join(reasons)}")
    return result


def probe_examples(tokenizer: TextTokenizer, rendering: Rendering) -> list[Example]:
    """The probe texts as examples; a classifier's are all of its first class, which need not be right."""
    if rendering.task == "text-classification":
        encoded = [tokenizer.encode_classifier(text, rendering.max_length)[0] for text in PROBES]
        return [Example(row, ids, [0], 0, "", 0) for row, ids in enumerate(encoded, 1)]
    encoded = [tokenizer.encode(text) for text in PROBES]
    return [Example(row, ids, list(ids), 1, "", 0) for row, ids in enumerate(encoded, 1)]


def score_examples(
    scorer: Scorer,
    examples: Sequence[Example],
    tokenizer: TextTokenizer,
    rendering: Rendering,
    progress: Progress,
    stage: str,
) -> RowScores:
    """`score` as all of verification does it."""
    return score(
        scorer, examples, task=rendering.task, pad_id=tokenizer.pad_id, batch_size=8, progress=progress, stage=stage
    )


def largest_difference(first: RowScores, second: RowScores) -> float:
    """The largest difference of any row, nats per target token."""
    return float((np.abs(first.nll - second.nll) / first.tokens).max())
