"""What would be trained in vain is found before training, with the rows it is in."""

from edge_ft.data import Example, Finding, audit


def row(number: int, labels: list[int], reference: str = "x", cut: int = 0, unlearned_turns: int = 0) -> Example:
    return Example(number, [1] * len(labels), labels, 1, reference, cut, unlearned_turns)


GOOD = [row(number, [-100, 5]) for number in range(20, 26)]


def test_good_rows_have_no_findings() -> None:
    assert audit(GOOD, 64) == []
    assert audit([], 64) == []


def test_rows_without_a_learned_token_are_refused_only_when_all_are() -> None:
    bad = [row(number, [-100, -100]) for number in range(1, 8)]
    found = Finding(
        "nothing-to-learn",
        "error",
        [1, 2, 3, 4, 5, 6, 7],
        "7 of 7 rows have no token to learn within 64 tokens (rows 1, 2, 3, 4, 5, ...)",
    )
    assert audit(bad, 64) == [found]
    assert [finding.severity for finding in audit(bad + GOOD, 64)] == ["warning"]


def test_cut_rows_are_counted_in_rows_and_tokens() -> None:
    found = audit([row(3, [-100, 5], cut=4), *GOOD, row(9, [-100, 5], cut=6)], 64)
    assert [(finding.code, finding.rows) for finding in found] == [("truncated", [3, 9])]
    assert "longer than 64 tokens and lose 10 tokens" in found[0].message


def test_empty_answers_and_unlearned_turns_are_said() -> None:
    found = audit([row(1, [-100, 2], reference=""), row(2, [-100, 5], unlearned_turns=1), *GOOD], 64)
    assert [(finding.code, finding.severity, finding.rows) for finding in found] == [
        ("empty-completion", "warning", [1]),
        ("unlearned-turns", "warning", [2]),
    ]


def test_one_class_cannot_be_learned() -> None:
    same = [Example(number, [1, 2, 3], [0], 3, "yes", 0) for number in (1, 2)]
    found = audit(same, 64)
    assert [(finding.code, finding.severity) for finding in found] == [("one-class", "error")]
    assert audit([*same, Example(3, [1, 2], [1], 2, "no", 0)], 64) == []
