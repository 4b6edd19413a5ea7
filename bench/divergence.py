"""`bench --data`: how far each subject's distributions are from those of the float model, as llama.cpp prints it.

Mean Kullback-Leibler divergence, root mean square of the change of the right token's probability, and how often the
likeliest token is the same: all at the same positions of the same token ids.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from edge_ft.bench.report import single_record
from edge_ft.bench.subjects import Subject
from edge_ft.bench.subprocess_job import run_worker
from edge_ft.progress import Progress

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from edge_ft.evaluate.metrics import Metric

__all__ = [
    "POSITIONS",
    "Divergence",
    "bundle_log_probabilities",
    "compare_distributions",
    "divergence",
    "divergence_records",
    "labelled_positions",
    "llama_cpp_log_probabilities",
    "longest_row",
    "reference_of",
    "torch_log_probabilities",
    "write_reference",
]

POSITIONS = 128
"""Most positions at which distributions are compared: those of the first rows, since a vocabulary of 150,000 takes
77 MB for these, and llama.cpp up to a second for each."""
COMPARED = ("edge-ft", "torch", "llama.cpp")
"""Engines that give log-probabilities."""
UNITS = {"kl_divergence": "nats", "delta_p_rms": "", "same_top_token": ""}
LEAST = -1e4
LOGITS, ROWS = "logits.npy", "rows.json"


@dataclass(frozen=True)
class Divergence:
    """Figures over positions, each `{value, low, high}` with a 95% interval."""

    kl_divergence: "Metric"
    """Mean of sum p·ln(p / q), nats; p is the float model."""
    delta_p_rms: "Metric"
    """Root mean square of q - p of the right token, 0 to 1."""
    same_top_token: "Metric"
    """Share of positions with the same likeliest token."""


def divergence(
    reference: "NDArray[np.float32]", found: "NDArray[np.float32]", targets: "NDArray[np.int64]"
) -> Divergence:
    """Compare distributions.

    Args:
        reference: Log-probabilities of the float model [positions, vocab].
        found: Those of a subject.
        targets: The right token of each position [positions].

    Returns:
        The figures; their intervals are a bootstrap over positions.
    """
    import numpy as np

    from edge_ft.evaluate.metrics import estimate, mean, proportion

    count, at = len(targets), np.arange(len(targets))
    p = np.exp(reference)
    # a token without probability in the float model adds nothing, and one that a subject lacks has one of e^-10000
    kl = (p * (np.maximum(reference, LEAST) - np.maximum(found, LEAST))).sum(axis=-1, dtype=np.float64)
    squares = (np.exp(found[at, targets]) - np.exp(reference[at, targets])).astype(np.float64) ** 2
    same = reference.argmax(axis=-1) == found.argmax(axis=-1)
    rms = estimate(lambda rows: np.sqrt(squares[rows].mean(axis=-1)), count)
    return Divergence(mean(kl), rms, proportion(same))


def reference_of(subject: Subject, subjects: Sequence[Subject]) -> Subject | None:
    """Return the float model of the same weights among the subjects, if there is one.

    A bundle of a tuned model has that of its run, a base as it is that of the base: `--peers torch` is always the base.
    """
    if subject.task != "text-generation" or subject.engine not in COMPARED:
        return None
    if subject.engine == "torch":
        return None
    from edge_ft.artifacts import Bundle

    manifest = Bundle.open(Path(subject.job["bundle"])).manifest
    content, tuned = manifest["provenance"]["base"]["content_sha256"], manifest["lane"] != "base"
    return next(
        (
            other
            for other in subjects
            if other.engine == "torch"
            and other.job["base"]["content_sha256"] == content
            and (other.job["adapter"] is not None) == tuned
        ),
        None,
    )


def divergence_records(
    subjects: Sequence[Subject],
    settings: dict[str, Any],
    environments: dict[Subject, dict[str, Any]],
    progress: Progress,
) -> list[dict[str, Any]]:
    """Compare each subject with its float model, where that is measured too.

    Args:
        subjects: What fitted.
        settings: What `edge_ft.bench.quality.score_settings` returned.
        environments: Machine, versions and settings of each subject.
        progress: Receives what is compared.

    Returns:
        Records as those of `edge_ft.bench.quality`.
    """
    records = []
    pairs = [(subject, reference_of(subject, subjects)) for subject in subjects]
    with TemporaryDirectory(prefix="edge-ft-bench-") as temporary:
        folders: dict[Subject, Path] = {}
        for subject, reference in pairs:
            if reference is None:
                continue
            if reference not in folders:
                folder = folders[reference] = Path(temporary) / str(len(folders))
                folder.mkdir()
                progress.say(f"distributions of {reference.name}")
                job = reference.job | {"score": settings, "reference": str(folder)}
                run_worker(job, f"distributions of {reference.name}", settings["threads"])
            progress.say(f"comparing {subject.name} with {reference.name}")
            job = subject.job | {"compared": str(folders[reference])}
            found = run_worker(job, f"comparing {subject.name}", settings["threads"])
            where = environments[subject] | {"data": Path(settings["data"]).name}
            where |= {"positions": found["positions"], "reference": reference.name}
            for metric, unit in UNITS.items():
                value = found[metric]
                interval = [value["low"], value["high"]]
                records.append(single_record(subject, metric, unit, value["value"], where, interval=interval))
    return records


def write_reference(
    folder: Path, rows: Sequence[tuple[list[int], list[int]]], log_probabilities: Callable[..., Any]
) -> None:
    """Write the float model's log-probabilities for `compare_distributions`.

    Args:
        folder: An empty folder.
        rows: Token ids of a row, and the positions in it that are compared.
        log_probabilities: Ids and positions -> log-probabilities [positions, vocab] of the tokens there.
    """
    import numpy as np

    parts = [log_probabilities(ids, positions) for ids, positions in rows]
    np.save(folder / LOGITS, np.concatenate(parts))
    (folder / ROWS).write_text(json.dumps(list(rows)), encoding="utf-8")


def compare_distributions(folder: Path, log_probabilities: Callable[..., Any]) -> dict[str, Any]:
    """Compare a subject with what `write_reference` wrote.

    Args:
        folder: Where it was written.
        log_probabilities: As there, of the subject.

    Returns:
        The fields of `Divergence`, and the number of `positions`.
    """
    import numpy as np

    rows = json.loads((folder / ROWS).read_text(encoding="utf-8"))
    reference = np.load(folder / LOGITS)
    found = np.concatenate([log_probabilities(ids, positions) for ids, positions in rows])
    targets = np.array([ids[at] for ids, positions in rows for at in positions])
    size = min(reference.shape[1], found.shape[1])  # a vocabulary may be padded
    return asdict(divergence(reference[:, :size], found[:, :size], targets)) | {"positions": len(targets)}


def longest_row(folder: Path) -> int:
    """Return the number of tokens of the longest row that `write_reference` wrote."""
    return max(len(ids) for ids, _ in json.loads((folder / ROWS).read_text(encoding="utf-8")))


def labelled_positions(examples: Sequence[Any]) -> Iterator[tuple[list[int], list[int]]]:
    """Yield ids and labelled positions of the first rows, `POSITIONS` positions in all."""
    from edge_ft.data import IGNORED

    left = POSITIONS
    for example in examples:
        labelled = [at for at, label in enumerate(example.labels) if label != IGNORED and at > 0][:left]
        if labelled:
            yield list(example.input_ids[: labelled[-1] + 1]), labelled
        left -= len(labelled)
        if not left:
            return


def torch_log_probabilities(engine: Any) -> Callable[..., Any]:
    """Return the function of `write_reference` for a torch decoder."""
    import torch

    def found(ids: list[int], positions: list[int]) -> Any:
        with torch.inference_mode():
            logits = engine.model(input_ids=torch.tensor([ids])).logits[0, [at - 1 for at in positions]]
            return torch.log_softmax(logits.float(), dim=-1).numpy()

    return found


def bundle_log_probabilities(engine: Any) -> Callable[..., Any]:
    """Return the function of `write_reference` for a bundle of a decoder."""
    import numpy as np

    from edge_ft.runtime.token_scores import log_softmax

    def found(ids: list[int], positions: list[int]) -> Any:
        row = np.array([ids], np.int64)
        keep = len(ids) - positions[0] + 1  # from the position before the first one
        logits = engine.logits(row, np.ones_like(row), keep)[0]
        return log_softmax(logits[[at - positions[0] for at in positions]])

    return found


def llama_cpp_log_probabilities(engine: Any, vocabulary: int) -> Callable[..., Any]:
    """Return the function of `write_reference` for llama.cpp, which gives one distribution at a time."""
    import numpy as np

    return lambda ids, positions: np.stack([engine.log_probabilities(ids[:at], vocabulary) for at in positions])
