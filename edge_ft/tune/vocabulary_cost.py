"""What a smaller vocabulary saves and costs, for the report: bytes of the weights, and nats per byte of text."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from edge_ft.config import TEXT_TASKS, BaseFormat
from edge_ft.data import IGNORED, Example, TextTokenizer
from edge_ft.evaluate.scoring import Batching, score
from edge_ft.progress import Progress
from edge_ft.system import release_memory
from edge_ft.tune.prepare import Job
from edge_ft.tune.vocabulary import Cut

if TYPE_CHECKING:
    from edge_ft.models.base_model import Base

__all__ = ["measure_cut"]

OTHER_TEXT, OTHER_BYTES = "objects", 2000
"""Text of another domain on which the whole base and the cut one are compared: a topic of Python's own manual, which
comes with Python, and the number of its bytes that are scored."""


def measure_cut(cut: Cut, job: Job, progress: Progress) -> dict[str, Any]:
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


def _load(base: "Base", job: Job) -> tuple[Any, int]:
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
