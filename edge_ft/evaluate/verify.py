"""Verify a bundle without torch: check its files, and score its graphs again on this machine."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_ft.artifacts import Bundle
from edge_ft.config import VerifyConfig
from edge_ft.data import (
    Example,
    Rendering,
    TextTokenizer,
    encode_rows,
    find_unused,
    fingerprint,
    read_rows,
    reads_clock,
    split_rows,
    trained_rendering,
)
from edge_ft.errors import BundleError, GateRefused
from edge_ft.evaluate.scoring import Batching, RowScores, drop_unscorable, score, summary
from edge_ft.progress import Progress, Silent
from edge_ft.runtime import load
from edge_ft.runtime.probes import probe_examples, score_tolerance

__all__ = ["VERIFY_ROWS", "largest_difference", "verify"]

VERIFY_ROWS = 512
"""Most validation rows that an export compared before its manifest said how many."""


@dataclass(frozen=True)
class _Graphs:
    """The graphs of a bundle on this machine, and how much they may lose."""

    bundle: Bundle
    tokenizer: TextTokenizer
    rendering: Rendering
    """As the export rendered rows."""
    max_tax: float
    """Nats per target token."""
    threads: int | None
    progress: Progress

    @property
    def levels(self) -> list[str]:
        return sorted(self.bundle.manifest["graphs"])

    def score(self, level: str, examples: Sequence[Example], stage: str, adapter: str | None = None) -> RowScores:
        scorer = load(self.bundle, accuracy_level=int(level), threads=self.threads, adapter=adapter)  # type: ignore[arg-type]
        return score(scorer, examples, Batching(self.rendering.task, self.tokenizer.pad_id), self.progress, stage)

    def tolerance(self, level: str, name: str) -> float:
        """Return by how many nats per token scores of one level may differ from the export's `probe_nll` or `nll`."""
        exported = np.atleast_1d(self.bundle.verification["by_accuracy_level"][level][name])
        return score_tolerance(level, self.max_tax, self.rendering, exported)


def verify(path: Path, config: VerifyConfig, progress: Progress | None = None) -> dict[str, Any]:
    """Check a bundle's files, its graphs on this machine, and with `config.data` its scores.

    - A bundle that its export refused is refused.
    - The probe texts must score as they did at the export.
    - If the first rows are the export's validation rows, rendered in the same way, only those are
      scored. They must score as they did, and the quantization tax must be within `config.max_tax` (default the
      export's own limit).
    - Any other rows are only scored; in the adapter lane the adapter must be better on them than its base.

    Args:
        path: Folder of the bundle.
        config: Rows, limit and threads.
        progress: Receives the steps.

    Returns:
        `bundle`, `files`, `probe_difference` (by accuracy level, nats per token), and with rows `same_rows`,
        `rows`, `dropped`, `cut`, `cut_tokens` (see `drop_unscorable`), `findings` (what the rows say and the model does
        not read), `nll`, `perplexity`, `metrics`.

    Raises:
        BundleError: the bundle cannot be opened.
        GateRefused: the export was refused, the bundle scores differently here, or it lost too much.
        AuditRefused: no row has an answer to score.
    """
    bundle = Bundle.open(path, hash_all=True)
    if refused := bundle.manifest.get("verification", {}).get("refused"):
        raise GateRefused(f"{path}: its export was refused: {'; '.join(refused)}")
    recorded = bundle.verification
    graphs = _Graphs(
        bundle,
        TextTokenizer.of_bundle(path),
        Rendering.from_dict(bundle.manifest["rendering"]),
        recorded["limits"]["max_tax"] if config.max_tax is None else config.max_tax,
        config.threads,
        progress or Silent(),
    )
    differences = _probe_differences(graphs)
    reasons = [
        f"level {level} scores the probe texts {difference:.4f} nats per token off its export"
        for level, difference in differences.items()
        if difference > graphs.tolerance(level, "probe_nll")
    ]
    result: dict[str, Any] = {
        "bundle": str(path),
        "files": len(bundle.manifest["files"]),
        "probe_difference": differences,
    }
    if config.data is not None:
        found, more_reasons = _verify_rows(graphs, config.data, config)
        result |= found
        reasons += more_reasons
    if reasons:
        raise GateRefused(f"{path}: {'; '.join(reasons)}")
    return result


def _probe_differences(graphs: _Graphs) -> dict[str, float]:
    """Return by accuracy level the largest difference of a probe text's score from the export's, in nats per token.

    Raises:
        BundleError: the export compared other probe texts.
    """
    probes = probe_examples(graphs.tokenizer, graphs.rendering)
    exported = graphs.bundle.verification["by_accuracy_level"]
    if odd := [level for level in graphs.levels if len(exported[level]["probe_nll"]) != len(probes)]:
        raise BundleError(
            f"{graphs.bundle.path}: level {odd[0]} was verified with other probe texts than this edge-ft has: export "
            "the model again, or verify it with the edge-ft that wrote it"
        )
    return {
        level: largest_difference(graphs.score(level, probes, "probe"), np.array(exported[level]["probe_nll"]))
        for level in graphs.levels
    }


def _verify_rows(graphs: _Graphs, data: str, config: VerifyConfig) -> tuple[dict[str, Any], list[str]]:
    """Return the scores of the user's rows, and the reasons to refuse the bundle."""
    manifest = graphs.bundle.manifest
    rows = read_rows(data)
    rendering = trained_rendering(graphs.rendering, config, rows, graphs.tokenizer, graphs.bundle.max_length)
    # The same rows, rendered differently, have other scores.
    exported = graphs.bundle.verification["rows_sha256"]
    count = graphs.bundle.verification.get("rows_read", VERIFY_ROWS)
    split = graphs.bundle.verification.get("rows_split")
    validation = split_rows(rows, tuple(split), seed=0)["validation"] if split else rows
    same = rendering == graphs.rendering and fingerprint(validation[:count]) == exported
    if same and rendering.rendered_at is None and reads_clock(rendering.chat_template):
        same = False
        graphs.progress.say(
            f"{graphs.bundle.path}: its chat template prints today's date, and this bundle of an earlier version does "
            "not say which one its scores are of: the rows are scored and not compared; export it again to compare them"
        )
    encoded = encode_rows(rendering, graphs.tokenizer, rows := validation[:count] if same else rows)
    findings = find_unused(rows, rendering.columns, {example.row: example.unread for example in encoded})
    for finding in findings:
        graphs.progress.say(f"{data}: {finding.message} [{finding.code}]")
    examples, counts = drop_unscorable(encoded, data, rendering.max_length, graphs.progress)
    level = graphs.levels[0]  # the most exact: level 4 differs too much between machines to compare with
    scores = graphs.score(level, examples, "rows")
    result = {
        "same_rows": same,
        **counts,
        "findings": [finding.plain(file=data) for finding in findings],
        **summary(scores, examples, rendering.task, rendering.labels),
    }
    if same:
        return result, _differences_from_export(graphs, level, scores)
    if manifest["lane"] != "adapter":
        return result, []
    base = graphs.score(level, examples, "rows, base", adapter="none")
    gain = base.above(scores)
    reason = f"on these rows the adapter is no better than its base: {scores.mean_nll:.4f} nats per token"
    return {**result, "base_nll": base.mean_nll}, [reason] if gain["low"] <= 0 else []


def _differences_from_export(graphs: _Graphs, level: str, scores: RowScores) -> list[str]:
    """Return in what respect the export's validation rows score differently, or lost too much."""
    recorded = graphs.bundle.verification
    exported, trained = recorded["by_accuracy_level"][level].get("nll"), recorded["nll"].get("trained")
    if exported is None:
        return [f"the manifest names the export's rows and has no score of level {level} on them"]
    reasons = []
    if abs(scores.mean_nll - exported) > graphs.tolerance(level, "nll"):
        reasons.append(f"the export's rows score {scores.mean_nll:.4f} here and {exported:.4f} there")
    # The gate measured an embedder by its vectors: its loss counts only where a limit is given here.
    by_vectors = "cosine" in recorded and graphs.max_tax == recorded["limits"]["max_tax"]
    if trained is not None and not by_vectors and scores.mean_nll - trained > graphs.max_tax:
        reasons.append(
            f"quantization tax {scores.mean_nll - trained:+.4f} nats per token is above --max-tax {graphs.max_tax:g}"
        )
    return reasons


def largest_difference(scores: RowScores, nll: NDArray[np.float64]) -> float:
    """Return the largest difference of any row from another `nll` [rows], in nats per target token."""
    return float((np.abs(scores.nll - nll) / scores.tokens).max())
