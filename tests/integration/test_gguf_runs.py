"""Runs over GGUF models: from a split file to answers, and runs over what an earlier release converted."""

import json
import shutil
from pathlib import Path

import pytest
from resumed_runs import adapter, settings, stopped_at
from tiny_gguf import write_gguf

from edge_ft.config import EvalConfig, ExportConfig
from edge_ft.errors import ModelError
from edge_ft.evaluate import evaluate
from edge_ft.export import export
from edge_ft.files import cache_folder, file_sha256
from edge_ft.runtime import load
from edge_ft.tune import tune

LIMITS = {"max_tax": 9.0, "min_retained": 0.0, "max_metric_drop": 1.0}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGE_FT_CACHE", str(tmp_path / "cache"))


def earlier_conversion(llama: Path, file: Path) -> Path:
    """A file's conversion as a first release left it in the cache."""
    folder = cache_folder() / f"gguf-{file_sha256(file)[:16]}"
    shutil.copytree(llama, folder)
    return folder


def test_a_split_model_is_tuned_exported_and_answers(llama: Path, sums: Path, tmp_path: Path) -> None:
    (tmp_path / "split").mkdir()
    write_gguf(llama, tmp_path / "split" / "model.gguf", "Q8_0", split_max_tensors=9)
    run = tune(settings(tmp_path / "split", sums, tmp_path / "run", base_format="fp32", max_steps=3))
    assert run.base()["model"] == str(tmp_path / "split")
    bundle = export(str(run.path), ExportConfig(out=tmp_path / "bundle", lane="adapter", **LIMITS))
    assert load(bundle, threads=1, engine="exact").generate("hello 1 the answer").new_tokens
    shutil.rmtree(cache_folder())  # it is converted again, to the same bytes
    assert evaluate(str(run.path), EvalConfig(data=str(sums), generate=False, threads=1))["rows"] == 40


def test_a_run_over_an_earlier_conversion_opens_if_that_was_complete(llama: Path, sums: Path, tmp_path: Path) -> None:
    whole, torn = tmp_path / "whole.gguf", tmp_path / "torn.gguf"
    write_gguf(llama, whole)
    write_gguf(llama, torn, without=("blk.1.ffn_up.weight",))
    earlier_conversion(llama, whole)
    run = tune(settings(earlier_conversion(llama, torn), sums, tmp_path / "run", base_format="fp32", max_steps=3))
    identity = json.loads((run.path / "base.json").read_text(encoding="utf-8"))
    for file, opens in ((whole, True), (torn, False)):
        path = cache_folder() / f"gguf-{file_sha256(file)[:16]}"
        (run.path / "base.json").write_text(json.dumps(identity | {"model": str(file), "path": str(path)}))
        if opens:
            assert evaluate(str(run.path), EvalConfig(data=str(sums), generate=False, threads=1))["rows"] == 40
            continue
        for command in (
            lambda: evaluate(str(run.path), EvalConfig(data=str(sums), generate=False, threads=1)),
            lambda: export(str(run.path), ExportConfig(out=tmp_path / "bundle", **LIMITS)),
        ):
            with pytest.raises(ModelError, match=r"lacks the tensor blk\.1\.ffn_up\.weight.*tune again with --model"):
                command()


def test_a_stopped_run_over_an_earlier_conversion_resumes_with_it(
    llama: Path, sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_gguf(llama, tmp_path / "model.gguf", "Q8_0")  # its weights now differ from those of that conversion
    begun = settings(earlier_conversion(llama, file), sums, tmp_path / "run", base_format="fp32", max_steps=6)
    stopped_at(begun, 4, monkeypatch)
    folder = tmp_path / "run"
    text = (folder / "config.yaml").read_text(encoding="utf-8")
    (folder / "config.yaml").write_text(text.replace(str(begun.model), str(file)), encoding="utf-8")
    resumed = tune(settings(file, sums, folder, base_format="fp32", max_steps=6, resume=True))
    assert resumed.report()["resumed_from_step"] > 0
    whole = tune(settings(llama, sums, tmp_path / "whole", base_format="fp32", max_steps=6))
    assert adapter(resumed) == adapter(whole)
