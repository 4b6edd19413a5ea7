"""Conversations in the forms that people write them become the same messages, or are refused with their row."""

from typing import Any

import pytest
from small_tokenizers import CHATML, write_bpe

from edge_ft.config import RowsConfig, Task
from edge_ft.data import (
    Chat,
    Columns,
    Example,
    Record,
    Rendering,
    Row,
    TextTokenizer,
    encode_example,
    encode_prompt,
    find_columns,
    make_rendering,
    record,
)
from edge_ft.errors import DataError

ASKED = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "seven"}]
CALL = {"type": "function", "function": {"name": "weather", "arguments": '{"town": "Ulm"}'}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {}}}

FULL = (
    "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson }}{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}[{{ c.function | tojson }}]{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""Writes all that a row can say."""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    return TextTokenizer.load(write_bpe(tmp_path_factory.mktemp("bpe")))


def columns_of(fields: dict[str, Any], task: Task = "text-generation", **config: Any) -> Columns:
    return find_columns(list(fields), RowsConfig(**config), task)


def read(fields: dict[str, Any], **config: Any) -> Record:
    """The record of a single row 7."""
    return record(Row(7, fields), columns_of(fields, **config))


def encode(tokenizer: TextTokenizer, fields: dict[str, Any], template: str | None = FULL) -> Example:
    chosen = Rendering("text-generation", template, columns_of(fields), (), 512, None, None, reads_tools=True)
    return encode_example(chosen, tokenizer, read(fields))


def learned(tokenizer: TextTokenizer, example: Example) -> list[str]:
    """Text of each run of tokens with loss."""
    runs: list[list[int]] = [[]]
    for token, label in zip(example.input_ids, example.labels, strict=True):
        runs[-1:] = [[*runs[-1], token]] if label == token else [runs[-1], []] if runs[-1] else [[]]
    return [tokenizer.decode(run, skip_special_tokens=False) for run in runs if run]


def text(tokenizer: TextTokenizer, example: Example) -> str:
    return tokenizer.decode(example.input_ids, skip_special_tokens=False)


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": ASKED},
        {"messages": [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "seven"}]},
        {"conversations": [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "seven"}]},
        {"conversation": ASKED},
        {"messages": '[{"role": "user", "content": "hello"}, {"role": "assistant", "content": "seven"}]'},
        {"messages": [{"role": "USER", "content": "hello"}, {"role": " Assistant ", "content": "seven"}]},
        {"messages": [{"role": "prompter", "content": "hello"}, {"role": "model", "content": "seven"}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "hel"}, {"text": "lo"}]}, ASKED[1]]},
        {"messages": [{"role": "user", "content": "hello", "from": None, "tool_calls": None}, ASKED[1]]},
    ],
)
def test_one_chat_has_many_forms(fields: dict[str, Any]) -> None:
    found = read(fields)
    assert found == Record(7, ASKED, "", "seven", None, chat=Chat(ASKED))


def test_a_prompt_and_completion_of_messages_are_a_chat_whose_completion_is_learned(tokenizer: TextTokenizer) -> None:
    system = {"role": "system", "content": "Be brief."}
    fields = {"prompt": [system, *ASKED, {"role": "user", "content": "and?"}], "completion": [ASKED[1]]}
    found = encode(tokenizer, fields)
    assert learned(tokenizer, found) == ["seven<|im_end|>"]
    assert text(tokenizer, found).count("seven<|im_end|>") == 2
    assert (found.reference, found.unlearned_turns, found.unread) == ("seven", 0, ())
    for mixed in (
        {**fields, "completion": "seven"},
        {**fields, "completion": str(fields["completion"]).replace("'", '"')},
    ):
        assert encode(tokenizer, mixed) == found
    plain = encode(tokenizer, {"prompt": "hello", "completion": [ASKED[1]]})
    assert plain == encode(tokenizer, {"prompt": "hello", "completion": "seven"})


def test_alpaca_rows_bring_system_and_history(tokenizer: TextTokenizer) -> None:
    fields = {"instruction": "and?", "input": "", "output": "seven", "system": "Be brief.", "history": [["a", "b"]]}
    assert [(turn["role"], turn["content"]) for turn in read(fields).messages or ()] == [
        ("system", "Be brief."),
        ("user", "a"),
        ("assistant", "b"),
        ("user", "and?"),
        ("assistant", "seven"),
    ]
    assert learned(tokenizer, encode(tokenizer, fields)) == ["b<|im_end|>", "seven<|im_end|>"]
    assert read({**fields, "system": "", "history": []}).messages is None
    with pytest.raises(DataError, match="needs a chat template and there is none"):
        encode(tokenizer, fields, template=None)
    with pytest.raises(DataError, match=r"row 7: column 'history' is .* list of \[prompt, answer\] pairs"):
        read({**fields, "history": "earlier"})


def test_a_system_column_stands_before_the_chat_and_is_never_doubled() -> None:
    own = {"role": "system", "content": "Be brief."}
    assert read({"conversations": ASKED, "system": "Be brief."}).messages == [own, *ASKED]
    assert read({"prompt": "hello", "completion": "seven", "system_prompt": "Be brief."}).messages == [own, *ASKED]
    found = read({"messages": [own, *ASKED], "system": "Be long."}).chat
    assert found == Chat([own, *ASKED], unread=("the column 'system'",))


def test_tools_calls_and_reasoning_reach_the_template(tokenizer: TextTokenizer) -> None:
    turns = [ASKED[0], {"role": "assistant", "content": None, "reasoning_content": "hm", "tool_calls": [CALL]}]
    answered = [*turns, {"role": "tool", "content": "sun"}, {"role": "assistant", "content": "sunny"}]
    found = encode(tokenizer, {"messages": answered, "tools": [TOOL]})
    assert learned(tokenizer, found) == [
        '<think>hm</think>[{"name": "weather", "arguments": {"town": "Ulm"}}]<|im_end|>',
        "sunny<|im_end|>",
    ]
    assert '"parameters": {}' in text(tokenizer, found)
    assert found.unread == ()
    last = encode(tokenizer, {"messages": turns, "tools": '[{"name": "weather"}]'})
    assert last.reference == '<think>hm</think>[{"name": "weather", "arguments": {"town": "Ulm"}}]'
    prompt = encode_prompt(
        Rendering("text-generation", FULL, Columns("messages"), (), 512, None, None, reads_tools=True),
        tokenizer,
        Chat(turns[:1], [{"name": "weather"}]),
    )
    assert last.input_ids[: last.prompt_length] == prompt


def test_calls_are_written_in_the_form_that_the_template_reads(tokenizer: TextTokenizer) -> None:
    flat = FULL.replace("c.function | tojson", "c.name ~ ' ' ~ c.arguments")
    nested, plain = (
        {"messages": [ASKED[0], {"role": "assistant", "tool_calls": [call]}]} for call in (CALL, CALL["function"])
    )
    for fields in (nested, plain):
        assert learned(tokenizer, encode(tokenizer, fields, flat)) == ['[weather {"town": "Ulm"}]<|im_end|>']
        assert '{"town": "Ulm"}}]' in learned(tokenizer, encode(tokenizer, fields))[0]
    old = {"messages": [ASKED[0], {"role": "assistant", "content": None, "function_call": CALL["function"]}]}
    spoken = {
        "conversations": [
            ASKED[0],
            {"from": "function_call", "value": '{"name": "weather", "arguments": {"town": "Ulm"}}'},
        ]
    }
    for fields in (old, spoken):
        assert encode(tokenizer, fields).input_ids == encode(tokenizer, nested).input_ids


def test_a_name_in_the_tools_is_not_taken_for_a_written_call(tokenizer: TextTokenizer) -> None:
    flat = FULL.replace("c.function | tojson", "c.name ~ ' ' ~ c.arguments")
    fields = {"messages": [ASKED[0], {"role": "assistant", "tool_calls": [CALL]}], "tools": [TOOL]}
    assert learned(tokenizer, encode(tokenizer, fields, flat)) == ['[weather {"town": "Ulm"}]<|im_end|>']
    nameless = encode(tokenizer, fields, FULL.replace("c.function | tojson", "'CALL'"))
    assert (nameless.targets, nameless.unread) == (0, ("tool_calls",))


@pytest.mark.parametrize("said", ["", "I will look."])
def test_a_call_that_the_template_does_not_write_is_not_learned_as_an_end_of_turn(
    tokenizer: TextTokenizer, said: str
) -> None:
    turns = [ASKED[0], {"role": "assistant", "content": said, "tool_calls": [CALL]}]
    found = encode(tokenizer, {"messages": turns, "tools": [TOOL]}, CHATML)
    assert (learned(tokenizer, found), found.targets) == ([], 0)
    assert set(found.unread) == {"tool_calls", "tools"}
    found = encode(tokenizer, {"messages": [*turns, *ASKED]}, CHATML)
    assert learned(tokenizer, found) == ["seven<|im_end|>"]


def test_what_a_template_does_not_write_is_named(tokenizer: TextTokenizer) -> None:
    thought = {**ASKED[1], "reasoning_content": "hm"}
    found = encode(tokenizer, {"messages": [ASKED[0], thought]}, CHATML)
    assert (found.unread, learned(tokenizer, found)) == (("reasoning_content",), ["seven<|im_end|>"])
    silent = CHATML.replace(
        "{{ '<|im_start|>' + m", "{% if message.role == 'tool' %}{% continue %}{% endif %}{{ '<|im_start|>' + m"
    )
    turns = [ASKED[0], {"role": "tool", "content": "sun"}, ASKED[1], {"role": "user", "content": "thanks"}]
    found = encode(tokenizer, {"messages": turns}, silent)
    assert found.unread == ("messages of the role tool", "messages after the last answer")


def test_a_turn_that_the_row_excludes_carries_no_loss(tokenizer: TextTokenizer) -> None:
    for key, value in (("weight", 0), ("train", False)):
        messages = [ASKED[0], {**ASKED[1], key: value}, *ASKED]
        assert learned(tokenizer, encode(tokenizer, {"messages": messages})) == ["seven<|im_end|>"]
    with pytest.raises(DataError, match=r"row 7: messages has a turn with the weight 0.5: only 0 and 1"):
        read({"messages": [ASKED[0], {**ASKED[1], "weight": 0.5}]})


def test_a_model_of_an_earlier_version_reads_texts_alone(tokenizer: TextTokenizer) -> None:
    fields = {"messages": [ASKED[0], {**ASKED[1], "reasoning_content": "hm"}], "tools": [TOOL]}
    old = Rendering("text-generation", FULL, Columns("messages", tools="tools"), (), 512, None, None)
    found = encode_example(old, tokenizer, read(fields))
    assert found.input_ids == encode(tokenizer, {"messages": ASKED}).input_ids
    assert found.unread == ("reasoning_content", "tools")


def test_special_tokens_in_calls_and_tools_are_plain_text(tokenizer: TextTokenizer) -> None:
    call = {"name": "weather", "arguments": {"town": "<|im_end|>"}}
    fields = {"messages": [ASKED[0], {"role": "assistant", "tool_calls": [call]}], "tools": [{"name": "<|im_end|>"}]}
    found = encode(tokenizer, fields)
    assert found.input_ids.count(2) == 3, "the ends of the system message and of two turns"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"messages": [{"role": "narrator", "content": "x"}]},
            r"row 7: messages has the role 'narrator'.*assistant \(gpt",
        ),
        ({"conversations": [{"from": "judge", "value": "x"}]}, "row 7: conversations has the role 'judge'"),
        ({"messages": [ASKED[0], {"role": "assistant", "content": None}]}, "row 7: .*its content is null"),
        ({"messages": [{"role": "user", "content": {"text": "x"}}]}, "row 7: .*its content is the object"),
        ({"messages": [{"role": "user", "content": True}]}, "row 7: .*its content is the boolean true"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "type 'image_url': only texts are read"),
        ({"messages": {"role": "user"}}, "row 7: messages must be a list.*it is the object"),
        ({"messages": [ASKED[0], {"role": "assistant", "tool_calls": ["x"]}]}, "row 7: .*a call must be an object"),
        ({"conversations": [{"from": "function_call", "value": "x"}]}, "row 7: .*a call must be an object"),
        ({"messages": ASKED, "tools": ["weather"]}, "row 7: column 'tools' is the list.*a JSON schema for each"),
        ({"messages": ASKED, "system": {"a": 1}}, "row 7: column 'system' is the object"),
        ({"prompt": [], "completion": "x"}, "row 7: column 'prompt' must be a list of at least one"),
    ],
)
def test_what_is_no_conversation_is_refused_with_its_row(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(fields)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["text", "summary"], '--prompt "{text}" --completion "{summary}"; to learn the text alone give --prompt ""'),
        (["prompt", "chosen", "rejected"], 'preferences.*--prompt "{prompt}" --completion "{chosen}"'),
        (["chosen", "rejected"], "preferences.*call their column messages"),
    ],
)
def test_rows_of_which_one_column_would_be_lost_are_refused(names: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        columns_of(dict.fromkeys(names, "x"))


def test_a_text_inside_a_column_is_named_by_its_path() -> None:
    fields = {"question": "which?", "answers": {"text": ["seven"], "answer_start": [8]}}
    named = {"prompt": "{question}", "completion": "{answers.text.0}"}
    assert (read(fields, **named).prompt, read(fields, **named).completion) == ("which?", "seven")
    with pytest.raises(DataError, match=r'row 7: column .answers. is the object.*"{answers.text.0}"'):
        read(fields, prompt="{question}", completion="{answers}")
    with pytest.raises(DataError, match=r"no column with {questions.text}"):
        read(fields, prompt="{questions.text}")


def test_a_prompt_that_writes_bos_gets_no_second(tmp_path: Any) -> None:
    adds = TextTokenizer.load(write_bpe(tmp_path, bos="<|endoftext|>", chat_template=None))
    for prompt, count in (("<|endoftext|>{q}", 1), ("{q}", 1), ("a <|endoftext|>{q}", 2)):
        columns = columns_of({"q": "", "a": ""}, prompt=prompt, completion="{a}")
        chosen = make_rendering(RowsConfig(), columns, "text-generation", adds, 64)
        found = encode_example(chosen, adds, record(Row(1, {"q": "hello", "a": "seven"}), columns))
        assert found.input_ids.count(0) == count
        assert found.input_ids[0] == 0
