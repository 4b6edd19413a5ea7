"""The exported graph computes what the torch model computes, in every form that ships."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from edge_ft.errors import ModelError
from edge_ft.export.lora_defaults import write_default_graph, write_values
from edge_ft.export.lora_graph import add_lora_inputs
from edge_ft.export.lowering import lower, store_in_fp16
from edge_ft.export.packing import write_graphs
from edge_ft.export.trace import trace
from edge_ft.families import family_of
from edge_ft.quant.blockwise import Grid
from edge_ft.quant.conversion import quantize_model, retained_weights
from edge_ft.quant.layers import QuantLinear
from edge_ft.quant.sensitivity import refine

Array = NDArray[Any]

TOLERANCE = 1e-4
VOCABULARY = 96
LENGTHS = (20, 7, 1)

SCALED_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}

FURTHER = {"lm_head": 40, **{f"model.layers.0.self_attn.{name}_proj": 64 if name == "q" else 32 for name in "qkv"}}
"""Rows with further bits by layer."""
DECODERS: dict[str, dict[str, Any]] = {
    "int4 tied, scaled rope": {"block_size": 16, "tie_word_embeddings": True, "rope_parameters": SCALED_ROPE},
    "int4 biased, padded block": {"block_size": 32, "hidden_size": 48, "head_dim": 16, "attention_bias": True},
    "int4 tied, further bits": {"block_size": 16, "tie_word_embeddings": True, "further": FURTHER},
    "fp32": {},
    "fp32 tied, biased": {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
}


def make_decoder(
    block_size: int | None = None, further: dict[str, int] | None = None, **config: Any
) -> PreTrainedModel:
    """A Llama of two layers with two query heads for each key head."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
    }
    return finish(LlamaForCausalLM(LlamaConfig(**(sizes | config))), block_size, further)


def make_encoder(block_size: int | None = None) -> PreTrainedModel:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
        num_labels=3,
    )
    return finish(BertForSequenceClassification(config), block_size)


def finish(model: PreTrainedModel, block_size: int | None, further: dict[str, int] | None = None) -> PreTrainedModel:
    # Weights far from their initial values, so that a wrong operator shows.
    for parameter in model.parameters():
        parameter.data = (
            parameter.data * 4 if parameter.ndim > 1 else parameter.data + 0.1 * torch.randn_like(parameter)
        )
    model.eval().requires_grad_(False)
    if block_size is not None:
        read = retained_weights(model)
        quantize_model(model, Grid(block_size))
        refine(model, read, further or {})
    return model


class Graph:
    """An exported graph in a session, fed as a client that knows its names would."""

    def __init__(self, path: Path) -> None:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        self.session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.inputs = {value.name: value.shape for value in self.session.get_inputs()}
        self.outputs = {value.name: value.shape for value in self.session.get_outputs()}

    def __call__(self, **feeds: Array) -> dict[str, Array]:
        """Run; a cache that is not fed is empty."""
        for name, shape in self.inputs.items():
            if name.startswith("past_key_values"):
                feeds.setdefault(name, np.zeros((len(feeds["input_ids"]), shape[1], 0, shape[3]), np.float32))
        return dict(zip(self.outputs, self.session.run(None, feeds), strict=True))


def export(model: PreTrainedModel, folder: Path) -> Graph:
    graph = trace(model, family_of(model.config.model_type))
    lower(graph)
    write_graphs({"model": graph}, folder, "model")
    return Graph(folder / "onnx/model.onnx")


def export_with_adapter(model: PreTrainedModel, folder: Path, pairs: dict[str, tuple[Array, Array]]) -> Graph:
    """The graph with inputs for an adapter on all of its linear layers, and `pairs` as their defaults."""
    graph = trace(model, family_of(model.config.model_type))
    lower(graph)
    sizes = {
        name: (module.in_features, module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    }
    assert add_lora_inputs(graph, sizes) == set(sizes)
    write_graphs({"lora_model": graph}, folder, "model")
    values = {
        f"lora_{side}.{name}": part for name, pair in pairs.items() for side, part in zip("AB", pair, strict=True)
    }
    write_values(folder / "onnx/adapter.safetensors", values)
    names = {f"lora_A.{name}": (0, size) for name, (size, _) in sizes.items()}
    names |= {f"lora_B.{name}": (size, 0) for name, (_, size) in sizes.items()}
    write_default_graph(
        folder / "onnx/lora_model.onnx", folder / "onnx/model.onnx", names, folder / "onnx/adapter.safetensors"
    )
    return Graph(folder / "onnx/model.onnx")


@pytest.fixture(scope="module", params=DECODERS)
def decoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, Graph]:
    model = make_decoder(**DECODERS[request.param])
    return model, export(model, tmp_path_factory.mktemp("decoder"))


def test_scales_of_an_embedding_are_constants_also_where_some_rows_have_further_bits(tmp_path: Path) -> None:
    # Large enough that no slice of it is folded into a constant.
    export(make_decoder(16, {"lm_head": 4000}, vocab_size=8192, tie_word_embeddings=True), tmp_path)
    graph = onnx.load(next(tmp_path.rglob("model.onnx"))).graph
    lookups = [node for node in graph.node if node.op_type == "GatherBlockQuantized"]
    assert len(lookups) == 2  # the codes of all rows, the further ones of some
    assert {node.input[2] for node in lookups} <= {tensor.name for tensor in graph.initializer}  # OpenVINO asks for it


@pytest.fixture(scope="module", params=[None, 32], ids=["fp32", "int4"])
def encoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, Graph]:
    model = make_encoder(request.param)
    return model, export(model, tmp_path_factory.mktemp("encoder"))


def padded_rows(lengths: tuple[int, ...] = LENGTHS) -> tuple[Array, Array]:
    """Right-padded ids and mask [rows, longest]."""
    mask = np.array([[position < length for position in range(max(lengths))] for length in lengths], dtype=np.int64)
    return np.random.default_rng(0).integers(1, VOCABULARY, mask.shape) * mask, mask


def torch_logits(model: nn.Module, ids: Array, mask: Array) -> Array:
    with torch.no_grad():
        logits: Array = model(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask)).logits.numpy()
    return logits


def past(outputs: dict[str, Array]) -> dict[str, Array]:
    return {name.replace("present", "past_key_values"): value for name, value in outputs.items() if name != "logits"}


ALL = np.array(0)


def test_a_decoder_scores_right_padded_rows_as_torch(decoder: tuple[PreTrainedModel, Graph]) -> None:
    model, graph = decoder
    ids, mask = padded_rows()
    logits = graph(input_ids=ids, attention_mask=mask, num_logits_to_keep=ALL)["logits"]
    expected = torch_logits(model, ids, mask)
    assert logits.shape == (*ids.shape, VOCABULARY)
    assert np.abs(expected[mask == 1]).max() > 1
    np.testing.assert_allclose(logits[mask == 1], expected[mask == 1], atol=TOLERANCE)


def test_further_bits_count_where_float16_holds_the_scales_of_their_rows_alone(tmp_path: Path) -> None:
    model = make_decoder(16, {"lm_head": 16}, tie_word_embeddings=True)
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        codes = layer.codes()
        codes.scales[16:] *= 1 + 2**-20  # as the scales of weights that are too small or too large for float16
        layer.set_codes(codes)
    graph = trace(model, family_of("llama"))
    lower(graph)
    store_in_fp16(graph)
    write_graphs({"model": graph}, tmp_path, "model")
    ids, mask = padded_rows((9,))
    ids %= 16  # rows with further bits
    logits = Graph(tmp_path / "onnx/model.onnx")(input_ids=ids, attention_mask=mask, num_logits_to_keep=ALL)["logits"]
    np.testing.assert_allclose(logits, torch_logits(model, ids, mask), atol=TOLERANCE)


def test_a_decoder_returns_the_last_position_by_default(
    decoder: tuple[PreTrainedModel, Graph],
) -> None:
    _, graph = decoder
    ids, mask = padded_rows((9,))
    every = graph(input_ids=ids, attention_mask=mask, num_logits_to_keep=ALL)["logits"]
    np.testing.assert_allclose(graph(input_ids=ids, attention_mask=mask)["logits"], every[:, -1:], atol=TOLERANCE)
    three = graph(input_ids=ids, attention_mask=mask, num_logits_to_keep=np.array(3))["logits"]
    np.testing.assert_allclose(three, every[:, -3:], atol=TOLERANCE)
    assert "num_logits_to_keep" not in graph.inputs


def test_decoding_with_a_cache_equals_reading_the_whole_text(decoder: tuple[PreTrainedModel, Graph]) -> None:
    model, graph = decoder
    ids, mask = padded_rows((24,))
    expected = torch_logits(model, ids, mask)
    outputs = graph(input_ids=ids[:, :20], attention_mask=mask[:, :20])
    for end in range(21, 25):
        outputs = graph(input_ids=ids[:, end - 1 : end], attention_mask=mask[:, :end], **past(outputs))
        np.testing.assert_allclose(outputs["logits"][:, 0], expected[:, end - 1], atol=TOLERANCE)
    prompt = graph(input_ids=ids[:, :20], attention_mask=mask[:, :20])
    continued = graph(input_ids=ids[:, 20:], attention_mask=mask, **past(prompt))
    np.testing.assert_allclose(continued["logits"][:, 0], expected[:, -1], atol=TOLERANCE)


def test_rows_of_different_lengths_decode_in_one_batch(decoder: tuple[PreTrainedModel, Graph]) -> None:
    model, graph = decoder
    ids, mask = padded_rows()
    outputs = graph(input_ids=ids, attention_mask=mask)
    token = np.full((len(ids), 1), 5)
    grown = np.concatenate([mask, np.zeros((len(ids), 1), dtype=np.int64)], axis=1)
    grown[np.arange(len(ids)), LENGTHS] = 1
    logits = graph(input_ids=token, attention_mask=grown, **past(outputs))["logits"]
    for row, length in enumerate(LENGTHS):
        text = np.concatenate([ids[row : row + 1, :length], token[:1]], axis=1)
        np.testing.assert_allclose(logits[row, 0], torch_logits(model, text, np.ones_like(text))[0, -1], atol=TOLERANCE)


def test_past_and_present_may_be_one_buffer(decoder: tuple[PreTrainedModel, Graph]) -> None:
    model, graph = decoder
    ids, mask = padded_rows((24,))
    expected = torch_logits(model, ids, mask)
    buffers = {
        name: ort.OrtValue.ortvalue_from_numpy(np.zeros((1, shape[1], 40, shape[3]), np.float32))
        for name, shape in graph.inputs.items()
        if name.startswith("past")
    }
    for start, end in ((0, 20), *((position, position + 1) for position in range(20, 24))):
        binding = graph.session.io_binding()
        binding.bind_cpu_input("input_ids", ids[:, start:end])
        binding.bind_cpu_input("attention_mask", mask[:, :end])
        binding.bind_output("logits")
        for name, buffer in buffers.items():
            binding.bind_ortvalue_input(name, buffer)
            binding.bind_ortvalue_output(name.replace("past_key_values", "present"), buffer)
        graph.session.run_with_iobinding(binding)
        logits = binding.get_outputs()[0].numpy()
        np.testing.assert_allclose(logits[:, 0], expected[:, end - 1], atol=TOLERANCE)


def test_a_decoder_has_the_names_that_clients_expect(decoder: tuple[PreTrainedModel, Graph]) -> None:
    _, graph = decoder
    assert graph.inputs["input_ids"] == ["batch_size", "sequence_length"]
    assert graph.inputs["attention_mask"] == ["batch_size", "total_sequence_length"]
    assert list(graph.outputs) == [
        "logits",
        *(f"present.{layer}.{part}" for layer in (0, 1) for part in ("key", "value")),
    ]
    for part in ("key", "value"):
        assert graph.inputs[f"past_key_values.1.{part}"] == ["batch_size", 2, "past_sequence_length", 16]
        assert graph.outputs[f"present.1.{part}"] == ["batch_size", 2, "total_sequence_length", 16]


def test_an_encoder_classifies_right_padded_rows_as_torch(encoder: tuple[PreTrainedModel, Graph]) -> None:
    model, graph = encoder
    ids, mask = padded_rows((32, 9, 1))
    types = np.zeros_like(ids)
    logits = graph(input_ids=ids, attention_mask=mask, token_type_ids=types)["logits"]
    np.testing.assert_allclose(logits, torch_logits(model, ids, mask), atol=TOLERANCE)
    for row, length in enumerate((32, 9, 1)):
        alone = {name: array[row : row + 1, :length] for name, array in (("input_ids", ids), ("token_type_ids", types))}
        single = graph(**alone, attention_mask=np.ones((1, length), dtype=np.int64))["logits"]
        np.testing.assert_allclose(single[0], logits[row], atol=TOLERANCE)


def test_an_encoder_has_the_names_that_clients_expect(encoder: tuple[PreTrainedModel, Graph]) -> None:
    _, graph = encoder
    dims = ["batch_size", "sequence_length"]
    assert graph.inputs == {"input_ids": dims, "attention_mask": dims, "token_type_ids": dims}
    assert graph.outputs == {"logits": ["batch_size", 3]}


@pytest.mark.parametrize(("make", "block_size"), [(make_decoder, 32), (make_decoder, None), (make_encoder, 32)])
def test_lora_inputs_beside_the_base(make: Any, block_size: int | None, tmp_path: Path) -> None:
    base = make(block_size)
    tuned = get_peft_model(base, LoraConfig(r=4, lora_alpha=12, target_modules="all-linear", init_lora_weights=False))
    layers = {
        name.removeprefix("base_model.model."): module
        for name, module in tuned.named_modules()
        if hasattr(module, "lora_A")
    }
    pairs = {
        name: (
            layer.lora_A["default"].weight.detach().numpy(),
            layer.lora_B["default"].weight.detach().numpy() * layer.scaling["default"],
        )
        for name, layer in layers.items()
    }
    graph = export_with_adapter(make(block_size), tmp_path, pairs)
    ids, mask = padded_rows((11,))
    feeds = {"input_ids": ids, "attention_mask": mask}
    if make is make_encoder:
        feeds["token_type_ids"] = np.zeros_like(ids)
    else:
        feeds["num_logits_to_keep"] = ALL

    expected = torch_logits(tuned.eval(), ids, mask)
    np.testing.assert_allclose(graph(**feeds)["logits"], expected, atol=TOLERANCE)
    assert {value.name: value.shape for value in graph.session.get_overridable_initializers()} == {
        f"lora_{part}.{name}": shape
        for name, (a, b) in pairs.items()
        for part, shape in (("A", [f"rank.{name}", a.shape[1]]), ("B", [b.shape[0], f"rank.{name}"]))
    } | ({"num_logits_to_keep": []} if make is make_decoder else {})

    with tuned.disable_adapter():
        without = torch_logits(tuned, ids, mask)
    assert np.abs(without - expected).max() > 0.01
    for rank in (0, 3):
        zeros = {f"lora_A.{name}": np.zeros((rank, a.shape[1]), np.float32) for name, (a, _) in pairs.items()}
        zeros |= {f"lora_B.{name}": np.zeros((b.shape[0], rank), np.float32) for name, (_, b) in pairs.items()}
        np.testing.assert_allclose(graph(**feeds, **zeros)["logits"], without, atol=TOLERANCE)


def test_a_layer_that_the_graph_lacks_gets_no_input() -> None:
    graph = trace(make_decoder(32), family_of("llama"))
    lower(graph)
    layer = "model.layers.1.mlp.up_proj"
    assert add_lora_inputs(graph, {layer: (64, 96), "model.layers.2.mlp.up_proj": (64, 96)}) == {layer}


def test_the_graph_has_the_models_codes() -> None:
    model = make_decoder(32, tie_word_embeddings=True)
    graph = trace(model, family_of("llama"))
    lower(graph)
    initializers = graph.graph.initializers

    def tensor(name: str) -> bytes:
        value = initializers[name].const_value
        assert value is not None
        return value.tobytes()

    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, QuantLinear)}
    for name, layer in layers.items():
        for buffer in ("qweight", "scales", "zero_points"):
            block, _, kind = name.rpartition(".")
            if kind in ("q_proj", "k_proj", "v_proj"):
                parts = [getattr(layers[f"{block}.{part}_proj"].codes(), buffer).tobytes() for part in "qkv"]
                assert tensor(f"{block}.qkv_proj.{buffer}") == b"".join(parts)
            else:
                assert tensor(f"{name}.{buffer}") == getattr(layer.codes(), buffer).tobytes()
    assert tensor("model.embed_tokens.qweight") == tensor("lm_head.qweight")


def test_a_block_has_as_few_operators_as_one_written_by_hand() -> None:
    operators = []
    for layers in (1, 2):
        graph = trace(make_decoder(32, num_hidden_layers=layers), family_of("llama"))
        lower(graph)
        operators.append([node.op_type for node in graph.graph])
    one, two = operators
    for operator in one:
        two.remove(operator)
    assert sorted(two) == [
        "GroupQueryAttention",
        *["MatMulNBits"] * 5,  # qkv, o, gate, up, down
        *["Mul"] * 2,
        "Sigmoid",
        *["SkipSimplifiedLayerNormalization"] * 2,
    ]


def test_the_same_model_gives_the_same_bytes(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        export(make_decoder(32, tie_word_embeddings=True), tmp_path / folder)
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert [str(path) for path in files] == ["onnx/model.onnx", "onnx/model.onnx_data", "onnx/model_a4.onnx"]
    for path in files:
        assert (tmp_path / "a" / path).read_bytes() == (tmp_path / "b" / path).read_bytes()


@pytest.mark.parametrize("make", [make_decoder, make_encoder])
def test_tracing_does_not_change_the_model(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    ids, mask = padded_rows((11,))
    before = torch_logits(model, ids, mask)
    forward, attention = nn.Linear.forward, model.config._attn_implementation

    trace(model, family_of(model.config.model_type))

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no graph")

    monkeypatch.setattr(torch.onnx, "export", fail)
    with pytest.raises(RuntimeError, match="no graph"):
        trace(model, family_of(model.config.model_type))
    assert nn.Linear.forward is forward
    assert model.config._attn_implementation == attention
    np.testing.assert_array_equal(torch_logits(model, ids, mask), before)


def test_the_exporters_print_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    level = logging.getLogger("torch.onnx").level
    graph = trace(make_decoder(32), family_of("llama"))
    lower(graph)
    assert capfd.readouterr() == ("", "")
    assert logging.getLogger("torch.onnx").level == level


def test_a_head_size_that_onnxruntime_does_not_support_is_refused() -> None:
    with pytest.raises(ModelError, match="size 8"):
        trace(make_decoder(head_dim=8), family_of("llama"))
