"""Calibrated codes through tune and export."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from recorded_progress import RecordedProgress
from tiny_models import write_decoder

from edge_ft.artifacts import RunFolder
from edge_ft.config import ExportConfig, TuneConfig
from edge_ft.errors import ModelError
from edge_ft.evaluate.loading import open_run_model
from edge_ft.export import export, source
from edge_ft.export.opening import open_export_source
from edge_ft.export.source import ExportSource
from edge_ft.models.base_model import find_base
from edge_ft.models.loading import ModelSpec, load_model
from edge_ft.progress import Silent
from edge_ft.quant import kept_codes
from edge_ft.quant.serialization import codes_sha256, frozen_layers
from edge_ft.tune import trainable_model, tune


def short_tune(model: Path, sums: Path, out: Path, **settings: Any) -> RunFolder:
    return tune(
        TuneConfig(
            **{"model": str(model), "data": str(sums), "out": out, "max_steps": 2, "eval_steps": 2},
            **{"base_format": "int4", "compute": "fp32", **settings},  # type: ignore[arg-type]
        )
    )


def test_the_option_changes_the_codes_and_the_run_stores_them(llama: Path, sums: Path, tmp_path: Path) -> None:
    plain = short_tune(llama, sums, tmp_path / "plain", calibration_rows=0)
    chosen = short_tune(llama, sums, tmp_path / "chosen", calibration_rows=8)
    assert not plain.codes.exists()
    nearest = codes_sha256(load_model(ModelSpec(find_base(str(llama)), "text-generation", "int4")))
    assert plain.base()["codes_sha256"] == nearest != chosen.base()["codes_sha256"]
    model, _ = open_run_model(chosen)
    assert codes_sha256(model) == chosen.base()["codes_sha256"]
    few = short_tune(llama, sums, tmp_path / "few", calibration_rows=2)
    assert few.base()["codes_sha256"] != chosen.base()["codes_sha256"]


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("missing", r"codes\.safetensors is missing"),
        ("torn", r"codes\.safetensors cannot be read"),
        ("other", "are not those that"),
    ],
)
def test_a_run_without_its_codes_is_refused(how: str, says: str, llama: Path, sums: Path, tmp_path: Path) -> None:
    run = short_tune(llama, sums, tmp_path / "run", calibration_rows=8)
    if how == "missing":
        run.codes.unlink()
    elif how == "torn":
        run.codes.write_bytes(run.codes.read_bytes()[:-100])
    else:
        other = short_tune(llama, sums, tmp_path / "other", calibration_rows=3)
        run.codes.write_bytes(other.codes.read_bytes())
    with pytest.raises(ModelError, match=says):
        open_run_model(run)


@pytest.mark.parametrize("lane", ["merged", "adapter"])
def test_the_manifest_has_the_calibration_of_the_codes(lane: Any, llama: Path, sums: Path, tmp_path: Path) -> None:
    loose: dict[str, Any] = {"max_tax": 9.0, "min_retained": -9.0, "max_metric_drop": 1.0}
    methods = {}
    for rows in (0, 8):
        run = short_tune(llama, sums, tmp_path / f"run{rows}", calibration_rows=rows, learning_rate=1e-2)
        bundle = export(str(run.path), ExportConfig(out=tmp_path / f"{lane}{rows}", lane=lane, **loose))
        methods[rows] = bundle.manifest["quantization"]["method"]
    assert methods == {0: "rtn", 8: "gptq"}


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_an_export_chooses_the_codes_of_the_merged_weights_and_never_holds_the_float_model(
    name: str, sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_decoder(tmp_path / "model", name)
    run = short_tune(model, sums, tmp_path / "run", base_format="fp32", learning_rate=1e-2)
    opened = open_export_source(str(run.path), ExportConfig(out=tmp_path / "unused"))
    trained = open_run_model(run)[0].merge_and_unload()
    with monkeypatch.context() as patch:
        patch.setattr(source, "merge_adapter", None)
        patch.setattr(source, "quantize_calibrated", None)
        shipped = opened.load_shipped(Silent())
    with monkeypatch.context() as patch:
        patch.setattr(ExportSource, "_plain_changes", lambda *_: None)
        merged_first = opened.load_shipped(Silent())
    layers, others = frozen_layers(shipped), frozen_layers(merged_first)
    assert layers.keys() == others.keys()
    for layer, module in layers.items():
        weight = trained.get_submodule(layer).weight.float()
        weight = weight.T if weight.shape != module.dequantize().shape else weight
        found, expected = (float((one[layer].dequantize() - weight).norm()) for one in (layers, others))
        assert found == pytest.approx(expected, rel=0.02), layer  # PEFT adds in another order: a code may differ


def test_a_change_of_a_layer_that_the_model_lacks_is_refused(llama: Path) -> None:
    pair = np.zeros((1, 4), np.float32), np.zeros((4, 1), np.float32)
    spec = ModelSpec(find_base(str(llama)), "text-generation", "int4", changes={"model.layers.9.mlp.up_proj": pair})
    with pytest.raises(ModelError, match=r"has no layer model\.layers\.9\.mlp\.up_proj"):
        load_model(spec)


Chosen = Callable[..., tuple[str, bool]]


@pytest.fixture
def chosen(llama: Path, sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Chosen:
    """Tunes with a cache of its own; returns the hash of the codes, and whether they were read from the cache."""
    monkeypatch.setenv("EDGE_FT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(trainable_model, "WORTH_KEEPING", 0.0)

    def run(**settings: Any) -> tuple[str, bool]:
        told, out = RecordedProgress(), tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        short = {"max_steps": 1, "eval_steps": 1, "compute": "fp32"}
        asked = short | {"base_format": "int4", "calibration_rows": 8} | settings
        found = tune(TuneConfig(model=str(llama), data=str(sums), out=out, **asked), told)
        assert found.codes.is_file()
        assert found.report()["calibration"]["rows"] == asked["calibration_rows"]
        return str(found.base()["codes_sha256"]), any("read from the cache" in line for line in told.lines)

    return run


def test_codes_of_the_same_weights_and_rows_are_chosen_once(chosen: Chosen) -> None:
    first, _ = chosen()
    assert chosen(learning_rate=1e-3) == (first, True)  # what does not change them is not compared
    other, kept = chosen(calibration_rows=3)
    assert (other != first, kept) == (True, False)
    assert not chosen(block_size=16)[1]


@pytest.mark.parametrize("damage", ["a byte", "an end", "no hash"])
def test_kept_codes_that_are_damaged_are_chosen_again(damage: str, chosen: Chosen, tmp_path: Path) -> None:
    first, _ = chosen()
    (file,) = (tmp_path / "cache" / "codes").glob("*.safetensors")
    whole = file.read_bytes()
    if damage == "a byte":
        file.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
    elif damage == "an end":
        file.write_bytes(whole[:-9])
    else:
        file.with_suffix(".sha256").unlink()
    assert chosen() == (first, False)
    assert file.read_bytes() == whole
    assert chosen() == (first, True)


def test_the_oldest_kept_codes_are_removed(chosen: Chosen, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(kept_codes, "KEPT", 1)
    chosen()
    chosen(calibration_rows=3)
    assert len(list((tmp_path / "cache" / "codes").iterdir())) == 2  # one entry and its hash
    assert chosen(calibration_rows=3)[1]
    monkeypatch.setattr(kept_codes, "KEPT_BYTES", 1)
    assert not chosen()[1]
    assert not list((tmp_path / "cache" / "codes").iterdir())
