"""The half of a verification that needs no torch: a bundle's graphs scored again, on any device."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from edge_ft.artifacts import Bundle
from edge_ft.config import VerifyConfig
from edge_ft.data import (
    Example,
    Rendering,
    Row,
    TextTokenizer,
    bare_columns,
    encode_rows,
    fingerprint,
    read_rows,
    trained_rendering,
)
from edge_ft.data.seq2seq import encode_pair
from edge_ft.errors import GateRefused
from edge_ft.evaluate.metrics import paired_bootstrap
from edge_ft.evaluate.scoring import RowScores, Scorer, counted, score, summary
from edge_ft.families import CLASSIFIERS
from edge_ft.progress import Progress, Silent
from edge_ft.runtime import load

__all__ = ["SAME", "VERIFY_ROWS", "largest_difference", "probe_examples", "score_examples", "verify"]

VERIFY_ROWS = 512
"""Validation rows that verification reads at most: enough for an interval of ±0.01 nats on most data."""

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

    What its export refused is refused. The probe texts must score as they did where the bundle was written.
    Rows whose first `VERIFY_ROWS` are the export's validation rows, read as they were then, must too: those
    alone are scored, and `config.max_tax` (default the export's own) limits the tax again. Any other rows are
    only scored; in the adapter lane the adapter must beat its base on them, in the others nothing is judged.

    Returns:
        `bundle`, `files`, `probe_difference` (by accuracy level, nats per token), and with rows `same_rows`,
        `rows`, `dropped`, `cut`, `cut_tokens` (see `counted`), `nll`, `perplexity`, `metrics`.

    Raises:
        BundleError: the bundle cannot be opened.
        GateRefused: its export was refused, it does not score here as it did, or it lost too much.
        AuditRefused: no row has an answer to score.
    """
    progress = progress or Silent()
    bundle = Bundle.open(path)
    recorded = bundle.manifest["verification"]
    tokenizer = TextTokenizer.load(path)
    rendering = Rendering.from_dict(bundle.manifest["rendering"])
    max_tax = recorded["limits"]["max_tax"] if config.max_tax is None else config.max_tax
    if refused := recorded.get("refused"):
        raise GateRefused(f"{path}: its export was refused: {'; '.join(refused)}")
    reasons: list[str] = []
    differences = {}
    for level in bundle.manifest["graphs"]:
        scorer = load(bundle, accuracy_level=int(level), threads=config.threads)
        probe = score_examples(scorer, probe_examples(tokenizer, rendering), tokenizer, rendering, progress, "probe")
        there = np.array(recorded["by_accuracy_level"][level]["probe_nll"])
        differences[level] = float((np.abs(probe.nll - there) / probe.tokens).max())
        # Level 4's int8 kernels round differently from processor to processor: it is held to the tax instead.
        if differences[level] > (SAME if level == "1" else max_tax):
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
        exported = rendering
        rendering = trained_rendering(exported, config, rows, tokenizer, int(bundle.manifest["max_length"]))
        # Cut or written otherwise than then, the same rows have another score.
        same = rendering == exported and fingerprint(rows[:VERIFY_ROWS]) == recorded["rows_sha256"]
        encoded = encode_rows(rendering, tokenizer, rows[:VERIFY_ROWS] if same else rows)
        examples, counts = counted(encoded, config.data, rendering.max_length, progress)
        # Where level 4 is the default, it is too different from machine to machine to compare with.
        level = min(bundle.manifest["graphs"])
        scorer = load(bundle, accuracy_level=int(level), threads=config.threads)
        exact = recorded["by_accuracy_level"][level].get("nll")
        scores = score_examples(scorer, examples, tokenizer, rendering, progress, "rows")
        result |= {
            "same_rows": same,
            **counts,
            **summary(scores, examples, rendering.task, rendering.labels),
        }
        trained = recorded["nll"]["trained"]
        if same and abs(scores.mean_nll - exact) > (SAME if level == "1" else max_tax):
            reasons.append(f"the export's rows score {scores.mean_nll:.4f} here and {exact:.4f} there")
        if same and trained is not None and scores.mean_nll - trained > max_tax:
            reasons.append(f"quantization tax {scores.mean_nll - trained:+.4f} is above --max-tax {max_tax:g}")
        if not same and bundle.manifest["lane"] == "adapter":
            without = load(bundle, accuracy_level=1, threads=config.threads, adapter="none")
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
    if rendering.task in CLASSIFIERS:
        framed = [tokenizer.encode_classifier(text, rendering.max_length) for text in PROBES]
        labels: list[int] | list[float] = [0]
        if rendering.problem_type in ("regression", "multi_label_classification"):
            labels = [0.0] * len(rendering.labels)
        return [
            Example(
                row,
                text.ids,
                # The first tag everywhere: that of the tokens around a text, too.
                [0] * len(text.ids) if rendering.task == "token-classification" else labels,
                0,
                "",
                0,
            )
            for row, text in enumerate(framed, 1)
        ]
    if rendering.task == "text2text-generation":
        # Each is to be answered by the next one.
        assert rendering.appended_eos is not None
        pairs = [
            encode_pair(tokenizer, text, answer, rendering.appended_eos, rendering.max_length)
            for text, answer in zip(PROBES, (*PROBES[1:], PROBES[0]), strict=True)
        ]
        return [Example(row, pair.source, pair.target, 0, "", 0) for row, pair in enumerate(pairs, 1)]
    if rendering.task in ("fill-mask", "feature-extraction"):
        asked = replace(rendering, columns=bare_columns(rendering.task))
        related = zip(PROBES, (*PROBES[1:], PROBES[0]), strict=True)  # not alike: their loss is large, and moves
        rows = [Row(row, {"text": text, "positive": other}) for row, (text, other) in enumerate(related, 1)]
        return encode_rows(asked, tokenizer, rows)
    encoded = [tokenizer.encode(text)[: rendering.max_length] for text in PROBES]
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
