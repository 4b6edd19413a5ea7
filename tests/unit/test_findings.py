"""Each way in which scores can fool is a finding: every test has rows where it speaks and where it is silent."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_tokenizers import write_bpe

from edge_ft.data import Columns, Example, Record, Rendering, TextTokenizer, encode_example, untrained_references
from edge_ft.evaluate.findings import CODES, Scored, answer_findings, row_findings, score_findings
from edge_ft.evaluate.generation import Answer, answer_metrics
from edge_ft.evaluate.scoring import RowScores, summary
from edge_ft.progress import Silent

DOCS = Path(__file__).resolve().parents[2] / "docs" / "audit.md"
LABELS = ("art", "music", "sport")


def rendering(
    task: Any = "text-classification", problem: Any = "single_label_classification", **more: Any
) -> Rendering:
    columns = Columns("text_label", "{text}", None, "label", None, problem)
    return Rendering(task, None, columns, more.get("labels", LABELS), 64, None, more.get("eos"))


SINGLE, SEVERAL = rendering(), rendering(problem="multi_label_classification")
NUMBER, TAGS = rendering(problem="regression", labels=("stars",)), rendering("token-classification", None)


def scored(labels: list[list[Any]], predicted: list[list[Any]], of: Rendering, model: str = "base") -> Scored:
    """Rows with these labels, and what a model predicts."""
    examples = [
        Example(row, [5] * max(len(one), 2), one, 0, str(row), 0, pair_ids=[row])
        for row, one in enumerate(labels, start=1)
    ]
    scores = RowScores(
        np.full(len(labels), 0.5),
        np.array([len(one) for one in labels]),
        np.array([sum(a == b for a, b in zip(*pair, strict=True)) for pair in zip(labels, predicted, strict=True)]),
        [np.array(one, np.float32 if isinstance(one[0], float) else np.int64) for one in predicted],
    )
    metrics = summary(scores, examples, of.task, of.labels)["metrics"]
    return Scored("validation", model, examples, metrics, scores)


def codes(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Codes of findings with the metrics they name."""
    return {finding["code"]: finding.get("metrics") for finding in found}


@pytest.mark.parametrize(
    ("labels", "predicted", "of", "found"),
    [
        ([[0], [1], [2]], [[0], [1], [2]], SINGLE, ["accuracy", "macro_f1"]),
        ([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]], [[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]], SEVERAL, ["micro_f1", "macro_f1"]),
        ([[0.5], [1.5], [3.5]], [[0.5], [1.5], [3.5]], NUMBER, ["mse", "pearson", "spearman"]),
        ([[0, 1], [2, 0]], [[0, 1], [2, 0]], TAGS, ["accuracy"]),
        ([[0], [1], [2]], [[0], [1], [1]], SINGLE, None),
        ([[0.5], [1.5], [3.5]], [[0.6], [1.0], [0.5]], NUMBER, None),
    ],
)
def test_a_metric_that_is_perfect_before_training(labels: Any, predicted: Any, of: Any, found: Any) -> None:
    assert codes(score_findings(scored(labels, predicted, of), of)) == (
        {"perfect-before-training": found} if found else {}
    )
    assert score_findings(scored(labels, predicted, of, "tuned"), of) == [], "after the training it may be perfect"


@pytest.mark.parametrize(
    ("labels", "predicted", "of", "says"),
    [
        ([[1], [1], [1]], [[0], [1], [2]], SINGLE, "all 3 validation rows have the same right answer 'music'"),
        ([[1.0, 0.0, 1.0]] * 2, [[0.0, 0.0, 1.0]] * 2, SEVERAL, "the same right answer 'art, sport'"),
        ([[0, 0], [0, 0]], [[1, 0], [0, 0]], TAGS, "the same right answer 'art'"),
        ([[0, 1], [0, 1]], [[1, 0], [0, 0]], TAGS, None),
        ([[1], [1], [0]], [[0], [1], [2]], SINGLE, None),
    ],
)
def test_a_metric_that_does_not_depend_on_the_model(labels: Any, predicted: Any, of: Any, says: str | None) -> None:
    found = score_findings(scored(labels, predicted, of), of)
    assert [finding["code"] for finding in found] == ["constant-metric"] * bool(says)
    assert says is None or says in found[0]["message"]
    assert says is None or score_findings(scored(labels, predicted, of, "tuned"), of) == [], "it is said once"


def test_a_recall_among_few_texts_is_always_1() -> None:
    of = rendering("feature-extraction", None)
    vectors = np.eye(12, dtype=np.float32), -np.eye(12, dtype=np.float32)
    for rows, expected in ((12, {}), (9, {"constant-metric": ["recall_at_10"]})):
        examples = [Example(row, [row], [0], 1, "", 0, pair_ids=[row]) for row in range(rows)]
        few = vectors[0][:rows], vectors[1][:rows]
        scores = RowScores(np.ones(rows), np.ones(rows, np.int64), np.zeros(rows, np.int64), [], few)
        metrics = summary(scores, examples, of.task, ())["metrics"]
        assert codes(score_findings(Scored("validation", "base", examples, metrics, scores), of)) == expected


@pytest.mark.parametrize(
    ("labels", "predicted", "of", "says"),
    [
        ([[0], [1], [2]], [[1], [1], [1]], SINGLE, "answers 'music' to all 3 validation rows"),
        ([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]], [[0.0, 0.0, 0.0]] * 2, SEVERAL, "answers no class to all 2"),
        ([[0, 1, 2], [0, 1, 0]], [[0, 0, 0], [0, 0, 0]], TAGS, "answers 'art' to all 2"),
        ([[0], [1], [2]], [[1], [1], [0]], SINGLE, None),
        ([[0, 1, 2], [0, 1, 0]], [[0, 0, 0], [1, 1, 1]], TAGS, None),
    ],
)
@pytest.mark.parametrize(("model", "when"), [("base", "before training the"), ("tuned", "after training the")])
def test_a_model_that_always_answers_the_same(
    labels: Any, predicted: Any, of: Any, says: str | None, model: str, when: str
) -> None:
    found = score_findings(scored(labels, predicted, of, model), of)
    assert [finding["code"] for finding in found] == ["constant-answers"] * bool(says)
    assert says is None or (says in found[0]["message"] and found[0]["message"].startswith(when))


@pytest.mark.parametrize(
    ("labels", "predicted", "of", "undefined"),
    [
        ([[0.5], [1.5], [2.5]], [[1.0], [1.0], [1.0]], NUMBER, ["pearson", "spearman"]),
        ([[1.5], [1.5], [1.5]], [[1.0], [2.0], [1.0]], NUMBER, ["pearson", "spearman"]),
        ([[0.0, 0.0, 0.0]] * 3, [[0.0, 1.0, 0.0]] * 3, SEVERAL, ["micro_f1", "macro_f1"]),
        ([[0, 0], [0, 0]], [[0, 1], [0, 0]], rendering("token-classification", None, labels=("O", "B-a")), ["span_f1"]),
        ([[0.5], [1.5], [2.5]], [[1.0], [1.0], [2.0]], NUMBER, None),
        ([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0]], [[0.0, 1.0, 0.0]] * 2, SEVERAL, None),
        ([[0, 1], [0, 0]], [[0, 1], [0, 0]], rendering("token-classification", None, labels=("O", "B-a")), None),
    ],
)
def test_a_metric_without_a_value_is_none_and_said(labels: Any, predicted: Any, of: Any, undefined: Any) -> None:
    one = scored(labels, predicted, of, "tuned")
    assert [name for name, metric in one.metrics.items() if metric["value"] is None] == (undefined or [])
    found = codes(score_findings(one, of))
    assert found.get("undefined-metric") == undefined


def answered(*texts: tuple[str, str, bool], tokens: int, model: str = "tuned") -> list[dict[str, Any]]:
    """Findings about (answer, reference, whether it ended), of references of this many tokens and a limit of 8."""
    answers = [Answer(*text) for text in texts]
    examples = [Example(row, [4] * 9, [-100, *[5] * tokens], 1, text[1], 0) for row, text in enumerate(texts)]
    metrics = {**answer_metrics(answers, Silent())}
    return answer_findings(Scored("test", model, examples, metrics), answers, 8, "give {tokens}")


WHOLE = ("a cat", "a cat", True), ("a dog", "a cow", True), ("an owl", "a hen", True)
CUT = ("a cat and so on", "a cat", False), *WHOLE[1:]


def test_answers_that_are_cut_are_counted() -> None:
    assert answered(*WHOLE, tokens=8) == []
    (found,) = answered(*CUT, tokens=8)
    assert (found["code"], found["share"], found["longer_references"]) == ("cut-answers", 0.3333, 0)
    assert (
        "1 of 3 answers to test rows were cut after 8 tokens, and 0 of 3 right answers are longer" in found["message"]
    )
    (found,) = answered(*WHOLE, tokens=9)
    assert (found["share"], found["longer_references"]) == (0, 3)
    assert found["message"].endswith("give 9")
    assert answered(*CUT, tokens=8, model="base") == [], "a base seldom ends its answers"


def test_answers_that_are_perfect_before_training_or_all_the_same() -> None:
    perfect = [(text, text, True) for text in ("a cat", "a dog", "an owl")]
    assert "exact_match" in codes(answered(*perfect, tokens=8, model="base"))["perfect-before-training"]
    assert answered(*perfect, tokens=8) == []
    same = [("hm", text, True) for text in ("a cat", "a dog", "an owl")]
    (found,) = answered(*same, tokens=8)
    assert found["code"] == "constant-answers"
    assert "the model answers the same text to all 3 test rows" in found["message"]


PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}assistant: "
CLOSED = PLAIN.removesuffix("assistant: ") + "{% if add_generation_prompt %}assistant: {% endif %}"
THINKS = CLOSED.replace("{{ m.content }}", "{% if m.role == 'assistant' %}hm hm {% endif %}{{ m.content }}")
LEAVES_OUT = CLOSED.replace("{{ m.content }}", "{{ m.content.split('|')[-1] }}")


@pytest.mark.parametrize(
    ("template", "answer", "rows"),
    [
        (CLOSED, " seven ", []),
        (CLOSED, "hello | seven", []),
        (THINKS, "seven", [3]),
        (LEAVES_OUT, "hello | seven", [3]),
        (None, " seven", []),
    ],
)
def test_a_reference_that_is_not_what_is_trained(
    tmp_path: Path, template: str | None, answer: str, rows: list[int]
) -> None:
    tokenizer = TextTokenizer.load(write_bpe(tmp_path))
    columns = Columns("prompt_completion", "{prompt}", "{completion}")
    of = Rendering("text-generation", template, columns, (), 64, None, None if template else tokenizer.eos_id)
    record = Record(3, None, "hello", answer, None)
    found = untrained_references([encode_example(of, tokenizer, record)], of, tokenizer)
    assert [finding.rows for finding in found] == ([rows] if rows else [])
    if template == THINKS:
        assert "trained 'hm hm seven'" in found[0].example


def test_an_evaluation_says_which_classes_its_rows_lack(tmp_path: Path) -> None:
    tokenizer = TextTokenizer.load(write_bpe(tmp_path))
    for labels, absent in (([[0], [1]], ["sport"]), ([[0], [1], [2]], None)):
        examples = [Example(row, [5], one, 0, "", 0) for row, one in enumerate(labels)]
        found = row_findings(examples, SINGLE, tokenizer, "rows.jsonl")
        assert [finding["classes"] for finding in found] == ([absent] if absent else [])


def test_every_code_is_documented() -> None:
    table = DOCS.read_text(encoding="utf-8")
    assert [code for code in CODES if f"| `{code}` |" not in table] == []
