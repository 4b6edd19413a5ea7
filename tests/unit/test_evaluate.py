"""`eval` gives the same figures for torch and ONNX, and `verify` finds what no longer scores as it did."""

import json
from pathlib import Path
from typing import Any

import pytest

from edge_ft.artifacts import Bundle, RunFolder
from edge_ft.config import EvalConfig, VerifyConfig
from edge_ft.errors import BundleError, DataError, GateRefused, UsageError
from edge_ft.evaluate import evaluate
from edge_ft.export.verify import verify


def rows(run: RunFolder, name: str = "test") -> str:
    return str(run.split(name))


def test_a_run_and_its_exact_bundle_score_alike(llama_run: RunFolder, llama_adapter_bundle: Bundle) -> None:
    config = EvalConfig(data=rows(llama_run), max_new_tokens=12)
    torch_side = evaluate(str(llama_run.path), config)
    onnx_side = evaluate(str(llama_adapter_bundle.path), config)
    assert onnx_side["nll"] == pytest.approx(torch_side["nll"], abs=1e-4)
    assert onnx_side["metrics"] == torch_side["metrics"]
    assert torch_side["nll"] == pytest.approx(llama_run.report()["nll"]["test"], abs=1e-5)
    assert set(torch_side["metrics"]) == {"token_accuracy", "exact_match", "verbatim_match", "token_f1"}


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
    "option",
    [
        {"base_format": "int4"},
        {"shots": 2},
        {"limit": 3},
        {"prompt": "{prompt}", "completion": "{completion}"},
        {"chat_template": "none"},
        {"max_length": 40},
    ],
    ids=lambda option: next(iter(option)),
)
def test_every_option_changes_the_score_of_a_model(option: dict[str, Any], llama: Path, llama_run: RunFolder) -> None:
    settings: dict[str, Any] = {"data": rows(llama_run), "shots_from": rows(llama_run, "train"), "generate": False}
    plain = evaluate(str(llama), EvalConfig(**settings))
    changed = evaluate(str(llama), EvalConfig(**{**settings, **option}))
    assert changed["nll"] != plain["nll"]


def test_answers_can_be_left_out_or_cut_short(llama_run: RunFolder) -> None:
    assert (
        "exact_match" not in evaluate(str(llama_run.path), EvalConfig(data=rows(llama_run), generate=False))["metrics"]
    )
    short = evaluate(str(llama_run.path), EvalConfig(data=rows(llama_run), max_new_tokens=1))
    whole = evaluate(str(llama_run.path), EvalConfig(data=rows(llama_run), max_new_tokens=12))
    assert short["metrics"]["token_f1"]["value"] < whole["metrics"]["token_f1"]["value"]


def test_batch_size_and_threads_do_not_change_the_score(llama_run: RunFolder, llama_adapter_bundle: Bundle) -> None:
    scores = [
        evaluate(str(llama_adapter_bundle.path), EvalConfig(data=rows(llama_run), generate=False, **option))["nll"]
        for option in ({"batch_size": 1}, {"batch_size": 16}, {"threads": 1})
    ]
    assert max(scores) - min(scores) < 1e-5


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


@pytest.mark.parametrize("name", ["llama_bundle", "llama_adapter_bundle", "bert_bundle", "bert_adapter_bundle"])
def test_a_bundle_verifies_where_it_was_made(name: str, request: pytest.FixtureRequest) -> None:
    found = verify(request.getfixturevalue(name).path, VerifyConfig())
    assert found["probe_difference"]["1"] < 1e-5


def test_the_exports_own_rows_must_score_as_they_did(
    llama_bundle: Bundle, llama_run: RunFolder, tmp_path: Path
) -> None:
    config = VerifyConfig(data=rows(llama_run, "validation"), max_tax=1.0)
    assert verify(llama_bundle.path, config)["same_rows"] is True
    changed = forge(llama_bundle, tmp_path, lambda found: found["nll"].update(shipped=found["nll"]["shipped"] - 0.1))
    with pytest.raises(GateRefused, match="the export's rows score"):
        verify(changed, config)


def test_a_tax_above_the_limit_is_refused_again(llama_bundle: Bundle, llama_run: RunFolder) -> None:
    assert llama_bundle.manifest["verification"]["quantization_tax"] > 0
    with pytest.raises(GateRefused, match="--max-tax 0"):
        verify(llama_bundle.path, VerifyConfig(data=rows(llama_run, "validation"), max_tax=0.0))


def test_a_machine_that_computes_otherwise_is_noticed(llama_bundle: Bundle, tmp_path: Path) -> None:
    def elsewhere(found: dict[str, Any]) -> None:
        level = found["by_accuracy_level"]["1"]
        level["probe_nll"] = [nll + 1 for nll in level["probe_nll"]]

    with pytest.raises(GateRefused, match="level 1 scores the probe texts"):
        verify(forge(llama_bundle, tmp_path, elsewhere), VerifyConfig())


def test_on_other_rows_an_adapter_must_beat_its_base(
    llama_adapter_bundle: Bundle, llama_run: RunFolder, tmp_path: Path
) -> None:
    found = verify(llama_adapter_bundle.path, VerifyConfig(data=rows(llama_run)))
    assert found["same_rows"] is False
    assert found["nll"] < found["base_nll"]
    wrong = tmp_path / "wrong.jsonl"
    lines = [{"prompt": f"hello {n}", "completion": "\x01\x02\x03\x04" * (n + 1)} for n in range(4)]
    wrong.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(GateRefused, match="no better than its base"):
        verify(llama_adapter_bundle.path, VerifyConfig(data=str(wrong)))


def test_a_tampered_bundle_does_not_verify(llama_bundle: Bundle, tmp_path: Path) -> None:
    changed = forge(llama_bundle, tmp_path, lambda found: None)
    (changed / "config.json").write_text("{}")
    with pytest.raises(BundleError, match="sha256"):
        verify(changed, VerifyConfig())


def forge(bundle: Bundle, tmp_path: Path, change: Any) -> Path:
    """A copy whose recorded verification was changed."""
    import shutil

    folder = tmp_path / "forged"
    shutil.copytree(bundle.path, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest["verification"])
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder
