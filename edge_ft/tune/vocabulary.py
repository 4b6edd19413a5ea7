"""`--vocabulary rows`: the base of a run has the tokens that its training rows and a general text need."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edge_ft.artifacts import RunFolder
from edge_ft.config import TEXT_TASKS, BaseFormat, Task, TuneConfig
from edge_ft.data import IGNORED, Example, TextTokenizer, evenly_spaced
from edge_ft.evaluate.scoring import Batching, score
from edge_ft.progress import Progress
from edge_ft.system import release_memory

if TYPE_CHECKING:
    from edge_ft.models.base_model import Base
    from edge_ft.models.vocabulary import Vocabulary
    from edge_ft.tune.prepare import Job, Prepared

__all__ = ["Cut", "compare_tokens", "find_vocabulary", "measure_cut"]

LABELS_ARE_TOKENS: tuple[Task, ...] = ("text-generation", "text2text-generation", "fill-mask")
"""Tasks whose labels are token ids: those of the others are classes or numbers."""
MEASURED_ROWS = 16
"""Validation rows on which the whole base and the cut one are compared."""
OTHER_TEXT, OTHER_BYTES = "objects", 2000
"""Text of another domain on which they are compared: a topic of Python's own manual, which comes with Python, and the
number of its bytes that are scored."""


@dataclass(frozen=True)
class Cut:
    """How the base of a run was made from a whole one."""

    whole: "Base"
    figures: dict[str, Any]
    """`kept`, `of`, and `tokens_per_row` of each split before and after."""
    rows: tuple[Sequence[Example], Sequence[Example]]
    """Some validation rows, in tokens of the whole base and in those that are kept."""


def find_vocabulary(config: TuneConfig, base: "Base", whole: "Prepared", resumed: bool) -> "Vocabulary":
    """Return the tokens that the base of a run keeps: those that an interrupted run has chosen, else by its rows.

    Args:
        config: With the run folder.
        base: The whole model.
        whole: The rows, in its tokens.
        resumed: Whether the folder holds an interrupted run.

    Returns:
        The tokens.

    Raises:
        ModelError: a kind of tokenizer that cannot be cut, or a damaged record of the interrupted run.
    """
    from edge_ft.models.vocabulary import Vocabulary, choose_vocabulary

    recorded = RunFolder(config.out).vocabulary
    if resumed and recorded.is_file():
        return Vocabulary.read(recorded)
    train = whole.examples["train"]
    used = {at for row in train for ids in (row.input_ids, row.pair_ids) for at in ids}
    if whole.task in LABELS_ARE_TOKENS:
        used |= {int(at) for row in train for at in row.labels if at != IGNORED}
    return choose_vocabulary(base, used)


def compare_tokens(whole: "Base", base: "Base", before: "Prepared", after: "Prepared", progress: Progress) -> Cut:
    """Compare the tokens of the rows.

    Args:
        whole: The whole base.
        base: The cut one.
        before: The rows in tokens of the whole model.
        after: The same rows in those that are kept.
        progress: Gets how many tokens a row takes.

    Returns:
        How many tokens are kept, and how many the rows take.
    """
    rows = {
        split: {"before": _mean_length(before.examples[split]), "after": _mean_length(after.examples[split])}
        for split in before.examples
        if before.examples[split]
    }
    kept, of, shown = base.dims.vocabulary, whole.dims.vocabulary, rows["validation"]
    progress.say(
        f"--vocabulary rows: {kept} of {of} tokens are kept; a validation row takes {shown['after']:.1f} tokens, "
        f"before {shown['before']:.1f}"
    )
    uncut = {example.row: example for example in after.examples["validation"] if not example.cut}
    pairs = [
        (example, uncut[example.row])
        for example in before.examples["validation"]
        if not example.cut and example.row in uncut
    ]
    chosen = evenly_spaced(pairs, MEASURED_ROWS)
    figures = {"kept": kept, "of": of, "tokens_per_row": rows}
    return Cut(whole, figures, ([one for one, _ in chosen], [other for _, other in chosen]))


def _mean_length(examples: Sequence[Example]) -> float:
    return round(float(np.mean([len(example.input_ids) for example in examples])), 2)


def measure_cut(cut: Cut, job: "Job", progress: Progress) -> dict[str, Any]:
    """Compare the whole base and the cut one, both rounded to nearest in the format of the run and untuned.

    Args:
        cut: Both.
        job: With all settings resolved.
        progress: Gets the state of the scoring.

    Returns:
        `Cut.figures`, and before and after: `bytes` of the weights; of a model that writes text `nats_per_byte` of
        the answers to some `validation` rows and, of a decoder, of text of `other` domains, and the
        `tokens_of_other_text`.
    """
    task = job.prepared.task
    columns: dict[str, dict[str, Any]] = {}
    for name, base, rows in (("before", cut.whole, cut.rows[0]), ("after", job.base, cut.rows[1])):
        tokenizer, found = base.open_tokenizer(), dict[str, Any]()
        texts = {"validation": list(rows)} if task in TEXT_TASKS else {}
        if task == "text-generation":
            texts["other"] = _other_text(tokenizer, (cut.whole, job.base))
        model, found["bytes"] = _load(base, job)
        for what, examples in texts.items():
            if examples:
                batching = Batching(task, tokenizer.pad_id, 4)
                nats = score(model, examples, batching, progress, f"{what} text, {name} the cut").nll.sum()
                size = sum(len(_answer(example, tokenizer).encode()) for example in examples)
                found[what] = round(float(nats) / size, 4) if size else None
        found["tokens"] = sum(len(example.input_ids) - 1 for example in texts.get("other", ()))
        columns[name] = found
        del model
        release_memory()

    def both(name: str) -> dict[str, Any]:
        return {column: found.get(name) for column, found in columns.items()}

    measured: dict[str, Any] = {"bytes": both("bytes")}
    if names := [name for name in ("validation", "other") if name in columns["before"]]:
        measured["nats_per_byte"] = {name: both(name) for name in names}
    if "other" in columns["before"]:
        measured["tokens_of_other_text"] = both("tokens")
    return {**cut.figures, **measured}


def _load(base: "Base", job: "Job") -> tuple[Any, int]:
    """Return the untuned task model of a base as a scorer, and the bytes of its weights as they ship.

    Scales count as float32: as float16 they take half, and the bytes that this saves go to 8 bits for some rows.
    """
    import torch

    from edge_ft.models.loading import ModelSpec, load_model
    from edge_ft.models.scorer import TorchScorer
    from edge_ft.quant.devices import to_device

    ships: BaseFormat = "int8" if job.config.base_format == "int8" else "int4"
    spec = ModelSpec.from_rendering(base, job.prepared.rendering, ships, seed=job.config.seed)
    model = to_device(load_model(spec), "cuda" if torch.cuda.is_available() else "cpu")
    tensors = {tensor.data_ptr(): tensor.nbytes for tensor in model.state_dict(keep_vars=True).values()}
    return TorchScorer(model, job.prepared.task), sum(tensors.values())


def _other_text(tokenizer: TextTokenizer, bases: "Sequence[Base]") -> list[Example]:
    """Return paragraphs of text of another domain as rows of which every token is scored."""
    from pydoc_data.topics import topics

    start = next(at for at in (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) if at is not None)
    longest = min(base.max_length for base in bases) - 1  # a text has at most as many tokens as bytes
    found: list[Example] = []
    size = 0
    for number, paragraph in enumerate(topics[OTHER_TEXT].split("\n\n")):
        if size < OTHER_BYTES and paragraph.strip():
            text = paragraph.encode()[:longest].decode(errors="ignore")
            ids = tokenizer.encode(text)
            found.append(Example(number, [start, *ids], [IGNORED, *ids], 1, text, 0))
            size += len(text.encode())
    return found


def _answer(example: Example, tokenizer: TextTokenizer) -> str:
    """Return the text of the tokens that are scored."""
    return tokenizer.decode([int(at) for at in example.labels if at != IGNORED])
