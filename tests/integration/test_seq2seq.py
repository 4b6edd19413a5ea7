"""Encoder-decoders: what they read, what is trained, and that a bundle answers as torch does."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from models_table import record
from peft import PeftModel
from tiny_bundle import write_decoder
from tiny_models import write_sums, write_t5
from transformers import AutoModelForSeq2SeqLM

from edge_ft.artifacts import Bundle, RunFolder
from edge_ft.bench import bench
from edge_ft.bench.studies import pretrain_t5
from edge_ft.config import BenchConfig, EvalConfig, ExportConfig, Memory, RowsConfig, RunConfig, TuneConfig
from edge_ft.data import Row, TextTokenizer, collate, encode_rows, find_columns, make_rendering, read_rows
from edge_ft.errors import DataError, ModelError, UsageError
from edge_ft.evaluate import evaluate
from edge_ft.evaluate.loading import open_run_model
from edge_ft.export import export
from edge_ft.export.trace_seq2seq import trace_seq2seq
from edge_ft.models.base_model import find_base
from edge_ft.models.compute import Compute
from edge_ft.models.loading import load_model
from edge_ft.models.lora import add_lora
from edge_ft.models.scorer import TorchScorer
from edge_ft.progress import Silent
from edge_ft.runtime import Seq2SeqGenerator, load
from edge_ft.tune import tune
from edge_ft.tune.prepare import prepare

TASK = "text2text-generation"
SHAPES: dict[str, dict[str, Any]] = {
    "t5, relu, tied": {},
    "mt5, gated, untied": {"model_type": "mt5", "untied": True, "num_decoder_layers": 1},
}
LOOSE: dict[str, Any] = {"max_tax": 1.0, "min_retained": 0.0, "max_metric_drop": 1.0}


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The tiny model of a shape, made once."""
    folder = tmp_path_factory.mktemp("models")
    return cache(lambda shape: write_t5(folder / shape.replace(", ", "-"), **SHAPES[shape]))


@pytest.fixture(scope="module", params=SHAPES)
def tuned(
    request: pytest.FixtureRequest, t5: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> RunFolder:
    """A run of each shape that has learned something."""
    folder = tmp_path_factory.mktemp("run")
    return tune(
        TuneConfig(
            model=str(t5(request.param)),
            data=str(write_sums(folder / "sums.jsonl")),
            out=folder / "run",
            epochs=6,
            learning_rate=1e-2,
            split=(0.6, 0.2, 0.2),
            compute="fp32",
        )
    )


@pytest.fixture(scope="module")
def adapter_bundle(tuned: RunFolder) -> Bundle:
    return export(str(tuned.path), ExportConfig(out=tuned.path.with_name("adapter"), lane="adapter", **LOOSE))


@pytest.fixture(scope="module")
def generator(adapter_bundle: Bundle) -> Seq2SeqGenerator:
    opened = load(adapter_bundle, threads=1)
    assert isinstance(opened, Seq2SeqGenerator)
    return opened


@pytest.fixture(scope="module")
def held_out(tuned: RunFolder, generator: Seq2SeqGenerator) -> list[list[int]]:
    """Sources that were not trained on, of different lengths."""
    rows = read_rows(str(tuned.split("test")))
    sources = [example.input_ids for example in encode_rows(generator.rendering, generator.tokenizer, rows)]
    long = generator.tokenizer.encode_classifier("the answer is seven hello world " * 6, 256).ids
    return [*sources, long]


def tokenizer_and_rendering(folder: Path, rows: RowsConfig = RowsConfig(), **limits: int) -> Any:
    tokenizer = TextTokenizer.load(folder)
    columns = find_columns(["prompt", "completion"], rows, TASK)
    return tokenizer, make_rendering(rows, columns, TASK, tokenizer, limits.get("max_length", 64))


# What it reads


def test_a_row_is_two_sequences_each_with_its_end(t5: Callable[[str], Path]) -> None:
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


def test_source_and_target_are_cut_each_and_said(t5: Callable[[str], Path]) -> None:
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
        (["text"], {}, "texts alone"),
        (["messages"], {}, "chats"),
        (["prompt", "completion"], {"chat_template": "auto"}, "--chat-template is for decoders"),
        (["text", "label"], {"label": "label"}, "--label label is for text-classification"),
    ],
)
def test_rows_that_are_no_pairs_are_refused(
    columns: list[str], settings: dict[str, Any], message: str, t5: Callable[[str], Path]
) -> None:
    tokenizer = TextTokenizer.load(t5("t5, relu, tied"))
    config = RowsConfig(**settings)
    with pytest.raises(DataError, match=message):
        make_rendering(config, find_columns(columns, config, TASK), TASK, tokenizer, 64)


def test_a_model_that_does_not_say_where_an_answer_begins_is_refused(tmp_path: Path) -> None:
    folder = write_t5(tmp_path / "t5")
    config = json.loads((folder / "config.json").read_text())
    del config["decoder_start_token_id"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="decoder_start_token_id"):
        find_base(str(folder))


# What is trained


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("block_size", [32, 128], ids=["embedding in int4", "embedding in float"])
def test_both_stacks_are_rounded_and_share_one_embedding(
    shape: str, block_size: int, t5: Callable[[str], Path]
) -> None:
    model: Any = load_model(find_base(str(t5(shape))), TASK, "int4", block_size)
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


def test_a_head_that_is_in_the_file_is_not_tied_whatever_the_config_says(t5: Callable[[str], Path]) -> None:
    base = find_base(str(t5("mt5, gated, untied")))
    whole: Any = load_model(base, TASK, "fp32")
    rounded: Any = load_model(base, TASK, "int8")
    assert not torch.equal(whole.lm_head.weight, whole.shared.weight)
    torch.testing.assert_close(rounded.lm_head.dequantize().T, whole.lm_head.weight, atol=0.01, rtol=0)


def test_last_k_layers_are_those_of_each_stack(t5: Callable[[str], Path]) -> None:
    base = find_base(str(t5("t5, relu, tied")))
    settings: dict[str, Any] = {"model": "-", "data": "-", "out": "-"}

    def adapted(layers: str) -> set[str]:
        model = add_lora(load_model(base, TASK), base.family, TASK, TuneConfig(**settings, layers=layers))
        return {name.split(".lora_A")[0] for name, _ in model.named_parameters() if "lora_A" in name}

    assert {name.split(".")[2] + name.split(".")[4] for name in adapted("last:1")} == {"encoder1", "decoder1"}
    assert len(adapted("all")) == 2 * 6 + 2 * 10
    with pytest.raises(UsageError, match="2 layers in its smaller stack"):
        adapted("last:3")


def test_a_fused_step_gives_the_loss_and_the_gradient_of_a_plain_one(t5: Callable[[str], Path]) -> None:
    base = find_base(str(t5("mt5, gated, untied")))
    tokenizer, rendering = tokenizer_and_rendering(base.path)
    rows = [Row(1, {"prompt": "hello", "completion": "seven"}), Row(2, {"prompt": "hello world", "completion": "the"})]
    batch = collate(encode_rows(rendering, tokenizer, rows), tokenizer.pad_id, TASK)
    config = TuneConfig(model="-", data="-", out="-")  # type: ignore[arg-type]
    found = []
    memories: tuple[tuple[bool, Memory], ...] = ((False, "normal"), (True, "normal"), (True, "high"), (True, "low"))
    for fused, memory in memories:
        model = add_lora(load_model(base, TASK, "int4"), base.family, TASK, config)
        with torch.no_grad():
            for name, parameter in sorted(model.named_parameters()):
                if "lora_B" in name:
                    torch.manual_seed(len(name))
                    parameter.normal_(std=0.1)
        compute = Compute(model, base.family, torch.float32, memory)
        model.train()
        compute.active = fused
        from edge_ft.models.scorer import HIDDEN

        hidden, _ = HIDDEN[TASK](model, batch, torch.device("cpu"))
        hidden.square().sum().backward()
        found.append((hidden.detach(), [p.grad for p in model.parameters() if p.requires_grad]))
    for hidden, gradients in found[1:]:
        torch.testing.assert_close(hidden, found[0][0], atol=1e-5, rtol=1e-4)
        for gradient, plain in zip(gradients, found[0][1], strict=True):
            torch.testing.assert_close(gradient, plain, atol=1e-4, rtol=1e-3)


def test_a_run_has_learned_and_its_adapter_loads_with_plain_peft(tuned: RunFolder) -> None:
    report = tuned.report()
    assert report["task"] == TASK
    assert report["nll"]["best"] < 0.5 * report["nll"]["base"]
    record(tuned.base()["model_type"], tune=f"{report['nll']['base']:.2f} → {report['nll']['best']:.2f}")
    assert {"exact_match", "token_f1"} <= set(report["answers"]["metrics"])
    base = AutoModelForSeq2SeqLM.from_pretrained(tuned.base()["path"])
    model = PeftModel.from_pretrained(base, str(tuned.adapter))
    assert model.peft_config["default"].task_type == "SEQ_2_SEQ_LM"
    assert any(float(p.abs().max()) > 0 for name, p in model.named_parameters() if "lora_B" in name)


def test_rows_are_shown_as_they_are_read(t5: Callable[[str], Path], tmp_path: Path) -> None:
    base = find_base(str(t5("t5, relu, tied")))
    data = write_sums(tmp_path / "sums.jsonl")
    config = TuneConfig(model=str(base.path), data=str(data), out=tmp_path / "run", show=1)
    (text,) = prepare(config, base, TextTokenizer.load(base.path), Silent()).shown
    assert "</s> → ⟦" in text
    assert text.endswith("</s>⟧")


# What ships


@pytest.mark.parametrize("weights", ["int4", "int8", "fp16", "fp32"])
def test_every_form_of_weights_ships_merged(weights: Any, tuned: RunFolder, tmp_path: Path) -> None:
    if tuned.base()["model_type"] == "mt5" and weights in ("int8", "fp16"):
        pytest.skip("one shape shows it")
    bundle = export(str(tuned.path), ExportConfig(out=tmp_path / "bundle", weights=weights, **LOOSE))
    found = bundle.manifest["verification"]
    assert found["by_accuracy_level"]["1"]["shipped_minus_last_evaluated"] < 1e-3
    assert found["nll"]["shipped"] < found["nll"]["base"]
    if weights == "int4":
        exact = found["by_accuracy_level"]["1"]["shipped_minus_last_evaluated"]
        record(tuned.base()["model_type"], shipped=f"{exact:.0e}")
    assert len(list((bundle.path / "onnx").glob("*.onnx_data"))) == 1
    graphs = {bundle.encoder_graph(int(level)).name for level in bundle.manifest["graphs"]}
    assert {file.name for file in (bundle.path / "onnx").glob("*.onnx")} == {
        name.replace("encoder", part) for name in graphs for part in ("encoder", "decoder", "decoder_with_past")
    }


def test_a_model_without_a_run_ships_too(t5: Callable[[str], Path], tmp_path: Path) -> None:
    bundle = export(str(t5("t5, relu, tied")), ExportConfig(out=tmp_path / "bundle"))
    assert (bundle.task, bundle.manifest["lane"]) == (TASK, "base")


def test_the_adapter_lane_is_exact_and_its_base_can_be_asked(adapter_bundle: Bundle, held_out: list[list[int]]) -> None:
    found = adapter_bundle.manifest["verification"]
    assert abs(found["quantization_tax"]) < 1e-3
    assert found["adapter_changes_logits"] is True
    tuned, base = load(adapter_bundle), load(adapter_bundle, adapter="none")
    assert isinstance(tuned, Seq2SeqGenerator)
    assert isinstance(base, Seq2SeqGenerator)
    assert [tuned.answer(ids, 8) for ids in held_out] != [base.answer(ids, 8) for ids in held_out]


def test_the_graph_of_the_first_tokens_needs_the_encoders_hidden_states_alone(adapter_bundle: Bundle) -> None:
    """Its logits, keys and values are those of the two graphs that our runtime uses."""

    def ran(part: str, **feed: Any) -> dict[str, Any]:
        file = adapter_bundle.path / "onnx" / f"{part}_model_q4.onnx"
        session = ort.InferenceSession(file, providers=["CPUExecutionProvider"])
        assert {node.name for node in session.get_inputs()} == feed.keys()
        return dict(zip([node.name for node in session.get_outputs()], session.run(None, feed), strict=True))

    source, mask = np.random.default_rng(0).integers(2, 60, (2, 9)), np.ones((2, 9), np.int64)
    mask[1, 5:] = 0
    tokens = np.array([[0, 5, 6], [0, 8, 4]])
    read = ran("encoder", input_ids=source, attention_mask=mask)
    first = ran(
        "decoder", input_ids=tokens, encoder_hidden_states=read.pop("last_hidden_state"), encoder_attention_mask=mask
    )
    sizes = adapter_bundle.manifest["cache"]
    empty = np.zeros((2, sizes["kv_heads"], 0, sizes["head_dim"]), np.float32)
    past = {name.replace("present", "past_key_values"): value for name, value in read.items()}
    past |= {name.replace("encoder", "decoder"): empty for name in past}
    second = ran("decoder_with_past", input_ids=tokens, encoder_attention_mask=mask, **past)
    assert first.keys() == {*second, *read}
    for name, value in first.items():
        np.testing.assert_allclose(value, (second | read)[name], atol=1e-6, err_msg=name)


def test_the_model_is_as_it_was_after_the_trace(t5: Callable[[str], Path]) -> None:
    model: Any = load_model(find_base(str(t5("t5, relu, tied"))), TASK)
    kind = type(model.encoder.block[0].layer[0].SelfAttention)
    bias, attention = kind.compute_bias, model.config._attn_implementation
    trace_seq2seq(model)
    assert kind.compute_bias is bias
    assert model.config._attn_implementation == attention == model.decoder.config._attn_implementation


# What it answers


def torch_model(run: RunFolder) -> Any:
    return open_run_model(run)[0].get_base_model()


def test_greedy_answers_are_those_of_torchs_generate(
    tuned: RunFolder, generator: Seq2SeqGenerator, held_out: list[list[int]]
) -> None:
    model = torch_model(tuned)
    scorer = TorchScorer(model, TASK, generator.stop_ids)
    longest = max(map(len, held_out))
    ids = torch.tensor([[*source, *[0] * (longest - len(source))] for source in held_out])
    together = model.generate(input_ids=ids, attention_mask=(ids != 0).long(), max_new_tokens=20, do_sample=False)
    right = 0
    for source, padded in zip(held_out, together.tolist(), strict=True):
        alone = model.generate(input_ids=torch.tensor([source]), max_new_tokens=20, do_sample=False)[0].tolist()
        answer = generator.answer(source, 20)
        assert answer == [token for token in alone[1:] if token not in (0, 1)]
        assert answer == [token for token in padded[1:] if token not in (0, 1)]
        assert answer == scorer.answer(source, 20)
        right += len(answer)
    record(tuned.base()["model_type"], adapter=f"{right} of {right}")


@pytest.mark.parametrize(("beams", "length_penalty"), [(4, 1.0), (2, 0.0), (3, 2.5)])
def test_beams_are_those_of_torchs_generate(
    beams: int, length_penalty: float, tuned: RunFolder, generator: Seq2SeqGenerator, held_out: list[list[int]]
) -> None:
    model = torch_model(tuned)
    config = RunConfig(num_beams=beams, length_penalty=length_penalty, max_new_tokens=12)
    for source in held_out[:2]:
        found = model.generate(
            input_ids=torch.tensor([source]), num_beams=beams, length_penalty=length_penalty, max_new_tokens=12
        )[0].tolist()
        answer = generator.generate(generator.tokenizer.decode(source), config)
        assert answer.text == generator.tokenizer.decode(found)
        assert answer.new_tokens == len(found) - 1
    record(tuned.base()["model_type"], beams="same answers")


def test_scores_are_those_of_torch_padded_or_not(tuned: RunFolder, generator: Seq2SeqGenerator) -> None:
    rows = read_rows(str(tuned.split("test")))
    examples = encode_rows(generator.rendering, generator.tokenizer, rows)
    scorer = TorchScorer(torch_model(tuned), TASK)
    batch = collate(examples, 0, TASK)
    nll, predicted = generator.token_nll(batch)
    expected, likeliest = scorer.token_nll(batch)
    np.testing.assert_allclose(nll, expected, atol=1e-4)
    np.testing.assert_array_equal(predicted, likeliest)
    worst = 0.0
    for row, example in enumerate(examples):
        alone, _ = generator.token_nll(collate([example], 0, TASK))
        np.testing.assert_allclose(nll[row, : alone.shape[1]], alone[0], atol=1e-4)
        worst = max(worst, float(np.abs(nll[row, : alone.shape[1]] - alone[0]).max()))
    record(tuned.base()["model_type"], padded=f"{worst:.0e}")


def test_a_stream_gives_what_generate_does_and_the_seed_decides_a_sample(generator: Seq2SeqGenerator) -> None:
    config = RunConfig(temperature=1.5, max_new_tokens=12)
    pieces = "".join(generator.stream("hello 3 the answer", config))
    assert pieces == generator.generate("hello 3 the answer", config).text
    others = {
        generator.generate("hello 3 the answer", RunConfig(temperature=1.5, max_new_tokens=12, seed=seed)).text
        for seed in range(5)
    }
    assert len(others) > 1


def test_timed_decoding_does_not_stop(generator: Seq2SeqGenerator) -> None:
    timings = generator.time_decode([5, 6, 1], 9)
    assert len(timings.decode_s) == 8
    assert 0 < timings.prefill_s <= timings.ttft_s


@pytest.mark.parametrize(
    ("prompt", "config", "message"),
    [
        ("", {}, "empty"),
        ("hello " * 2000, {}, "shorten it"),
        ("hello", {"max_new_tokens": 5000}, "the answer may have 5000"),
        ("hello", {"system": "Be brief."}, "--system and --chat-template"),
        ("hello", {"stop": ("",)}, "--stop"),
    ],
)
def test_what_cannot_be_asked_is_refused(
    prompt: str, config: dict[str, Any], message: str, generator: Seq2SeqGenerator
) -> None:
    with pytest.raises(UsageError, match=message):
        generator.generate(prompt, RunConfig(**config))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beams": 0}, "at least 1"),
        ({"num_beams": 2, "temperature": 0.5}, "leave --temperature"),
        ({"length_penalty": 2.0}, "give --num-beams above 1"),
    ],
)
def test_beams_go_with_nothing_that_would_be_ignored(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        RunConfig(**settings)


def test_a_bundle_is_evaluated_as_its_run_is(tuned: RunFolder, adapter_bundle: Bundle) -> None:
    data = str(tuned.split("test"))
    run, bundle = (evaluate(str(path), EvalConfig(data=data)) for path in (tuned.path, adapter_bundle.path))
    assert run["nll"] == pytest.approx(bundle["nll"], abs=1e-3)
    for name in ("token_accuracy", "exact_match", "token_f1"):
        assert run["metrics"][name] == bundle["metrics"][name]


# Beside others


@pytest.mark.parametrize("peer", ["torch", "ctranslate2"])
def test_the_bench_measures_it_beside_its_peers(
    peer: str, adapter_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "mt5" in adapter_bundle.manifest["family"]:
        pytest.skip("one shape shows it")
    pytest.importorskip(peer)
    monkeypatch.setenv("EDGE_FT_CACHE", str(tmp_path))
    settings = BenchConfig(peers=(peer,), repeats=1, threads=1, prompt_tokens=12, new_tokens=4)
    records = bench([str(adapter_bundle.path)] * 2, settings)  # of one base: each peer is measured once
    found = {(one["subject"], one["variant"]): {} for one in records}
    for one in records:
        found[one["subject"], one["variant"]][one["metric"]] = one["value"]
    # CTranslate2 is measured twice, in float32 and in int8.
    assert [subject for subject, _ in found] == ["edge-ft", "edge-ft", *[peer] * {"torch": 1, "ctranslate2": 2}[peer]]
    for figures in found.values():
        assert figures["decode_tps"] > 0
        assert 0 < figures["ttft_s"] < figures["cold_start_s"]
        assert figures["size_bytes"] > 0


def test_ctranslate2_is_no_peer_of_a_decoder(tmp_path: Path) -> None:
    decoder = write_decoder(tmp_path / "decoder")
    with pytest.raises(UsageError, match="--peers ctranslate2 is for text2text-generation"):
        bench([str(decoder)], BenchConfig(peers=("ctranslate2",)))


def pretrained_nll(folder: Path, monkeypatch: pytest.MonkeyPatch, **recipe: Any) -> float:
    """Held-out loss after three steps over a few sentences."""
    rows = [{"transcript": f"hello world {n}", "written": f"Hello world {n}."} for n in range(40)]
    monkeypatch.setattr(pretrain_t5, "split_sentences", lambda: (rows[8:], rows[:8]))
    small = pretrain_t5.T5Recipe(width=32, layers=1, heads=2, inner=32, vocabulary=60, batch=4, steps=3)
    folder.mkdir()
    pretrain_t5.pretrain_t5(folder, replace(small, **recipe), Silent())
    found: float = json.loads((folder / "pretraining.json").read_text())["held_out_nll"]
    return found


def test_a_small_t5_is_pretrained_from_sentences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "t5"
    assert pretrained_nll(folder, monkeypatch) > 0
    assert find_base(str(folder)).task == TASK
    tokenizer = TextTokenizer.load(folder)
    assert (tokenizer.pad_id, tokenizer.eos_id) == (0, 1)
    assert tokenizer.decode(tokenizer.encode("hello world")) == "hello world"


def test_jumbled_words_are_other_rows_than_sentences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sentences, jumbled = (pretrained_nll(tmp_path / str(share), monkeypatch, jumbled=share) for share in (0.0, 1.0))
    assert sentences != jumbled
