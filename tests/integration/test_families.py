"""Every decoder family is tuned and exported in both lanes, and the bundle generates torch's tokens."""

import json
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models_table import OPENVINO_EXACT, record, record_client, release
from numpy.typing import NDArray
from peft import PeftModel
from tiny_models import DECODERS, ROPE, write_decoder, write_sums
from torch import nn
from transformers import AutoModelForCausalLM

from edge_ft.artifacts import Bundle, RunFolder
from edge_ft.config import ExportConfig, TuneConfig
from edge_ft.data import Batch
from edge_ft.errors import ModelError
from edge_ft.export import export
from edge_ft.export.opening import open_export_source
from edge_ft.models.base_model import find_base
from edge_ft.models.loading import ModelSpec, load_model
from edge_ft.models.lora import add_lora
from edge_ft.models.scorer import TorchScorer
from edge_ft.progress import Silent
from edge_ft.runtime import cache, load
from edge_ft.tune import tune
from edge_ft.tune.plan import plan
from edge_ft.tune.torch_backend import TorchBackend

WINDOW = 8
NOT_IN_OPENVINO = {  # 2026.4, its ONNX frontend
    "gemma2": "no softcap in attention",
    "opt-350m": "cannot convert a quantized embedding that is followed directly by a projection",
}
LOOSE: dict[str, Any] = {"max_tax": 5.0, "min_retained": 0.0, "max_metric_drop": 1.0}


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "head size": ("llama", {"head_dim": 24}, "heads of size 24: .* multiples of 16"),
    "rotated part": (
        "phi3",
        {"rope_parameters": {**ROPE, "partial_rotary_factor": 0.25}},
        "rotates 8 of 32 dimensions",
    ),
    "dynamic rope": (
        "qwen2",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
        "rotary embedding of type 'dynamic'",
    ),
    "looks ahead": ("gemma3_text", {"use_bidirectional_attention": True}, "attends to later tokens too"),
    "cross-attention": ("gpt2", {"add_cross_attention": True}, "attends to an encoder"),
    "layer type": (
        "smollm3",
        {"layer_types": ["full_attention", "chunked_attention"]},
        "layers of type 'chunked_attention'",
    ),
    "not a config": ("mistral", {"num_hidden_layers": "two"}, "is not the config of a mistral model"),
}


class Family:
    """One family's model and what the pipeline makes of it, each made once."""

    def __init__(self, name: str, folder: Path, **config: Any) -> None:
        self.name, self.folder = name, folder
        self.model = write_decoder(folder / "model", name, **config)

    @cached_property
    def rows(self) -> Path:
        file = self.folder / "rows.jsonl"
        lines = [
            {"prompt": f"hello world, the answer {n} is", "completion": " seven hello" if n % 2 else " world"}
            for n in range(24)
        ]
        file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        return file

    @cached_property
    def run(self) -> RunFolder:
        settings = TuneConfig(
            model=str(self.model),
            data=str(self.rows),
            out=self.folder / "run",
            max_steps=8,
            eval_steps=8,
            learning_rate=1e-2,
            split=(0.7, 0.3, 0.0),
            compute="fp32",
        )
        return tune(settings)

    def bundle(self, lane: Any) -> Bundle:
        out = self.folder / lane
        if out.is_dir():
            return Bundle.open(out)
        return export(str(self.run.path), ExportConfig(out=out, lane=lane, **LOOSE))

    def torch(self, lane: Any) -> TorchScorer:
        """The torch model that the bundle of a lane was made from."""
        source = open_export_source(str(self.run.path), ExportConfig(out=self.folder / "unused", lane=lane))
        return TorchScorer(source.load_shipped(Silent()).eval(), "text-generation")


@pytest.fixture(scope="module", params=DECODERS)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    return Family(request.param, tmp_path_factory.mktemp(request.param))


def padded_batch(lengths: tuple[int, ...] = (30, 11, 3)) -> Batch:
    """Rows of random tokens, right-padded, every token but the first one a target."""
    random = np.random.default_rng(0)
    mask: NDArray[np.int64] = (np.arange(max(lengths)) < np.array(lengths)[:, None]).astype(np.int64)
    ids = random.integers(3, 290, mask.shape) * mask
    return Batch(
        input_ids=ids, attention_mask=mask, labels=np.where(mask == 1, ids, -100), rows=list(range(len(lengths)))
    )


def test_a_step_equals_plain_peft_on_the_plain_model(family: Family, tmp_path: Path) -> None:
    """The adapter is saved here and read there, so that the file fits the plain model too."""
    settings = TuneConfig(model="", data="", out=tmp_path, compute="fp32")
    base = find_base(str(family.model))
    model = add_lora(load_model(ModelSpec(base, "text-generation", "fp32")), base.family, "text-generation", settings)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    backend = TorchBackend(model, base.family, "text-generation", settings)
    backend.save(tmp_path / "adapter")
    batch = padded_batch()
    loss = backend.gradient(batch, 1)
    plain = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(family.model, dtype=torch.float32), tmp_path / "adapter", is_trainable=True
    )
    ids, mask, labels = (torch.from_numpy(batch[key]) for key in ("input_ids", "attention_mask", "labels"))  # type: ignore[literal-required]
    logits = plain(input_ids=ids, attention_mask=mask).logits
    expected = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    gradients = {name: parameter.grad for name, parameter in plain.named_parameters() if parameter.requires_grad}
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(
            found[name], gradient, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_the_loss_falls(family: Family) -> None:
    nll = family.run.report()["nll"]
    assert nll["best"] < nll["base"]
    record(family.name, tune=f"{nll['base']:.2f} → {nll['best']:.2f}")


@pytest.mark.parametrize("lane", ["merged", "adapter"])
def test_the_bundle_generates_torchs_tokens(family: Family, lane: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a prompt longer than the window is read in parts."""
    bundle = family.bundle(lane)
    assert bundle.manifest["verification"]["by_accuracy_level"]["1"]["shipped_minus_last_evaluated"] < 1e-4
    scorer, generator = family.torch(lane), load(bundle, accuracy_level=1)
    generator.stop_ids = frozenset()
    right = 0
    for number, part in ((1, 512), (17, 512), (400, 5)):
        monkeypatch.setattr(cache, "_PREFILL", part)
        prompt = generator.tokenizer.encode(f"hello world, the answer {number} is seven hello world")
        assert len(prompt) > WINDOW
        answer = generator.answer(prompt, 12)
        assert answer == scorer.answer(prompt, 12)
        right += len(answer)
    record(family.name, **{lane: f"{right} of {right}"})


@pytest.mark.parametrize("lane", ["merged", "adapter"])
def test_onnxruntime_genai_generates_the_same_tokens(family: Family, lane: str) -> None:
    genai = pytest.importorskip("onnxruntime_genai")
    generator = load(family.bundle(lane), accuracy_level=1)
    generator.stop_ids = frozenset()
    prompt = generator.tokenizer.encode("hello world, the answer 3 is seven hello world")
    params = genai.GeneratorParams(model := genai.Model(str(family.bundle(lane).path)))
    params.set_search_options(max_length=len(prompt) + 8)
    genai_generator = genai.Generator(model, params)
    genai_generator.append_tokens(prompt)
    tokens = []
    while not genai_generator.is_done():
        genai_generator.generate_next_token()
        tokens.append(int(genai_generator.get_next_tokens()[0]))
    ours = generator.answer(prompt, 8)
    assert tokens == ours[: len(tokens)]
    assert len(tokens) == 8 or tokens[-1] in generator.tokenizer.stop_ids
    record(family.name, genai="same tokens")
    client = f"onnxruntime-genai {release('onnxruntime-genai')}"
    record_client(family.name, "text-generation", f"int4 {lane}", client, "the same greedy tokens")


def test_openvino_scores_as_onnxruntime(family: Family) -> None:
    core = pytest.importorskip("openvino").Core()
    bundle = family.bundle("merged")
    client, held = f"OpenVINO {release('openvino')}, ONNX frontend", "the same logits within 0.002"
    seen = partial(record_client, family.name, "text-generation", "int4 merged", client, held)
    opened = partial(core.compile_model, str(bundle.graph(1)), "CPU", OPENVINO_EXACT)
    if family.name in NOT_IN_OPENVINO:
        with pytest.raises(RuntimeError, match=r"OpConversionFailure|convert_gather_to_compressed"):
            opened()
        record(family.name, openvino=f"no: {NOT_IN_OPENVINO[family.name]}")
        seen(refused=NOT_IN_OPENVINO[family.name])
        return
    generator, compiled = load(bundle, accuracy_level=1), opened()
    ids = np.array([generator.tokenizer.encode("hello world, the answer 3 is seven hello world")])
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    for value in compiled.inputs:
        if value.any_name.startswith("past_key_values"):
            shape = value.partial_shape
            feeds[value.any_name] = np.zeros((1, shape[1].get_length(), 0, shape[3].get_length()), np.float32)
    logits = compiled(feeds)["logits"]
    expected = generator.logits(ids, np.ones_like(ids))[:, -1:]
    np.testing.assert_allclose(logits, expected, atol=2e-3)
    record(family.name, openvino="same logits")
    seen()


def test_a_padded_batch_scores_as_its_single_rows(family: Family) -> None:
    batch = padded_batch()
    generator = load(family.bundle("merged"), accuracy_level=1)
    together, _ = generator.token_nll(batch)
    expected, _ = family.torch("merged").token_nll(batch)
    np.testing.assert_allclose(together, expected, atol=2e-4)
    worst = 0.0
    for row, length in enumerate(batch["attention_mask"].sum(1)):
        keys = ("input_ids", "attention_mask", "labels")
        alone, _ = generator.token_nll(Batch(rows=[row], **{key: batch[key][row : row + 1, :length] for key in keys}))  # type: ignore[literal-required, typeddict-item]
        worst = max(worst, float(np.abs(together[row, :length] - alone[0]).max()))
    assert worst < 1e-4
    record(family.name, padded=f"{worst:.0e}")


@pytest.mark.parametrize("reason", REFUSED)
def test_a_model_that_cannot_be_exported_is_refused_before_training(reason: str, tmp_path: Path) -> None:
    name, changes, message = REFUSED[reason]
    model = write_decoder(tmp_path / "model", name)
    file = model / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes), encoding="utf-8")
    config = TuneConfig(model=str(model), data=str(write_sums(tmp_path / "rows.jsonl")), out=tmp_path / "run")
    for command in (tune, plan):
        with pytest.raises(ModelError, match=message):
            command(config)
    assert not (tmp_path / "run").exists()


def test_longrope_is_limited_to_its_short_table(tmp_path: Path) -> None:
    factors = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 32, **factors}
    family = Family("llama", tmp_path, rope_parameters=rope)
    base = find_base(str(family.model))
    assert base.max_length == 32
    bundle = export(str(family.model), ExportConfig(out=tmp_path / "bundle"))
    batch = padded_batch((32, 9))
    expected, _ = TorchScorer(load_model(ModelSpec(base, "text-generation", "int4")), "text-generation").token_nll(
        batch
    )
    np.testing.assert_allclose(load(bundle, engine="exact").token_nll(batch)[0], expected, atol=2e-4)
