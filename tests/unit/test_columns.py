"""Columns are recognised by name or named by templates; an error about a value names its row."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_ft.config import RowsConfig, Task
from edge_ft.data import Columns, Record, Row, fill_text, find_columns, find_labels, guess_task, record
from edge_ft.data.tokenizer import Filled
from edge_ft.errors import DataError


def only(fields: dict[str, Any], task: Task = "text-generation", **config: Any) -> Record:
    """The record of a single row 7."""
    return record(Row(7, fields), find_columns(list(fields), RowsConfig(**config), task))


@pytest.mark.parametrize(
    ("fields", "prompt", "completion"),
    [
        ({"prompt": "p", "completion": "c", "id": 1}, "p", "c"),
        ({"instruction": "do", "output": "done"}, "do", "done"),
        ({"instruction": "do", "input": "", "output": "done"}, "do", "done"),
        ({"instruction": "do", "input": "this", "output": "done"}, "do\n\nthis", "done"),
        ({"text": "all of it"}, "", "all of it"),
        ({"text": "good film", "label": 1}, "good film\n", "1"),
        ({"prompt": 7, "completion": 0.5}, "7", "0.5"),
    ],
)
def test_known_columns_are_recognised(fields: dict[str, Any], prompt: str, completion: str) -> None:
    assert only(fields) == Record(7, None, prompt, completion, None)


def test_messages_win_and_their_last_answer_is_the_completion() -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 1}]
    found = only({"messages": messages, "text": "x"})
    assert found.messages == [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert found.completion == "b"


def test_a_template_has_columns_braces_and_escapes() -> None:
    found = only({"q": "{a}\\n", "a b": 3}, prompt=r"{{{q}}}\n\tC:\\new {a b}", completion="{a b}")
    assert (found.prompt, found.completion) == ("{{a}\\n}\n\tC:\\new 3", "3")


@given(st.text(), st.text())
def test_values_are_never_read_as_templates(first: str, second: str) -> None:
    assert only({"x": first, "y": second}, prompt="{x}|{y}", completion="").prompt == f"{first}|{second}"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{pasage}", r"no column with \{pasage\} \(did you mean 'passage'\?\): the columns are passage"),
        ("{passage.__class__}", "no column with"),
        ("{passage!r}", "no column with"),
        ('{"a": {passage}}', "lone {"),
        ("{passage", "lone {"),
        ("passage}", "lone }"),
    ],
)
def test_a_template_cannot_run_code(template: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        find_columns(["passage"], RowsConfig(prompt=template), "text-generation")


@pytest.mark.parametrize(
    ("fields", "config", "text"),
    [
        ({"text": "t", "label": " pos "}, {}, "t"),
        ({"review": "t", "label": "pos"}, {}, "t"),
        ({"text": "t", "title": "u", "sense": "pos"}, {"label": "sense"}, "t"),
        ({"body": "t", "title": "u", "label": "pos"}, {"prompt": "{title}: {body}"}, "u: t"),
    ],
)
def test_a_class_and_its_text(fields: dict[str, Any], config: dict[str, Any], text: str) -> None:
    assert only(fields, "text-classification", **config) == Record(7, None, text, None, "pos", classes=("pos",))


@pytest.mark.parametrize(
    ("names", "config", "task", "message"),
    [
        (["question", "answer"], {}, "text-generation", "the columns are question, answer: name yours with --prompt"),
        (["text", "lable"], {}, "text-classification", r"no column 'label'.*did you mean 'lable'"),
        (["a", "b", "label"], {}, "text-classification", "which of a, b, label is the text"),
        (["text", "label"], {"label": "label"}, "text-generation", "--label label is for text-classification"),
        (["a", "label"], {"prompt": "{a}", "completion": "{a}"}, "text-classification", "--completion is for"),
    ],
)
def test_missing_columns_are_named(names: list[str], config: dict[str, Any], task: Task, message: str) -> None:
    with pytest.raises(DataError, match=message):
        find_columns(names, RowsConfig(**config), task)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"prompt": {"a": "ü"}, "completion": "c"},
            'row 7: column .prompt. is the object {"a": "ü"}, which is not a text',
        ),
        ({"prompt": "p", "completion": True}, "row 7: column 'completion' is the boolean true.*such as \"yes\""),
        ({"prompt": "p", "completion": ["a", "b"]}, 'row 7: column .completion. is the list .*"{completion.0}"'),
        ({"instruction": "p", "output": float("inf")}, "row 7: column 'output' is the number"),
        ({"instruction": "p", "input": {}, "output": "x"}, "row 7: column 'input' is the object"),
        ({"text": ["a"]}, "row 7: column 'text' is the list"),
        ({"messages": None}, "row 7: messages must be a list"),
        ({"messages": []}, "row 7: messages must be a list"),
        ({"messages": ["hi"]}, "row 7: messages holds"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "must both be text"),
        ({"messages": [{"role": "user<|im_end|>", "content": "x"}]}, r"row 7.*has the role 'user<\|im_end\|>'"),
        ({"prompt": "p", "completion": None}, "row 7: column 'completion' is null"),
        ({"prompt": float("nan"), "completion": "c"}, "row 7: column 'prompt' is null"),
    ],
)
def test_unusable_values_name_their_row(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        only(fields)


@pytest.mark.parametrize("label", ["", 0.5, float("inf"), ["a"], None])
def test_a_class_is_text_or_a_whole_number(label: Any) -> None:
    with pytest.raises(DataError, match="row 7"):
        only({"text": "t", "label": label}, "text-classification")


def test_a_row_may_lack_a_column_that_others_have() -> None:
    columns = Columns("prompt_completion", "{prompt}", "{completion}")
    with pytest.raises(DataError, match="row 3: column 'completion' is missing"):
        record(Row(3, {"prompt": "p"}), columns)
    assert record(Row(3, {"prompt": "p"}), columns, answer=False) == Record(3, None, "p", None, None)


def test_fits_requires_every_column_that_is_read() -> None:
    columns = Columns("template", "{a} {{b}}", "{c}")
    assert columns.fits(["a", "c", "z"])
    assert not columns.fits(["a"])
    assert columns.fits(["a"], answer=False)
    assert not columns.fits(["c"], answer=False)
    assert not Columns("text_label", "{text}", None, "label").fits(["text"])
    assert Columns("messages").fits(["messages"])


def test_a_text_fills_a_template_of_one_column() -> None:
    columns = Columns("template", "Q {{x}}: {q}\nA:", "{a}")
    assert fill_text(columns, "why?") == "Q {x}: why?\nA:"
    assert fill_text(columns, "Q {x}: why\nnot?\nA:") == "Q {x}: why\nnot?\nA:"
    for other in (Columns("template", "{a} {b}"), Columns("messages"), Columns("prompt_completion", "{prompt}")):
        assert fill_text(other, "why {q}?") == "why {q}?"


def test_a_text_in_the_templates_form_is_split_into_its_values() -> None:
    columns = Columns("template", "<s>{q}{{{q}}}</s>", "{a}")
    for text, values in (("why?", ("why?", "why?")), ("<s>a\n<s>{b}</s>", ("a\n<s>", "b"))):
        found = fill_text(columns, text)
        assert isinstance(found, Filled)
        assert found.parts == ("<s>", values[0], "{", values[1], "}</s>")


def test_rows_of_only_a_text_have_no_prompt() -> None:
    text = Columns("text", None, "{text}")
    assert text.fits(["text"])
    assert not text.fits(["text"], answer=False)


@pytest.mark.parametrize(("label", "name"), [(1.0, "1"), (-2.0, "-2"), (1, "1"), ("1.0", "1.0")])
def test_a_whole_number_that_a_table_stores_as_float_is_a_class(label: Any, name: str) -> None:
    assert only({"text": "t", "label": label}, "text-classification").label == name


def test_classes_are_sorted_by_value() -> None:
    rows = [Row(n, {"text": "t", "label": label}) for n, label in enumerate([10, 9, "b", True, "a", 9])]
    columns = Columns("text_label", "{text}", None, "label")
    assert find_labels(rows, columns) == ("9", "10", "True", "a", "b")


def test_the_task_follows_from_the_model_unless_a_label_is_named() -> None:
    assert guess_task(["text", "label"], RowsConfig(), "decoder") == "text-generation"
    assert guess_task(["text", "label"], RowsConfig(), "encoder") == "text-classification"
    assert guess_task(["text", "label"], RowsConfig(label="label"), "decoder") == "text-classification"
    with pytest.raises(DataError, match="no column 'label' holds the class"):
        guess_task(["body", "stars"], RowsConfig(), "encoder")


@pytest.mark.parametrize(
    ("names", "config", "task"),
    [
        (["id", "tokens", "ner_tags"], {}, "token-classification"),
        (["words", "marks"], {"label": "marks"}, "token-classification"),
        (["question", "passage", "label"], {}, "text-classification"),
        (["question", "answer"], {}, "feature-extraction"),
        (["a", "b"], {"prompt": "{a}", "completion": "{b}"}, "feature-extraction"),
        (["text"], {}, "fill-mask"),
    ],
)
def test_what_an_encoder_learns_follows_from_the_columns(names: list[str], config: dict[str, Any], task: Task) -> None:
    assert guess_task(names, RowsConfig(**config), "encoder") == task
