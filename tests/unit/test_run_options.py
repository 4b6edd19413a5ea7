"""Options of `edge-ft run` and `eval` that reach the session or the prompt."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import onnxruntime as ort
import pytest
from tiny_bundle import write_classifier, write_decoder

from edge_ft.config import EvalConfig, RunConfig
from edge_ft.errors import BundleError, UsageError
from edge_ft.evaluate import evaluate
from edge_ft.runtime.run import run_text


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The threads of the sessions that a test opens."""
    seen: list[int] = []
    open_session = ort.InferenceSession

    def opened(graph: str, options: Any, **settings: Any) -> Any:
        seen.append(options.intra_op_num_threads)
        return open_session(graph, options, **settings)

    monkeypatch.setattr(ort, "InferenceSession", opened)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    return seen


def test_threads_are_those_of_the_session(tmp_path: Path, threads: list[int]) -> None:
    bundle = write_classifier(tmp_path / "classifier")
    for given in (None, 2):
        run_text(bundle, "text", RunConfig(threads=given), None)
    assert threads == [3, 2]


def test_an_evaluation_of_a_bundle_uses_as_many_threads(tmp_path: Path, threads: list[int]) -> None:
    bundle, rows = write_decoder(tmp_path / "decoder"), tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "Is it:", "completion": "yes"}\n')
    settings = EvalConfig(data=str(rows), prompt="{prompt}", completion="{completion}", generate=False)
    scored = [evaluate(str(bundle), replace(settings, threads=given))["nll"] for given in (None, 2)]
    assert threads == [3, 2]
    assert scored[0] == pytest.approx(scored[1])


def test_the_accuracy_level_chooses_the_graph(tmp_path: Path) -> None:
    bundle = write_decoder(tmp_path / "decoder")
    assert run_text(bundle, "Is it:", RunConfig(accuracy_level=1, max_new_tokens=2), None)["new_tokens"] == 2
    with pytest.raises(BundleError, match="no verified graph of accuracy level 4"):
        run_text(bundle, "Is it:", RunConfig(accuracy_level=4), None)


def test_the_chat_template_of_the_training_is_replaced(tmp_path: Path) -> None:
    bundle = write_decoder(tmp_path / "decoder", chat=True)
    chat, none = (
        run_text(bundle, "Is it:", RunConfig(chat_template=template, max_new_tokens=1), None)["prompt_tokens"]
        for template in (None, "none")
    )
    assert chat > none > 0
    file = tmp_path / "template.jinja"
    file.write_text("{% for message in messages %}0000 {{ message.content }}<|end|>{% endfor %}")
    own = run_text(bundle, "Is it:", RunConfig(chat_template=str(file), max_new_tokens=1), None)["prompt_tokens"]
    assert own == none + len("0000 ") + 1


def test_what_does_not_fit_is_dropped_for_generated_answers_alone(tmp_path: Path) -> None:
    bundle = write_decoder(tmp_path / "decoder", max_length=16)
    cut = RunConfig(overflow="truncate-left", max_new_tokens=4)
    found = run_text(bundle, "longer than the limit", cut, None)
    assert (found["prompt_tokens"], found["dropped_tokens"]) == (12, 9)
    with pytest.raises(UsageError, match="leave it out with --labels"):
        RunConfig(overflow="shift", labels=("a", "b"))
    with pytest.raises(UsageError, match="--overflow is for decoders"):
        run_text(write_classifier(tmp_path / "classifier"), "text", cut, None)
