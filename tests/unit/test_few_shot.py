"""Solved examples come before the prompt, and only the row's own answer is scored."""

from pathlib import Path
from typing import Any

import pytest

from edge_ft.config import RowsConfig
from edge_ft.data import Row, TextTokenizer, plain_rendering
from edge_ft.evaluate.few_shot import encode_few_shot
from edge_ft.models.base_model import find_base


def chat(system: str | None, user: str) -> dict[str, Any]:
    turns = [("system", system), ("user", user), ("assistant", " seven")]
    return {"messages": [{"role": role, "content": text} for role, text in turns if text is not None]}


@pytest.mark.parametrize(
    ("own", "shots", "expected"),
    [
        ("own", ["first", "second"], "own"),
        (None, ["first", "second"], "first"),
        (None, [None, "second"], "second"),
        ("same", ["same", "same"], "same"),
    ],
)
def test_shots_of_chats_keep_one_system_message_and_it_comes_first(
    own: str | None, shots: list[str | None], expected: str, llama: Path
) -> None:
    rows = [Row(1, chat(own, "question"))]
    solved = [Row(number, chat(system, f"shot {number}")) for number, system in enumerate(shots)]
    tokenizer = TextTokenizer.load(llama)
    rendering = plain_rendering(find_base(str(llama)), RowsConfig(), rows, tokenizer)
    example = encode_few_shot(rendering, tokenizer, rows, solved)[0]
    turns = [chat(expected, "shot 0"), chat(None, "shot 1"), chat(None, "question")]
    whole = [Row(1, {"messages": [message for turn in turns for message in turn["messages"]]})]
    assert example.input_ids == encode_few_shot(rendering, tokenizer, whole, [])[0].input_ids
