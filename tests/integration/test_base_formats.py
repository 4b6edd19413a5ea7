"""Every format of a base is tuned and exported through the gate, and every format of weights ships and runs."""

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from safetensors.numpy import load_file, save_file
from tiny_models import write_llama

from edge_ft.artifacts import Bundle, RunFolder
from edge_ft.config import EvalConfig, ExportConfig, TuneConfig, VerifyConfig
from edge_ft.data import Example, collate
from edge_ft.errors import GateRefused, ModelError, UsageError
from edge_ft.evaluate import evaluate
from edge_ft.evaluate.loading import open_run_model
from edge_ft.evaluate.verify import verify
from edge_ft.export import export
from edge_ft.quant import calibration
from edge_ft.quant.layers import QuantEmbedding, QuantLinear
from edge_ft.runtime import load
from edge_ft.tune import tune

LOOSE: dict[str, Any] = {"max_tax": 1.0, "min_retained": 0.0, "max_metric_drop": 1.0}
NAMES = {"int4": "model_q4", "int8": "model_int8", "fp16": "model_fp16", "fp32": "model"}
BITS = {"int4": 4, "int8": 8, "fp16": 16, "fp32": 32}


@pytest.fixture(scope="module")
def runs(
    llama: Path, bert: Path, sums: Path, reviews: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str], RunFolder]:
    """A short run by family and base format; int4 is what all other tests tune over."""
    folder = tmp_path_factory.mktemp("runs")
    settings: dict[str, Any] = {"learning_rate": 1e-2, "split": (0.6, 0.2, 0.2), "compute": "fp32"}
    return {
        (family, base_format): tune(
            TuneConfig(
                model=str(model),
                data=str(data),
                out=folder / f"{family}-{base_format}",
                epochs=epochs,
                base_format=base_format,
                **settings,
            )
        )
        for family, model, data, epochs in (("llama", llama, sums, 12), ("bert", bert, reviews, 6))
        for base_format in ("int8", "nf4", "bf16", "fp32")
    }


def initializers(bundle: Bundle) -> dict[str, np.ndarray]:
    model = onnx.load(bundle.graph(1))
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


@pytest.mark.parametrize("base_format", ["int8", "nf4", "bf16", "fp32"])
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_a_run_over_any_base_ships_merged_with_its_tax(
    family: str, base_format: str, runs: dict[tuple[str, str], RunFolder], tmp_path: Path
) -> None:
    run = runs[family, base_format]
    bundle = export(str(run.path), ExportConfig(out=tmp_path / "bundle", **LOOSE))
    assert bundle.manifest["model"] == "onnx/model_q4.onnx"
    found = bundle.manifest["verification"]
    # As trained is over the base that was trained over, not over the one that ships.
    assert found["nll"]["trained"] == pytest.approx(run.report()["nll"]["best"], abs=1e-4)
    assert found["quantization_tax"] == found["nll"]["shipped"] - found["nll"]["trained"] != 0
    assert found["by_accuracy_level"]["1"]["shipped_minus_last_evaluated"] < 1e-4


@pytest.mark.parametrize("base_format", ["int8", "nf4", "bf16", "fp32"])
def test_a_run_is_scored_over_its_own_base(
    base_format: str, runs: dict[tuple[str, str], RunFolder], llama: Path
) -> None:
    run = runs["llama", base_format]
    rows = EvalConfig(data=str(run.split("test")), generate=False)
    assert evaluate(str(run.path), rows)["nll"] == pytest.approx(run.report()["nll"]["test"], abs=1e-4)
    plain = EvalConfig(data=str(run.split("test")), generate=False, base_format=base_format)  # type: ignore[arg-type]
    assert evaluate(str(llama), plain)["nll"] == pytest.approx(run.report()["nll"]["test_base"], abs=1e-4)


QKV = ("q_proj", "k_proj", "v_proj")


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_the_adapter_lane_of_an_int8_run_ships_its_codes_byte_for_byte(
    family: str, runs: dict[tuple[str, str], RunFolder], tmp_path: Path
) -> None:
    run = runs[family, "int8"]
    bundle = export(str(run.path), ExportConfig(out=tmp_path / "bundle", lane="adapter"))
    assert bundle.manifest["quantization"] == {"method": "rtn", "bits": 8, "block_size": 32, "symmetric": False}
    assert abs(bundle.manifest["verification"]["quantization_tax"]) < 1e-4
    shipped = initializers(bundle)
    model, _ = open_run_model(run, adapter=False)
    layers = {
        name: module for name, module in model.named_modules() if isinstance(module, QuantLinear | QuantEmbedding)
    }
    assert len(layers) >= 13
    for name, layer in layers.items():
        for kind in ("qweight", "scales", "zero_points"):
            own = getattr(layer.codes(), kind)
            block, _, part = name.rpartition(".")
            if part in QKV and f"{block}.qkv_proj.{kind}" in shipped:
                start = sum(layers[f"{block}.{other}"].out_features for other in QKV[: QKV.index(part)])
                stored = shipped[f"{block}.qkv_proj.{kind}"][start : start + len(own)]
            else:  # a tied embedding has the head's scales and zero points, which are stored once
                stored = shipped[f"{name}.{kind}" if f"{name}.{kind}" in shipped else f"lm_head.{kind}"]
            assert stored.astype(own.dtype).tobytes() == own.tobytes()  # scales are stored in float16
    nodes = onnx.load(bundle.graph(1), load_external_data=False).graph.node
    bits = {node.op_type: {a.i for a in node.attribute if a.name == "bits"} for node in nodes}
    assert bits["MatMulNBits"] == bits["GatherBlockQuantized"] == {8}


@pytest.mark.parametrize(
    ("base_format", "weights", "bits"), [("fp32", "fp32", 32), ("fp32", None, 4), ("int8", None, 8)]
)
def test_the_adapter_lane_ships_the_quantized_format_of_the_training_by_default_else_int4(
    base_format: str, weights: Any, bits: int, runs: dict[tuple[str, str], RunFolder], tmp_path: Path
) -> None:
    settings = ExportConfig(out=tmp_path / "own", lane="adapter", weights=weights, **LOOSE)
    assert export(str(runs["llama", base_format].path), settings).manifest["quantization"]["bits"] == bits


@pytest.mark.parametrize("base_format", ["bf16", "fp32"])
def test_an_adapter_trained_over_float_weights_is_refused_where_rounding_them_costs_too_much(
    base_format: str, runs: dict[tuple[str, str], RunFolder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "gptq_quantize", lambda _, __, codes: replace(codes, scales=codes.scales / 4))
    with pytest.raises(GateRefused, match=r"tune --base-format int4 trains over the codes"):
        settings = ExportConfig(out=tmp_path / "bundle", lane="adapter", max_tax=0.0)
        export(str(runs["llama", base_format].path), settings)


def test_nf4_is_refused_for_the_adapter_lane(runs: dict[tuple[str, str], RunFolder], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"a base of format nf4.*--lane merged"):
        export(str(runs["llama", "nf4"].path), ExportConfig(out=tmp_path / "bundle", lane="adapter"))


@pytest.mark.parametrize("weights", ["int8", "fp16"])
@pytest.mark.parametrize("run_name", ["llama_run", "bert_run"])
def test_the_graph_scores_as_torch_does(
    run_name: str, weights: Any, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    run: RunFolder = request.getfixturevalue(run_name)
    bundle = export(str(run.path), ExportConfig(out=tmp_path / "bundle", weights=weights, **LOOSE))
    assert bundle.manifest["graphs"]["1"] == f"onnx/{NAMES[weights]}.onnx"
    assert bundle.manifest["verification"]["by_accuracy_level"]["1"]["shipped_minus_last_evaluated"] < 1e-4


@pytest.mark.parametrize("max_tax", [1.0, 0.0], ids=["passed", "refused"])
def test_int8_runs_with_int8_activations_where_they_passed(
    max_tax: float, llama: Path, sums: Path, tmp_path: Path
) -> None:
    config = ExportConfig(out=tmp_path / "bundle", weights="int8", data=str(sums), max_tax=max_tax)
    bundle = export(str(llama), config)
    found = bundle.manifest["verification"]
    exact, fast = (found["by_accuracy_level"][level]["nll"] for level in ("1", "4"))
    level = "4" if fast - exact <= max_tax else "1"  # the processor decides how int8 activations round
    assert max_tax == 0 or level == "4"
    assert ("4" in bundle.manifest["graphs"]) == (level == "4")
    assert bundle.manifest["model"] == bundle.manifest["graphs"][level]
    assert found["nll"]["shipped"] == found["by_accuracy_level"][level]["nll"]
    scored = evaluate(str(bundle.path), EvalConfig(data=str(sums), generate=False))
    assert scored["nll"] == pytest.approx(found["nll"]["shipped"], abs=1e-6)
    assert verify(bundle.path, VerifyConfig(data=str(sums)))["same_rows"]


def test_fewer_bits_take_less_space(tmp_path: Path) -> None:
    model = write_llama(tmp_path / "wide", hidden_size=256, intermediate_size=768, vocab_size=1024, tie=False)
    row = Example(1, list(range(40, 60)), list(range(40, 60)), 1, "", 0)
    sizes = {}
    answers = {}
    for weights in ("int4", "int8", "fp16", "fp32"):
        bundle = export(str(model), ExportConfig(out=tmp_path / weights, weights=weights))
        assert bundle.manifest["quantization"]["bits"] == BITS[weights]
        sizes[weights] = (bundle.path / "onnx" / f"{NAMES[weights]}.onnx_data").stat().st_size
        answers[weights] = load(bundle, engine="exact").token_nll(collate([row], 0, "text-generation"))[0]
    assert all(2 * less < 1.3 * more for less, more in itertools.pairwise(sizes.values()))
    off = {weights: float(np.abs(nll - answers["fp32"]).max()) for weights, nll in answers.items()}
    assert 0 < off["fp16"] < off["int8"] < off["int4"]


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_fp16_is_only_the_format_of_matrices_in_the_file(
    family: str, runs: dict[tuple[str, str], RunFolder], tmp_path: Path
) -> None:
    bundle = export(
        str(runs[family, "int8"].path), ExportConfig(out=tmp_path / "bundle", weights="fp16", lane="adapter", **LOOSE)
    )
    assert bundle.manifest["verification"]["by_accuracy_level"]["1"]["shipped_minus_last_evaluated"] < 1e-4
    held = initializers(bundle)
    matrices = {name for name, array in held.items() if array.ndim == 2 and name.endswith(".weight")}
    trained = {name for name in matrices if name.startswith(("head.", "classifier", "bert.pooler"))}
    assert {name for name, array in held.items() if array.dtype == np.float16} == matrices - trained
    assert all(held[name].dtype == np.float32 for name in held if name.startswith("lora_"))
    model = onnx.load(bundle.graph(1), load_external_data=False).graph
    assert all(value.type.tensor_type.elem_type != onnx.TensorProto.FLOAT16 for value in (*model.input, *model.output))


def test_a_weight_beyond_float16_is_refused(llama: Path, tmp_path: Path) -> None:
    folder = write_llama(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] = 1e5
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"up_proj\.weight has a value beyond float16's 65504"):
        export(str(folder), ExportConfig(out=tmp_path / "bundle", weights="fp16"))
