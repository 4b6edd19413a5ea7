"""The three ways of `edge-ft run`: one text, a file of rows, and a chat."""

import json
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from edge_ft.config import RunConfig
from edge_ft.data import (
    Chat,
    Columns,
    Rendering,
    Row,
    chat_columns,
    fill_text,
    find_unused,
    read_rows,
    record,
    with_extras,
)
from edge_ft.errors import DataError, UsageError
from edge_ft.files import atomic_file, locked, refuse_existing
from edge_ft.progress import Lines, Progress, say_if_slow, track
from edge_ft.runtime import (
    Classification,
    Conversation,
    EncoderBundle,
    MaskFiller,
    Seq2SeqGenerator,
    TextEmbedder,
    TextGenerator,
    TextTagger,
    load,
)
from edge_ft.runtime.decode import TooLong, read_to_end
from edge_ft.runtime.open_bundle import GenerativeBundle

__all__ = ["run_chat", "run_file", "run_text"]

EncoderInput = str | tuple[str, str] | Sequence[str]
"""A text; two texts for a model that was trained on pairs; the words of a text to tag."""
PROMPTS = (
    Columns("instruction", "{instruction}"),
    Columns("prompt_completion", "{prompt}"),
    Columns("text", "{text}"),
)
"""Columns of a prompt that every bundle takes, beside those of its training rows."""
DEFAULT_TOP_K = 5
"""Classes that are shown, and candidates for a mask."""


def run_text(bundle: Path, text: str, config: RunConfig, stream: TextIO | None) -> dict[str, Any]:
    """Run a bundle on one text: generate an answer, or classify, tag, fill or embed it.

    If the model was trained with a --prompt template of one column, the text is put into that template, unless it
    already has the template's form.

    Args:
        bundle: Its folder.
        text: The prompt or text.
        config: Options of the run.
        stream: Where the result is written, piece by piece if it is generated; None writes nothing.

    Returns:
        `text`, `prompt_tokens`, `new_tokens`, `finish_reason` and `timings` (seconds); or `label` and `scores`, `tags`
        and `words`, `fills` and `text`, or `embedding`, with `prompt_tokens` and `cut`. And `engine`: accuracy level
        and threads of `prefill` and `decode`, and `nll_above_exact` (nats per token; None: not scored).

    Raises:
        UsageError: options that do not fit the bundle.
    """
    opened = _open(bundle, config)
    if not isinstance(opened, GenerativeBundle):
        (result,) = _predict(opened, [_input_of_text(opened, text, config.text_pair)], config.top_k)
        lines = _format_result(opened, result)
    elif config.labels:
        result = asdict(_classify(opened, [fill_text(opened.rendering.columns, text)], config)[0])
        lines = _format_scores(result["scores"])
    elif config.text_pair is not None:
        raise UsageError(f"--text-pair is for models that read two texts: {opened.bundle.path} reads one prompt")
    else:
        result = asdict(read_to_end(opened.stream(fill_text(opened.rendering.columns, text), config), stream))
        lines = []
    if stream is not None:
        print("\n".join(lines), file=stream)
    return {**result, **_engine_of(opened)}


def _engine_of(opened: TextGenerator | Seq2SeqGenerator | EncoderBundle) -> dict[str, Any]:
    """Return how an open bundle runs, as the `engine` of a result."""
    return {} if opened.engine is None else {"engine": opened.engine.plain()}


def run_file(bundle: Path, source: Path, out: Path, config: RunConfig, progress: Progress) -> dict[str, Any]:
    """Run a bundle on every row of a file.

    Args:
        bundle: Its folder.
        source: Rows file.
        out: JSON Lines file to write, a line for each row in order; must not exist.
        config: Options of the run.
        progress: Receives the number of rows that are done.

    Returns:
        `out`, `rows`, `failed` (rows whose line is an `error`: longer than the model can read), `seconds`, and `engine`
        as `run_text` says.

    Raises:
        DataError: a row without a text.
        UsageError: `out` exists, or every row failed; then nothing is written.
    """
    with locked(out):
        refuse_existing(out)
        return _run_file(bundle, source, out, config, progress)


def _run_file(bundle: Path, source: Path, out: Path, config: RunConfig, progress: Progress) -> dict[str, Any]:
    """Run a bundle on every row of a file, without a lock.

    Returns:
        What `run_file` returns.

    Raises:
        UsageError: every row failed.
    """
    started = time.monotonic()
    rows = read_rows(str(source))
    opened, left_out = _open(bundle, config, progress), dict[int, tuple[str, ...]]()
    if not isinstance(opened, GenerativeBundle):
        inputs = [_input_of_row(row, opened.rendering) for row in rows]
        results: Iterator[dict[str, Any]] = iter(_predict(opened, inputs, config.top_k))
    else:
        prompts = [_prompt(row, opened.rendering) for row in rows]
        for row, prompt in zip(rows, prompts, strict=True):
            with suppress(UsageError):  # a template that fails is the error of its row, below
                left_out[row.number] = opened.unread_by(prompt, config)
        results = _results(opened, prompts, config)
    for message in _report_unused(rows, opened, left_out):
        progress.say(f"{source}: {message}")
    failed = 0
    sharing = opened.sharing_beginnings() if isinstance(opened, TextGenerator) else nullcontext()
    with sharing, atomic_file(out) as path, path.open("w", encoding="utf-8") as file:
        for result in track(progress, "answer", results, len(rows)):
            failed += "error" in result
            file.write(json.dumps(result, ensure_ascii=False) + "\n")
        if failed == len(rows):
            raise UsageError(f"no row of {source} can be answered; the last: {result['error']}")
    seconds = round(time.monotonic() - started, 3)
    return {"out": str(out), "rows": len(rows), "failed": failed, "seconds": seconds, **_engine_of(opened)}


def run_chat(bundle: Path, config: RunConfig, source: Iterable[str], target: TextIO) -> None:
    """Answer one line of input after another in a conversation, until the input ends.

    Args:
        bundle: Its folder.
        config: Options of every answer.
        source: A message in every line.
        target: Where the input prompt and the answers are written.

    Raises:
        UsageError: the bundle is not for text-generation, or has no chat template.
        TooLong: a message is longer than the model can read even at the start of a conversation.
    """
    opened = _open(bundle, config)
    conversation = opened.chat(config)
    print("> ", end="", file=target, flush=True)
    for line in source:
        if line.strip():
            try:
                _reply(conversation, line, target)
            except TooLong:
                if not conversation.messages:
                    raise  # this message alone is too long
                target.write("(the conversation has reached the model's limit: starting a new one)\n")
                conversation = opened.chat(config)
                _reply(conversation, line, target)
        print("> ", end="", file=target, flush=True)
    print(file=target)


def _reply(conversation: Conversation, line: str, target: TextIO) -> None:
    read_to_end(conversation.stream(line.rstrip("\n")), target)
    print(file=target)


def _results(
    opened: TextGenerator | Seq2SeqGenerator, prompts: Sequence[str | Chat], config: RunConfig
) -> Iterator[dict[str, Any]]:
    """Yield the answer to each row, or its error, so that one bad row does not stop the others."""
    if not config.labels:
        answers = opened.generate_each(prompts, config)
        yield from ({"error": str(found)} if isinstance(found, UsageError) else asdict(found) for found in answers)
        return
    for prompt in prompts:
        try:
            yield asdict(_classify(opened, [prompt], config)[0])
        except UsageError as error:
            yield {"error": str(error)}


def _classify(
    opened: TextGenerator | Seq2SeqGenerator, prompts: Sequence[Any], config: RunConfig
) -> list[Classification]:
    """Return the likeliest of --labels for each prompt; `_open` has refused an encoder-decoder."""
    return opened.classify(prompts, None if config.labels == ("auto",) else config.labels)


def _open(
    bundle: Path, config: RunConfig, progress: Progress | None = None
) -> TextGenerator | Seq2SeqGenerator | EncoderBundle:
    """Return the open bundle; `progress` (default: stderr) receives what happens if that takes seconds.

    Raises:
        UsageError: --labels or --overflow for a model that is not a decoder.
    """
    first = "the first time, all files are checked and the fastest of its graphs is found"
    with say_if_slow(progress or Lines(), f"opening {bundle}: {first}"):
        opened = load(
            bundle,
            threads=config.threads,
            accuracy_level=config.accuracy_level,
            adapter=config.adapter,
            engine=config.engine,
        )
    if config.overflow != "error" and not isinstance(opened, TextGenerator):
        raise UsageError("--overflow is for decoders: other models read texts up to their limit")
    if config.labels and isinstance(opened, Seq2SeqGenerator):
        raise UsageError("--labels is for decoders: an encoder-decoder generates its answer")
    if config.labels and not isinstance(opened, TextGenerator):
        own = ", ".join(opened.labels) or "none"
        raise UsageError(f"--labels is for models that generate text; the labels of this one are fixed: {own}")
    return opened


def _columns_of(row: Row, rendering: Rendering) -> Columns:
    """Return the columns of a row's prompt: those of the training rows, else others that are known.

    Raises:
        DataError: no column is known to hold a text.
    """
    names = list(row.fields)
    others: list[Columns | None] = [*PROMPTS]
    if rendering.task == "text-generation":
        others = [chat_columns(names), *(with_extras(columns, names) for columns in PROMPTS)]
    for columns in (rendering.columns, *others):
        if columns is not None and columns.fits(names, answer=False):
            return columns
    raise DataError(
        f"row {row.number} has the columns {', '.join(row.fields)}: "
        "it needs those of the training rows, or one called messages, instruction, prompt or text"
    )


def _prompt(row: Row, rendering: Rendering) -> str | Chat:
    """Return a row's prompt: as in training if it has the same columns, else a chat or a text in the same template."""
    columns = _columns_of(row, rendering)
    found = record(row, columns, answer=False)
    if found.chat is not None:
        return found.chat.before_answer  # a training row ends with the answer
    return found.prompt if columns == rendering.columns else fill_text(rendering.columns, found.prompt)


def _report_unused(
    rows: Sequence[Row], opened: TextGenerator | Seq2SeqGenerator | EncoderBundle, left_out: dict[int, tuple[str, ...]]
) -> list[str]:
    """Return a message for each set of rows that say what the model does not read."""
    known: dict[Columns, list[Row]] = {}
    for row in rows:
        known.setdefault(_columns_of(row, opened.rendering), []).append(row)
    return [
        f"{finding.message} [{finding.code}]"
        for columns, same in known.items()
        for finding in find_unused(same, columns, left_out, answers=False)
    ]


def _input_of_text(opened: EncoderBundle, text: str, pair: str | None) -> EncoderInput:
    """Return the input for a text, and a second one; a template of one column is applied.

    Raises:
        UsageError: a second text for a model that reads one, or none for a model that reads two.
    """
    columns = opened.rendering.columns
    if (pair is not None) != (columns.pair is not None):
        fix = "reads two texts: give --text-pair" if pair is None else "reads one text: leave --text-pair out"
        raise UsageError(f"{opened.bundle.path} {fix}")
    if isinstance(opened, TextTagger | MaskFiller):
        return text
    first = fill_text(columns, text)
    return first if pair is None else (first, fill_text(Columns("template", columns.pair), pair))


def _input_of_row(row: Row, rendering: Rendering) -> EncoderInput:
    """Return a row's input: as in training if it has the same columns, else its one text."""
    columns = _columns_of(row, rendering)
    found = record(row, columns, answer=False)
    if columns.kind == "tokens":
        return found.words
    if columns != rendering.columns:
        return fill_text(rendering.columns, found.prompt)
    return found.prompt if found.pair is None else (found.prompt, found.pair)


def _predict(opened: EncoderBundle, inputs: Sequence[Any], top_k: int) -> list[dict[str, Any]]:
    """Return a JSON object for each input.

    It has `label` and `scores`, `tags` and `words`, `fills` and `text`, or `embedding`; and `prompt_tokens` and `cut`.
    """
    if isinstance(opened, MaskFiller):
        return [asdict(found) for found in opened.fill(inputs, top_k or DEFAULT_TOP_K)]
    if isinstance(opened, TextEmbedder):
        texts = opened.tokenize(inputs)
        return [
            {"embedding": vector.tolist(), "prompt_tokens": len(text.ids), "cut": text.cut}
            for vector, text in zip(opened.embed_tokenized(texts), texts, strict=True)
        ]
    if isinstance(opened, TextTagger):
        return [{"tags": found.tags, **asdict(found)} for found in opened.tag(inputs)]
    return [asdict(found) for found in opened.classify(inputs)]


def _format_result(opened: EncoderBundle, result: dict[str, Any]) -> list[str]:
    """Return a result of `_predict` as lines for people."""
    if isinstance(opened, TextTagger):
        return [
            f"{word['text']}\t{word['label'] or '-'}\t" + ("-" if word["score"] is None else f"{word['score']:.2%}")
            for word in result["words"]
        ]
    if isinstance(opened, TextEmbedder):
        return [" ".join(f"{value:.6f}" for value in result["embedding"])]
    if isinstance(opened, MaskFiller):
        candidates = [f"{fill['score']:7.2%}  {fill['token']}" for fills in result["fills"] for fill in fills]
        return [*candidates, result["text"]]
    scores: dict[str, float] = result["scores"]
    if opened.problem == "regression":
        return [f"{score:.4g}  {label}" for label, score in scores.items()]
    if opened.problem == "single_label_classification":
        return _format_scores(scores)
    return _format_scores(scores, {label: "* " if label in result["label"] else "  " for label in scores})


def _format_scores(scores: dict[str, float], marks: dict[str, str] | None = None) -> list[str]:
    """Return a line for each of the likeliest labels: its probability, its mark and its name."""
    best = sorted(scores.items(), key=lambda pair: -pair[1])[:DEFAULT_TOP_K]
    return [f"{score:7.2%}  {(marks or {}).get(label, '')}{label}" for label, score in best]
