"""`eval` gives the same metrics for torch and ONNX, and its options do what they promise."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from recorded_progress import RecordedProgress

from edge_ft.artifacts import Bundle, RunFolder
from edge_ft.config import EvalConfig
from edge_ft.data import encode_rows, read_rows
from edge_ft.errors import AuditRefused, DataError, UsageError
from edge_ft.evaluate import evaluate, evaluate_loaded
from edge_ft.evaluate.generation import generate_answers
from edge_ft.evaluate.loading import open_run_model, open_source
from edge_ft.models.scorer import TorchScorer
from edge_ft.progress import Silent

CUTS = 41
"""Tokens that cut an answer of the fixtures' rows, and no prompt."""


def rows(run: RunFolder, name: str = "test") -> str:
    return str(run.split(name))


def write(file: Path, lines: list[dict[str, Any]]) -> str:
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(file)


def test_a_run_and_its_exact_bundle_score_alike(llama_run: RunFolder, llama_adapter_bundle: Bundle) -> None:
    config = EvalConfig(data=rows(llama_run), max_new_tokens=12)
    torch_side = evaluate(str(llama_run.path), config)
    onnx_side = evaluate(str(llama_adapter_bundle.path), config)
    assert onnx_side["nll"] == pytest.approx(torch_side["nll"], abs=1e-4)
    assert onnx_side["metrics"] == torch_side["metrics"]
    assert torch_side["nll"] == pytest.approx(llama_run.report()["nll"]["test"], abs=1e-5)
    generated = {
        "exact_match",
        "verbatim_match",
        "token_f1",
        "rouge1",
        "rouge2",
        "rougeL",
        "chrf",
        "eos_rate",
        "distinct_1",
    }
    assert set(torch_side["metrics"]) == {"token_accuracy", "choice_accuracy", "choice_macro_f1", *generated}
    low, high = torch_side["nll_interval"]
    assert low < torch_side["nll"] < high
    assert torch_side["perplexity_interval"] == pytest.approx([math.exp(low), math.exp(high)])


def test_a_classifier_is_scored_by_accuracy_and_macro_f1(bert_run: RunFolder, bert_bundle: Bundle) -> None:
    config = EvalConfig(data=rows(bert_run))
    assert evaluate(str(bert_run.path), config)["metrics"] == evaluate(str(bert_bundle.path), config)["metrics"]
    found = evaluate(str(bert_bundle.path), config)
    assert set(found["metrics"]) == {"accuracy", "macro_f1"}
    assert found["perplexity"] > 1


@pytest.mark.parametrize("source", ["run", "bundle"])
def test_without_the_adapter_the_base_is_scored(
    source: str, llama_run: RunFolder, llama_adapter_bundle: Bundle
) -> None:
    path = str({"run": llama_run.path, "bundle": llama_adapter_bundle.path}[source])
    found = evaluate(path, EvalConfig(data=rows(llama_run), adapter="none", generate=False))
    assert found["nll"] == pytest.approx(llama_run.report()["nll"]["test_base"], abs=1e-4)


@pytest.mark.parametrize(
    ("option", "reported"),
    [
        ({"base_format": "int4"}, {}),
        ({"base_format": "int8"}, {}),
        ({"base_format": "nf4"}, {}),
        ({"base_format": "bf16"}, {}),
        ({"shots": 2}, {"shots": 2}),
        ({"limit": 3}, {"rows": 3}),
        ({"prompt": "{prompt}", "completion": "{completion}"}, {}),
        ({"chat_template": "none"}, {}),
        ({"max_length": 40}, {"cut": 8}),
    ],
    ids=lambda option: next(iter(option), "score"),
)
def test_every_option_changes_the_score_of_a_model(
    option: dict[str, Any], reported: dict[str, Any], llama: Path, llama_run: RunFolder
) -> None:
    settings: dict[str, Any] = {"data": rows(llama_run), "shots_from": rows(llama_run, "train"), "generate": False}
    plain = evaluate(str(llama), EvalConfig(**settings))
    changed = evaluate(str(llama), EvalConfig(**{**settings, **option}))
    assert changed["nll"] != plain["nll"]
    assert {name: changed[name] for name in reported} == reported
    assert not reported or {name: plain[name] for name in reported} != reported


def test_answers_can_be_left_out_or_cut_short(llama_run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    config = EvalConfig(data=rows(llama_run), generate=False)
    given = read_rows(config.data)
    opened = open_source(str(llama_run.path), config, given)
    assert "exact_match" not in evaluate_loaded(opened, given, config, Silent())["metrics"]
    assert isinstance(opened.scorer, TorchScorer)
    opened.scorer.stop_ids = frozenset()
    monkeypatch.setattr("edge_ft.evaluate.row_findings", lambda *_: [])  # it decodes the right answers
    for longest in (1, 12):
        lengths: set[int] = set()
        monkeypatch.setattr(opened.tokenizer, "decode", lambda ids, lengths=lengths: lengths.add(len(ids)) or "")
        evaluate_loaded(opened, given, replace(config, generate=True, max_new_tokens=longest), Silent())
        assert lengths == {longest}


def test_batch_size_and_threads_do_not_change_the_score(llama_run: RunFolder, llama_adapter_bundle: Bundle) -> None:
    scores = [
        evaluate(str(llama_adapter_bundle.path), EvalConfig(data=rows(llama_run), generate=False, **option))["nll"]
        for option in ({"batch_size": 1}, {"batch_size": 16}, {"threads": 1})
    ]
    assert max(scores) - min(scores) < 1e-5


def test_graphs_of_different_accuracy_levels_score_differently(llama_run: RunFolder, llama_bundle: Bundle) -> None:
    config = EvalConfig(data=rows(llama_run), generate=False)
    assert "4" in llama_bundle.manifest["graphs"]
    exact, fast = (evaluate(str(llama_bundle.path), replace(config, accuracy_level=level))["nll"] for level in (1, 4))
    assert exact != fast
    with pytest.raises(UsageError, match="--accuracy-level is for bundles"):
        evaluate(str(llama_run.path), replace(config, accuracy_level=1))


def test_a_runs_shots_come_from_its_train_rows(llama_run: RunFolder) -> None:
    with_shots = evaluate(str(llama_run.path), EvalConfig(data=rows(llama_run), shots=1, generate=False))
    without = evaluate(str(llama_run.path), EvalConfig(data=rows(llama_run), generate=False))
    assert with_shots["shots"] == 1
    assert with_shots["nll"] != without["nll"]


def test_a_bundle_has_no_rows_for_shots(llama_adapter_bundle: Bundle, llama_run: RunFolder) -> None:
    with pytest.raises(UsageError, match="--shots-from"):
        evaluate(str(llama_adapter_bundle.path), EvalConfig(data=rows(llama_run), shots=1))


def test_rows_with_other_columns_are_mapped_anew(
    llama_adapter_bundle: Bundle, llama_run: RunFolder, tmp_path: Path
) -> None:
    lines = [json.loads(line) for line in Path(rows(llama_run)).read_text().splitlines()]
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps({"instruction": r["prompt"], "output": r["completion"]}) + "\n" for r in lines))
    config = EvalConfig(data=str(other), generate=False)
    expected = evaluate(str(llama_adapter_bundle.path), EvalConfig(data=rows(llama_run), generate=False))
    assert evaluate(str(llama_adapter_bundle.path), config)["nll"] == pytest.approx(expected["nll"])


def test_rows_that_cannot_be_mapped_are_refused(llama_adapter_bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n')
    with pytest.raises(DataError, match="--prompt"):
        evaluate(str(llama_adapter_bundle.path), EvalConfig(data=str(tmp_path / "rows.jsonl")))


def test_rows_of_only_a_text_are_scored_without_answers(
    llama_run: RunFolder, llama_bundle: Bundle, tmp_path: Path
) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "hello world, the answer"}\n{"text": "seven"}\n')
    for source in (llama_run.path, llama_bundle.path):
        assert set(evaluate(str(source), EvalConfig(data=str(text)))["metrics"]) == {"token_accuracy"}


def test_rows_that_were_cut_or_dropped_are_counted_and_reported(
    llama_run: RunFolder, llama_bundle: Bundle, tmp_path: Path
) -> None:
    lines = [{"prompt": "hello", "completion": " seven"}, {"prompt": "hello 1 " * 200, "completion": " seven"}]
    data = write(tmp_path / "rows.jsonl", lines)
    for source in (llama_bundle.path, llama_run.path):
        progress = RecordedProgress()
        found = evaluate(str(source), EvalConfig(data=data, generate=False), progress)
        assert (found["rows"], found["dropped"], found["cut"]) == (1, 1, 1)
        assert found["cut_tokens"] > 100
        assert any(f"1 row(s) lose {found['cut_tokens']} tokens" in line for line in progress.lines)
        assert any("1 row(s) are not scored" in line for line in progress.lines)


def test_a_length_beyond_the_models_is_refused(llama: Path, llama_bundle: Bundle, llama_run: RunFolder) -> None:
    for source in (llama, llama_bundle.path, llama_run.path):
        with pytest.raises(DataError, match="beyond the model's 256 positions"):
            evaluate(str(source), EvalConfig(data=rows(llama_run), max_length=9999))


def test_runs_and_bundles_take_an_explicit_length(llama_run: RunFolder, llama_bundle: Bundle) -> None:
    for source in (llama_run.path, llama_bundle.path):
        whole = evaluate(str(source), EvalConfig(data=rows(llama_run), generate=False))
        short = evaluate(str(source), EvalConfig(data=rows(llama_run), generate=False, max_length=CUTS))
        assert (whole["cut"], whole["dropped"], short["dropped"]) == (0, 0, 0)
        assert short["cut"] > 0
        assert short["nll"] != whole["nll"]


def test_shots_may_use_the_models_whole_length(llama_bundle: Bundle, llama_run: RunFolder, tmp_path: Path) -> None:
    short = tmp_path / "short"
    shutil.copytree(llama_bundle.path, short)
    manifest = json.loads((short / "manifest.json").read_text())
    manifest["rendering"]["max_length"] = CUTS + 10
    (short / "manifest.json").write_text(json.dumps(manifest))
    config = EvalConfig(data=rows(llama_run), shots_from=rows(llama_run, "train"), shots=2, generate=False)
    found = evaluate(str(short), config)
    assert (found["rows"], found["dropped"], found["cut"]) == (len(read_rows(rows(llama_run))), 0, 0)
    for beyond in ({"shots": 20}, {"max_length": CUTS + 10}):
        with pytest.raises(AuditRefused, match="no row has an answer"):
            evaluate(str(short), replace(config, **beyond))


def test_rows_of_text_take_no_shots(llama_run: RunFolder, tmp_path: Path) -> None:
    data = write(tmp_path / "text.jsonl", [{"text": "hello world"}])
    with pytest.raises(UsageError, match="rows with a prompt"):
        evaluate(str(llama_run.path), EvalConfig(data=data, shots=1, shots_from=data))


def test_nothing_is_answered_where_there_is_no_prompt(llama: Path, llama_run: RunFolder, tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = [{"q": "", "a": " seven"}, {"q": "hello", "a": " seven"}]
    settings = {"prompt": "{q}", "completion": "{a}", "max_new_tokens": 4}
    mixed = evaluate(str(llama), EvalConfig(data=write(tmp_path / "mixed.jsonl", lines), **settings))
    assert mixed["rows"] == 2
    assert "exact_match" in mixed["metrics"]
    empty = evaluate(str(llama), EvalConfig(data=write(tmp_path / "empty.jsonl", lines[:1]), **settings))
    assert set(empty["metrics"]) == {"token_accuracy"}
    model, _base = open_run_model(llama_run)
    assert TorchScorer(model, "text-generation").answer([], 3) == []


def test_answers_end_at_the_models_limit(llama_run: RunFolder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    lines = [{"prompt": "\x01" * length, "completion": "\x02" * 40} for length in (20, 195)]
    data = read_rows(write(tmp_path / "long.jsonl", lines))
    opened = open_source(str(llama_run.path), EvalConfig(data="-"), data)
    endless = TorchScorer(open_run_model(llama_run)[0], "text-generation", stop_ids=frozenset())
    examples = encode_rows(opened.rendering, opened.tokenizer, data)
    monkeypatch.setattr(opened.tokenizer, "decode", lambda ids: str(len(ids)))
    answers = generate_answers(replace(opened, scorer=endless), examples, 64, Silent())
    assert [answer.text for answer in answers] == ["64", str(256 - examples[1].prompt_length)]
    assert examples[1].prompt_length > 256 - 64


def test_torch_scores_on_the_gpu_where_there_is_one(
    llama: Path, llama_run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = rows(llama_run)
    has_gpu = torch.cuda.is_available()
    for source in (llama_run.path, llama):
        scorer = open_source(str(source), EvalConfig(data=data), read_rows(data)).scorer
        assert isinstance(scorer, TorchScorer)
        assert scorer.device.type == ("cuda" if has_gpu else "cpu")
    if not has_gpu:  # moving a model to a GPU that is not there fails, and shows that it was tried
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        with pytest.raises((AssertionError, RuntimeError), match=r"CUDA|NVIDIA"):
            open_source(str(llama), EvalConfig(data=data), read_rows(data))
