"""What `edge-ft run` does with a bundle: answer one text, a file of rows, or a person who keeps asking."""

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from edge_ft.artifacts import refuse_existing
from edge_ft.config import RunConfig
from edge_ft.data import Columns, Message, Rendering, Row, read_rows, record
from edge_ft.data.columns import fill_text
from edge_ft.errors import DataError, UsageError
from edge_ft.progress import Progress, track
from edge_ft.runtime import Classification, Conversation, Seq2SeqGenerator, TextGenerator, load
from edge_ft.runtime.decode import TooLong
from edge_ft.runtime.results import Asked, Reader, ask, asked_of, asked_of_row, lines_of, ranked

__all__ = ["answer_file", "answer_one", "converse"]


def answer_one(bundle: Path, text: str, config: RunConfig, stream: TextIO | None) -> dict[str, Any]:
    """Answer one prompt, or say what a bundle of another task makes of one text.

    A text for a model that was trained with a --prompt template of one column is put into that template,
    unless it has the template's form already.

    Args:
        stream: Where the answer is written as it comes; None writes nothing.

    Returns:
        `text`, `prompt_tokens`, `new_tokens`, `finish_reason` and `timings` (seconds), or what `ask` gives.
    """
    opened = _open(bundle, config)
    if not isinstance(opened, TextGenerator | Seq2SeqGenerator):
        _refuse_labels(opened, config)
        (answer,) = ask(opened, [asked_of(opened, text, config.text_pair)], config.top_k)
        lines = lines_of(opened, answer)
    elif config.labels:
        answer = asdict(_labelled(opened, [fill_text(opened.rendering.columns, text)], config)[0])
        lines = ranked(answer["scores"])
    else:
        return _generated(opened, text, config, stream)
    if stream is not None:
        print("\n".join(lines), file=stream)
    return answer


def _generated(
    opened: TextGenerator | Seq2SeqGenerator, text: str, config: RunConfig, stream: TextIO | None
) -> dict[str, Any]:
    """An answer that is written to `stream` as it comes."""
    if config.text_pair is not None:
        raise UsageError(f"--text-pair is for models that read two texts: {opened.bundle.path} answers one prompt")
    prompt = fill_text(opened.rendering.columns, text)
    pieces = opened.stream(prompt, config)
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


def answer_file(bundle: Path, source: Path, out: Path, config: RunConfig, progress: Progress) -> dict[str, Any]:
    """Answer every row of a file into `out`: a JSON line for each row, in its order.

    Returns:
        `rows`, `failed` (those whose line is an `error`: longer than the model can read) and `seconds`.

    Raises:
        DataError: a row that has nothing to answer.
        UsageError: `out` exists, or no row can be answered: then it is what was asked for that cannot be.
    """
    refuse_existing(out)
    started = time.monotonic()
    rows = read_rows(str(source))
    opened = _open(bundle, config)
    if not isinstance(opened, TextGenerator | Seq2SeqGenerator):
        _refuse_labels(opened, config)
        answers: Iterator[dict[str, Any]] = iter(
            ask(opened, [_asked(row, opened.rendering) for row in rows], config.top_k)
        )
    else:
        prompts = [_prompt(row, opened.rendering) for row in rows]
        answers = (_answer_or_error(opened, prompt, config) for prompt in prompts)
    failed = 0
    with _whole_file(out) as file:
        for answer in track(progress, "answer", answers, len(rows)):
            failed += "error" in answer
            file.write(json.dumps(answer, ensure_ascii=False) + "\n")
        if failed == len(rows):
            raise UsageError(f"no row of {source} can be answered; the last: {answer['error']}")
    return {"out": str(out), "rows": len(rows), "failed": failed, "seconds": round(time.monotonic() - started, 3)}


def converse(bundle: Path, config: RunConfig, source: TextIO, target: TextIO) -> None:
    """Answer line after line, each turn going on from the cached tokens, until the input ends.

    Raises:
        UsageError: the bundle is of another task than text-generation, or has no chat template.
    """
    opened = _open(bundle, config)
    if isinstance(opened, Seq2SeqGenerator):
        raise UsageError(f"{bundle} turns one text into another: it cannot hold a conversation")
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
            _say(conversation, line, target)
        except TooLong:
            if not conversation.messages:
                raise  # this message alone is too long
            target.write("(the conversation is as long as the model can read: starting anew)\n")
            conversation = opened.chat(config)
            _say(conversation, line, target)


def _say(conversation: Conversation, line: str, target: TextIO) -> None:
    for piece in conversation.stream(line.rstrip("\n")):
        target.write(piece)
        target.flush()
    target.write("\n")


def _answer_or_error(
    opened: TextGenerator | Seq2SeqGenerator, prompt: str | list[Message], config: RunConfig
) -> dict[str, Any]:
    """One row that cannot be answered does not cost the others theirs."""
    try:
        return asdict(_labelled(opened, [prompt], config)[0] if config.labels else opened.generate(prompt, config))
    except UsageError as error:
        return {"error": str(error)}


def _labelled(
    opened: TextGenerator | Seq2SeqGenerator, prompts: Sequence[Any], config: RunConfig
) -> list[Classification]:
    """What a generator chooses under --labels."""
    if isinstance(opened, Seq2SeqGenerator):
        raise UsageError("--labels is for decoders: an encoder-decoder writes its answer")
    return opened.classify(prompts, None if config.labels == ("auto",) else config.labels)


def _refuse_labels(opened: Reader, config: RunConfig) -> None:
    """Raise UsageError under --labels: the labels of these models are their own."""
    if config.labels:
        own = ", ".join(opened.labels) or "none"
        raise UsageError(f"--labels is for models that write text; this one's labels are its own: {own}")


def _open(bundle: Path, config: RunConfig) -> TextGenerator | Seq2SeqGenerator | Reader:
    return load(bundle, threads=config.threads, accuracy_level=config.accuracy_level, adapter=config.adapter)


def _prompt(row: Row, rendering: Rendering) -> str | list[Message]:
    """The question of a row: as in training where it has those columns, else that of any columns we know."""
    if rendering.columns.fits(list(row.fields), answer=False):
        asked = record(row, rendering.columns, answer=False)
        if asked.messages is None:
            return asked.prompt
        return _question(asked.messages)
    if "messages" in row.fields:
        messages = record(row, Columns("messages"), answer=False).messages
        return _question(messages or [])
    return _text(row, rendering)


def _question(messages: list[Message]) -> list[Message]:
    """A chat without the answer that a row of training data ends with."""
    return messages[:-1] if messages and messages[-1]["role"] == "assistant" else messages


def _asked(row: Row, rendering: Rendering) -> Asked:
    """What a model of whole texts is asked: as in training where the row has those columns, else its one text."""
    asked = asked_of_row(row, rendering)
    return _text(row, rendering) if asked is None else asked


def _text(row: Row, rendering: Rendering) -> str:
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


@contextmanager
def _whole_file(path: Path) -> Iterator[TextIO]:
    """A file that takes its name when the block ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    neighbour = path.with_name(f".{path.name}.tmp")
    try:
        with neighbour.open("w", encoding="utf-8") as file:
            yield file
        neighbour.replace(path)
    finally:
        neighbour.unlink(missing_ok=True)
