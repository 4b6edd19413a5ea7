"""The audit finds rows that cannot be learned from, and rows that leak between splits, with their numbers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from small_tokenizers import write_bpe

from edge_ft.config import TuneConfig
from edge_ft.data import Example, Finding, Record, TextTokenizer, audit, template_marks
from edge_ft.data.audit import CODES
from edge_ft.data.filled import Filled
from edge_ft.errors import AuditRefused, UsageError
from edge_ft.families import family_of
from edge_ft.models.base_model import Base
from edge_ft.progress import Silent
from edge_ft.tune.prepare import Prepared, prepare

DOCS = Path(__file__).resolve().parents[2] / "docs" / "audit.md"


def row(number: int, labels: list[int], reference: str = "x", cut: int = 0, **more: int) -> Example:
    return Example(number, [1] * len(labels), labels, 1, reference, cut, **more)


def find(examples: list[Example], max_length: int = 64) -> list[Finding]:
    """Findings on rows that all read differently."""
    records = [
        Record(one.row, None, f"row {one.row}", one.reference, None, classes=(one.reference,) * (len(one.labels) == 1))
        for one in examples
    ]
    return audit(records, examples, max_length)


def read(*records: Record, marks: tuple[str, ...] = ()) -> dict[str, list[int]]:
    """Codes and rows of what is found in texts."""
    found = audit(records, [row(one.row, [-100, 5]) for one in records], 64, marks)
    return {finding.code: finding.rows for finding in found}


def text(number: int, prompt: str, answer: str = "yes") -> Record:
    return Record(number, None, Filled(["", prompt, ""]), Filled(["", answer, ""]), None)


GOOD = [row(number, [-100, 5]) for number in range(20, 26)]


def test_good_rows_have_no_findings() -> None:
    assert find(GOOD) == []
    assert find([]) == []
    assert read(text(1, "façade, Âge, 5 € – “naïve” [x] 'NÃO'"), text(2, "b")) == {}


def test_rows_without_a_learned_token_are_refused_only_when_all_are() -> None:
    bad = [row(number, [-100, -100]) for number in range(1, 8)]
    message = "7 of 7 rows have no token to learn within 64 tokens (rows 1, 2, 3, 4, 5, ...)"
    assert find(bad) == [Finding("nothing-to-learn", "error", [1, 2, 3, 4, 5, 6, 7], message, "row 1 → x")]
    assert [finding.severity for finding in find(bad + GOOD)] == ["warning"]


def test_cut_rows_are_counted_with_the_tokens_that_their_answers_lose() -> None:
    found = find([row(3, [-100, 5], cut=4, cut_targets=3), *GOOD, row(9, [-100, 5], cut=6, cut_targets=6)])
    assert [(finding.code, finding.rows, finding.lost) for finding in found] == [("truncated", [3, 9], (3, 6))]
    assert "longer than 64 tokens and lose 10 tokens at their end, 9 of them of answers, up to 6" in found[0].message


def test_empty_answers_and_unlearned_turns_are_reported() -> None:
    found = find([row(1, [-100, 2], reference=""), row(2, [-100, 5], unlearned_turns=1), *GOOD])
    assert [(finding.code, finding.severity, finding.rows) for finding in found] == [
        ("empty-completion", "warning", [1]),
        ("unlearned-turns", "warning", [2]),
    ]


def classes(**counts: int) -> list[Example]:
    names = [name for name, count in counts.items() for _ in range(count)]
    return [Example(number, [1, 2, 3], [0], 3, name, 0) for number, name in enumerate(names, 1)]


def test_one_class_is_refused_and_an_imbalance_is_reported() -> None:
    assert [(finding.code, finding.severity) for finding in find(classes(yes=2))] == [("one-class", "error")]
    assert find(classes(yes=2, no=1)) == []
    assert find(classes(yes=10, no=1, maybe=3)) == []
    found = find(classes(yes=23, no=2, maybe=5))
    assert [(finding.code, finding.rows) for finding in found] == [("imbalance", [24, 25])]
    assert "2 of 30 rows are of class 'no', 23 of 'yes'" in found[0].message


def test_repeated_and_contradicting_rows_are_distinguished() -> None:
    rows = [text(1, "a"), text(2, "b"), text(5, "a"), text(6, "a", "no"), text(7, "b", "yes")]
    assert read(*rows) == {"duplicated": [5, 7], "contradicting": [6]}


def test_a_prompt_of_blank_values_is_empty_and_rows_of_only_a_text_have_none() -> None:
    assert read(text(1, " \n"), text(2, "b"), Record(3, None, "", "a text", None)) == {"empty-prompt": [1]}


@pytest.mark.parametrize("broken", ["caf\ufffd", "cafÃ©", "itâ€™s", "Ã‰t\u00e9", "no\u00a0Â\u00a0break", "a\u0092b"])
def test_a_text_in_the_wrong_encoding_is_reported(broken: str) -> None:
    assert read(text(1, "ok"), text(2, broken), text(3, "fine", broken)) == {"encoding": [2, 3]}


def test_a_value_that_holds_marks_of_a_chat_template_is_reported(tmp_path: Path) -> None:
    tokenizer = TextTokenizer.load(write_bpe(tmp_path))
    marks = template_marks("{% for m in messages %}<turn {{ m.role }}>\n{{ m.content }}{% endfor %}", tokenizer)
    assert {"<turn assistant>", "<|im_end|>", "[INST]"} <= set(marks)
    own = Filled(["<|im_start|>user\n", "hello", "<|im_end|>"])  # what --prompt itself writes is meant
    rows = [
        text(1, "<|im_start|>user\nhi"),
        text(2, "[INST] hi"),
        Record(3, None, own, "x", None),
        text(4, "<turn user>"),
    ]
    assert read(*rows, marks=marks) == {"template-in-text": [1, 2, 4]}


# What follows goes through `prepare`, as tune and plan do.


@pytest.fixture
def prepared(tmp_path: Path) -> Any:
    """Rows to what `prepare` makes of them."""
    tokenizer = TextTokenizer.load(write_bpe(tmp_path))

    def base(label: str | None) -> Base:
        family = "llama" if label is None else "bert"
        save_file({"weight": np.zeros(1, np.float32)}, tmp_path / "model.safetensors")  # no head in it
        return Base("m", tmp_path, family_of(family), "", {"max_position_embeddings": 256})

    def run(train: list[Any] | str, validation: list[Any] | None = None, **config: Any) -> Prepared:
        content = train if isinstance(train, str) else "".join(json.dumps(one) + "\n" for one in train)
        data = tmp_path / ("train.csv" if isinstance(train, str) else "train.jsonl")
        data.write_text(content, encoding="utf-8")
        if validation is not None:
            (tmp_path / "held.jsonl").write_text("".join(json.dumps(one) + "\n" for one in validation))
            config["validation"] = str(tmp_path / "held.jsonl")
        settings = TuneConfig(model="m", data=str(data), out=tmp_path / "run", **config)
        return prepare(settings, base(settings.label), tokenizer, Silent())

    return run


def pair(number: int, **fields: Any) -> dict[str, Any]:
    return {"prompt": f"hello {number}", "completion": " seven", **fields}


PAIRS = [pair(number) for number in range(20)]


def test_findings_name_the_file_the_count_and_an_example(prepared: Any) -> None:
    # Line 1 of a CSV file is its header; a quoted field may have a line break in it.
    lines = ["prompt,completion", *(f"hello {n},seven" for n in range(10)), '"two\nlines",', "hello 3,seven"]
    found = {finding["code"]: finding for finding in prepared("\n".join(lines)).findings}
    assert set(found) == {"empty-completion", "duplicated", "few-rows"}
    assert (found["empty-completion"]["rows"], found["empty-completion"]["example"]) == ([12], "two lines")
    assert {key: value for key, value in found["duplicated"].items() if key not in ("file", "message")} == {
        "code": "duplicated",
        "severity": "warning",
        "rows": [14],
        "count": 1,
        "example": "hello 3 → seven",
    }
    assert found["duplicated"]["file"].endswith("train.csv")


def test_an_example_is_short(prepared: Any) -> None:
    findings = prepared([pair(0, prompt="hello " * 90, completion=""), *PAIRS]).findings
    assert all(len(finding["example"]) <= 120 for finding in findings) and findings


def test_rows_without_an_answer_and_empty_rows_are_left_out(prepared: Any) -> None:
    rows = [*PAIRS, {"prompt": "hello", "completion": None}, {"prompt": "hello"}, {}, {"prompt": "", "completion": " "}]
    result = prepared(rows)
    assert {finding["code"]: finding["rows"] for finding in result.findings} == {
        "unlabelled": [21, 22],
        "empty-row": [23, 24],
    }
    assert sum(map(len, result.rows.values())) == 20
    with pytest.raises(AuditRefused, match="no row has an answer"):
        prepared([{"prompt": "a", "completion": None}, {"prompt": "b"}])


def test_a_chat_without_an_answer_is_left_out(prepared: Any) -> None:
    asked = {"role": "user", "content": "hello"}
    chats = [{"messages": [asked, {"role": "assistant", "content": f"seven {n}"}]} for n in range(10)]
    result = prepared([*chats, {"messages": [asked]}])
    assert {finding["code"] for finding in result.findings} == {"unlabelled", "contradicting", "few-rows"}


def test_a_class_that_is_missing_is_left_out(prepared: Any) -> None:
    rows = [{"text": f"hello {n}", "label": "ab"[n % 2]} for n in range(100)] + [{"text": "x", "label": " "}]
    result = prepared(rows, label="label")
    assert [(finding["code"], finding["rows"]) for finding in result.findings] == [("unlabelled", [101])]


def test_a_row_in_two_given_splits_is_refused_unless_allowed(prepared: Any) -> None:
    held = [pair(40), pair(4), pair(41)]
    with pytest.raises(
        AuditRefused, match=r"also in the train split, e.g. train row 5 is validation row 2.*--allow leak"
    ):
        prepared(PAIRS, held)
    findings = prepared(PAIRS, held, allow=("leak",)).findings
    assert [(finding["code"], finding["severity"], finding["rows"]) for finding in findings] == [
        ("leak", "warning", [2])
    ]
    assert findings[0]["file"].endswith("held.jsonl")
    assert findings[0]["example"] == "hello 4 → seven"


def test_a_training_set_of_one_class_is_refused_unless_allowed(prepared: Any) -> None:
    train, held = ([{"text": f"{part} {n}", "label": part} for n in range(9)] for part in ("one", "other"))
    with pytest.raises(AuditRefused, match=r"one class 'one'.*--allow one-class"):
        prepared(train, held, label="label")
    assert {finding["severity"] for finding in prepared(train, held, label="label", allow=["one-class"]).findings} == {
        "warning"
    }


def test_nothing_to_learn_cannot_be_allowed(prepared: Any) -> None:
    for allow, message in (((), "--max-length 10"), (("nothing-to-learn",), "--allow cannot change that")):
        with pytest.raises(AuditRefused, match=message):
            prepared(PAIRS, max_length=10, allow=allow)


def test_an_unknown_code_is_refused_with_a_suggestion(prepared: Any) -> None:
    with pytest.raises(UsageError, match="did you mean 'leak'"):
        prepared(PAIRS, allow=("leek",))


def test_max_length_auto_keeps_99_of_100_rows_whole(prepared: Any) -> None:
    rows = [pair(n, prompt=f"hello {n}", completion=" seven" * (3 + 20 * (n == 7))) for n in range(100)]
    lengths = sorted(
        len(example.input_ids)
        for examples in prepared(rows, chat_template="none").examples.values()
        for example in examples
    )
    result = prepared(rows, chat_template="none", max_length="auto")
    assert result.rendering.max_length % 32 == 0
    assert lengths[98] <= result.rendering.max_length < lengths[98] + 32 < lengths[99]
    assert [(finding["code"], finding["rows"]) for finding in result.findings] == [("truncated", [8])]
    assert result.findings[0]["lost"] == [lengths[99] - result.rendering.max_length]


def test_max_length_auto_stays_within_the_model(prepared: Any) -> None:
    rows = [pair(n, completion=" seven" * 300) for n in range(10)]
    assert prepared(rows, max_length="auto").rendering.max_length == 256


def test_show_marks_what_is_trained(prepared: Any) -> None:
    assert prepared(PAIRS).shown == []
    one, two = prepared(PAIRS, chat_template="none", split=(0.9, 0.1, 0.0), show=2).shown
    head, _, body = one.partition("\n")
    assert head.startswith("row ") and "tokens read" in head and "3 of them trained" in head
    assert body.startswith("hello ") and body.endswith("⟦ seven<|im_end|>⟧")
    assert one != two


def test_show_marks_every_trained_turn_of_a_chat(prepared: Any) -> None:
    turns = [{"role": role, "content": f"{role} {n}"} for n in (1, 2) for role in ("user", "assistant")]
    chats = [{"messages": [{**turns[0], "content": f"hé {n}"}, *turns[1:]]} for n in range(10)]
    shown = prepared(chats, show=1).shown[0]
    assert "⟦assistant 1<|im_end|>⟧\n<|im_start|>user\nuser 2" in shown
    assert shown.endswith("⟦assistant 2<|im_end|>⟧")


def test_show_names_the_class(prepared: Any) -> None:
    rows = [{"text": f"hello {n}", "label": "ab"[n % 2]} for n in range(20)]
    assert prepared(rows, label="label", show=1).shown[0].endswith("⟧")


def test_every_code_is_documented() -> None:
    table = DOCS.read_text(encoding="utf-8")
    assert [code for code in CODES if f"| `{code}` |" not in table] == []
