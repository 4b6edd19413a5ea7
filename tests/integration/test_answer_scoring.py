"""Choosing among remembered answers, with a tuned run and its bundle."""

import json
from pathlib import Path

import pytest

from edge_ft.artifacts import Bundle, RunFolder
from edge_ft.config import EvalConfig
from edge_ft.data import Rendering, TextTokenizer, answer_ids
from edge_ft.evaluate import evaluate
from edge_ft.evaluate.loading import open_run_model
from edge_ft.models.scorer import TorchScorer
from edge_ft.runtime import TextGenerator, load


def generator(bundle: Path) -> TextGenerator:
    opened = load(bundle, threads=1, engine="exact")
    assert isinstance(opened, TextGenerator)
    return opened


def test_a_run_keeps_its_answers_and_is_scored_on_choosing(llama_run: RunFolder, llama_adapter_bundle: Bundle) -> None:
    opened = generator(llama_adapter_bundle.path)
    assert opened.rendering.answers == (" hello", " seven")
    assert opened.classify("hello 3 the answer").label in (" hello", " seven")
    data = str(llama_run.split("test"))
    found = [
        evaluate(str(path), EvalConfig(data=data))["metrics"] for path in (llama_run.path, llama_adapter_bundle.path)
    ]
    rows = [json.loads(line) for line in Path(data).read_text().splitlines()]
    chosen = opened.classify([row["prompt"] for row in rows])
    share = sum(one.label == row["completion"] for one, row in zip(chosen, rows, strict=True)) / len(rows)
    assert found[0]["choice_accuracy"]["value"] == found[1]["choice_accuracy"]["value"] == share
    assert 0 <= found[1]["choice_macro_f1"]["value"] <= 1
    assert "choice_accuracy" in llama_run.report()["answers"]["metrics"]


def test_torch_gives_the_same_scores(llama_run: RunFolder, llama_adapter_bundle: Bundle) -> None:
    model, _ = open_run_model(llama_run)
    tokenizer = TextTokenizer.load(llama_run.tokenizer)
    rendering = Rendering.from_dict(llama_run.rendering())
    answers = [answer_ids(rendering, tokenizer, label) for label in (" hello", " seven", " seven hello", "")]
    prompt = tokenizer.encode("hello 3 the answer")
    expected = generator(llama_adapter_bundle.path).answer_nll(prompt, answers)
    assert TorchScorer(model, "text-generation").answer_nll(prompt, answers) == pytest.approx(expected, abs=1e-3)
