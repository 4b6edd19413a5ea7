"""`export --format gguf`: the file holds what a bundle holds, is gated on what was read back, and runs in llama.cpp."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from tiny_models import write_decoder, write_llama

from edge_ft.adapter import find_adapter
from edge_ft.artifacts import Bundle, RunFolder
from edge_ft.config import EvalConfig, ExportConfig
from edge_ft.data import TextTokenizer
from edge_ft.errors import GateRefused, UsageError
from edge_ft.evaluate import evaluate
from edge_ft.export import GgufExport, export, export_gguf
from edge_ft.export.bundle_weights import bundle_weights
from edge_ft.export.gguf_file import file_tensors
from edge_ft.models.adapted import load_adapter
from edge_ft.models.base_model import find_base
from edge_ft.models.gguf_names import Heads
from edge_ft.models.loading import ModelSpec, load_model
from edge_ft.quant.blockwise import Codes, dequantize
from edge_ft.quant.serialization import frozen_layers

LOOSE: dict[str, Any] = {"max_tax": 1, "min_retained": 0.5, "max_metric_drop": 1}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGE_FT_CACHE", str(tmp_path / "cache"))


def as_gguf(source: Path, out: Path, **settings: Any) -> GgufExport:
    return export_gguf(str(source), ExportConfig(out=out, format="gguf", threads=1, **settings))


def nibbles(blocks: np.ndarray) -> np.ndarray:
    """Codes [rows, columns] of Q4_1 blocks."""
    part = blocks.reshape(len(blocks), -1, 20)[..., 4:]
    return np.concatenate([part & 15, part >> 4], axis=-1).reshape(len(blocks), -1)


def test_a_merged_run_is_written_with_the_codes_of_its_bundle(
    llama_run: RunFolder, llama_bundle: Bundle, tmp_path: Path
) -> None:
    made = as_gguf(llama_run.path, tmp_path / "m.gguf", **LOOSE)
    found = made.manifest["verification"]
    ours = llama_bundle.manifest["verification"]
    for kind in ("base", "trained"):
        assert found["nll"][kind] == pytest.approx(ours["nll"][kind], abs=1e-4)
    assert found["nll"]["shipped"] == pytest.approx(ours["nll"]["shipped"], abs=0.01)  # scales in float16
    assert found["test"]["nll"]["shipped"] == pytest.approx(ours["test"]["nll"]["shipped"], abs=0.01)
    assert made.size_bytes == (tmp_path / "m.gguf").stat().st_size
    # A copy: onnx reads no data file that has several names, and another test may have given it one.
    copied = shutil.copytree(llama_bundle.path, tmp_path / "bundle")
    graph = pytest.importorskip("onnx_ir").load(copied / llama_bundle.manifest["model"])
    shipped = graph.graph.initializers["model.layers.0.mlp.down_proj.qweight"].const_value.numpy()
    codes = np.stack([shipped & 15, shipped >> 4], axis=-1).reshape(len(shipped), -1)
    tensors = {tensor.name: tensor for tensor in GGUFReader(tmp_path / "m.gguf").tensors}
    assert (nibbles(tensors["blk.0.ffn_down.weight"].data) == codes).all()
    # the file is a model like any other
    rows = str(llama_run.split("validation"))
    again = evaluate(str(made.path), EvalConfig(data=rows, generate=False, threads=1))
    assert again["nll"] == pytest.approx(found["nll"]["shipped"], abs=1e-4)


def test_the_adapter_lane_writes_the_trained_codes_and_a_lora_file(llama_run: RunFolder, tmp_path: Path) -> None:
    made = as_gguf(llama_run.path, tmp_path / "m.gguf", lane="adapter", max_tax=0.1, max_metric_drop=1)
    assert set(made.manifest["files"]) == {"m.gguf", "m.lora.gguf"}
    lora = GGUFReader(tmp_path / "m.lora.gguf")
    fields = {name: field.contents() for name, field in lora.fields.items()}
    assert fields["general.type"] == "adapter"
    tensors = {tensor.name: tensor.data for tensor in lora.tensors}
    base = load_model(ModelSpec(find_base(str(made.path)), "text-generation"))
    before = {name: weight.detach().clone() for name, weight in base.named_parameters()}
    merged = load_adapter(base, find_adapter(llama_run.adapter)).merge_and_unload()
    for ours, theirs in (("mlp.up_proj", "ffn_up"), ("mlp.down_proj", "ffn_down")):
        name = f"model.layers.1.{ours}.weight"
        a, b = (torch.from_numpy(tensors[f"blk.1.{theirs}.weight.lora_{part}"].copy()) for part in "ab")
        scale = fields["adapter.lora.alpha"] / len(a)  # as llama.cpp computes it
        change = merged.get_parameter(name) - before[name]
        assert change.abs().max() > 1e-3
        assert torch.allclose(scale * b @ a, change, atol=1e-5)


def test_a_model_is_written_without_rows_in_4_bits_or_as_float(tmp_path: Path) -> None:
    folder = write_llama(tmp_path / "model")
    for weights, kind in (("int4", "Q4_1"), ("fp16", "F16"), ("fp32", "F32")):
        made = as_gguf(folder, tmp_path / f"{weights}.gguf", weights=weights)
        assert kind in made.manifest["types"]
        assert made.manifest["verification"]["shipped_minus_last_evaluated"] < (1e-4 if weights == "fp32" else 0.02)


def test_the_gate_refuses_what_the_file_lost_and_keeps_it(llama_run: RunFolder, tmp_path: Path) -> None:
    out = tmp_path / "m.gguf"
    with pytest.raises(GateRefused, match=r"m\.gguf\.rejected: .*retained gain"):
        as_gguf(llama_run.path, out, max_tax=9, min_retained=9, max_metric_drop=1, block_size=128)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "cache") == ["m.gguf.rejected"]


def test_the_gate_sees_scales_that_float16_cannot_hold(tmp_path: Path) -> None:
    folder = write_llama(tmp_path / "model")
    made = load_model(ModelSpec(find_base(str(folder)), "text-generation"))
    with (
        torch.no_grad()
    ):  # so small that float16 rounds the scales of these to a few bits, and undone by the norm before
        for layer in made.model.layers:
            for projection in (layer.mlp.gate_proj, layer.mlp.up_proj):
                projection.weight *= 3e-6
            layer.post_attention_layernorm.weight *= 1 / 3e-6
    made.save_pretrained(folder)
    with pytest.raises(GateRefused, match="differs from the weights it was written from"):
        as_gguf(folder, tmp_path / "m.gguf", max_tax=0.001)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"weights": "int8"}, "takes --weights int4, fp16 or fp32, not int8"),
        ({"block_size": 16}, "in blocks of 16"),
    ],
)
def test_weights_that_a_file_cannot_hold_are_refused(settings: dict[str, Any], expected: str, tmp_path: Path) -> None:
    folder = write_llama(tmp_path / "model")
    with pytest.raises(UsageError, match=expected):
        as_gguf(folder, tmp_path / "m.gguf", **settings)
    assert not list(tmp_path.glob("*.gguf*"))


def test_models_and_names_that_are_not_written_are_refused(bert_run: RunFolder, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="a bert model cannot be exported with --format gguf"):
        as_gguf(bert_run.path, tmp_path / "m.gguf")
    with pytest.raises(UsageError, match="layer windows"):
        as_gguf(write_decoder(tmp_path / "qwen2", "qwen2"), tmp_path / "m.gguf")
    with pytest.raises(UsageError, match=r"ends in \.gguf"):
        as_gguf(tmp_path, tmp_path / "bundle")
    with pytest.raises(UsageError, match="is no bundle"):
        export(str(tmp_path), ExportConfig(out=tmp_path / "m.gguf", format="gguf"))
    (tmp_path / "there.gguf").touch()
    with pytest.raises(UsageError, match="exists already"):
        as_gguf(tmp_path, tmp_path / "there.gguf")


LLAMA_CPP = """
import json, os, sys
import xllamacpp
file, prompts = json.load(sys.stdin)
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_parallel, params.warmup = file, 512, 1, False
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
server = xllamacpp.Server(params)
ask = lambda ids: server.handle_completions({"prompt": ids, "n_predict": 1, "temperature": 0.0, "logprobs": 1})
tokens = [ask(ids)["choices"][0]["logprobs"]["content"][0]["id"] for ids in prompts]
os.write(1, json.dumps(tokens).encode())
os._exit(0)
"""


@pytest.mark.long
def test_llama_cpp_gives_the_same_top_token_at_95_of_100_positions(tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp", reason="xllamacpp is not installed: pip install 'edge-ft[peers]'")
    from edge_ft.bench.studies.datasets import decoder_weights

    source = find_base(str(decoder_weights()))
    made = as_gguf(source.path, tmp_path / "m.gguf")
    model = load_model(ModelSpec(source, "text-generation", "int4"))
    text = (
        "The pump in the cellar runs at night, when power is cheap. It lifts water from a well of forty metres into a "
        "tank under the roof, and stops when a float closes the valve. Twice a year somebody cleans the filter, writes "
        "the date on a card beside the door, and checks that the pressure is between two and three bar."
    )
    ids = TextTokenizer.load(source.path).encode(text)
    with torch.inference_mode():
        ours = model(input_ids=torch.tensor([ids])).logits[0].argmax(-1).tolist()
    prompts = [ids[: end + 1] for end in range(len(ids))]
    command = [sys.executable, "-P", "-c", LLAMA_CPP]
    request = json.dumps([str(made.path), prompts])
    found = subprocess.run(command, input=request, capture_output=True, text=True, timeout=300, env=os.environ)
    theirs = json.loads(found.stdout[found.stdout.rindex("[") :])
    same = np.mean([a == b for a, b in zip(ours, theirs, strict=True)])
    assert same >= 0.95, same


def test_the_weights_in_a_bundles_graph_are_those_of_its_gguf_file(tmp_path: Path) -> None:
    folder = write_decoder(tmp_path / "model", "llama")
    bundle = export(str(folder), ExportConfig(out=tmp_path / "bundle", threads=1))
    made = as_gguf(folder, tmp_path / "m.gguf")
    dims = find_base(str(made.path)).dims
    read = bundle_weights(bundle.graph(1), dims)
    found = file_tensors("llama", dims.layers, Heads(dims.heads, dims.kv_heads), read)
    tensors = {tensor.name: tensor for tensor in GGUFReader(tmp_path / "m.gguf").tensors}
    assert not set(found) ^ set(tensors)
    for name, blocks in found.items():
        assert (tensors[name].data == blocks.data).all(), name


@pytest.mark.parametrize("family", ["gemma3_text", "phi3", "qwen3"])
def test_the_weights_in_a_graph_are_those_of_the_model(family: str, tmp_path: Path) -> None:
    folder = write_decoder(tmp_path / "model", family)
    bundle = export(str(folder), ExportConfig(out=tmp_path / "bundle", threads=1))
    base = find_base(str(folder))
    model = load_model(ModelSpec(base, "text-generation", "int4"))
    layers, floats = frozen_layers(model), dict(model.named_parameters())
    for name, weight in bundle_weights(bundle.graph(1), base.dims).items():
        if isinstance(weight, Codes):
            assert (dequantize(weight) == dequantize(layers[name.removesuffix(".weight")].codes())).all(), name
        else:
            assert np.abs(weight - floats[name].detach().numpy()).max() < 1e-6, name
