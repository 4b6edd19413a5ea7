"""Adapters that PEFT, TRL, unsloth and others saved are applied exactly once, in every weight format."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from checkpoints_table import dequantized, record_checkpoint
from foreign_adapters import merged_by_peft, plain_logits, save_foreign, with_peft
from once import once
from tiny_models import write_bert, write_decoder, write_llama, write_t5

from edge_ft.config import ExportConfig
from edge_ft.data import Batch
from edge_ft.export import export
from edge_ft.export.opening import open_export_source
from edge_ft.models.scorer import TorchScorer
from edge_ft.progress import Silent
from edge_ft.runtime import load

BASES: dict[str, Callable[[Path], Path]] = {
    "llama, tied": write_llama,
    "llama, untied": lambda folder: write_llama(folder, tie=False),
    "llama, biased": lambda folder: write_llama(folder, attention_bias=True),
    "gpt2": lambda folder: write_decoder(folder, "gpt2"),
    "bert": write_bert,
    "t5": write_t5,
    "mt5": lambda folder: write_t5(folder, model_type="mt5", untied=True),
}
TASKS = {"bert": "SEQ_CLS", "t5": "SEQ_2_SEQ_LM", "mt5": "SEQ_2_SEQ_LM"}


class Case(NamedTuple):
    base: str
    settings: dict[str, Any]
    vocabulary: int = 0
    """Tokens added."""
    lanes: tuple[str, ...] = ("merged", "adapter")


ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
MERGED = ("merged",)
CASES: dict[str, Case] = {
    "bfloat16 weights": Case("llama, tied", {"dtype": torch.bfloat16}),
    "float16 weights": Case("llama, untied", {"dtype": torch.float16}),
    "rsLoRA, rank and alpha patterns": Case(
        "llama, tied", {"use_rslora": True, "rank_pattern": {"down_proj": 2}, "alpha_pattern": {"layers.1.*q_proj": 32}}
    ),
    "DoRA": Case("llama, untied", {"use_dora": True}, lanes=MERGED),
    "DoRA, GPT-2": Case(
        "gpt2", {"use_dora": True, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}, lanes=MERGED
    ),
    "GPT-2's Conv1D": Case("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "GPT-2, a whole Conv1D": Case(
        "gpt2", {"target_modules": ["c_attn"], "modules_to_save": ["attn.c_proj"], "fan_in_fan_out": True}, lanes=MERGED
    ),
    "LoRA on lm_head, tied": Case("llama, tied", {"target_modules": ["q_proj", "lm_head"]}),
    "LoRA on lm_head, untied": Case("llama, untied", {"target_modules": ["q_proj", "lm_head"]}),
    "LoRA on lm_head, its weight not beside": Case(
        "llama, untied", {"target_modules": ["q_proj", "lm_head"], "save": {"save_embedding_layers": False}}
    ),
    "LoRA on embed_tokens, tied": Case("llama, tied", {"target_modules": ["q_proj", "embed_tokens"]}, lanes=MERGED),
    "LoRA on embed_tokens, untied": Case("llama, untied", {"target_modules": ["q_proj", "embed_tokens"]}, lanes=MERGED),
    "LoRA on embed_tokens and lm_head, tied": Case(
        "llama, tied", {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}, lanes=MERGED
    ),
    "LoRA on embed_tokens, kept tied": Case(
        "llama, tied", {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}, lanes=MERGED
    ),
    "modules_to_save, untied": Case("llama, untied", {"modules_to_save": ["embed_tokens", "lm_head"]}, lanes=MERGED),
    "modules_to_save, tied": Case("llama, tied", {"modules_to_save": ["embed_tokens"]}, lanes=MERGED),
    "modules_to_save, both of a tied model": Case(
        "llama, tied", {"modules_to_save": ["embed_tokens", "lm_head"]}, lanes=MERGED
    ),
    "modules_to_save, kept tied": Case(
        "llama, tied", {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, lanes=MERGED
    ),
    "modules_to_save, a norm": Case("llama, tied", {"modules_to_save": ["input_layernorm", "norm"]}, lanes=MERGED),
    "resized vocabulary, tied": Case("llama, tied", {}, 3, MERGED),
    "resized vocabulary, untied": Case("llama, untied", {}, 3, MERGED),
    "resized vocabulary, embeddings trained": Case(
        "llama, untied", {"modules_to_save": ["embed_tokens", "lm_head"]}, 3, MERGED
    ),
    "resized vocabulary, LoRA on lm_head and embed_tokens": Case(
        "llama, untied", {"target_modules": ["q_proj", "lm_head", "embed_tokens"]}, 3, MERGED
    ),
    "trained tokens, tied": Case("llama, tied", {"trainable_token_indices": [3, 9]}, lanes=MERGED),
    "trained tokens, untied": Case(
        "llama, untied", {"trainable_token_indices": {"embed_tokens": [3, 9]}}, lanes=MERGED
    ),
    "trained tokens of the head, untied": Case(
        "llama, untied", {"trainable_token_indices": {"lm_head": [3, 9]}}, lanes=MERGED
    ),
    "resized vocabulary, trained tokens": Case(
        "llama, tied", {"trainable_token_indices": [3, 285, 286, 287]}, 3, MERGED
    ),
    "resized vocabulary, only the tokens saved": Case(
        "llama, tied",
        {"trainable_token_indices": [285, 286, 287], "save": {"save_embedding_layers": False}},
        3,
        MERGED,
    ),
    "layers_to_transform": Case("llama, tied", {"layers_to_transform": [1], "layers_pattern": "layers"}),
    "target_modules as a regex": Case("llama, tied", {"target_modules": r".*layers\.0\..*(q|v)_proj"}),
    "target_modules all-linear": Case("llama, untied", {"target_modules": "all-linear"}),
    "exclude_modules": Case("llama, tied", {"target_modules": ALL, "exclude_modules": r".*layers\.0.*|.*o_proj"}),
    "bias all": Case("llama, biased", {"bias": "all"}, lanes=MERGED),
    "bias lora_only": Case("llama, biased", {"bias": "lora_only"}, lanes=MERGED),
    "lora_bias": Case("llama, biased", {"target_modules": ["q_proj"], "lora_bias": True}, lanes=MERGED),
    "target_parameters": Case(
        "llama, tied", {"target_modules": [], "target_parameters": ["q_proj.weight"]}, lanes=MERGED
    ),
    "a classifier's head": Case("bert", {"target_modules": ["query", "value"]}),
    "a classifier, all-linear": Case("bert", {"target_modules": "all-linear"}),
    "a classifier, bias all": Case("bert", {"target_modules": ["query"], "bias": "all"}, lanes=MERGED),
    "T5": Case("t5", {"target_modules": ["q", "v", "wo"]}),
    "mT5, LoRA on its head": Case("mt5", {"target_modules": ["q", "lm_head"]}),
    "T5, modules_to_save": Case("t5", {"target_modules": ["q", "v"], "modules_to_save": ["lm_head"]}, lanes=MERGED),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("bases")
    return lambda name: once(root / name.replace(", ", "-"), BASES[name])


def ours(base: Path, folder: Path, lane: Any, weights: Any) -> Any:
    source = open_export_source(
        str(base), ExportConfig(out=folder / "none", adapter=folder, lane=lane, weights=weights)
    )
    return source.load_shipped(Silent())


@pytest.mark.filterwarnings("ignore")  # PEFT's own, about tied weights and embeddings that it saves
@pytest.mark.parametrize("name", CASES)
def test_a_foreign_adapter_computes_what_peft_computes(name: str, bases: Callable[[str], Path], tmp_path: Path) -> None:
    case, base = CASES[name], bases(CASES[name].base)
    task = TASKS.get(case.base, "CAUSAL_LM")
    size = None
    if case.vocabulary:
        from transformers import AutoConfig

        size = AutoConfig.from_pretrained(base).vocab_size + case.vocabulary
    folder = save_foreign(base, tmp_path / "adapter", task, vocabulary=size, **case.settings)
    seq2seq = task == "SEQ_2_SEQ_LM"
    expected = plain_logits(with_peft(base, folder, task, size), seq2seq)
    cells: dict[str, float] = {}
    for lane in case.lanes:
        found = plain_logits(ours(base, folder, lane, "fp32"), seq2seq)
        assert found.shape == expected.shape
        error = float((found - expected).abs().max())
        assert error < 1e-4 * float(expected.abs().max()), lane
        cells["fp32"] = max(cells.get("fp32", 0.0), error)
    merged = merged_by_peft(base, folder, task, size)
    for weights, bits in (("int4", 4), ("int8", 8)):
        model = ours(base, folder, "merged", weights)
        reference = plain_logits(dequantized(merged, model, bits), seq2seq)  # type: ignore[arg-type]
        cells[weights] = float((plain_logits(model, seq2seq) - reference).abs().max())
        assert cells[weights] < 1e-4 * float(reference.abs().max())
    record_checkpoint("adapters", name, **cells)


HEADS = [
    "trained tokens, tied",
    "trained tokens of the head, untied",
    "LoRA on lm_head, tied",
    "modules_to_save, untied",
]
SCORED = {name: CASES[name] for name in HEADS} | {
    "T5, trained tokens": Case("t5", {"target_modules": ["q", "v"], "trainable_token_indices": [3, 9]})
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SCORED)
def test_the_model_as_trained_scores_rows(name: str, bases: Callable[[str], Path], tmp_path: Path) -> None:
    """Whatever PEFT has made of its head."""
    case, base = SCORED[name], bases(SCORED[name].base)
    task = TASKS.get(case.base, "CAUSAL_LM")
    folder = save_foreign(base, tmp_path / "adapter", task, **case.settings)
    source = open_export_source(str(base), ExportConfig(out=tmp_path / "none", adapter=folder))
    ids = np.array([[3, 5, 7, 9, 11, 4, 6, 8]])
    nll, _ = TorchScorer(source.load_trained(), source.task).token_nll(
        Batch(input_ids=ids, attention_mask=np.ones_like(ids), labels=ids, rows=[0])
    )
    with torch.inference_mode():
        loss = with_peft(base, folder, task)(input_ids=torch.from_numpy(ids), labels=torch.from_numpy(ids)).loss
    targets = ids.size if task == "SEQ_2_SEQ_LM" else ids.size - 1
    assert nll.sum() / targets == pytest.approx(float(loss), rel=1e-4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "weights"), [("llama, tied", "int4"), ("llama, untied", "fp32"), ("t5", "int4")])
def test_an_adapter_on_the_head_stays_beside_the_graph_of_a_bundle(
    name: str, weights: Any, bases: Callable[[str], Path], tmp_path: Path
) -> None:
    base, task = bases(name), TASKS.get(name, "CAUSAL_LM")
    layers = ["q", "lm_head"] if task == "SEQ_2_SEQ_LM" else ["q_proj", "lm_head"]
    folder = save_foreign(base, tmp_path / "adapter", task, target_modules=layers)
    config = ExportConfig(out=tmp_path / "bundle", adapter=folder, lane="adapter", weights=weights)
    graph = load(export(str(base), config), accuracy_level=1)
    ids = np.array([[3, 5, 7, 9, 11, 4, 6, 8]])
    batch = Batch(input_ids=ids, attention_mask=np.ones_like(ids), labels=ids[:, ::-1].copy(), rows=[0])
    whole = with_peft(base, folder, task) if weights == "fp32" else ours(base, folder, "adapter", weights)
    expected = TorchScorer(whole, graph.bundle.task).token_nll(batch)[0]
    np.testing.assert_allclose(graph.token_nll(batch)[0], expected, atol=1e-4)
