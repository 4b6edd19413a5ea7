"""Few-shot prompts: solved training examples before a prompt."""

from collections.abc import Sequence

from edge_ft.data import (
    IGNORED,
    Chat,
    Example,
    Filled,
    Message,
    Record,
    Rendering,
    Row,
    TextTokenizer,
    chat_record,
    encode_example,
    record,
)
from edge_ft.errors import UsageError

__all__ = ["encode_few_shot"]


def encode_few_shot(
    rendering: Rendering, tokenizer: TextTokenizer, rows: Sequence[Row], shots: Sequence[Row]
) -> list[Example]:
    """Encode rows with the solved `shots` before each prompt; only the row's own answer is scored.

    Args:
        rendering: How the rows are rendered.
        tokenizer: Tokenizer of the model.
        rows: Rows to score.
        shots: Rows to put before each prompt, with the same columns.

    Returns:
        An example per row.

    Raises:
        UsageError: rows that have no prompt, or chats without a chat template.
        DataError: a row cannot be used; the message names it.
    """
    if rendering.task != "text-generation":
        raise UsageError(f"--shots is for text-generation, and the task is {rendering.task}: leave it out")
    if rendering.columns.kind != "messages" and not rendering.columns.prompt:
        raise UsageError("--shots needs rows with a prompt, and these have only a text: leave it out")
    solved = [record(row, rendering.columns) for row in shots]
    examples = []
    for row in rows:
        question = record(row, rendering.columns)
        if rendering.chat_template is not None:
            own, before = _turns(question), [turn for shot in solved for turn in _turns(shot)]
            # Chat templates allow one system message at the start: the row's own, else that of the first shot with one.
            system = [turn for turn in [*own, *before] if turn["role"] == "system"][:1]
            solved_turns = [turn for turn in before if turn["role"] != "system"]
            turns = [*system, *solved_turns, *(turn for turn in own if turn not in system)]
            combined = chat_record(row.number, Chat(turns, None if question.chat is None else question.chat.tools))
        elif question.messages is None:
            # `concat` keeps control tokens of the template as control tokens.
            texts = [text for shot in solved for text in (shot.prompt, shot.completion or "", Filled(["\n\n"]))]
            combined = Record(row.number, None, Filled.concat([*texts, question.prompt]), question.completion, None)
        else:
            raise UsageError("--shots needs a chat template for rows of messages: give one with --chat-template FILE")
        example = encode_example(rendering, tokenizer, combined)
        example.labels[: example.prompt_length] = [IGNORED] * example.prompt_length
        examples.append(example)
    return examples


def _turns(example: Record) -> list[Message]:
    if example.messages is not None:
        return example.messages
    return [{"role": "user", "content": example.prompt}, {"role": "assistant", "content": example.completion or ""}]
