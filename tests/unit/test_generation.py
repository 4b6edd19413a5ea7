"""Metrics of generated answers equal those of the libraries that define them, or are counted by hand."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from recorded_progress import RecordedProgress
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import CHRF

from edge_ft.data import Example
from edge_ft.errors import MissingExtra
from edge_ft.evaluate import generation as module
from edge_ft.evaluate.generation import Answer, answer_metrics, generate_answers
from edge_ft.progress import Silent

REFERENCE = "The pump runs at night."


def figures(texts: Sequence[str], references: Sequence[str], ended: bool = True) -> dict[str, float]:
    answers = [Answer(text, reference, ended) for text, reference in zip(texts, references, strict=True)]
    return {name: found["value"] for name, found in answer_metrics(answers, Silent()).items()}


def test_overlaps_are_those_of_rouge_score_and_sacrebleu() -> None:
    texts = ["The pump runs by day.", "A float closes the valve.", ""]
    references = [REFERENCE, "The float closes a valve.", REFERENCE]
    found = figures(texts, references)
    for kind in ("rouge1", "rouge2", "rougeL"):
        scores = [
            RougeScorer([kind]).score(right, text)[kind].fmeasure for right, text in zip(references, texts, strict=True)
        ]
        assert found[kind] == pytest.approx(sum(scores) / 3)
    chrf = [CHRF().sentence_score(text, [right]).score for right, text in zip(references, texts, strict=True)]
    assert found["chrf"] == pytest.approx(sum(chrf) / 300)
    # By hand: "the pump runs" is 3 of 5 words of both, and 2 of 4 pairs.
    first = figures(texts[:1], references[:1])
    assert (first["rouge1"], first["rouge2"], first["rougeL"]) == pytest.approx((0.6, 0.5, 0.6))


def test_a_right_answer_has_full_scores() -> None:
    found = figures([REFERENCE], [REFERENCE])
    assert all(found[name] == pytest.approx(1) for name in found if name != "repetition_4"), found
    assert found["repetition_4"] == 0


def test_repetition_is_counted_within_an_answer() -> None:
    loop = "on and on and on and on and"  # 8 words, 2 of them different; pairs 2 of 7; phrases of four 2 of 5
    found = figures([loop, "a b c d e"], ["", ""])
    assert found["distinct_1"] == pytest.approx((2 / 8 + 1) / 2)
    assert found["distinct_2"] == pytest.approx((2 / 7 + 1) / 2)
    assert found["repetition_4"] == pytest.approx((3 / 5 + 0) / 2)


def test_answers_that_are_too_short_have_no_repetition_metric() -> None:
    found = figures(["yes", ""], ["yes", "no"])
    assert "repetition_4" not in found
    assert "distinct_2" not in found
    assert found["distinct_1"] == 1


def test_eos_rate_is_the_share_that_ended() -> None:
    answers = [Answer("x", "x", n != 0) for n in range(4)]
    assert answer_metrics(answers, Silent())["eos_rate"]["value"] == 0.75


def test_every_figure_lies_in_its_interval() -> None:
    answers = [Answer(" ".join(["the pump runs"] * (n % 3 + 1)), REFERENCE, n % 2 == 0) for n in range(30)]
    for name, found in answer_metrics(answers, Silent()).items():
        assert 0 <= found["low"] <= found["value"] <= found["high"] <= 1, name


def test_without_the_extra_its_metrics_are_left_out_with_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str, extra: str) -> None:
        raise MissingExtra(f"this needs the package {name!r}: pip install 'edge-ft[{extra}]'")

    monkeypatch.setattr(module, "require", missing)
    progress = RecordedProgress()
    found = answer_metrics([Answer("yes", "yes", True)], progress)
    assert {"exact_match", "token_f1", "eos_rate"} <= set(found)
    assert not {"rouge1", "chrf"} & set(found)
    assert progress.lines == [
        "ROUGE and chrF are left out: this needs the package 'rouge_score.rouge_scorer': pip install 'edge-ft[metrics]'"
    ]


def examples(*prompts: list[int]) -> list[Example]:
    return [
        Example(row, [*ids, 7], [-100] * len(ids) + [7], len(ids), "seven", 0) for row, ids in enumerate(prompts, 1)
    ]


class Counter:
    """Writes 1, 2, 3 … up to the longest answer allowed, or to the prompt's first token."""

    def token_nll(self, batch: object) -> None:  # type: ignore[return]
        ...

    def answer(self, prompt_ids: list[int], max_new_tokens: int) -> list[int]:
        return list(range(1, min(max_new_tokens, prompt_ids[0]) + 1))


def test_an_answer_that_was_cut_has_not_ended_and_none_exceeds_the_models_limit() -> None:
    opened: Any = SimpleNamespace(scorer=Counter(), tokenizer=SimpleNamespace(decode=str), model_limit=8)
    found = generate_answers(opened, examples([2], [9], [], [9] * 6, [9] * 8), 4, Silent())
    assert [(answer.text, answer.ended) for answer in found] == [
        ("[1, 2]", True),
        ("[1, 2, 3, 4]", False),
        ("[1, 2]", False),  # 6 of 8 positions are taken; the rows without a prompt or a free position have no answer
    ]
