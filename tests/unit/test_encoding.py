"""The model reads the same tokens in training and at run time, and only answers carry the loss."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from small_tokenizers import CHATML, write_bpe

from edge_ft.config import RowsConfig
from edge_ft.data import (
    Columns,
    Example,
    Message,
    Record,
    Rendering,
    Row,
    TextTokenizer,
    encode_example,
    encode_prompt,
    encode_rows,
    fill_text,
    make_rendering,
    record,
    render_chat,
    stop_ids,
)
from edge_ft.errors import DataError, ModelError

SYSTEM = "<|im_start|>system\nYou help.<|im_end|>\n"
MESSAGES = Columns("messages")
PAIRS = Columns("prompt_completion", "{prompt}", "{completion}")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    return TextTokenizer.load(write_bpe(tmp_path_factory.mktemp("bpe")))


def rendering(tokenizer: TextTokenizer, columns: Columns, max_length: int = 512, **config: Any) -> Rendering:
    return make_rendering(RowsConfig(**config), columns, "text-generation", tokenizer, max_length)


def chat(*contents: str, system: str | None = None) -> list[Message]:
    """Messages of user and assistant in turn."""
    turns = [{"role": ("user", "assistant")[at % 2], "content": content} for at, content in enumerate(contents)]
    return [*([] if system is None else [{"role": "system", "content": system}]), *turns]


def encode(tokenizer: TextTokenizer, messages: list[Message], template: str = CHATML) -> Example:
    chosen = Rendering("text-generation", template, MESSAGES, (), 512, None, None)
    return encode_example(chosen, tokenizer, record(Row(7, {"messages": messages}), MESSAGES))


def learned(tokenizer: TextTokenizer, example: Example) -> list[str]:
    """Text of each run of tokens with loss."""
    runs: list[list[int]] = [[]]
    for token, label in zip(example.input_ids, example.labels, strict=True):
        assert label in (token, -100)
        runs[-1:] = [[*runs[-1], token]] if label == token else [runs[-1], []] if runs[-1] else [[]]
    return [tokenizer.decode(run, skip_special_tokens=False) for run in runs if run]


def text(tokenizer: TextTokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False)


# Plain text


def test_plain_rows_are_prompt_completion_and_eos(tokenizer: TextTokenizer) -> None:
    plain = rendering(tokenizer, PAIRS, chat_template="none")
    example = encode_example(plain, tokenizer, Record(1, None, "hello ", "world", None))
    assert example.input_ids == [*tokenizer.encode("hello "), *tokenizer.encode("world"), 2]
    assert learned(tokenizer, example) == ["world<|im_end|>"]
    assert example.input_ids[: example.prompt_length] == encode_prompt(plain, tokenizer, "hello ")
    assert (example.row, example.reference, example.cut) == (1, "world", 0)


def test_bos_comes_before_plain_text_where_the_tokenizer_adds_one(tmp_path: Path) -> None:
    adds = TextTokenizer.load(write_bpe(tmp_path, bos="<|endoftext|>", chat_template=None))
    plain = rendering(adds, PAIRS)
    assert (plain.bos, plain.appended_eos, plain.chat_template) == (0, 2, None)
    example = encode_example(plain, adds, Record(1, None, "", "hello", None))
    assert example.input_ids == [0, *adds.encode("hello"), 2]
    assert example.labels == [-100, *example.input_ids[1:]]


def test_text_rows_learn_every_token_but_the_first(tokenizer: TextTokenizer) -> None:
    example = encode_rows(
        rendering(tokenizer, Columns("text", None, "{text}")), tokenizer, [Row(1, {"text": "hello"})]
    )[0]
    assert example.labels == [-100, *example.input_ids[1:]]
    assert example.input_ids[-1] == 2


def test_an_empty_answer_still_learns_to_stop(tokenizer: TextTokenizer) -> None:
    plain = rendering(tokenizer, PAIRS, chat_template="none")
    assert learned(tokenizer, encode_example(plain, tokenizer, Record(1, None, "hi", "", None))) == ["<|im_end|>"]


def test_long_rows_are_cut_at_their_end_and_the_lost_tokens_are_counted(tokenizer: TextTokenizer) -> None:
    plain = rendering(tokenizer, PAIRS, max_length=8, chat_template="none")
    example = encode_example(plain, tokenizer, Record(1, None, "q", "x" * 10, None))
    assert (len(example.input_ids), example.prompt_length, example.cut) == (8, 1, 4)
    example = encode_example(plain, tokenizer, Record(1, None, "q" * 20, "x", None))
    assert (example.prompt_length, set(example.labels), example.cut) == (8, {-100}, 14)


def test_a_row_without_an_answer_column_is_an_error(tokenizer: TextTokenizer) -> None:
    with pytest.raises(DataError, match="row 1 has no answer to learn: give --completion"):
        encode_rows(rendering(tokenizer, Columns("template", "{q}")), tokenizer, [Row(1, {"q": "hi"})])


def test_control_tokens_are_read_in_a_template_but_not_in_values(tokenizer: TextTokenizer) -> None:
    columns = Columns("template", "<|im_start|>user\n{q}<|im_end|>\n<|im_start|>assistant\n", "{a}<|im_end|>")
    chosen = rendering(tokenizer, columns)
    assert chosen.chat_template is None
    example = encode_rows(chosen, tokenizer, [Row(1, {"q": "hi<|im_end|>", "a": "the answer"})])[0]
    assert [token for token in example.input_ids if token in tokenizer.control_tokens] == [1, 2, 1, 2, 2]
    assert learned(tokenizer, example) == ["the answer<|im_end|><|im_end|>"]
    assert example.reference == "the answer"
    prompt = example.input_ids[: example.prompt_length]
    for text in ("hi<|im_end|>", "<|im_start|>user\nhi<|im_end|><|im_end|>\n<|im_start|>assistant\n"):
        assert encode_prompt(chosen, tokenizer, fill_text(columns, text)) == prompt


def test_a_classifiers_template_may_separate_its_columns(tokenizer: TextTokenizer) -> None:
    columns = Columns("text_label", "{a}<|endoftext|>{b}", None, "label")
    chosen = make_rendering(RowsConfig(), columns, "text-classification", tokenizer, 64, ("no", "yes"))
    example = encode_rows(chosen, tokenizer, [Row(1, {"a": "x", "b": "<|endoftext|>", "label": "no"})])[0]
    assert example.input_ids == [*tokenizer.encode("x"), 0, *tokenizer.encode("<|endoftext|>")]


# Chats


def test_every_assistant_turn_is_learned_through_its_end(tokenizer: TextTokenizer) -> None:
    example = encode(tokenizer, chat("hi", "hello", "and?", "the answer"))
    assert learned(tokenizer, example) == ["hello<|im_end|>", "the answer<|im_end|>"]
    assert text(tokenizer, example.input_ids) == (
        SYSTEM + "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nhello<|im_end|>\n"
        "<|im_start|>user\nand?<|im_end|>\n<|im_start|>assistant\nthe answer<|im_end|>"
    )
    assert text(tokenizer, example.input_ids[example.prompt_length :]) == "the answer<|im_end|>"
    assert (example.reference, example.unlearned_turns) == ("the answer", 0)


def test_a_given_system_message_replaces_the_templates_own(tokenizer: TextTokenizer) -> None:
    example = encode(tokenizer, chat("hi", "hello", system="Be brief."))
    assert text(tokenizer, example.input_ids).startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user")
    assert learned(tokenizer, example) == ["hello<|im_end|>"]


words = st.lists(st.sampled_from(["hello", " ", "\n", "\n\n", "é🙂", "<|im_end|>", "<|im_start|>assistant\n"])).map(
    "".join
)


@given(words, words)
def test_training_reads_the_same_prompt_as_run_time(tokenizer: TextTokenizer, question: str, answer: str) -> None:
    messages = chat(question, answer)
    example = encode(tokenizer, messages)
    assume(not example.cut)
    chosen = rendering(tokenizer, MESSAGES)
    assert example.input_ids[: example.prompt_length] == encode_prompt(chosen, tokenizer, messages[:1])
    assert encode_prompt(chosen, tokenizer, messages[:1]) == encode_prompt(chosen, tokenizer, question)
    assert text(tokenizer, example.input_ids[example.prompt_length :]) == answer + "<|im_end|>"
    assert example.input_ids.count(2) == 3, "a user's text ends no turn"


def test_a_template_that_strips_spaces_keeps_the_end_of_turn(tokenizer: TextTokenizer) -> None:
    trims = CHATML.replace("message['content']", "message['content'] | trim")
    assert learned(tokenizer, encode(tokenizer, chat("q", " hello \n", "r", "x"), trims)) == [
        "hello<|im_end|>",
        "x<|im_end|>",
    ]


THINKS = (
    "{% for m in messages %}{% set text = m['content'] %}"
    "{% if not loop.last and '</think>' in text %}{% set text = text.split('</think>')[-1] %}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + text + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_turns_that_the_template_rewrites_later_carry_no_loss_and_are_counted(tokenizer: TextTokenizer) -> None:
    example = encode(tokenizer, chat("a", "<think>1</think>hello", "b", "<think>2</think>world"), THINKS)
    assert learned(tokenizer, example) == ["<think>2</think>world<|im_end|>"]
    assert "<think>1" not in text(tokenizer, example.input_ids)
    assert example.unlearned_turns == 1


def test_a_greeting_before_any_question_is_context(tokenizer: TextTokenizer) -> None:
    messages = [{"role": "assistant", "content": "welcome"}, *chat("hi", "hello")]
    example = encode(tokenizer, messages)
    assert (learned(tokenizer, example), example.unlearned_turns) == (["hello<|im_end|>"], 1)


def test_nothing_after_the_last_answer_is_read(tokenizer: TextTokenizer) -> None:
    assert encode(tokenizer, chat("a", "b", "thanks")).input_ids == encode(tokenizer, chat("a", "b")).input_ids
    closing = CHATML + "{% if not add_generation_prompt %}<|endoftext|>{% endif %}"
    assert learned(tokenizer, encode(tokenizer, chat("a", "b", "c", "d"), closing)) == ["b<|im_end|>", "d<|im_end|>"]


def test_a_template_whose_answers_do_not_start_with_its_prompt_is_refused(tokenizer: TextTokenizer) -> None:
    template = CHATML.replace("{{ '<|im_start|>assistant\n' }}", "{{ '<|im_start|>bot\n' }}")
    with pytest.raises(DataError, match="row 7: the chat template does not begin the last assistant turn with its own"):
        encode(tokenizer, chat("a", "b"), template)


def test_a_template_without_a_special_end_gets_eos(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    file = tmp_path / "plain.jinja"
    file.write_text(
        "{% for m in messages %}### {{ m['role'] }}\n{{ m['content'] }}\n\n{% endfor %}"
        "{% if add_generation_prompt %}### assistant\n{% endif %}"
    )
    chosen = rendering(tokenizer, MESSAGES, chat_template=str(file))
    assert chosen.appended_eos == 2
    example = encode_example(chosen, tokenizer, Record(1, chat("a", "b", "c", "d"), "", "d", None))
    assert learned(tokenizer, example) == ["b", "d<|im_end|>"]


def test_a_template_writes_its_own_bos_and_gets_no_second(tmp_path: Path) -> None:
    adds = TextTokenizer.load(write_bpe(tmp_path, bos="<|endoftext|>", chat_template="{{ bos_token }}" + CHATML))
    chosen = rendering(adds, MESSAGES)
    assert chosen.bos is None
    assert encode_prompt(chosen, adds, "hi").count(0) == 1


def test_an_end_of_turn_that_is_not_eos_stops_an_answer(tmp_path: Path) -> None:
    base = TextTokenizer.load(write_bpe(tmp_path, eos_token="<|endoftext|>"))
    assert base.stop_ids == {0}
    assert stop_ids(rendering(base, MESSAGES), base) == {0, 2}
    assert stop_ids(rendering(base, PAIRS, chat_template="none"), base) == {0}


# Which template applies


def test_chats_and_pairs_get_the_models_template_texts_do_not(tokenizer: TextTokenizer) -> None:
    for columns in (MESSAGES, PAIRS, Columns("instruction", "{instruction}", "{output}")):
        assert rendering(tokenizer, columns).chat_template == CHATML
    for columns in (Columns("text", None, "{text}"), Columns("template", "{a}", "{b}")):
        assert rendering(tokenizer, columns).chat_template is None
    assert rendering(tokenizer, Columns("template", "{a}", "{b}"), chat_template="auto").chat_template == CHATML


def test_a_prompt_and_its_completion_become_a_chat(tokenizer: TextTokenizer) -> None:
    row = Row(4, {"prompt": "hi", "completion": "hello"})
    assert encode_rows(rendering(tokenizer, PAIRS), tokenizer, [row])[0].input_ids == (
        encode(tokenizer, chat("hi", "hello")).input_ids
    )


def test_choices_that_cannot_work_are_refused(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="messages need a chat template"):
        rendering(tokenizer, MESSAGES, chat_template="none")
    with pytest.raises(DataError, match="have no turns"):
        rendering(tokenizer, Columns("text", None, "{text}"), chat_template="auto")
    with pytest.raises(DataError, match="neither auto, none nor a file"):
        rendering(tokenizer, MESSAGES, chat_template="chatml")
    with pytest.raises(DataError, match="not trained with a chat template"):
        encode_prompt(rendering(tokenizer, PAIRS, chat_template="none"), tokenizer, chat("hi"))
    endless = TextTokenizer.load(write_bpe(tmp_path, eos_token=None, chat_template=None))
    with pytest.raises(ModelError, match="names no eos_token"):
        rendering(endless, PAIRS)


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}",
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[5]['content'] }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.clear() }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{{ 1 / 0 }}{{ messages[0]['content'] }}",
        "{% include 'secret' %}",
    ],
)
def test_broken_and_hostile_templates_are_refused(tokenizer: TextTokenizer, template: str) -> None:
    with pytest.raises(DataError, match="cannot render this chat"):
        render_chat(template, chat("hi"), False, tokenizer)


def test_functions_that_templates_of_transformers_use_are_there(tokenizer: TextTokenizer) -> None:
    template = (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{% continue %}{% endif %}"
        "{% generation %}{{ m | tojson }}{%- endgeneration %}{% endfor %}{{ strftime_now('') }}{{ eos_token }}"
    )
    assert render_chat(template, chat("<é>", system="no"), False, tokenizer) == (
        '<|endoftext|>{"role": "user", "content": "<é>"}<|im_end|>'
    )


# Classes, and what is written down


def test_a_class_is_its_index(tokenizer: TextTokenizer) -> None:
    columns = Columns("text_label", "{text}", None, "label")
    chosen = make_rendering(RowsConfig(), columns, "text-classification", tokenizer, 16, ("no", "yes"))
    example = encode_rows(chosen, tokenizer, [Row(2, {"text": "x" * 20, "label": "yes"})])[0]
    assert (example.labels, example.reference, len(example.input_ids), example.cut) == ([1], "yes", 16, 4)
    with pytest.raises(
        DataError, match=r"row 3: 'yess' is none of the classes \(did you mean 'yes'\?\): they are no, yes"
    ):
        encode_rows(chosen, tokenizer, [Row(3, {"text": "x", "label": "yess"})])


def test_a_rendering_survives_json(tokenizer: TextTokenizer) -> None:
    for chosen in (
        rendering(tokenizer, MESSAGES),
        Rendering("text-classification", None, Columns("text_label", "{a}", None, "b"), ("x", "y"), 9, None, None),
    ):
        assert Rendering.from_dict(json.loads(json.dumps(chosen.to_dict()))) == chosen
