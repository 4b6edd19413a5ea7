"""A fused, narrow or recomputed step gives the gradient that plain PEFT and PyTorch give."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from recorded_operators import RecordedOperators
from tiny_models import write_llama
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from edge_ft.config import TuneConfig
from edge_ft.data import Batch
from edge_ft.families import family_of
from edge_ft.models.base_model import find_base
from edge_ft.models.compute import Compute
from edge_ft.models.loading import ModelSpec, load_model
from edge_ft.models.lora import add_lora
from edge_ft.models.scorer import TorchScorer
from edge_ft.quant.blockwise import Grid
from edge_ft.quant.conversion import quantize_model
from edge_ft.quant.layers import QuantLinear
from edge_ft.tune import torch_backend
from edge_ft.tune.torch_backend import TorchBackend


def config(**settings: Any) -> TuneConfig:
    return TuneConfig(model="", data="", out=Path("unused"), **{"compute": "fp32", **settings})


def decoder_batch(rows: int = 3, length: int = 21) -> Batch:
    random = np.random.default_rng(0)
    ids = random.integers(3, 60, (rows, length))
    mask = np.ones_like(ids)
    mask[1, 9:] = 0
    labels = np.where(random.random(ids.shape) < 0.5, ids, -100)
    labels[mask == 0] = -100
    return Batch(input_ids=ids, attention_mask=mask, labels=labels, rows=list(range(rows)))


def classifier_batch() -> Batch:
    ids = np.random.default_rng(0).integers(4, 15, (3, 12))
    mask = np.ones_like(ids)
    mask[1, 7:] = 0
    return Batch(input_ids=ids, attention_mask=mask, labels=np.array([[0], [1], [1]]), rows=[0, 1, 2])


def adapted(folder: Path, settings: TuneConfig, base_format: Any = "int4") -> Any:
    """A PEFT model whose B matrices are no zeros, so that every gradient says something."""
    base = find_base(str(folder))
    task = base.family.tasks[0]
    model = load_model(ModelSpec(base, task, base_format, labels=() if base.family.decoder else ("a", "b")))
    peft_model = add_lora(model, base.family, task, settings)
    torch.manual_seed(1)
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return peft_model


def plain_gradients(peft_model: Any, batch: Batch) -> tuple[float, dict[str, Tensor]]:
    """The loss as transformers' own model and cross-entropy give it."""
    ids, mask, labels = (torch.from_numpy(batch[key]) for key in ("input_ids", "attention_mask", "labels"))  # type: ignore[literal-required]
    logits = peft_model(input_ids=ids, attention_mask=mask).logits
    if logits.dim() == 3:
        logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    else:
        labels = labels[:, 0]
    loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
    loss.backward()
    return loss.item(), gradients(peft_model)


def gradients(peft_model: Any) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in peft_model.named_parameters() if p.requires_grad}


def backend_gradients(
    peft_model: Any, family: str, batch: Batch, settings: TuneConfig
) -> tuple[float, dict[str, Tensor]]:
    backend = TorchBackend(peft_model, family_of(family), family_of(family).tasks[0], settings)
    return backend.gradient(batch, 1), gradients(peft_model)


@pytest.mark.parametrize("memory", ["high", "normal", "low"])
@pytest.mark.parametrize("base_format", ["int4", "nf4", "bf16", "fp32"])
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_a_float32_step_is_that_of_plain_peft(
    family: str, base_format: str, memory: str, request: pytest.FixtureRequest
) -> None:
    settings = config(memory=memory)
    folder = request.getfixturevalue(family)
    batch = decoder_batch() if family == "llama" else classifier_batch()
    loss, expected = plain_gradients(adapted(folder, settings, base_format).eval(), batch)
    model = adapted(folder, settings, base_format)
    for module in model.modules():  # BERT's own dropout
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    found, actual = backend_gradients(model, family, batch, settings)
    assert found == pytest.approx(loss, rel=1e-5)
    for name, gradient in expected.items():
        torch.testing.assert_close(
            actual[name], gradient, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("base_format", ["int4", "nf4", "bf16", "fp32"])
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_a_bfloat16_step_points_the_same_way(family: str, base_format: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(family)
    batch = decoder_batch() if family == "llama" else classifier_batch()
    targets = ("q_proj", "down_proj") if family == "llama" else ("query", "output.dense")
    loss, expected = plain_gradients(adapted(folder, config(target_modules=targets), base_format).eval(), batch)
    model = adapted(folder, config(target_modules=targets), base_format)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    found, actual = backend_gradients(model, family, batch, config(compute="bf16"))
    assert found == pytest.approx(loss, rel=0.02)
    assert found != loss
    flat, exact = (torch.cat([part[name].flatten() for name in expected]) for part in (actual, expected))
    assert flat.dtype == torch.float32
    assert nn.functional.cosine_similarity(flat, exact, dim=0) > 0.99


def test_a_layer_norm_computes_in_float32(bert: Path) -> None:
    """Its weight is float32, and a GPU refuses to mix dtypes in it, as a CPU does not."""
    settings = config(compute="bf16")
    model = adapted(bert, settings)
    with RecordedOperators() as operators:
        backend_gradients(model, "bert", classifier_batch(), settings)
    assert {dtype for name, _, dtype in operators.calls if name == "native_layer_norm"} == {torch.float32}


def test_what_can_be_recomputed_is_not_saved(llama: Path) -> None:
    """Of a layer: the inputs of its two norms and what attention gives, the two inputs of its gated unit."""
    model = adapted(llama, config())
    backend, shape = TorchBackend(model, family_of("llama"), "text-generation", config()), model.config
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        backend.gradient(decoder_batch(4, 40), 1)
    widths = [tensor.shape[-1] for tensor in kept.values() if tensor.numel() == 4 * 40 * tensor.shape[-1]]
    assert widths.count(shape.intermediate_size) == 2 * shape.num_hidden_layers
    assert widths.count(shape.hidden_size) <= 3 * shape.num_hidden_layers + 1  # and the last norm


def test_low_memory_saves_fewer_activations(llama: Path) -> None:
    kept = {}
    for memory in ("normal", "low"):
        settings = config(memory=memory)
        backend = TorchBackend(adapted(llama, settings), family_of("llama"), "text-generation", settings)
        sizes: list[int] = []

        def pack(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            backend.gradient(decoder_batch(4, 64), 1)
        kept[memory] = sum(sizes)
    assert kept["low"] < kept["normal"] / 3


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_high_memory_dequantizes_once_and_changes_no_bit(
    compute: str, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted, plain = [0], QuantLinear.dequantize

    def dequantize(self: Any, dtype: Any = torch.float32, columns: Any = slice(None)) -> Tensor:
        counted[0] += isinstance(columns, slice)
        return plain(self, dtype, columns)

    monkeypatch.setattr(QuantLinear, "dequantize", dequantize)
    found: dict[str, list[Tensor]] = {}
    often: dict[str, list[int]] = {}
    for memory in ("normal", "high"):
        settings = config(memory=memory, compute=compute)
        model = adapted(llama, settings)
        backend = TorchBackend(model, family_of("llama"), "text-generation", settings)
        found[memory], often[memory] = [], []
        for _ in range(2):
            counted[0] = 0
            backend.gradient(decoder_batch(), 1)
            found[memory] += gradients(model).values()
            often[memory].append(counted[0])
        backend.compute.cache_weights(None)
        counted[0] = 0
        backend.gradient(decoder_batch(), 1)
        often[memory].append(counted[0])
    assert all(torch.equal(*both) for both in zip(found["normal"], found["high"], strict=True))
    assert often["normal"][0] == often["normal"][1] > often["high"][0] > often["high"][1] == 0
    assert often["high"][2] == often["normal"][0]  # after the cache was dropped


def test_a_norm_is_recomputed_once_for_all_layers_that_read_it(llama: Path) -> None:
    model = adapted(llama, config())
    backend = TorchBackend(model, family_of("llama"), "text-generation", config())
    with RecordedOperators() as operators:
        backend.gradient(decoder_batch(), 1)
    norms = 2 * model.config.num_hidden_layers
    assert [name for name, *_ in operators.calls].count("rsqrt_") == 2 * norms  # forward and backward


def test_dropout_is_the_same_when_it_is_recomputed(llama: Path) -> None:
    found = []
    for memory in ("normal", "low"):
        settings = config(memory=memory, dropout=0.5)
        model = adapted(llama, settings)
        torch.manual_seed(3)
        found.append(backend_gradients(model, "llama", decoder_batch(), settings)[1])
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient)


def test_scores_of_a_scorer_are_float32_beside_a_bfloat16_backend(llama: Path) -> None:
    batch = decoder_batch()
    model = adapted(llama, config())
    expected, _ = TorchScorer(model, "text-generation").token_nll(batch)
    backend = TorchBackend(model, family_of("llama"), "text-generation", config(compute="bf16"))
    narrow, _ = backend.token_nll(batch)
    wide, _ = TorchScorer(model, "text-generation").token_nll(batch)
    np.testing.assert_allclose(wide, expected, rtol=1e-5, atol=1e-5)
    assert np.abs(narrow - expected).max() > 1e-4


def test_a_step_after_an_evaluation(llama: Path) -> None:
    """A mask that was made in inference mode, of a length that no other test has, must not break a gradient."""
    backend = TorchBackend(adapted(llama, config()), family_of("llama"), "text-generation", config())
    backend.token_nll(decoder_batch(length=37))
    assert backend.gradient(decoder_batch(length=37), 1) > 0


def test_a_disabled_adapter_has_no_effect(llama: Path) -> None:
    model = adapted(llama, config())
    backend = TorchBackend(model, family_of("llama"), "text-generation", config())
    on = backend.token_nll(decoder_batch())[0]
    with model.disable_adapter():
        off = backend.token_nll(decoder_batch())[0]
    base = find_base(str(llama))
    expected = TorchScorer(load_model(ModelSpec(base, "text-generation", "int4")), "text-generation").token_nll(
        decoder_batch()
    )[0]
    np.testing.assert_allclose(off, expected, rtol=1e-5, atol=1e-5)
    assert np.abs(on - off).max() > 1e-3


def test_a_norm_of_another_form_computes_as_before() -> None:
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    )
    quantize_model(model, Grid(32))
    model.requires_grad_(False)

    class ResidualRMSNorm(type(model.model.layers[0].input_layernorm)):  # type: ignore[misc]
        def forward(self, hidden_states: Tensor) -> Tensor:
            return super().forward(hidden_states) + hidden_states

    model.model.layers[0].input_layernorm = ResidualRMSNorm(32).requires_grad_(False)
    peft_model = add_lora(model, family_of("llama"), "text-generation", config()).eval()
    ids = torch.arange(1, 9)[None]
    expected = peft_model(input_ids=ids).logits
    with Compute(peft_model, family_of("llama"), torch.float32, "normal"):
        torch.testing.assert_close(peft_model(input_ids=ids).logits, expected)


def test_biases_of_an_adapter_count(tmp_path: Path) -> None:
    """Those of its own (lora_bias), which adapters from elsewhere may have."""
    folder = write_llama(tmp_path, attention_bias=True, mlp_bias=True)
    lora = LoraConfig(target_modules=["q_proj", "up_proj", "down_proj"], lora_bias=True, init_lora_weights=False)
    model = get_peft_model(LlamaForCausalLM.from_pretrained(folder), lora).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B.default.bias"):
            nn.init.normal_(parameter)
    ids = torch.arange(3, 12)[None]
    expected = model(input_ids=ids).logits
    with Compute(model, family_of("llama"), torch.float32, "normal"):
        torch.testing.assert_close(model(input_ids=ids).logits, expected)


@pytest.mark.parametrize("memory", ["high", "normal", "low"])
def test_a_released_model_is_as_it_was_before(memory: Any, llama: Path) -> None:
    """Nothing is left around its layers that a trace would see."""

    def state() -> dict[str, Any]:
        own = {name: vars(module).get("forward") for name, module in model.named_modules()}
        hooks = {name: (*m._forward_hooks, *m._forward_pre_hooks) for name, m in model.named_modules()}
        return {"forward": own, "hooks": hooks, "attention": model.config._attn_implementation}

    model = adapted(llama, config())
    layer = model.get_base_model().model.layers[0].input_layernorm
    layer.forward = layer.forward  # of its own already
    before, nll = state(), TorchScorer(model, "text-generation").token_nll(decoder_batch())[0]
    compute = Compute(model, family_of("llama"), torch.float32, memory)
    assert state() != before
    with compute:
        TorchScorer(model, "text-generation").token_nll(decoder_batch())
    compute.release()
    assert state() == before
    assert not any(module.cached for module in model.modules() if isinstance(module, QuantLinear))
    assert np.array_equal(TorchScorer(model, "text-generation").token_nll(decoder_batch())[0], nll)


@pytest.mark.parametrize(
    ("hardware", "confident", "expected"), [(True, False, "bf16"), (True, True, "fp32"), (False, False, "fp32")]
)
def test_auto_is_bfloat16_where_the_processor_has_it_and_the_loss_agrees(
    hardware: bool, confident: bool, expected: str, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The small loss of confident predictions is another one in bfloat16."""
    monkeypatch.setattr(torch_backend, "has_bf16", lambda _: hardware)
    settings, batch = config(compute="auto"), decoder_batch()
    model = adapted(llama, settings)
    if confident:
        model.get_base_model().model.norm.weight.data *= 50
        batch["labels"] = TorchScorer(model, "text-generation").token_nll(batch)[1]
    backend = TorchBackend(model, family_of("llama"), "text-generation", settings)
    assert backend.resolve(batch) == expected
    assert (backend.dtype == backend.compute.dtype == torch.bfloat16) == (expected == "bf16")
