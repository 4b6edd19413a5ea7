"""Sequence-to-sequence models: rows, loading, LoRA targets and the gradient of a step, without a training."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import T5_SHAPES, write_sums, write_t5

from edge_ft.config import Memory, RowsConfig, RunConfig, TuneConfig
from edge_ft.data import Row, TextTokenizer, collate, encode_rows, find_columns, make_rendering
from edge_ft.errors import DataError, ModelError, UsageError
from edge_ft.models.base_model import find_base
from edge_ft.models.compute import Compute
from edge_ft.models.loading import ModelSpec, load_model
from edge_ft.models.lora import add_lora
from edge_ft.progress import Silent
from edge_ft.quant.blockwise import Grid
from edge_ft.tune.prepare import prepare

TASK = "text2text-generation"


def tokenizer_and_rendering(folder: Path, rows: RowsConfig = RowsConfig(), **limits: int) -> Any:
    tokenizer = TextTokenizer.load(folder)
    columns = find_columns(["prompt", "completion"], rows, TASK)
    return tokenizer, make_rendering(rows, columns, TASK, tokenizer, limits.get("max_length", 64))


def test_a_row_becomes_two_sequences_with_an_end_token_each(t5: Callable[[str], Path]) -> None:
    tokenizer, rendering = tokenizer_and_rendering(t5("t5, relu, tied"))
    rows = [Row(1, {"prompt": "hello", "completion": "seven"}), Row(2, {"prompt": "hello world", "completion": "the"})]
    first, second = encode_rows(rendering, tokenizer, rows)
    assert first.input_ids == [*tokenizer.encode("hello"), 1]
    assert first.labels == [*tokenizer.encode("seven"), 1]
    assert (first.prompt_length, first.reference, first.cut) == (len(first.input_ids), "seven", 0)
    batch = collate([first, second], tokenizer.pad_id, TASK)
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (2, len(second.input_ids))
    assert batch["labels"].shape == (2, max(len(first.labels), len(second.labels)))
    assert batch["labels"][0].tolist()[: len(first.labels)] == first.labels


def test_source_and_target_are_cut_separately_and_reported(t5: Callable[[str], Path]) -> None:
    tokenizer, rendering = tokenizer_and_rendering(t5("t5, relu, tied"), max_length=8)
    row = Row(1, {"prompt": "hello world " * 9, "completion": "seven " * 20})
    (example,) = encode_rows(rendering, tokenizer, [row])
    assert len(example.input_ids) == len(example.labels) == 8
    assert example.input_ids[-1] == 1  # the source ends as every source does
    assert 1 not in example.labels  # what is cut does not end
    whole = len(tokenizer.encode("seven " * 20)) + 1
    assert example.cut_targets == whole - 8
    assert example.cut == example.cut_targets + len(tokenizer.encode("hello world " * 9)) - 7


@pytest.mark.parametrize(
    ("columns", "settings", "message"),
    [
        (["text"], {}, "single texts"),
        (["messages"], {}, "chats"),
        (["prompt", "completion"], {"chat_template": "auto"}, "--chat-template is for decoders"),
        (["text", "label"], {"label": "label"}, "--label label is for text-classification"),
    ],
)
def test_rows_without_two_texts_are_refused(
    columns: list[str], settings: dict[str, Any], message: str, t5: Callable[[str], Path]
) -> None:
    tokenizer = TextTokenizer.load(t5("t5, relu, tied"))
    config = RowsConfig(**settings)
    with pytest.raises(DataError, match=message):
        make_rendering(config, find_columns(columns, config, TASK), TASK, tokenizer, 64)


def test_a_model_without_a_decoder_start_token_is_refused(tmp_path: Path) -> None:
    folder = write_t5(tmp_path / "t5")
    config = json.loads((folder / "config.json").read_text())
    del config["decoder_start_token_id"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="decoder_start_token_id"):
        find_base(str(folder))


@pytest.mark.parametrize("shape", T5_SHAPES)
@pytest.mark.parametrize("block_size", [32, 128], ids=["embedding in int4", "embedding in float"])
def test_both_stacks_are_rounded_and_share_one_embedding(
    shape: str, block_size: int, t5: Callable[[str], Path]
) -> None:
    model: Any = load_model(ModelSpec(find_base(str(t5(shape))), TASK, "int4", Grid(block_size)))
    linear = [module for module in model.modules() if type(module).__name__ == "QuantLinear"]
    head_is_tied = shape.startswith("t5")
    rounded = block_size == 32
    assert len(linear) == sum(isinstance(m, torch.nn.Linear) for m in model.modules()) - (head_is_tied and not rounded)
    tables = {
        id(getattr(stack.embed_tokens, "weight" if not rounded else "qweight"))
        for stack in (model.encoder, model.decoder)
    }
    assert len(tables) == 1
    assert type(model.decoder.embed_tokens).__name__ == ("QuantEmbedding" if rounded else "Embedding")
    if rounded:
        same = model.lm_head.qweight.data_ptr() == model.shared.qweight.data_ptr()
        assert same == head_is_tied


def test_a_head_in_the_checkpoint_is_never_tied(t5: Callable[[str], Path]) -> None:
    base = find_base(str(t5("mt5, gated, untied")))
    whole: Any = load_model(ModelSpec(base, TASK, "fp32"))
    rounded: Any = load_model(ModelSpec(base, TASK, "int8"))
    assert not torch.equal(whole.lm_head.weight, whole.shared.weight)
    torch.testing.assert_close(rounded.lm_head.dequantize().T, whole.lm_head.weight, atol=0.01, rtol=0)


def test_layers_last_k_applies_to_each_stack(t5: Callable[[str], Path]) -> None:
    base = find_base(str(t5("t5, relu, tied")))
    settings: dict[str, Any] = {"model": "-", "data": "-", "out": "-"}

    def adapted(layers: str) -> set[str]:
        model = add_lora(load_model(ModelSpec(base, TASK)), base.family, TASK, TuneConfig(**settings, layers=layers))
        return {name.split(".lora_A")[0] for name, _ in model.named_parameters() if "lora_A" in name}

    assert {name.split(".")[2] + name.split(".")[4] for name in adapted("last:1")} == {"encoder1", "decoder1"}
    assert len(adapted("all")) == 2 * 6 + 2 * 10
    with pytest.raises(UsageError, match="2 layers in its smaller stack"):
        adapted("last:3")


def test_a_fused_step_has_the_loss_and_the_gradient_of_a_plain_one(t5: Callable[[str], Path]) -> None:
    base = find_base(str(t5("mt5, gated, untied")))
    tokenizer, rendering = tokenizer_and_rendering(base.path)
    rows = [Row(1, {"prompt": "hello", "completion": "seven"}), Row(2, {"prompt": "hello world", "completion": "the"})]
    batch = collate(encode_rows(rendering, tokenizer, rows), tokenizer.pad_id, TASK)
    config = TuneConfig(model="-", data="-", out="-")  # type: ignore[arg-type]
    found = []
    memories: tuple[tuple[bool, Memory], ...] = ((False, "normal"), (True, "normal"), (True, "high"), (True, "low"))
    for fused, memory in memories:
        model = add_lora(load_model(ModelSpec(base, TASK, "int4")), base.family, TASK, config)
        with torch.no_grad():
            for name, parameter in sorted(model.named_parameters()):
                if "lora_B" in name:
                    torch.manual_seed(len(name))
                    parameter.normal_(std=0.1)
        compute = Compute(model, base.family, torch.float32, memory)
        model.train()
        compute.active = fused
        from edge_ft.models.scorer import HEAD_INPUTS

        hidden, _ = HEAD_INPUTS[TASK](model, batch, torch.device("cpu"))
        hidden.square().sum().backward()
        found.append((hidden.detach(), [p.grad for p in model.parameters() if p.requires_grad]))
    for hidden, gradients in found[1:]:
        torch.testing.assert_close(hidden, found[0][0], atol=1e-5, rtol=1e-4)
        for gradient, plain in zip(gradients, found[0][1], strict=True):
            torch.testing.assert_close(gradient, plain, atol=1e-4, rtol=1e-3)


def test_plan_shows_rows_as_the_model_reads_them(t5: Callable[[str], Path], tmp_path: Path) -> None:
    base = find_base(str(t5("t5, relu, tied")))
    data = write_sums(tmp_path / "sums.jsonl")
    config = TuneConfig(model=str(base.path), data=str(data), out=tmp_path / "run", show=1)
    (text,) = prepare(config, base, TextTokenizer.load(base.path), Silent()).shown
    assert "</s> → ⟦" in text
    assert text.endswith("</s>⟧")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beams": 0}, "at least 1"),
        ({"num_beams": 2, "temperature": 0.5}, "leave --temperature"),
        ({"length_penalty": 2.0}, "give --num-beams above 1"),
    ],
)
def test_options_that_beams_would_ignore_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        RunConfig(**settings)
