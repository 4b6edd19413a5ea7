"""Encoder-decoders: what they read, what is trained, and that a bundle answers as torch does."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from models_table import record
from peft import PeftModel
from tiny_bundle import write_decoder
from tiny_models import T5_SHAPES, write_sums
from transformers import AutoModelForSeq2SeqLM

from edge_ft.artifacts import Bundle, RunFolder
from edge_ft.bench import bench
from edge_ft.config import BenchConfig, EvalConfig, ExportConfig, RunConfig, TuneConfig
from edge_ft.data import collate, encode_rows, read_rows
from edge_ft.errors import UsageError
from edge_ft.evaluate import evaluate
from edge_ft.evaluate.loading import open_run_model
from edge_ft.export import export
from edge_ft.export.trace_seq2seq import trace_seq2seq
from edge_ft.models.base_model import find_base
from edge_ft.models.loading import ModelSpec, load_model
from edge_ft.models.scorer import TorchScorer
from edge_ft.runtime import Seq2SeqGenerator, load
from edge_ft.tune import tune

TASK = "text2text-generation"

LOOSE: dict[str, Any] = {"max_tax": 1.0, "min_retained": 0.0, "max_metric_drop": 1.0}


@pytest.fixture(scope="module", params=T5_SHAPES)
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
    opened = load(adapter_bundle, threads=1, engine="exact")
    assert isinstance(opened, Seq2SeqGenerator)
    return opened


@pytest.fixture(scope="module")
def held_out(tuned: RunFolder, generator: Seq2SeqGenerator) -> list[list[int]]:
    """Sources that were not trained on, of different lengths."""
    rows = read_rows(str(tuned.split("test")))
    sources = [example.input_ids for example in encode_rows(generator.rendering, generator.tokenizer, rows)]
    long = generator.tokenizer.encode_framed("the answer is seven hello world " * 6, 256).ids
    return [*sources, long]


def test_a_run_learns_and_its_adapter_loads_with_plain_peft(tuned: RunFolder) -> None:
    report = tuned.report()
    assert report["task"] == TASK
    assert report["nll"]["best"] < 0.5 * report["nll"]["base"]
    record(tuned.base()["model_type"], tune=f"{report['nll']['base']:.2f} → {report['nll']['best']:.2f}")
    assert {"exact_match", "token_f1"} <= set(report["answers"]["metrics"])
    base = AutoModelForSeq2SeqLM.from_pretrained(tuned.base()["path"])
    model = PeftModel.from_pretrained(base, str(tuned.adapter))
    assert model.peft_config["default"].task_type == "SEQ_2_SEQ_LM"
    assert any(float(p.abs().max()) > 0 for name, p in model.named_parameters() if "lora_B" in name)


@pytest.mark.parametrize("weights", ["int4", "int8", "fp16", "fp32"])
def test_the_merged_lane_ships_in_every_format(weights: Any, tuned: RunFolder, tmp_path: Path) -> None:
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


def test_a_model_without_a_run_can_be_exported(t5: Callable[[str], Path], tmp_path: Path) -> None:
    bundle = export(str(t5("t5, relu, tied")), ExportConfig(out=tmp_path / "bundle"))
    assert (bundle.task, bundle.manifest["lane"]) == (TASK, "base")


def test_the_adapter_lane_is_exact_and_can_run_its_base(adapter_bundle: Bundle, held_out: list[list[int]]) -> None:
    found = adapter_bundle.manifest["verification"]
    assert abs(found["quantization_tax"]) < 1e-3
    assert found["adapter_changes_logits"] is True
    tuned, base = load(adapter_bundle, engine="exact"), load(adapter_bundle, adapter="none", engine="exact")
    assert isinstance(tuned, Seq2SeqGenerator)
    assert isinstance(base, Seq2SeqGenerator)
    assert [tuned.answer(ids, 8) for ids in held_out] != [base.answer(ids, 8) for ids in held_out]


def test_the_graph_of_the_first_tokens_needs_only_the_encoders_hidden_states(adapter_bundle: Bundle) -> None:
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


def test_tracing_does_not_change_the_model(t5: Callable[[str], Path]) -> None:
    model: Any = load_model(ModelSpec(find_base(str(t5("t5, relu, tied"))), TASK))
    kind = type(model.encoder.block[0].layer[0].SelfAttention)
    bias, attention = kind.compute_bias, model.config._attn_implementation
    trace_seq2seq(model)
    assert kind.compute_bias is bias
    assert model.config._attn_implementation == attention == model.decoder.config._attn_implementation


def torch_model(run: RunFolder) -> Any:
    return open_run_model(run)[0].get_base_model()


def test_greedy_answers_equal_transformers_generate(
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
def test_beam_search_equals_transformers_generate(
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


def test_scores_equal_torch_with_and_without_padding(tuned: RunFolder, generator: Seq2SeqGenerator) -> None:
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


def test_a_stream_equals_generate_and_the_seed_decides_a_sample(generator: Seq2SeqGenerator) -> None:
    config = RunConfig(temperature=1.5, max_new_tokens=12)
    pieces = "".join(generator.stream("hello 3 the answer", config))
    assert pieces == generator.generate("hello 3 the answer", config).text
    others = {
        generator.generate("hello 3 the answer", RunConfig(temperature=1.5, max_new_tokens=12, seed=seed)).text
        for seed in range(5)
    }
    assert len(others) > 1


def test_time_decode_ignores_stop_tokens(generator: Seq2SeqGenerator) -> None:
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
def test_options_that_do_not_fit_are_refused(
    prompt: str, config: dict[str, Any], message: str, generator: Seq2SeqGenerator
) -> None:
    with pytest.raises(UsageError, match=message):
        generator.generate(prompt, RunConfig(**config))


def test_a_bundle_and_its_run_have_the_same_evaluation(tuned: RunFolder, adapter_bundle: Bundle) -> None:
    data = str(tuned.split("test"))
    run, bundle = (evaluate(str(path), EvalConfig(data=data)) for path in (tuned.path, adapter_bundle.path))
    assert run["nll"] == pytest.approx(bundle["nll"], abs=1e-3)
    for name in ("token_accuracy", "exact_match", "token_f1"):
        assert run["metrics"][name] == bundle["metrics"][name]


@pytest.mark.parametrize("peer", ["torch", "ctranslate2"])
def test_the_bench_measures_an_encoder_decoder_and_its_peers(
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


def test_ctranslate2_is_refused_for_a_decoder(tmp_path: Path) -> None:
    decoder = write_decoder(tmp_path / "decoder")
    with pytest.raises(UsageError, match="--peers ctranslate2 is for text2text-generation"):
        bench([str(decoder)], BenchConfig(peers=("ctranslate2",)))
