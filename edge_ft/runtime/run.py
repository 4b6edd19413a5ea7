"""The three ways of `edge-ft run`: one text, a file of rows, and a chat."""

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from edge_ft.artifacts import atomic_file, refuse_existing
from edge_ft.config import RunConfig
from edge_ft.data import Columns, Message, Rendering, Row, fill_text, read_rows, record
from edge_ft.errors import DataError, UsageError
from edge_ft.progress import Progress, track
from edge_ft.runtime import Classification, Conversation, Seq2SeqGenerator, TextGenerator, load
from edge_ft.runtime.decode import TooLong
from edge_ft.runtime.generative_bundle import GenerativeBundle
from edge_ft.runtime.results import (
    EncoderBundle,
    EncoderInput,
    format_result,
    format_scores,
    input_of_row,
    input_of_text,
    predict,
)

__all__ = ["run_chat", "run_file", "run_text"]


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
        `text`, `prompt_tokens`, `new_tokens`, `finish_reason` and `timings` (seconds), or an object of `predict`.

    Raises:
        UsageError: options that do not fit the bundle.
    """
    opened = _open(bundle, config)
    if not isinstance(opened, GenerativeBundle):
        _refuse_labels(opened, config)
        (result,) = predict(opened, [input_of_text(opened, text, config.text_pair)], config.top_k)
        lines = format_result(opened, result)
    elif config.labels:
        result = asdict(_classify(opened, [fill_text(opened.rendering.columns, text)], config)[0])
        lines = format_scores(result["scores"])
    else:
        return _generate(opened, text, config, stream)
    if stream is not None:
        print("\n".join(lines), file=stream)
    return result


def run_file(bundle: Path, source: Path, out: Path, config: RunConfig, progress: Progress) -> dict[str, Any]:
    """Run a bundle on every row of a file.

    Args:
        bundle: Its folder.
        source: Rows file.
        out: JSON Lines file to write, a line for each row in order; must not exist.
        config: Options of the run.
        progress: Receives the number of rows that are done.

    Returns:
        `out`, `rows`, `failed` (rows whose line is an `error`: longer than the model can read) and `seconds`.

    Raises:
        DataError: a row without a text.
        UsageError: `out` exists, or every row failed; then nothing is written.
    """
    refuse_existing(out)
    started = time.monotonic()
    rows = read_rows(str(source))
    opened = _open(bundle, config)
    if not isinstance(opened, GenerativeBundle):
        _refuse_labels(opened, config)
        inputs = [_encoder_input(row, opened.rendering) for row in rows]
        results: Iterator[dict[str, Any]] = iter(predict(opened, inputs, config.top_k))
    else:
        prompts = [_prompt(row, opened.rendering) for row in rows]
        results = (_result_or_error(opened, prompt, config) for prompt in prompts)
    failed = 0
    with atomic_file(out) as path, path.open("w", encoding="utf-8") as file:
        for result in track(progress, "answer", results, len(rows)):
            failed += "error" in result
            file.write(json.dumps(result, ensure_ascii=False) + "\n")
        if failed == len(rows):
            raise UsageError(f"no row of {source} can be answered; the last: {result['error']}")
    return {"out": str(out), "rows": len(rows), "failed": failed, "seconds": round(time.monotonic() - started, 3)}


def run_chat(bundle: Path, config: RunConfig, source: TextIO, target: TextIO) -> None:
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
    while True:
        target.write("> ")
        target.flush()
        line = source.readline()
        if not line:
            target.write("\n")
            return
        if not line.strip():
            continue
        try:
            _reply(conversation, line, target)
        except TooLong:
            if not conversation.messages:
                raise  # this message alone is too long
            target.write("(the conversation has reached the model's limit: starting a new one)\n")
            conversation = opened.chat(config)
            _reply(conversation, line, target)


def _reply(conversation: Conversation, line: str, target: TextIO) -> None:
    for piece in conversation.stream(line.rstrip("\n")):
        target.write(piece)
        target.flush()
    target.write("\n")


def _generate(
    opened: TextGenerator | Seq2SeqGenerator, text: str, config: RunConfig, stream: TextIO | None
) -> dict[str, Any]:
    """Return a generated answer, written to `stream` piece by piece.

    Raises:
        UsageError: a second text.
    """
    if config.text_pair is not None:
        raise UsageError(f"--text-pair is for models that read two texts: {opened.bundle.path} reads one prompt")
    pieces = opened.stream(fill_text(opened.rendering.columns, text), config)
    while True:
        try:
            piece = next(pieces)
        except StopIteration as end:
            if stream is not None:
                print(file=stream)
            return asdict(end.value)
        if stream is not None:
            stream.write(piece)
            stream.flush()


def _result_or_error(
    opened: TextGenerator | Seq2SeqGenerator, prompt: str | list[Message], config: RunConfig
) -> dict[str, Any]:
    """Return the answer to a row, or its error, so that one bad row does not stop the others."""
    try:
        return asdict(_classify(opened, [prompt], config)[0] if config.labels else opened.generate(prompt, config))
    except UsageError as error:
        return {"error": str(error)}


def _classify(
    opened: TextGenerator | Seq2SeqGenerator, prompts: Sequence[Any], config: RunConfig
) -> list[Classification]:
    """Return the likeliest of --labels for each prompt.

    Raises:
        UsageError: the bundle is an encoder-decoder.
    """
    if isinstance(opened, Seq2SeqGenerator):
        raise UsageError("--labels is for decoders: an encoder-decoder generates its answer")
    return opened.classify(prompts, None if config.labels == ("auto",) else config.labels)


def _refuse_labels(opened: EncoderBundle, config: RunConfig) -> None:
    """Refuse --labels for a model with labels of its own.

    Raises:
        UsageError: it is given.
    """
    if config.labels:
        own = ", ".join(opened.labels) or "none"
        raise UsageError(f"--labels is for models that generate text; the labels of this one are fixed: {own}")


def _open(bundle: Path, config: RunConfig) -> TextGenerator | Seq2SeqGenerator | EncoderBundle:
    return load(bundle, threads=config.threads, accuracy_level=config.accuracy_level, adapter=config.adapter)


def _prompt(row: Row, rendering: Rendering) -> str | list[Message]:
    """Return a row's prompt: as in training if it has the same columns, else from any columns that are known."""
    known = (rendering.columns, Columns("messages"))
    columns = next((columns for columns in known if columns.fits(list(row.fields), answer=False)), None)
    messages = None if columns is None else record(row, columns, answer=False).messages
    if messages is None:
        return _text(row, rendering)
    # A training row ends with the answer.
    return messages[:-1] if messages and messages[-1]["role"] == "assistant" else messages


def _encoder_input(row: Row, rendering: Rendering) -> EncoderInput:
    """Return a row's input: as in training if it has the same columns, else its one text."""
    found = input_of_row(row, rendering)
    return _text(row, rendering) if found is None else found


def _text(row: Row, rendering: Rendering) -> str:
    """Return a row's one text, in the bundle's template.

    Raises:
        DataError: no column is known to hold a text.
    """
    if rendering.columns.fits(list(row.fields), answer=False):
        return record(row, rendering.columns, answer=False).prompt
    for columns in (
        Columns("instruction", "{instruction}"),
        Columns("template", "{prompt}"),
        Columns("text", "{text}"),
    ):
        if columns.fits(list(row.fields), answer=False):
            return fill_text(rendering.columns, record(row, columns, answer=False).prompt)
    raise DataError(
        f"row {row.number} has the columns {', '.join(row.fields)}: "
        "it needs those of the training rows, or one called instruction, prompt or text"
    )
