"""Every command reads the same tensors of a checkpoint, or refuses it before any work."""

import shutil
from pathlib import Path

import pytest
from in_process import run_cli
from odd_checkpoints import edit_config, read_tensors, to_fp8, write_tensors

from edge_ft.artifacts import Bundle
from edge_ft.config import EvalConfig, ExportConfig
from edge_ft.evaluate import evaluate
from edge_ft.export import export


@pytest.mark.parametrize("command", ["tune", "plan", "export", "eval"])
@pytest.mark.parametrize("method", ["gptq", "awq", "compressed-tensors"])
def test_a_quantized_checkpoint_is_refused_by_every_command(
    command: str,
    method: str,
    llama: Path,
    sums: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(llama, folder)
    edit_config(folder, quantization_config={"quant_method": method, "bits": 4, "format": "pack-quantized"})
    model, rows, out = str(folder), ["--data", str(sums)], ["--out", str(tmp_path / "out")]
    arguments = {
        "tune": ["--model", model, *rows, *out],
        "plan": ["--model", model, *rows],
        "export": [model, *out],
        "eval": [model, *rows],
    }
    code, _ = run_cli(monkeypatch, command, *arguments[command])
    assert code == 2
    assert "give the float checkpoint that it was made from" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_an_fp8_checkpoint_is_exported_as_its_float_numbers(llama: Path, sums: Path, tmp_path: Path) -> None:
    stored, plain = to_fp8(read_tensors(llama), (128, 128))
    nll = {}
    for name, tensors in (("fp8", stored), ("float", plain)):
        folder = tmp_path / name
        shutil.copytree(llama, folder)
        write_tensors(folder, tensors)
        if name == "fp8":
            edit_config(folder, quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
        bundle = export(str(folder), ExportConfig(out=tmp_path / f"{name}-bundle", data=str(sums)))
        nll[name] = evaluate(str(bundle.path), EvalConfig(data=str(sums)))["nll"]
        assert "quantization_config" not in (bundle.path / "config.json").read_text(encoding="utf-8")
        assert Bundle.open(bundle.path)
    assert nll["fp8"] == nll["float"]
