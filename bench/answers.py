"""`bench --html`: what each subject answers, to texts of our own or, where the user wants, to rows of their data."""

from typing import Any

from edge_ft.bench.quality import score_settings
from edge_ft.bench.report import single_record
from edge_ft.bench.subjects import Subject
from edge_ft.config import TEXT_TASKS, BenchConfig, EvalConfig
from edge_ft.progress import Silent

__all__ = ["ANSWERED_ROWS", "answer", "answer_records", "answer_settings"]

ANSWERED_ROWS = 5
"""Rows of the user's data that a page shows."""
_LONGEST_PROMPT = 600
"""Characters of a prompt that a page shows."""
_TEXTS = (
    "The pump in the cellar runs at night, when power is cheap. It lifts water",
    "Question: How do I clean the filter?\nAnswer:",
    "Three things to check before winter:\n1.",
)
"""What a subject continues where rows of the user are not to be shown."""


def answer_settings(subject: Subject, config: BenchConfig, threads: int) -> dict[str, Any] | None:
    """Settings of the job `answer`.

    Returns:
        As plain values; None without a page, and for a classifier without rows, which has nothing to answer.
    """
    if config.html is None:
        return None
    if config.include_samples:
        rows = score_settings(config, threads)
        return {"rows": rows | {"limit": min(config.limit or ANSWERED_ROWS, ANSWERED_ROWS)}}
    return {"threads": threads, "max_new_tokens": config.new_tokens} if subject.task in TEXT_TASKS else None


def answer(job: dict[str, Any]) -> dict[str, Any]:
    """Let the subject of a measuring job answer.

    Args:
        job: The job that measures the subject, with `answer`: what `answer_settings` returned.

    Returns:
        `answers`, each `{prompt, reference, answer}`; the reference is None for our own texts.
    """
    settings = job["answer"]
    return {"answers": _answer_rows(job, settings["rows"]) if "rows" in settings else _continue(job, settings)}


def answer_records(
    subject: Subject, answers: list[dict[str, Any]], environment: dict[str, Any]
) -> list[dict[str, Any]]:
    """Make the record of what a subject answered: its value is the number of answers.

    Returns:
        A record with `answers`, or none where there are no answers.
    """
    if not answers:
        return []
    return [single_record(subject, "answers", "", len(answers), environment, answers=answers)]


def _continue(job: dict[str, Any], settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Answers to `_TEXTS`, as they stand, without template."""
    if job["do"] == "bundle":
        from edge_ft.runtime import load

        scorer: Any = load(job["bundle"], threads=settings["threads"], accuracy_level=job["accuracy_level"])
        tokenizer = scorer.tokenizer
    else:
        from edge_ft.bench.torch_peer import load_peer, prepare
        from edge_ft.models.scorer import TorchScorer

        engine = load_peer(prepare(job), job)
        tokenizer = engine.tokenizer
        scorer = TorchScorer(engine.model, job["task"], tokenizer.stop_ids)
    before = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    framed = job["task"] == "text2text-generation"
    found = []
    for text in _TEXTS:
        ids = tokenizer.encode_framed(text, 512).ids if framed else before + tokenizer.encode(text)
        written = tokenizer.decode(scorer.answer(ids, settings["max_new_tokens"]))
        found.append({"prompt": text, "reference": None, "answer": written})
    return found


def _answer_rows(job: dict[str, Any], settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Answers to the first rows of the user's data, read as for the scores."""
    from edge_ft.bench.quality import open_subject
    from edge_ft.data import encode_rows, read_rows
    from edge_ft.evaluate.generation import generate_answers
    from edge_ft.evaluate.scoring import Batching, drop_unscorable, format_prediction, score

    rows = read_rows(settings["data"])[: settings["limit"]]
    config = EvalConfig(**settings, accuracy_level=job.get("accuracy_level"))
    opened = open_subject(job, rows, config)
    tokenizer, rendering = opened.tokenizer, opened.rendering
    read = encode_rows(rendering, tokenizer, rows)
    examples, _ = drop_unscorable(read, config.data, rendering.max_length, Silent())
    if rendering.task in TEXT_TASKS:
        examples = [example for example in examples if example.prompt_length]
        answers = [one.text for one in generate_answers(opened, examples, config.max_new_tokens, Silent())]
        prompts = [tokenizer.decode(example.input_ids[: example.prompt_length]) for example in examples]
    else:
        batching = Batching(rendering.task, tokenizer.pad_id, config.batch_size)
        predicted = score(opened.scorer, examples, batching, Silent(), "answer").predicted
        answers = [format_prediction(one, rendering, tokenizer) for one in predicted]
        prompts = [tokenizer.decode(example.input_ids) for example in examples]
    return [
        {"prompt": prompt[:_LONGEST_PROMPT], "reference": example.reference, "answer": text}
        for prompt, example, text in zip(prompts, examples, answers, strict=False)
    ]
