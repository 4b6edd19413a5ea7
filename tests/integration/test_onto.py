"""An adapter is added to a bundle where it is, and the bundle then answers with it; without torch or ONNX libraries."""

import json
import shutil
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from foreign_adapters import save_foreign
from numpy.typing import NDArray
from once import once
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.numpy import load_file, save_file
from tiny_models import write_decoder, write_t5
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

from edge_ft.artifacts import Bundle, RunFolder
from edge_ft.config import EvalConfig, ExportConfig, TuneConfig, VerifyConfig
from edge_ft.data import collate, target_mask
from edge_ft.errors import GateRefused, UsageError
from edge_ft.evaluate import evaluate
from edge_ft.evaluate.verify import verify
from edge_ft.export import export
from edge_ft.models.scorer import TorchScorer
from edge_ft.runtime import TextGenerator, load
from edge_ft.runtime.probes import probe_examples
from edge_ft.tune import tune

LOOSE: dict[str, Any] = {"max_tax": 10.0, "min_retained": -10.0, "max_metric_drop": 1.0}


@pytest.fixture(scope="module")
def base_bundle(work: Path, llama: Path, sums: Path) -> Path:
    """The tiny decoder as it is, in int4 over the codes that `llama_run` was trained over."""
    return once(work / "onto-base", lambda out: export(str(llama), ExportConfig(out=out, data=str(sums))))


@pytest.fixture
def base(base_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(base_bundle, tmp_path / "bundle"))


@pytest.fixture(scope="module")
def float_bundle(work: Path, llama: Path) -> Path:
    return once(work / "onto-float", lambda out: export(str(llama), ExportConfig(out=out, weights="fp32")))


def peft_adapter(llama: Path, folder: Path, seed: int = 0, **settings: Any) -> Path:
    """An adapter whose A and B are random, as plain PEFT saves it."""
    torch.manual_seed(seed)
    config = LoraConfig(**{"task_type": "CAUSAL_LM", "r": 4, "init_lora_weights": False, **settings})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tied layers
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(llama), config)
        model.save_pretrained(folder, save_embedding_layers=False)
    return folder


IDS = np.array([[5, 9, 3, 17, 42, 8, 1, 30]], np.int64)


def logits(bundle: Path, adapter: Any = None) -> NDArray[np.float32]:
    opened = load(bundle, adapter=adapter, engine="exact", threads=1)
    assert isinstance(opened, TextGenerator)
    return opened.logits(IDS, np.ones_like(IDS))


def torch_logits(llama: Path, adapter: Path) -> NDArray[np.float32]:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), adapter).eval()
    with torch.no_grad():
        return model(input_ids=torch.tensor(IDS)).logits.numpy()


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj"], "r": 16, "use_rslora": True},
        {
            "target_modules": ["q_proj", "v_proj", "up_proj"],
            "rank_pattern": {"up_proj": 2},
            "alpha_pattern": {"layers.1.*q_proj": 32},
        },
    ],
    ids=["all layers", "rsLoRA, one layer, rank 16", "patterns"],
)
def test_an_adapter_of_peft_bound_to_a_base_gives_the_logits_of_torch(
    llama: Path, float_bundle: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    adapter = peft_adapter(llama, tmp_path / "adapter", **settings)
    np.testing.assert_allclose(logits(float_bundle, adapter), torch_logits(llama, adapter), atol=1e-4)
    assert np.abs(logits(float_bundle, adapter) - logits(float_bundle)).max() > 1e-2


def test_bfloat16_and_float16_adapters_are_read(llama: Path, float_bundle: Path, tmp_path: Path) -> None:
    adapter = peft_adapter(llama, tmp_path / "adapter")
    weights = adapter / "adapter_model.safetensors"
    from safetensors.torch import load_file as load_torch
    from safetensors.torch import save_file as save_torch

    exact = logits(float_bundle, adapter)
    for kind in (torch.bfloat16, torch.float16):
        save_torch({name: tensor.to(kind) for name, tensor in load_torch(weights).items()}, weights)
        np.testing.assert_allclose(logits(float_bundle, adapter), exact, atol=0.1)


def test_each_swap_changes_the_answer_and_both_adapters_stay_exact(
    llama: Path, float_bundle: Path, tmp_path: Path
) -> None:
    bundle = Path(shutil.copytree(float_bundle, tmp_path / "bundle"))
    before = logits(bundle)
    one, two = (peft_adapter(llama, tmp_path / name, seed, r=seed) for name, seed in (("one", 2), ("two", 5)))
    export(str(one), ExportConfig(onto=bundle))
    export(str(two), ExportConfig(onto=bundle, name="second"))
    manifest = Bundle.open(bundle).manifest
    assert manifest["lane"] == "adapter"
    assert manifest["adapters"]["default"] == "second"
    assert set(manifest["adapters"]["names"]) == {"one", "second"}
    for adapter, folder in (("one", one), ("second", two), (None, two), (two, two)):
        np.testing.assert_allclose(logits(bundle, adapter), torch_logits(llama, folder), atol=1e-4)
    np.testing.assert_array_equal(logits(bundle, "none"), before)
    assert np.abs(logits(bundle, "one") - logits(bundle, "second")).max() > 1e-2
    verify(bundle, VerifyConfig())


def test_plain_onnx_runtime_answers_with_the_default_adapter(llama: Path, float_bundle: Path, tmp_path: Path) -> None:
    import onnxruntime

    bundle = Path(shutil.copytree(float_bundle, tmp_path / "bundle"))
    adapter = peft_adapter(llama, tmp_path / "adapter")
    export(str(adapter), ExportConfig(onto=bundle))
    manifest = json.loads((bundle / "manifest.json").read_text())
    session = onnxruntime.InferenceSession(bundle / manifest["model"])
    feeds: dict[str, Any] = {"input_ids": IDS, "attention_mask": np.ones_like(IDS), "num_logits_to_keep": np.array(0)}
    feeds |= {
        value.name: np.zeros([1, value.shape[1], 0, value.shape[3]], np.float32)
        for value in session.get_inputs()
        if value.name.startswith("past")
    }
    np.testing.assert_allclose(session.run(["logits"], feeds)[0], torch_logits(llama, adapter), atol=1e-4)


def classifier(bert: Path, folder: Path, seed: int) -> Path:
    """An adapter with a head, both random."""
    torch.manual_seed(seed)
    model = get_peft_model(
        AutoModelForSequenceClassification.from_pretrained(bert, num_labels=2),
        LoraConfig(
            task_type="SEQ_CLS",
            target_modules=["query", "value"],
            modules_to_save=["pooler", "classifier"],
            init_lora_weights=False,
        ),
    )
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            parameter.data = torch.randn_like(parameter) * 0.3
    model.save_pretrained(folder)
    return folder


def test_a_classifiers_adapter_brings_its_head(bert: Path, tmp_path: Path) -> None:
    one, two = (classifier(bert, tmp_path / name, seed) for name, seed in (("one", 1), ("two", 2)))
    bundle = tmp_path / "bundle"
    export(str(bert), ExportConfig(out=bundle, adapter=one, lane="adapter", weights="fp32"))
    ids = torch.tensor([[2, 7, 9, 11, 3]])

    def scores(adapter: Any) -> NDArray[np.float32]:
        return load(bundle, adapter=adapter).logits(ids.numpy(), np.ones_like(ids.numpy()))  # type: ignore[union-attr]

    def in_torch(adapter: Path) -> NDArray[np.float32]:
        model = AutoModelForSequenceClassification.from_pretrained(bert, num_labels=2)
        with torch.no_grad():
            return PeftModel.from_pretrained(model, adapter).eval()(input_ids=ids).logits.numpy()

    np.testing.assert_allclose(scores(None), in_torch(one), atol=1e-4)
    np.testing.assert_allclose(scores(two), in_torch(two), atol=1e-4)
    assert np.abs(scores(one) - scores(two)).max() > 1e-2
    export(str(two), ExportConfig(onto=bundle))
    np.testing.assert_allclose(scores(None), in_torch(two), atol=1e-4)
    np.testing.assert_allclose(scores("one"), in_torch(one), atol=1e-4)
    weights = two / "adapter_model.safetensors"
    save_file({name: value for name, value in load_file(weights).items() if "classifier.bias" not in name}, weights)
    with pytest.raises(UsageError, match=r"lacks classifier\.bias, a part of the head"):
        scores(two)


@pytest.mark.parametrize(
    ("write", "task", "model_class", "settings"),
    [
        (write_t5, "SEQ_2_SEQ_LM", AutoModelForSeq2SeqLM, {"target_modules": ["q", "v", "wo"]}),
        (
            partial(write_decoder, name="gpt2"),
            "CAUSAL_LM",
            AutoModelForCausalLM,
            {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True},
        ),
    ],
    ids=["t5", "gpt2"],
)
def test_other_kinds_of_models_take_adapters_too(
    tmp_path: Path, write: Any, task: str, model_class: Any, settings: dict[str, Any]
) -> None:
    model, bundle = write(tmp_path / "model"), tmp_path / "bundle"
    export(str(model), ExportConfig(out=bundle, weights="fp32"))
    one, two = (save_foreign(model, tmp_path / f"rank {r}", task, r=r, **settings) for r in (3, 7))

    def nll(adapter: Any) -> NDArray[np.float32]:
        opened: Any = load(bundle, adapter=adapter, engine="exact")
        batch = collate(probe_examples(opened.tokenizer, opened.rendering), opened.tokenizer.pad_id, opened.bundle.task)
        targets = target_mask(batch["labels"], opened.bundle.task)
        found: NDArray[np.float32] = opened.token_nll(batch)[0] * targets
        if isinstance(adapter, Path):
            peft = PeftModel.from_pretrained(model_class.from_pretrained(model), adapter).eval()
            expected = TorchScorer(peft, opened.bundle.task).token_nll(batch)[0] * targets
            np.testing.assert_allclose(found, expected, atol=1e-4)
        return found

    before = nll(None)
    assert np.abs(nll(one) - before).max() > 0.1
    export(str(one), ExportConfig(onto=bundle, name="one"))
    np.testing.assert_array_equal(nll(None), nll(one))
    np.testing.assert_array_equal(nll("none"), before)
    assert np.abs(nll(two) - nll("one")).max() > 0.1


def test_a_run_becomes_the_default_of_a_bundle_over_its_codes(
    llama_run: RunFolder, llama_adapter_bundle: Bundle, tmp_path: Path
) -> None:
    bundle = Path(shutil.copytree(llama_adapter_bundle.path, tmp_path / "bundle"))
    name = llama_adapter_bundle.manifest["adapters"]["default"]
    before = logits(bundle)
    added = export(str(llama_run.path), ExportConfig(onto=bundle, name="again"))
    np.testing.assert_allclose(logits(bundle), before, atol=1e-5)
    np.testing.assert_array_equal(logits(bundle, name), logits(bundle))
    found = added.manifest["verification"]
    assert found["nll"]["shipped"] == pytest.approx(llama_run.report()["nll"]["best"], abs=1e-3)
    assert found["test"]["rows"] > 0
    assert set(added.manifest["graphs"]) == {"1", "4"}
    data = str(llama_run.split("validation"))
    verify(bundle, VerifyConfig(data=data))
    scores = {
        adapter: evaluate(str(bundle), EvalConfig(data=data, adapter=adapter, generate=False))["nll"]
        for adapter in (None, "none", str(llama_run.path))
    }
    assert scores[None] == pytest.approx(scores[str(llama_run.path)], abs=1e-6)
    assert scores["none"] > scores[None] + 0.1
    assert isinstance(load(bundle), TextGenerator)  # the engine is chosen among the graphs that passed


def test_an_adapter_that_learned_nothing_is_refused_and_the_bundle_stays(
    llama: Path, base: Path, sums: Path, tmp_path: Path
) -> None:
    before = {file: file.read_bytes() for file in base.rglob("*") if file.is_file()}
    adapter = peft_adapter(llama, tmp_path / "adapter")
    with pytest.raises(GateRefused, match=r"is as before: .*nothing was learned") as refusal:
        export(str(adapter), ExportConfig(onto=base, data=str(sums), **LOOSE))
    assert refusal.value.exit_code == 3
    assert {file: file.read_bytes() for file in base.rglob("*") if file.is_file()} == before
    weights = adapter / "adapter_model.safetensors"
    save_file({name: tensor * 0 for name, tensor in load_file(weights).items()}, weights)
    with pytest.raises(GateRefused, match="does not change the logits"):
        export(str(adapter), ExportConfig(onto=base))


def test_an_adapter_of_other_codes_is_refused(llama_run: RunFolder, base: Path) -> None:
    """The run's base was rounded over its rows, this bundle's was not."""
    report = llama_run.report()["nll"]
    with pytest.raises(GateRefused, match="trained over other weights than this bundle's"):
        export(str(llama_run.path), ExportConfig(onto=base, **{**LOOSE, "max_tax": 0.0}))
    added = export(str(llama_run.path), ExportConfig(onto=base, **LOOSE))
    assert added.manifest["verification"]["nll"]["shipped"] > report["best"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"target_modules": ["q_proj", "lm_head"]},
            "lm_head, which takes no adapter .* MODEL --adapter",
        ),
        ({"target_modules": ["q_proj"], "use_dora": True}, "has DoRA"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, r"the whole of embed_tokens"),
        ({"target_modules": ["embed_tokens"]}, "an adapted embedding"),
        ({"target_modules": ["q_proj"], "lora_bias": True}, "lora_bias"),
    ],
    ids=["head", "DoRA", "modules_to_save", "embedding", "biases"],
)
def test_an_adapter_that_does_not_fit_is_refused_by_name(
    llama: Path, base: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    adapter = peft_adapter(llama, tmp_path / "adapter", **change)
    for use in (lambda: load(base, adapter=adapter), lambda: export(str(adapter), ExportConfig(onto=base))):
        with pytest.raises(UsageError, match=message):
            use()


def test_an_adapter_of_another_model_is_refused(base: Path, tmp_path: Path, llama: Path) -> None:
    adapter = peft_adapter(llama, tmp_path / "adapter", target_modules=["q_proj"])
    weights = adapter / "adapter_model.safetensors"
    save_file({k: v[:, :32].copy() if "lora_A" in k else v for k, v in load_file(weights).items()}, weights)
    with pytest.raises(UsageError, match=r"of shape \[4, 32\].*is of another model"):
        load(base, adapter=adapter)


def test_a_merged_bundle_takes_no_adapter(llama_bundle: Bundle, llama_run: RunFolder, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="merged into the weights, and its base is gone"):
        export(str(llama_run.path), ExportConfig(onto=llama_bundle.path))
    with pytest.raises(UsageError, match="merged into the weights"):
        load(llama_bundle, adapter=llama_run.path)


def test_a_name_that_is_taken_must_be_given_to_be_replaced(llama: Path, base: Path, tmp_path: Path) -> None:
    one, two = (peft_adapter(llama, tmp_path / folder / "mine", seed) for folder, seed in (("a", 1), ("b", 2)))
    export(str(one), ExportConfig(onto=base))
    files = set(Bundle.open(base).manifest["files"])
    with pytest.raises(UsageError, match="--name mine replaces it"):
        export(str(two), ExportConfig(onto=base))
    replaced = export(str(two), ExportConfig(onto=base, name="mine"))
    np.testing.assert_array_equal(logits(base), logits(base, two))
    assert len(replaced.manifest["files"]) == len(files)
    assert set(replaced.manifest["files"]) == {
        file.relative_to(base).as_posix() for file in base.rglob("*") if file.is_file()
    } - {"manifest.json"}


@pytest.mark.parametrize("name", ["none", "a/b", "", ".x"])
def test_a_name_that_is_none_is_refused(llama: Path, base: Path, tmp_path: Path, name: str) -> None:
    adapter = peft_adapter(llama, tmp_path / "adapter", target_modules=["q_proj"])
    with pytest.raises(UsageError, match=f"--name {name}: a name has"):
        export(str(adapter), ExportConfig(onto=base, name=name))


def test_an_unknown_adapter_is_refused_with_the_names(base: Path) -> None:
    with pytest.raises(UsageError, match=r"--adapter non: there is no such folder.*none"):
        load(base, adapter="non")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"out": Path("x")}, "leave --out out"),
        ({"weights": "int8"}, "--weights was settled"),
        ({"adapter": Path("x")}, "--adapter was settled"),
        ({"format": "gguf"}, "--format was settled"),
    ],
)
def test_options_of_a_new_bundle_do_not_go_with_onto(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ExportConfig(onto=Path("bundle"), **options)
    with pytest.raises(UsageError, match="--name is for --onto"):
        ExportConfig(out=Path("x"), name="x")


def test_files_of_a_killed_change_are_ignored_and_removed_by_the_next_one(
    llama: Path, base: Path, tmp_path: Path
) -> None:
    for name in ("onnx/adapter.0123abcd.safetensors", "onnx/model_q4.0123abcd.onnx", ".manifest.json.7.tmp"):
        (base / name).write_bytes(b"half")
    before = logits(base)
    export(str(peft_adapter(llama, tmp_path / "adapter")), ExportConfig(onto=base))
    np.testing.assert_array_equal(logits(base, "none"), before)
    assert not list(base.rglob("*0123abcd*")) + list(base.glob(".*"))
    (base / "onnx" / "other.onnx").write_bytes(b"")
    with pytest.raises(UsageError, match="does not list"):
        Bundle.open(base)


def test_a_bundle_of_the_adapter_lane_learns_from_its_base_and_keeps_what_it_learned(
    llama: Path, sums: Path, tmp_path: Path
) -> None:
    bundle = tmp_path / "bundle"
    first = peft_adapter(llama, tmp_path / "first", target_modules="all-linear")
    export(str(llama), ExportConfig(out=bundle, adapter=first, lane="adapter"))
    settings: dict[str, Any] = {"epochs": 10, "batch_size": 4, "learning_rate": 1e-2, "split": (0.6, 0.2, 0.2)}
    run = tune(TuneConfig(model=str(bundle), data=str(sums), out=tmp_path / "run", **settings))
    added = export(str(run.path), ExportConfig(onto=bundle, name="learned"))
    found, report = added.manifest["verification"]["nll"], run.report()["nll"]
    assert found["base"] == pytest.approx(report["base"], abs=1e-4)
    assert found["shipped"] == pytest.approx(report["best"], abs=1e-4)
    assert set(added.manifest["adapters"]["names"]) == {"first", "learned"}
    verify(bundle, VerifyConfig(data=str(run.split("validation"))))
