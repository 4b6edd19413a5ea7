"""A bundle holds what was trained, reports the quantization tax, and is refused above the limits."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from peft import LoraConfig, get_peft_model
from recorded_progress import RecordedProgress
from safetensors.numpy import load_file, save_file
from tiny_models import write_llama
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from edge_ft.artifacts import Bundle, RunFolder
from edge_ft.config import ExportConfig, TuneConfig, VerifyConfig
from edge_ft.data import Rendering, TextTokenizer, collate, encode_rows, fingerprint, read_rows
from edge_ft.errors import DataError, GateRefused, ModelError, UsageError
from edge_ft.evaluate.loading import open_run_model
from edge_ft.evaluate.verify import verify
from edge_ft.export import export, verification
from edge_ft.export.verification import genai_level
from edge_ft.models.base_model import find_base
from edge_ft.models.loading import ModelSpec, load_model
from edge_ft.models.scorer import TorchScorer
from edge_ft.quant import calibration as calibrating
from edge_ft.quant.blockwise import Codes
from edge_ft.quant.layers import QuantEmbedding, QuantLinear
from edge_ft.quant.sensitivity import finer_layers
from edge_ft.runtime import load
from edge_ft.tune import tune

LOOSE: dict[str, Any] = {"max_tax": 1.0, "min_retained": 0.0, "max_metric_drop": 1.0}


def initializers(bundle: Bundle) -> dict[str, np.ndarray]:
    model = onnx.load(bundle.graph(1))
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def test_the_adapter_lane_ships_the_trained_codes_byte_for_byte(
    llama_run: RunFolder, llama_adapter_bundle: Bundle
) -> None:
    shipped = initializers(llama_adapter_bundle)
    model, _ = open_run_model(llama_run, adapter=False)
    layers = {
        name: module for name, module in model.named_modules() if isinstance(module, QuantLinear | QuantEmbedding)
    }
    assert len(layers) == 16
    joined = ("q_proj", "k_proj", "v_proj")
    for name, layer in layers.items():
        block, _, last = name.rpartition(".")
        for kind in ("qweight", "scales", "zero_points", "fine"):
            if (trained := getattr(layer.codes(), kind)) is None:
                continue
            if last in joined:  # one tensor holds the rows of all three
                trained = np.concatenate([getattr(layers[f"{block}.{part}"].codes(), kind) for part in joined])
                stored = shipped[f"{block}.qkv_proj.{kind}"]
            else:  # a tied embedding has the head's scales and zero points, which are stored once
                stored = shipped.get(f"{name}.{kind}", shipped.get(f"lm_head.{kind}"))
            assert stored is not None
            assert stored.dtype == (np.float16 if kind == "scales" else np.uint8)
            assert stored.astype(trained.dtype).tobytes() == trained.tobytes()


@pytest.mark.parametrize("bundle_name", ["llama_bundle", "bert_bundle"])
def test_the_operator_of_an_embedding_has_its_scales_as_a_constant_since_openvino_takes_no_others(
    bundle_name: str, request: pytest.FixtureRequest
) -> None:
    graph = onnx.load(request.getfixturevalue(bundle_name).graph(1), load_external_data=False).graph
    constants = {tensor.name: tensor.data_type for tensor in graph.initializer}
    lookups = [node for node in graph.node if node.op_type == "GatherBlockQuantized"]
    assert lookups
    assert all(constants.get(node.input[2]) == onnx.TensorProto.FLOAT16 for node in lookups)


@pytest.mark.parametrize("bundle_name", ["llama_adapter_bundle", "bert_adapter_bundle"])
def test_the_adapter_lane_is_exact(bundle_name: str, request: pytest.FixtureRequest) -> None:
    found = request.getfixturevalue(bundle_name).manifest["verification"]
    assert abs(found["quantization_tax"]) < 1e-3
    assert found["argmax_agreement"] == 1.0
    assert found["adapter_changes_logits"] is True


def test_the_manifest_has_the_keys_that_scripts_rely_on(llama_bundle: Bundle) -> None:
    manifest = llama_bundle.manifest
    assert {"format_version", "task", "family", "model", "quantization", "lane", "files", "verification"} <= set(
        manifest
    )
    assert manifest["tokenization"] == {"bos": None, "appended_eos": None}
    found = manifest["verification"]
    assert found["nll"]["shipped"] - found["nll"]["trained"] == found["quantization_tax"]
    assert found["nll"]["trained"] < found["nll"]["base"]
    assert set(found["by_accuracy_level"]) == {"1", "4"}
    assert found["test"]["rows"] > 0
    assert found["metrics"]["token_accuracy"]["shipped"]["value"] > found["metrics"]["token_accuracy"]["base"]["value"]


def test_no_row_of_the_users_data_is_in_a_bundle(llama_bundle: Bundle, bert_bundle: Bundle) -> None:
    for bundle, secret in ((llama_bundle, b"hello 1"), (bert_bundle, b"the film was")):
        for name in bundle.manifest["files"]:
            assert secret not in (bundle.path / name).read_bytes()


@pytest.mark.parametrize("weights", ["int4", "fp32"])
@pytest.mark.parametrize("lane", ["merged", "adapter"])
@pytest.mark.parametrize("run_name", ["llama_run", "bert_run"])
def test_the_graph_scores_as_torch(
    run_name: str, lane: Any, weights: Any, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    run: RunFolder = request.getfixturevalue(run_name)
    bundle = export(str(run.path), ExportConfig(out=tmp_path / "bundle", lane=lane, weights=weights, **LOOSE))
    level = bundle.manifest["verification"]["by_accuracy_level"]["1"]
    assert level["shipped_minus_last_evaluated"] < 1e-4
    assert bundle.manifest["quantization"]["bits"] == {"int4": 4, "fp32": 32}[weights]


def test_a_padded_batch_scores_as_single_rows(llama_bundle: Bundle, llama_run: RunFolder) -> None:
    rendering = Rendering.from_dict(llama_bundle.manifest["rendering"])
    tokenizer = TextTokenizer.load(llama_bundle.path)
    examples = encode_rows(rendering, tokenizer, read_rows(str(llama_run.split("train"))))[:6]
    assert len({len(example.input_ids) for example in examples}) > 1
    generator = load(llama_bundle, engine="exact")
    together, _ = generator.token_nll(collate(examples, tokenizer.pad_id, "text-generation"))
    for row, example in enumerate(examples):
        alone, _ = generator.token_nll(collate([example], tokenizer.pad_id, "text-generation"))
        np.testing.assert_allclose(together[row, : alone.shape[1]], alone[0], atol=1e-4)


def test_greedy_answers_equal_torch(llama_run: RunFolder, llama_adapter_bundle: Bundle) -> None:
    model, _base = open_run_model(llama_run)
    generator = load(llama_adapter_bundle, engine="exact")
    scorer = TorchScorer(model, "text-generation", generator.stop_ids)
    rendering, tokenizer = generator.rendering, generator.tokenizer
    for example in encode_rows(rendering, tokenizer, read_rows(str(llama_run.split("test")))):
        prompt = example.input_ids[: example.prompt_length]
        assert generator.answer(prompt, 12) == scorer.answer(prompt, 12)


def test_what_has_8_bits_in_the_training_has_them_in_the_bundle(llama_run: RunFolder, llama_bundle: Bundle) -> None:
    trained, _ = open_run_model(llama_run, adapter=False)
    rows = finer_layers(trained)
    assert rows
    assert llama_bundle.manifest["quantization"]["overrides"] == {
        name: {"bits": 8, "rows": count} for name, count in rows.items()
    }


def test_a_larger_size_gives_more_layers_8_bits(llama_run: RunFolder, llama_bundle: Bundle, tmp_path: Path) -> None:
    bundle = export(str(llama_run.path), ExportConfig(out=tmp_path / "bundle", size_mb=3.0, **LOOSE))
    assert bundle_size(bundle) <= 3e6
    found, default = (each.manifest["quantization"]["overrides"] for each in (bundle, llama_bundle))
    assert len(found) == 15 > len(default)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"size_mb": 0.1}, "with 4 bits for every weight, in blocks of 64, the bundle takes about 0.191 MB"),
        ({"size_mb": 9.0, "lane": "adapter"}, "the adapter lane ships those of the training"),
        ({"size_mb": 9.0, "weights": "fp16"}, "chooses between 4 and 8 bits, and --weights is fp16"),
    ],
)
def test_a_size_that_nothing_fits_or_that_chooses_nothing_is_refused(
    llama_run: RunFolder, tmp_path: Path, settings: dict[str, Any], expected: str
) -> None:
    with pytest.raises(UsageError, match=expected):
        export(str(llama_run.path), ExportConfig(out=tmp_path / "bundle", **settings))
    assert not (tmp_path / "bundle").exists()


def bundle_size(bundle: Bundle) -> int:
    return sum(file.stat().st_size for file in bundle.path.rglob("*") if file.is_file())


def test_an_untied_head_and_another_block_size_can_be_exported(sums: Path, tmp_path: Path) -> None:
    model = write_llama(tmp_path / "untied", tie=False)
    bundle = export(str(model), ExportConfig(out=tmp_path / "bundle", data=str(sums), block_size=16))
    assert bundle.manifest["quantization"]["block_size"] == 16
    assert bundle.manifest["verification"]["by_accuracy_level"]["1"]["shipped_minus_last_evaluated"] < 1e-4


def test_a_base_without_an_adapter_has_scores_but_no_gate(llama: Path, sums: Path, tmp_path: Path) -> None:
    bundle = export(str(llama), ExportConfig(out=tmp_path / "bundle", data=str(sums)))
    found = bundle.manifest["verification"]
    assert bundle.manifest["lane"] == "base"
    assert found["nll"]["trained"] is None is found["quantization_tax"]
    assert found["nll"]["shipped"] == pytest.approx(found["nll"]["base"], abs=1e-4)


def test_without_rows_only_the_exact_level_ships(llama: Path, tmp_path: Path) -> None:
    bundle = export(str(llama), ExportConfig(out=tmp_path / "bundle"))
    assert list(bundle.manifest["graphs"]) == ["1"]
    assert bundle.manifest["verification"]["nll"] == {"base": None, "trained": None, "shipped": None}


@pytest.fixture
def foreign_adapter(llama: Path, tmp_path: Path) -> Path:
    """An adapter that plain PEFT trained on the sums' end-of-answer token, with patterns."""
    torch.manual_seed(0)
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "up_proj"],
        rank_pattern={"up_proj": 2},
        alpha_pattern={"q_proj": 32},
        use_rslora=True,
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(llama), lora)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn_like(parameter) * 0.1
    model.save_pretrained(tmp_path / "foreign", save_embedding_layers=False)
    return tmp_path / "foreign"


@pytest.mark.parametrize("lane", ["merged", "adapter"])
def test_an_adapter_trained_with_plain_peft_keeps_its_rank_and_alpha_patterns(
    llama: Path, foreign_adapter: Path, tmp_path: Path, lane: Any
) -> None:
    bundle = export(
        str(llama), ExportConfig(out=tmp_path / "bundle", adapter=foreign_adapter, lane=lane, weights="fp32")
    )
    found = bundle.manifest["verification"]
    assert found["by_accuracy_level"]["1"]["shipped_minus_last_evaluated"] < 1e-3
    assert found["adapter_changes_logits"] is True


def test_an_adapter_that_changes_nothing_is_refused(llama: Path, foreign_adapter: Path, tmp_path: Path) -> None:
    weights = load_file(foreign_adapter / "adapter_model.safetensors")
    zeroed = {name: tensor * 0 if "lora_B" in name else tensor for name, tensor in weights.items()}
    save_file(zeroed, foreign_adapter / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(GateRefused, match="does not change the logits"):
        export(str(llama), ExportConfig(out=tmp_path / "bundle", adapter=foreign_adapter))


def test_nothing_learned_is_refused(llama: Path, sums: Path, tmp_path: Path) -> None:
    settings = TuneConfig(
        model=str(llama), data=str(sums), out=tmp_path / "run", max_steps=1, learning_rate=1e-9, compute="fp32"
    )
    run = tune(settings)
    with pytest.raises(GateRefused, match=r"nothing was learned.*another --learning-rate, then export again"):
        export(str(run.path), ExportConfig(out=tmp_path / "bundle"))


@pytest.fixture
def bad_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Merged weights get codes that are far from them: a tax well above 0 and a fallen metric on any processor."""

    def reversed_codes(weight: Any, curvature: Any, nearest: Codes) -> Codes:
        return replace(nearest, qweight=nearest.qweight[:, ::-1])

    monkeypatch.setattr(calibrating, "gptq_quantize", reversed_codes)


def assert_refused(run: RunFolder, config: ExportConfig, message: str) -> None:
    """The gate refuses with `message`, and only the rejected bundle is kept."""
    with pytest.raises(GateRefused, match=message) as refusal:
        export(str(run.path), config)
    assert refusal.value.exit_code == 3
    assert not config.out.exists()
    assert Bundle.open(config.out.with_name("bundle.rejected")).manifest["verification"]["refused"]


@pytest.mark.usefixtures("bad_rounding")
def test_a_tax_above_the_limit_refuses_the_bundle_and_keeps_it_as_rejected(
    llama_run: RunFolder, tmp_path: Path
) -> None:
    # In other blocks than the run's, whose codes of the merged model would ship.
    loose: dict[str, Any] = {"min_retained": -100.0, "max_metric_drop": 1.0, "block_size": 64}
    config = ExportConfig(out=tmp_path / "bundle", max_tax=0.0, **loose)
    message = "--max-tax 0.* --lane adapter ships the int4 weights of the training unchanged"
    assert_refused(llama_run, config, message)
    assert Bundle.open(tmp_path / "bundle.rejected").manifest["verification"]["quantization_tax"] > 0


def test_a_retained_gain_below_the_limit_refuses_the_bundle_and_keeps_it_as_rejected(
    llama_run: RunFolder, tmp_path: Path
) -> None:
    config = ExportConfig(out=tmp_path / "bundle", **{**LOOSE, "min_retained": 1.5})
    assert_refused(llama_run, config, "--min-retained")


@pytest.mark.usefixtures("bad_rounding")
def test_a_metric_drop_above_the_limit_refuses_the_bundle(llama_run: RunFolder, tmp_path: Path) -> None:
    # In other blocks than the run's, whose codes of the merged model would ship.
    config = ExportConfig(out=tmp_path / "bundle", max_tax=100.0, min_retained=-100.0, block_size=64)
    assert_refused(llama_run, config, r"--max-metric-drop 0\.02")


def test_an_interrupted_export_leaves_nothing(llama_run: RunFolder, tmp_path: Path) -> None:
    class Interrupting:
        def say(self, text: str) -> None:
            pass

        def advance(self, stage: str, done: int, total: int, detail: str = "") -> None:
            if stage.startswith("validation, level 1"):
                raise KeyboardInterrupt

    (tmp_path / "out").mkdir()
    with pytest.raises(KeyboardInterrupt):
        export(str(llama_run.path), ExportConfig(out=tmp_path / "out" / "bundle"), Interrupting())
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    "options",
    [{"adapter": Path("x")}, {"data": "x"}, {"task": "text-generation"}],
    ids=lambda option: next(iter(option)),
)
def test_options_of_a_model_are_refused_for_a_run(
    llama_run: RunFolder, tmp_path: Path, options: dict[str, Any]
) -> None:
    with pytest.raises(UsageError, match=f"--{next(iter(options))} is for a model"):
        export(str(llama_run.path), ExportConfig(out=tmp_path / "bundle", **options))


def test_a_bundle_is_not_exported_again(llama_bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="already a bundle"):
        export(str(llama_bundle.path), ExportConfig(out=tmp_path / "bundle"))


def test_a_base_that_changed_since_the_run_is_refused(llama: Path, llama_run: RunFolder, tmp_path: Path) -> None:
    shutil.copytree(llama_run.path, tmp_path / "run")
    base = json.loads((tmp_path / "run" / "base.json").read_text())
    (tmp_path / "run" / "base.json").write_text(json.dumps({**base, "content_sha256": "0" * 64}))
    with pytest.raises(ModelError, match="content has changed"):
        export(str(tmp_path / "run"), ExportConfig(out=tmp_path / "bundle"))


def test_a_float_base_is_loaded_as_float(llama: Path) -> None:
    model = load_model(ModelSpec(find_base(str(llama)), "text-generation", "fp32"))
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def test_layers_of_different_rank_work_in_one_graph(llama: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    settings: dict[str, Any] = {"r": 8, "target_modules": ["q_proj", "up_proj"], "rank_pattern": {"up_proj": 4}}
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(llama),
        LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **settings),
    )
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    bundle = export(str(llama), ExportConfig(out=tmp_path / "bundle", adapter=tmp_path / "adapter", lane="adapter"))
    assert bundle.manifest["verification"]["by_accuracy_level"]["1"]["shipped_minus_last_evaluated"] < 1e-3


def test_a_refusal_is_recorded_and_may_be_replaced(llama_run: RunFolder, tmp_path: Path) -> None:
    config = ExportConfig(out=tmp_path / "bundle", **{**LOOSE, "min_retained": 2.0})
    for _ in range(2):
        with pytest.raises(GateRefused):
            export(str(llama_run.path), config)
    assert "--min-retained" in Bundle.open(tmp_path / "bundle.rejected").manifest["verification"]["refused"][0]


def test_a_refused_bundle_does_not_replace_a_users_folder(llama_run: RunFolder, tmp_path: Path) -> None:
    (tmp_path / "bundle.rejected").mkdir()
    with pytest.raises(UsageError, match="exists already"):
        export(str(llama_run.path), ExportConfig(out=tmp_path / "bundle"))


def test_a_classifiers_adapter_has_its_own_head(bert: Path, reviews: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = get_peft_model(
        AutoModelForSequenceClassification.from_pretrained(bert, num_labels=2),
        LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["query", "value"], init_lora_weights=False),
    )
    with torch.no_grad():
        model.get_submodule("base_model.model.classifier").modules_to_save["default"].weight *= 30  # sure of anything
    model.save_pretrained(tmp_path / "adapter")
    loose = ExportConfig(out=tmp_path / "named", adapter=tmp_path / "adapter", data=str(reviews), **LOOSE)
    with pytest.raises(DataError, match=r"blame, praise.*2 outputs without names.*--class-names"):
        export(str(bert), loose)
    with pytest.raises(GateRefused, match="nothing was learned"):
        export(str(bert), replace(loose, class_names=("praise", "blame")))
    named = Bundle.open(tmp_path / "named.rejected")
    assert named.manifest["rendering"]["labels"] == ["praise", "blame"]
    bare = export(str(bert), ExportConfig(out=tmp_path / "bare", adapter=tmp_path / "adapter"))
    assert bare.manifest["rendering"]["labels"] == ["LABEL_0", "LABEL_1"]


def test_weights_without_a_finite_loss_are_refused(llama: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama)
    model.get_input_embeddings().weight.data.fill_(float("inf"))
    model.save_pretrained(tmp_path / "model")
    for file in (*llama.glob("tokenizer*"), *llama.glob("*.jinja")):
        shutil.copy(file, tmp_path / "model")
    with pytest.raises(ModelError, match="give no finite loss of the probe texts"):
        export(str(tmp_path / "model"), ExportConfig(out=tmp_path / "bundle", weights="fp32"))
    assert not (tmp_path / "bundle").exists()


def test_genai_is_pointed_at_the_fast_graph_on_request(
    llama_bundle: Bundle, llama_run: RunFolder, tmp_path: Path
) -> None:
    config = ExportConfig(out=tmp_path / "bundle", genai_graph="fast", max_tax=9, min_retained=-9, max_metric_drop=1)
    fast = export(str(llama_run.path), config)
    names = [
        json.loads((bundle.path / "genai_config.json").read_text())["model"]["decoder"]["filename"]
        for bundle in (llama_bundle, fast)
    ]
    assert names == ["onnx/model_q4_genai.onnx", "onnx/model_q4_a4_genai.onnx"]
    assert (fast.path / names[1]).is_file()
    assert fast.manifest["model"] == "onnx/model_q4.onnx"


def test_genai_keeps_the_exact_graph_where_the_fast_one_failed_or_loses_too_much() -> None:
    def scores(nll: float) -> dict[str, Any]:
        return {"by_accuracy_level": {"1": {"nll": 1.0}, "4": {"nll": nll}}}

    assert genai_level(scores(1.009), {1, 4}, 1) == 4
    assert genai_level(scores(1.02), {1, 4}, 1) == 1
    assert genai_level(scores(1.0), {1}, 1) == 1
    assert genai_level({"by_accuracy_level": {"1": {}, "4": {}}}, {1, 4}, 1) == 1


def test_an_export_scores_no_more_rows_than_the_interval_of_its_tax_needs(
    llama_run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge_ft.export.verification.FEWEST_ROWS", 4)
    monkeypatch.setattr("edge_ft.export.verification.rows_needed", lambda trained, shipped, available: 5)
    bundle = export(str(llama_run.path), ExportConfig(out=tmp_path / "bundle", **LOOSE))
    rows = read_rows(str(llama_run.split("validation")))
    found = bundle.manifest["verification"]
    assert (found["rows"], found["rows_sha256"]) == (5, fingerprint(rows[: found["rows_read"]]))
    low, high = found["tax_interval"]
    assert low <= found["quantization_tax"] <= high
    assert verify(bundle.path, VerifyConfig(data=str(llama_run.split("validation"))))["same_rows"] is True


def test_scores_that_the_run_computed_are_not_computed_again(
    llama_run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored: list[str] = []
    score_rows = verification.score_rows

    def recorded(source: Any, scorer: Any, examples: Any, progress: Any, stage: str) -> Any:
        scored.append(stage)
        return score_rows(source, scorer, examples, progress, stage)

    monkeypatch.setattr(verification, "score_rows", recorded)
    told = RecordedProgress()
    known = export(str(llama_run.path), ExportConfig(out=tmp_path / "known", lane="adapter", **LOOSE), told)
    (seconds,) = (line for line in told.lines if line.startswith("seconds: "))
    assert all(stage in seconds for stage in ("graphs", "in all"))  # those that took a tenth of a second
    torch_scores = {"validation, base", "validation, as trained"}
    assert (torch_scores & set(scored), "validation, level 1" in scored) == (set(), True)
    monkeypatch.setattr("edge_ft.export.source.find_scores", lambda *_: None)
    computed = export(str(llama_run.path), ExportConfig(out=tmp_path / "computed", lane="adapter", **LOOSE))
    assert torch_scores <= set(scored)
    for name in ("base", "trained", "shipped"):
        found, expected = (bundle.manifest["verification"]["nll"][name] for bundle in (known, computed))
        assert found == pytest.approx(expected, abs=1e-5)


def test_what_rows_hold_beside_the_text_is_said_and_does_not_stop_the_export_of_a_base(
    llama: Path, tmp_path: Path
) -> None:
    turns = [{"role": "user", "content": "hello", "mood": "glad"}, {"role": "assistant", "content": "seven"}]
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"messages": turns}) + "\n", encoding="utf-8")
    progress = RecordedProgress()
    bundle = export(str(llama), ExportConfig(out=tmp_path / "bundle", data=str(rows), trainable=False), progress)
    assert "adapter" not in bundle.manifest["provenance"]
    assert any("mood" in message for message in progress.lines)
