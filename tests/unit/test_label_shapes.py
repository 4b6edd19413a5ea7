"""How people write labels: each form is read as what it means, or refused with its row number."""

import json
from pathlib import Path
from typing import Any

import pytest
from small_tokenizers import write_bpe

from edge_ft.config import RowsConfig, TuneConfig
from edge_ft.data import (
    Columns,
    Rendering,
    Row,
    TextTokenizer,
    encode_rows,
    plain_rendering,
    read_rows,
    trained_rendering,
)
from edge_ft.data.classes import class_index, list_of
from edge_ft.errors import AuditRefused, DataError, UsageError
from edge_ft.families import family_of
from edge_ft.models.base_model import Base
from edge_ft.tune.prepare import Prepared, prepare

CONLL = "# id 1\tdomain=a\nthe _ _ O\n# _ _ B-sign\n1 _ _ O\n\n# id 2\tdomain=a\n# _ _ B-sign\ngood _ _ O\n"


class Said:
    """Collects what a command says."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def say(self, text: str) -> None:
        self.texts.append(text)

    def advance(self, stage: str, done: int, total: int) -> None:
        pass


@pytest.fixture
def prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Labels, or the text of a file, to what `prepare` makes of them for a model with a `head`, and what it says."""
    tokenizer = TextTokenizer.load(write_bpe(tmp_path))

    def run(
        labels: list[Any] | str, head: tuple[str, ...] = (), ending: str = "csv", **config: Any
    ) -> tuple[Prepared, str]:
        monkeypatch.setattr(Base, "labels", lambda self, task: head)
        data = tmp_path / f"rows.{'jsonl' if isinstance(labels, list) else ending}"
        if isinstance(labels, list):
            rows = [{"text": f"hello {n} the answer", "label": label} for n, label in enumerate(labels)]
            labels = "".join(json.dumps(row) + "\n" for row in rows)
        data.write_text(labels, encoding="utf-8")
        base = Base("m", tmp_path, family_of("bert"), "", {"max_position_embeddings": 256})
        said = Said()
        settings = TuneConfig(model="m", data=str(data), out=tmp_path / "run", **{"split": (0.6, 0.4, 0.0), **config})
        return prepare(settings, base, tokenizer, said), "\n".join(said.texts)

    return run


def table(*labels: str) -> str:
    """A CSV file with these labels, as often as a split needs."""
    lines = (f'hello {n} the answer,"{label.replace(chr(34), chr(34) * 2)}"' for n, label in enumerate(labels * 5))
    return "text,label\n" + "\n".join(lines) + "\n"


def codes(found: Prepared) -> set[str]:
    return {finding["code"] for finding in found.findings}


@pytest.mark.parametrize(
    ("first", "second", "third"),
    [
        ([0, 1, 0], [1, 0, 0], [0, 1, 1]),
        ([False, True, False], [True, False, False], [False, True, True]),
        ([0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 1.0]),
        ("[0, 1, 0]", "[1, 0, 0]", "[False, True, True]"),
    ],
)
def test_a_place_for_every_class_makes_as_many_classes(prepared: Any, first: Any, second: Any, third: Any) -> None:
    found, said = prepared([first, second, third] * 5)
    assert found.rendering.labels == ("0", "1", "2")
    assert found.rendering.problem_type == "multi_label_classification"
    assert "label holds several classes, as a 0 or 1 for each of 3" in said
    by_row = {example.row: example.labels for part in found.examples.values() for example in part}
    assert [by_row[row] for row in (1, 2, 3)] == [[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 1.0]]


def test_places_have_the_names_of_a_head_with_as_many_classes(prepared: Any) -> None:
    rows = [[0, 1, 0], [1, 0, 0], [0, 1, 1]] * 5
    found, _ = prepared(rows, ("joy", "anger", "fear"))
    assert found.rendering.labels == ("joy", "anger", "fear")
    references = {example.row: example.reference for part in found.examples.values() for example in part}
    assert [references[row] for row in (1, 2, 3)] == ["anger", "joy", "anger, fear"]
    assert prepared(rows, ("joy", "anger"))[0].rendering.labels == ("0", "1", "2")
    # A head whose names are numbers in another order: a place stays a place.
    assert prepared(rows, ("2", "1", "0"))[0].examples["train"][0].labels in ([0, 1, 0], [1, 0, 0], [0, 1, 1])


def test_one_place_of_several_can_be_a_single_class(prepared: Any) -> None:
    found, _ = prepared([[0, 1], [1, 0]] * 8, problem_type="single_label_classification")
    assert {int(example.labels[0]) for example in found.examples["train"]} == {0, 1}
    with pytest.raises(DataError, match=r"row 3: 'label' is \[1, 1\]: with one class per row it must hold exactly one"):
        prepared([[0, 1], [1, 0], [1, 1]] * 5, problem_type="single_label_classification")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([[0, 1, 0], [1, 0]], r"row 1: 'label' is \[0, 1, 0\], which names a class twice"),
        ([[0.3, 0.7], [1.0, 0.0]], r"row 1.*a list of texts or whole numbers.*or in every row a list of equal length"),
        ([[True, False], [True]], "row 1.*a list of equal length with a 0 or 1 for each class"),
        ([["a"], ["b", " "]], "row 2.*the name of a class is blank"),
        ([["a"], "b"], r"row 1: 'label' is \['a'\], which is a list, and in row 2 it is 'b', which is no list"),
        ([1, True], "row 2: 'label' is True, which is a boolean, and in row 1 it is 1"),
        (["a", {"b": 1}], r"row 2: 'label' is \{'b': 1\}: a class must be text or a whole number"),
        (["a", "['b' 'c']"], "row 2.*looks like a list and is not one.*in JSON"),
        (["a", "[b, c]"], "row 2.*looks like a list and is not one"),
        (["a", "('b', 'c')"], "row 2.*looks like a list and is not one"),
        (["[1 0]", "[0 1]"], "row 1.*looks like a list and is not one"),
        (["[ 0.  1.]", "[1. 0.]"], "row 1.*looks like a list and is not one"),
        (["[e]", "[1st]", "(a)"], None),
        ([10**400, 1], None),
        (["0.5", "1_000", "nan"], None),
    ],
)
def test_labels_of_several_kinds_are_refused_with_their_rows(
    prepared: Any, labels: list[Any], message: str | None
) -> None:
    if message is None:
        assert prepared(labels * 6)[0].rendering.problem_type == "single_label_classification"
        return
    with pytest.raises(DataError, match=message):
        prepared(labels * 6)


@pytest.mark.parametrize("value", [float("inf"), "inf", "nan", "1_000", True, [0.5], 1e300, 10**400])
def test_a_number_is_finite(prepared: Any, value: Any) -> None:
    with pytest.raises(DataError, match=r"row 2: 'label' is .*for regression it must be a finite number"):
        prepared([0.5, value, 1.5] * 5, problem_type="regression")


def test_a_number_that_is_nan_is_a_missing_label(prepared: Any) -> None:
    found, _ = prepared([0.5, float("nan"), 1.5] * 6)
    assert found.rendering.problem_type == "regression"
    assert ("unlabelled", 6) in [(finding["code"], finding["count"]) for finding in found.findings]


@pytest.mark.parametrize(
    ("text", "items"),
    [
        ('["a", "b"]', ["a", "b"]),
        ("['a', \"b's\", 'c\\'s']", ["a", "b's", "c's"]),
        (" [1, 2] ", [1, 2]),
        ("[]", []),
        ("[True, 0.5, None]", [True, 0.5, None]),
        ("['a' 'b']", None),
        ("[a, b]", None),
        ("[__import__('os')]", None),
        ("a", None),
        ("{'a': 1}", None),
        ("[" * 100_000 + "]" * 100_000, None),
    ],
)
def test_a_table_holds_lists_as_json_or_python_writes_them(text: str, items: list[Any] | None) -> None:
    assert list_of(text) == items


def test_lists_in_a_table_are_several_classes(prepared: Any) -> None:
    found, _ = prepared(table("['art', 'music']", "['art']", "[]"))
    assert found.rendering.labels == ("art", "music")
    assert found.rendering.problem_type == "multi_label_classification"


def test_words_and_tags_of_a_table_are_lists_too(prepared: Any) -> None:
    lines = "".join(f"\"['hello', 'w{n}']\",\"['O', ' B-a ']\"\n" for n in range(20))
    found, _ = prepared("tokens,tags\n" + lines)
    assert found.rendering.labels == ("B-a", "O")
    with pytest.raises(DataError, match=r"row 2: column 'tokens' must be a list.*a text is not split into words"):
        prepared("tokens,tags\n" + "".join(f"hello w{n},O O\n" for n in range(20)))


# Names of classes: a head that has names keeps them.


@pytest.mark.parametrize(
    "labels", [[0, 1], ["0", "1"], [False, True], ["0.0", "1.0"], ["NEGATIVE", 1], ["Negative", "positive"]]
)
def test_a_head_keeps_its_names_for_rows_with_numbers(prepared: Any, labels: list[Any]) -> None:
    found, said = prepared([labels[0], labels[1]] * 10, ("NEGATIVE", "POSITIVE"))
    assert found.rendering.labels == ("NEGATIVE", "POSITIVE")
    assert "the model's own head is trained further, for NEGATIVE, POSITIVE" in said
    assert f"{1 if labels[1] == '1.0' else labels[1]} is POSITIVE" in said
    references = {example.row: example.reference for part in found.examples.values() for example in part}
    assert (references[1], references[2]) == ("NEGATIVE", "POSITIVE")
    # The run is read again with its own rows.
    own = Rendering.from_dict(json.loads(json.dumps(found.rendering.to_dict())))
    assert own == found.rendering


def test_other_numbers_than_those_of_the_head_get_a_new_one(prepared: Any) -> None:
    found, said = prepared([1, 2] * 10, ("NEGATIVE", "POSITIVE"))
    assert found.rendering.labels == ("1", "2")
    assert "a new head replaces the model's for NEGATIVE, POSITIVE" in said
    assert prepared([0, 1] * 10, ("LABEL_0", "LABEL_1"))[0].rendering.labels == ("0", "1"), "LABEL_0 is no name"
    assert prepared(["LABEL_0", "LABEL_1"] * 10, ("LABEL_0", "LABEL_1"))[0].rendering.labels == ("LABEL_0", "LABEL_1")


@pytest.mark.parametrize("head", [("0", "1"), ("1", "0"), ()])
def test_a_table_may_write_1_as_a_float(prepared: Any, head: tuple[str, ...]) -> None:
    found, _ = prepared(table("0.0", "1.0"), head)
    assert found.rendering.labels == (head or ("0", "1"))
    assert found.examples["train"][0].labels == [found.rendering.labels.index(found.examples["train"][0].reference)]
    assert class_index("1.5", ("0", "1")) is None


def test_rows_of_one_class_have_one_rule(prepared: Any) -> None:
    for labels in (["a"] * 20, ["a", None] * 10, [["a"]] * 20):
        with pytest.raises(AuditRefused, match="only the class 'a' in all rows"):
            prepared(labels)
    with pytest.raises(AuditRefused, match="one class 'none'"):
        prepared([[0, 0, 0]] * 20)
    # The model's own head knows another class.
    with pytest.raises(AuditRefused, match=r"one class 'a'.*--allow one-class"):
        prepared(["a"] * 20, ("a", "b"))
    assert codes(prepared(["a"] * 20, ("a", "b"), allow=("one-class",))[0]) == {"one-class", "absent-class"}


# Findings about names of classes: each speaks, and is silent.


@pytest.mark.parametrize(
    ("labels", "code"),
    [
        (["Sport", "sport", "art"], "similar-classes"),
        (["new  york", "new york", "art"], "similar-classes"),
        (["1", "1.0", "art"], "similar-classes"),
        (["Sport", "art", "music"], None),
        (["nan", "art", "music"], "missing-class"),
        (["None", "art", "music"], "missing-class"),
        (["nano", "art", "music"], None),
        (["art", "music", "art, music"], "joined-classes"),
        (["art", "music", "art|music"], "joined-classes"),
        (["art", "music", "art, old"], None),
    ],
)
def test_odd_names_of_classes_are_reported(prepared: Any, labels: list[str], code: str | None) -> None:
    found, _ = prepared(labels * 40)
    assert codes(found) == ({code} if code else set())
    assert all(finding["count"] == len(finding["rows"]) for finding in found.findings)


def test_a_column_of_texts_is_no_class(prepared: Any) -> None:
    texts = [f"answer {n}" for n in range(20)]
    with pytest.raises(AuditRefused, match="20 rows have 20 different classes in the column label, such as 'answer 0'"):
        prepared(texts)
    assert "many-classes" in codes(prepared(texts, allow=("many-classes",))[0])
    assert "many-classes" not in codes(prepared(texts, tuple(sorted(texts)))[0]), "the model's own head knows them"
    assert "many-classes" not in codes(prepared(texts * 3)[0])


@pytest.mark.parametrize(
    ("text", "severity"),
    [
        ("a film of {0}", "warning"),
        ("sport or music? {0}", None),  # every text names both
        ("a film", None),
        ("{0}ing", None),
    ],
)
def test_an_answer_that_stands_in_the_prompt(prepared: Any, text: str, severity: str | None) -> None:
    names = ["sport", "music"] * 30
    lines = [{"body": f"{text.format(name)} {n}", "label": name} for n, name in enumerate(names)]
    content = "".join(json.dumps(line) + "\n" for line in lines)
    found = [finding for finding in prepared(content, ending="jsonl")[0].findings if finding["code"] != "absent-class"]
    assert [(finding["code"], finding["severity"]) for finding in found] == (
        [("answer-in-prompt", severity)] if severity else []
    )
    with pytest.raises(AuditRefused, match=r"the prompt holds the column label, which is the answer"):
        prepared(content, ending="jsonl", prompt="{body} {label}")


@pytest.mark.parametrize(("labels", "absent"), [(["a", "b"] * 40, []), (["a"] * 39 + ["b"], ["validation"])])
def test_a_class_that_a_split_lacks_is_reported(prepared: Any, labels: list[str], absent: list[str]) -> None:
    found, _ = prepared(labels, split=(0.9, 0.1, 0.0))
    missing = [finding for finding in found.findings if finding["code"] == "absent-class"]
    assert [(finding["split"], finding["classes"]) for finding in missing] == [(split, ["b"]) for split in absent]
    assert all("say nothing about it" in finding["message"] for finding in missing)


# The same model on other rows.


def rendering(labels: tuple[str, ...], places: int = 0) -> Rendering:
    columns = Columns("text_label", "{text}", None, "label", None, "multi_label_classification", places)
    return Rendering("text-classification", None, columns, labels, 64, None, None)


@pytest.mark.parametrize(
    ("own", "label", "targets"),
    [
        (rendering(("a", "b", "c"), 3), [0, 1, 0], [0, 1, 0]),
        (rendering(("a", "b", "c"), 3), ["b", "c"], [0, 1, 1]),
        (rendering(("a", "b", "c")), [True, False, False], [1, 0, 0]),
        (rendering(("0", "1")), [0, 1], [1, 1]),
        (rendering(("0", "1"), 2), [0, 1], [0, 1]),
    ],
)
def test_a_trained_model_reads_labels_in_either_form(
    own: Rendering, label: Any, targets: list[float], tmp_path: Path
) -> None:
    tokenizer = TextTokenizer.load(write_bpe(tmp_path))
    rows = [Row(1, {"text": "hello", "label": label})]
    found = trained_rendering(own, RowsConfig(), rows, tokenizer, 64)
    assert encode_rows(found, tokenizer, rows)[0].labels == targets
    assert trained_rendering(own, RowsConfig(), [Row(1, {"text": "a", "label": None})], tokenizer, 64) == own


def test_places_of_another_number_of_classes_are_refused(tmp_path: Path) -> None:
    tokenizer = TextTokenizer.load(write_bpe(tmp_path))
    rows = [Row(1, {"text": "hello", "label": [0, 1, 1, 0]})]
    with pytest.raises(DataError, match="a 0 or 1 for each of 4 classes, and the model learned 3: a, b, c"):
        trained_rendering(rendering(("a", "b", "c"), 3), RowsConfig(), rows, tokenizer, 64)


# CoNLL files.


def test_comments_of_a_conll_file_are_left_out_and_counted(prepared: Any, tmp_path: Path) -> None:
    file = tmp_path / "a.conll"
    file.write_text("the _ _ O\n# _ _ B-sign\n\n" + CONLL)
    rows = read_rows(str(file))
    assert [row.fields["tokens"] for row in rows] == [["the", "#"], ["the", "#", "1"], ["good"]]
    tags = ["O", "B-work", "B-praise"]
    text = "".join(
        f"# id row-{n}\tx=y\n" + "".join(f"w{n}{at} _ _ {tag}\n" for at, tag in enumerate(tags)) + "\n"
        for n in range(20)
    )
    found, said = prepared(text, ending="conll")
    assert found.rendering.labels == ("B-praise", "B-work", "O")
    assert [(finding["code"], finding["count"]) for finding in found.findings] == [("comment-lines", 20)]
    assert "20 lines are comments and are left out (lines 1, 6, 11, 16, 21, ...) [comment-lines]" in said


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("New York\tB-place\nis\tO\n", ["New York", "is"]),
        ("\ufeffis\tO\r\nold\t\tO\t\r\n", ["is", "old"]),
        ("is \t O\nold O\n", ["is", "old"]),
        ("a\u00a0b O\nold O\n", ["a\u00a0b", "old"]),
        ("-DOCSTART-\tO\nis\tO\n", ["is"]),
        ("#1 B-rank\nis O\nin B-rank\n", ["#1", "is", "in"]),
    ],
)
def test_the_columns_of_a_conll_file_are_separated_in_many_ways(tmp_path: Path, text: str, words: list[str]) -> None:
    file = tmp_path / "a.conll"
    file.write_text(text, encoding="utf-8")
    (row,) = read_rows(str(file))
    assert row.fields["tokens"] == words


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("New York B-place\nis O\nbig O\n", "line 1 has 3 columns and other lines have 2"),
        ("is,O\nbig,O\n", "line 1 holds only 'is,O'.*with a tab or spaces between"),
        ("1\tis\tO\n2\tbig\tO\n\n1\tso\tO\n", "numbers its words in the first column"),
        ("d/1 0 is O\nd/1 1 big O\n\nd/1 0 so O\nd/1 1 it O\n", "has 'd/1' in the first column of every line"),
    ],
)
def test_a_conll_file_with_other_columns_is_refused(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "a.conll"
    file.write_text(text)
    with pytest.raises(DataError, match=message):
        read_rows(str(file))


# --class-names.


@pytest.mark.parametrize(
    ("labels", "head", "said"),
    [
        ([[0, 1, 0], [1, 0, 0], [0, 1, 1]], (), "0 is joy, 1 is anger, 2 is fear"),
        ([0, 1, 2], (), "0 is joy, 1 is anger, 2 is fear"),
        (["fear", "joy", "anger"], (), ""),
        (["fear", "joy", "anger"], ("LABEL_0", "LABEL_1", "LABEL_2"), "own head is trained further, for joy, anger"),
        (["fear", "joy", "anger"], ("a", "b"), "a new head replaces the model's for a, b"),
    ],
)
def test_classes_can_be_named(prepared: Any, labels: list[Any], head: tuple[str, ...], said: str) -> None:
    found, text = prepared(labels * 6, head, class_names=("joy", "anger", "fear"))
    assert found.rendering.labels == ("joy", "anger", "fear")
    assert said in text


@pytest.mark.parametrize(
    ("labels", "config", "says"),
    [
        (["a", "b", "c"], {}, "has the class 'c' and --class-names gives a, b"),
        ([[0, 1, 1], [1, 0, 0]], {}, "has 3 classes and --class-names gives a, b"),
        ([0.5, 1.5, 2.5], {}, "--class-names is for classes and tags"),
        (["a", "b"], {"class_names": ("a", "a")}, "two different names"),
        (["a", "b"], {"class_names": ("a",)}, "two different names"),
    ],
)
def test_names_that_do_not_fit_are_refused(prepared: Any, labels: list[Any], config: Any, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        prepared(labels * 8, **{"class_names": ("a", "b"), **config})


def test_a_name_may_hold_a_comma() -> None:
    assert RowsConfig(class_names=("a,b",)).class_names == ("a", "b")
    assert RowsConfig(class_names=("a, b", "c")).class_names == ("a, b", "c")


def test_a_plain_head_is_given_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Base, "labels", lambda self, task: ("LABEL_0", "LABEL_1"))
    tokenizer = TextTokenizer.load(write_bpe(tmp_path))
    base = Base("m", tmp_path, family_of("bert"), "", {"max_position_embeddings": 256})
    rows = [Row(1, {"text": "hello", "label": "yes"})]
    named = plain_rendering(base, RowsConfig(class_names=("no", "yes")), rows, tokenizer, "text-classification")
    assert encode_rows(named, tokenizer, rows)[0].labels == [1]
    with pytest.raises(UsageError, match="--class-names gives 3 names, the head has 2 outputs"):
        plain_rendering(base, RowsConfig(class_names=("a", "b", "c")), rows, tokenizer, "text-classification")
    with pytest.raises(DataError, match="--class-names: this model's classes are a, b, leave it out"):
        trained_rendering(rendering(("a", "b")), RowsConfig(class_names=("b", "a")), rows, tokenizer, 64)
    bare = plain_rendering(base, RowsConfig(), rows, tokenizer, "text-classification")
    with pytest.raises(DataError, match=r"'yes' is none of the classes.*give their names with --class-names"):
        encode_rows(bare, tokenizer, rows)
