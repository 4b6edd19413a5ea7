"""Solved train examples in front of a prompt: what a model does without tuning."""

from collections.abc import Sequence

from edge_ft.data import Example, Message, Record, Rendering, Row, TextTokenizer, encode_example, record
from edge_ft.data.tokenizer import Filled
from edge_ft.errors import UsageError

__all__ = ["encode_few_shot"]


def encode_few_shot(
    rendering: Rendering, tokenizer: TextTokenizer, rows: Sequence[Row], shots: Sequence[Row]
) -> list[Example]:
    """Examples whose prompts start with the solved `shots`; only the row's own answer is scored.

    Raises:
        UsageError: the rows have no prompt to put anything before.
        DataError: a row that cannot be used; the message names it.
    """
    if rendering.task != "text-generation":
        raise UsageError("--shots is for text-generation")
    if rendering.columns.kind != "messages" and not rendering.columns.prompt:
        raise UsageError("--shots needs rows with a prompt: these are text alone")
    solved = [record(row, rendering.columns) for row in shots]
    examples = []
    for row in rows:
        asked = record(row, rendering.columns)
        if rendering.chat_template is not None:
            own, before_it = _turns(asked), [turn for shot in solved for turn in _turns(shot)]
            # One system message for all, the row's own if it has one: templates allow it at the start only.
            system = [turn for turn in [*own, *before_it] if turn["role"] == "system"][:1]
            solved_turns = [turn for turn in before_it if turn["role"] != "system"]
            rest = [turn for turn in own if turn not in system]
            combined = Record(row.number, [*system, *solved_turns, *rest], "", None, None)
        elif asked.messages is None:
            # Joined so that a template's own control tokens stay what they are.
            before = [text for shot in solved for text in (shot.prompt, shot.completion or "", Filled(["\n\n"]))]
            combined = Record(row.number, None, Filled.concat([*before, asked.prompt]), asked.completion, None)
        else:
            raise UsageError("--shots needs a chat template for rows of messages")
        example = encode_example(rendering, tokenizer, combined)
        example.labels[: example.prompt_length] = [-100] * example.prompt_length
        examples.append(example)
    return examples


def _turns(example: Record) -> list[Message]:
    if example.messages is not None:
        return example.messages
    return [{"role": "user", "content": example.prompt}, {"role": "assistant", "content": example.completion or ""}]
