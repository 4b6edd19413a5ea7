"""Classification with a decoder: scores of the allowed answers, each as a whole, with the prompt read once."""

import io
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tiny_bundle import write_classifier, write_decoder

from edge_ft.artifacts import Bundle
from edge_ft.config import RunConfig
from edge_ft.data import Columns, Example, Rendering, Row, answer_ids, collate, find_answers
from edge_ft.errors import UsageError
from edge_ft.progress import Silent
from edge_ft.runtime import KVCache, TextGenerator, load
from edge_ft.runtime.cache import CacheShape
from edge_ft.runtime.decode import TooLong
from edge_ft.runtime.run import run_file, run_text
from edge_ft.runtime.session import open_session
from edge_ft.runtime.token_scores import answer_nll

LABELS = ("no", "not sure", "yes", "no way")
"""Labels of different lengths; one of them begins others."""


def generator(bundle: Path) -> TextGenerator:
    opened = load(bundle, threads=1, engine="exact")
    assert isinstance(opened, TextGenerator)
    return opened


def whole_nll(opened: TextGenerator, prompt: str, label: str) -> float:
    """The loss of one answer after the prompt, both read in one run."""
    prompt_ids, answer = opened.tokenizer.encode(prompt), answer_ids(opened.rendering, opened.tokenizer, label)
    ids = [*prompt_ids, *answer]
    example = Example(1, ids, [-100] * len(prompt_ids) + answer, len(prompt_ids), label, 0)
    losses, _ = opened.token_nll(collate([example], opened.tokenizer.pad_id, "text-generation"))
    return float(losses.sum())


def test_scores_are_the_softmax_of_whole_answers_stop_token_included(tmp_path: Path) -> None:
    opened = generator(write_decoder(tmp_path / "b"))
    found = opened.classify(["Is it?", "Was it so?"], LABELS)
    for prompt, result in zip(("Is it?", "Was it so?"), found, strict=True):
        nll = np.array([whole_nll(opened, prompt, label) for label in LABELS])
        expected = np.exp(-nll) / np.exp(-nll).sum()
        assert list(result.scores) == list(LABELS)
        assert list(result.scores.values()) == pytest.approx(expected.tolist(), rel=1e-3)
        assert sum(result.scores.values()) == pytest.approx(1)
        assert result.label == LABELS[int(nll.argmin())]
        assert result.prompt_tokens == len(prompt)


def test_one_text_gives_one_result(tmp_path: Path) -> None:
    opened = generator(write_decoder(tmp_path / "b"))
    assert opened.classify("Is it?", LABELS) == opened.classify(["Is it?"], LABELS)[0]


def test_the_best_label_is_not_always_what_the_model_would_generate(tmp_path: Path) -> None:
    opened = generator(write_decoder(tmp_path / "b", script="yes"))
    assert opened.generate("Is it:").text == "yes"
    assert opened.classify("Is it:", ("yes", "ye")).label == "yes"
    assert opened.classify("Is it:", ("no", "maybe")).label in ("no", "maybe")


def test_the_prompt_and_common_beginnings_of_labels_are_read_once(tmp_path: Path) -> None:
    opened = generator(write_decoder(tmp_path / "b"))

    class CountingCache(KVCache):
        """Counts the tokens that the model reads."""

        read = 0

        def extend(self, ids: Sequence[int]) -> NDArray[np.float32]:
            self.read += len(ids)
            return super().extend(ids)

        def extend_each(self, ids: Sequence[int]) -> NDArray[np.float32]:
            self.read += len(ids)
            return super().extend_each(ids)

    session = open_session(opened.bundle.graph(), threads=1)
    cache = CountingCache(session, CacheShape(**opened.bundle.manifest["cache"]))
    prompt = opened.tokenizer.encode("Is it?")
    answers = [answer_ids(opened.rendering, opened.tokenizer, label) for label in LABELS]
    nll = answer_nll(cache, prompt, answers)
    assert nll == pytest.approx([whole_nll(opened, "Is it?", label) for label in LABELS], rel=1e-3)
    # A token a byte; an answer's stop token is predicted and never read, and "no" is a beginning of two other labels.
    assert cache.read == len("Is it?") + len("no") + len("t sure") + len(" way") + len("yes")


def test_the_order_of_labels_does_not_change_their_scores(tmp_path: Path) -> None:
    opened = generator(write_decoder(tmp_path / "b"))
    scores = opened.classify("Is it?", LABELS).scores
    assert opened.classify("Is it?", LABELS[::-1]).scores == pytest.approx(scores)


def with_rendering(bundle: Path, **changes: Any) -> Path:
    manifest = Bundle.open(bundle).manifest
    manifest["rendering"] = replace(Rendering.from_dict(manifest["rendering"]), **changes).to_dict()
    Bundle.seal(bundle, manifest)
    return bundle


def test_labels_go_into_the_completion_template_of_training(tmp_path: Path) -> None:
    columns = Columns("template", "{question}?", " {answer}.")
    opened = generator(with_rendering(write_decoder(tmp_path / "b"), columns=columns))
    ids = answer_ids(opened.rendering, opened.tokenizer, "no")
    assert opened.tokenizer.decode(ids, skip_special_tokens=False) == " no.<|end|>"


def test_in_a_chat_an_answer_ends_as_a_turn_does(tmp_path: Path) -> None:
    opened = generator(with_rendering(write_decoder(tmp_path / "b", chat=True), appended_eos=None))
    ids = answer_ids(opened.rendering, opened.tokenizer, "no")
    assert opened.tokenizer.decode(ids, skip_special_tokens=False) == "no<|end|>"
    messages = [{"role": "user", "content": "Is it?"}]
    assert opened.classify([messages], LABELS)[0].scores == opened.classify("Is it?", LABELS).scores


@pytest.mark.parametrize(
    ("prompt", "labels", "says"),
    [
        ("Is it?", None, "not trained on a few answers"),
        ("Is it?", ("yes",), "at least two"),
        ("Is it?", ("yes", "yes"), "at least two"),
        ("", ("yes", "no"), "empty"),
    ],
)
def test_unusable_labels_and_prompts_are_refused(
    tmp_path: Path, prompt: str, labels: tuple[str, ...] | None, says: str
) -> None:
    with pytest.raises(UsageError, match=says):
        generator(write_decoder(tmp_path / "b")).classify([prompt], labels)


def test_prompt_and_longest_label_must_fit_the_model(tmp_path: Path) -> None:
    opened = generator(write_decoder(tmp_path / "b", max_length=12))
    assert opened.classify("a" * 9, ("no", "ok"))
    with pytest.raises(TooLong, match="9 tokens and 5 new ones"):
        opened.classify("a" * 9, ("no", "sure"))


def answers_of(values: Sequence[str | None], tmp_path: Path, columns: Columns | None = None) -> tuple[str, ...]:
    opened = generator(write_decoder(tmp_path / "b"))
    columns = columns or Columns("prompt_completion", "{prompt}", "{completion}")
    rows = [Row(n, {"prompt": f"{n}", "completion": value}) for n, value in enumerate(values, 1)]
    return find_answers(rows, replace(opened.rendering, columns=columns), opened.tokenizer)


@pytest.mark.parametrize(
    ("values", "found"),
    [
        (["no", "yes"] * 4, ("no", "yes")),
        (["no", "yes"] * 3, ()),  # three rows each
        (["no"] * 8, ()),
        ([f"{n % 64}" for n in range(256)], tuple(sorted(map(str, range(64))))),
        ([f"{n % 65}" for n in range(260)], ()),
        (["no", "x" * 15] * 4, ("no", "x" * 15)),  # 15 and the end
        (["no", "x" * 16] * 4, ()),
        (["no", "yes", None] * 4, ("no", "yes")),
    ],
    ids=["few", "too-few-rows", "one", "64", "65", "16-tokens", "17-tokens", "gaps"],
)
def test_few_short_answers_that_repeat_are_kept(
    values: list[str | None], found: tuple[str, ...], tmp_path: Path
) -> None:
    assert answers_of(values, tmp_path) == found


def test_the_completion_templates_text_is_not_part_of_an_answer(tmp_path: Path) -> None:
    columns = Columns("template", "{prompt}:", " It is {completion}.")
    assert answers_of(["no", "yes"] * 4, tmp_path, columns) == ("no", "yes")


def test_run_prints_labels_and_scores(tmp_path: Path) -> None:
    bundle, shown = write_decoder(tmp_path / "b", script="yes"), io.StringIO()
    found = run_text(bundle, "Is it:", RunConfig(threads=1, labels=("no,maybe,yes",)), shown)
    assert list(found["scores"]) == ["no", "maybe", "yes"]
    assert found["label"] == "yes"
    assert shown.getvalue().splitlines()[0].split() == [f"{found['scores']['yes']:.2%}", "yes"]


def test_run_labels_every_row_of_a_file_except_one_that_is_too_long(tmp_path: Path) -> None:
    bundle = with_rendering(write_decoder(tmp_path / "b", max_length=16), answers=("no", "yes"))
    source, out = tmp_path / "rows.jsonl", tmp_path / "labels.jsonl"
    source.write_text('{"prompt": "Is it:"}\n{"prompt": "' + "a" * 20 + '"}\n')
    summary = run_file(bundle, source, out, RunConfig(threads=1, labels=("auto",)), Silent())
    first, second = map(json.loads, out.read_text().splitlines())
    assert set(first["scores"]) == {"no", "yes"}
    assert "error" in second
    assert summary["failed"] == 1


def test_a_classifiers_labels_are_its_own(tmp_path: Path) -> None:
    bundle = write_classifier(tmp_path / "b")
    with pytest.raises(UsageError, match="no, maybe, yes"):
        run_text(bundle, "text", RunConfig(threads=1, labels=("a", "b")), None)
