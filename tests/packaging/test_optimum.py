"""optimum's ORTModel classes open fp32 bundles.

They need another version of transformers, so they run in an environment of their own.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models_table import record, record_client
from tiny_models import DECODERS, ENCODERS, padded_ids, tiny_encoder_config, write_decoder, write_encoder, write_t5
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from edge_ft.artifacts import Bundle, RunFolder
from edge_ft.config import ExportConfig, Task
from edge_ft.export import export
from edge_ft.runtime import Seq2SeqGenerator, TextClassifier, TextGenerator, load
from edge_ft.runtime.encoder import Encoder

pytestmark = pytest.mark.long

Jobs = dict[str, dict[str, Any]]

OPTIMUM = "0.1"
NOT_IN_OPTIMUM = {  # this version
    "gemma2": "assumes one key head for each query head",
    "phi3": "assumes one key head for each query head",
    "qwen3": "assumes head_dim = hidden_size / heads",
}
"""Families whose cache optimum creates with the wrong shape, whatever their config says."""
SHAPES: dict[str, dict[str, Any]] = {
    **{name: {} for name in DECODERS},
    "phi3 with one key head for each query head": {"num_key_value_heads": 4},  # as Phi-3 mini
    "qwen3 with heads of size hidden_size / heads": {"head_dim": 16},  # as Qwen3 8B
}
"""Every decoder, and the shapes in which the families above open."""
T5_SHAPES: dict[str, dict[str, Any]] = {
    "t5": {"seed": 5, "initializer_factor": 2.0},  # a tied head that does not say one token alone
    "mt5": {"model_type": "mt5", "untied": True, "seed": 2},
}

HEADS: dict[Task, tuple[Any, str]] = {
    "text-classification": (AutoModelForSequenceClassification, "ORTModelForSequenceClassification"),
    "token-classification": (AutoModelForTokenClassification, "ORTModelForTokenClassification"),
    "fill-mask": (AutoModelForMaskedLM, "ORTModelForMaskedLM"),
    "feature-extraction": (AutoModel, "ORTModelForFeatureExtraction"),
}

CLIENT = """
import json, sys
import optimum.onnxruntime
import torch
from transformers import AutoConfig, AutoTokenizer

def output(kind, bundle, files, inputs, new_tokens):
    opened = getattr(optimum.onnxruntime, kind)
    model = opened.from_pretrained(bundle, subfolder="onnx", config=AutoConfig.from_pretrained(bundle), **files)
    if "texts" in inputs:
        inputs = AutoTokenizer.from_pretrained(bundle)(inputs["texts"], padding=True, return_tensors="pt")
    else:
        inputs = {name: torch.tensor(values) for name, values in inputs.items()}
    if not new_tokens:
        return model(**inputs)[0].tolist()
    model.generation_config.eos_token_id = None
    return model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False).tolist()

def tried(job):
    try:
        return {"output": output(**job)}
    except Exception as error:
        return {"error": str(error)}

print(json.dumps({name: tried(job) for name, job in json.load(sys.stdin).items()}))
"""


@pytest.fixture(scope="module")
def optimum(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Jobs], dict[str, Any]]:
    """Run `CLIENT` in a new environment with optimum-onnx; returns an `output` or an `error` for each job."""
    folder = tmp_path_factory.mktemp("optimum")
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    wanted = [f"optimum-onnx=={OPTIMUM}.*", "onnxruntime", f"torch=={torch.__version__.partition('+')[0]}"]
    subprocess.run([folder / "bin" / "pip", "install", "--quiet", *wanted], check=True)

    def ask(jobs: Jobs) -> dict[str, Any]:
        command = [folder / "bin" / "python", "-c", CLIENT]
        done = subprocess.run(command, input=json.dumps(jobs), capture_output=True, text=True, check=True, cwd=folder)
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    return ask


def job(kind: str, bundle: Bundle, inputs: dict[str, Any], new_tokens: int = 0) -> dict[str, Any]:
    """A job of `CLIENT`: open the fp32 graph in the class `kind`; run it once, or generate `new_tokens` greedily."""
    files = {"file_name": "model.onnx"}
    return {"kind": kind, "bundle": str(bundle.path), "files": files, "inputs": inputs, "new_tokens": new_tokens}


def seen(model: str, task: Task, kind: str, held: str, refused: str | None = None) -> None:
    """Record for docs/bundle.md that a class opens a model, or why it does not."""
    record_client(model, task, "fp32", f"optimum-onnx {OPTIMUM}, `{kind}`", held, refused=refused)


# Decoders


def greedy(bundle: Bundle) -> tuple[list[int], list[int]]:
    """A prompt longer than the attention window of every tiny model, and our answer."""
    generator = load(bundle, threads=1, engine="exact")
    assert isinstance(generator, TextGenerator)
    generator.stop_ids = frozenset()
    prompt = generator.tokenizer.encode("hello world, the answer 3 is seven hello world")
    return prompt, generator.answer(prompt, 12)


@pytest.fixture(scope="module")
def decoders(
    optimum: Callable[[Jobs], dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Any, list[int]]]:
    """For each family: optimum's result, and the prompt and answer of our runtime."""
    ours, jobs = {}, {}
    for name, config in SHAPES.items():
        family = name.partition(" ")[0]
        folder = tmp_path_factory.mktemp(family)
        model = write_decoder(folder / "model", family, **config)
        bundle = export(str(model), ExportConfig(out=folder / "bundle", weights="fp32"))
        prompt, answer = greedy(bundle)
        ours[name] = [*prompt, *answer]
        inputs = {"input_ids": [prompt], "attention_mask": [[1] * len(prompt)]}
        jobs[name] = job("ORTModelForCausalLM", bundle, inputs, len(answer))
    found = optimum(jobs)
    return {name: (found[name], ours[name]) for name in SHAPES}


@pytest.mark.parametrize("name", SHAPES)
def test_a_decoder_answers_with_the_same_tokens(name: str, decoders: dict[str, tuple[Any, list[int]]]) -> None:
    found, expected = decoders[name]
    held = "the same greedy tokens"
    if name in NOT_IN_OPTIMUM:
        assert "Got invalid dimensions for input: past_key_values" in found["error"], found
        record(name, optimum=f"no: {NOT_IN_OPTIMUM[name]}")
        seen(name, "text-generation", "ORTModelForCausalLM", held, NOT_IN_OPTIMUM[name])
        return
    assert found.get("output") == [expected], found
    if name in DECODERS:
        record(name, optimum="same tokens")
    seen(name, "text-generation", "ORTModelForCausalLM", held)


# Encoder and decoder


@pytest.fixture(scope="module")
def encoder_decoders(
    optimum: Callable[[Jobs], dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Any, list[list[int]]]]:
    """For T5 and mT5: optimum's results for two sources in a padded batch, and our answer to each alone."""
    ours: dict[str, list[list[int]]] = {}
    jobs = {}
    for name, config in T5_SHAPES.items():
        folder = tmp_path_factory.mktemp(name)
        model = write_t5(folder / "model", **config)
        bundle = export(str(model), ExportConfig(out=folder / "bundle", weights="fp32"))
        generator = load(bundle, threads=1, engine="exact")
        assert isinstance(generator, Seq2SeqGenerator)
        generator.stop_ids = frozenset()
        sources = [generator.tokenizer.encode(text) for text in ("hello world, the answer is seven", "hello")]
        ours[name] = [generator.answer(source, 12) for source in sources]
        longest = max(map(len, sources))
        padded = [source + [0] * (longest - len(source)) for source in sources]
        inputs = {"input_ids": padded, "attention_mask": [[int(token > 0) for token in row] for row in padded]}
        jobs[name] = job("ORTModelForSeq2SeqLM", bundle, inputs, 12) | {"files": {}}
    found = optimum(jobs)
    return {name: (found[name], ours[name]) for name in jobs}


@pytest.mark.parametrize("name", T5_SHAPES)
def test_an_encoder_decoder_answers_with_the_same_tokens(
    name: str, encoder_decoders: dict[str, tuple[Any, list[list[int]]]]
) -> None:
    """optimum generates the first token with a graph of its own, the rest with the graph of our runtime."""
    found, expected = encoder_decoders[name]
    assert "output" in found, found
    assert [row[1:] for row in found["output"]] == expected  # before it stands what an answer begins with
    assert len({token for answer in expected for token in answer}) > 2
    record(name, optimum="same tokens")
    seen(name, "text2text-generation", "ORTModelForSeq2SeqLM", "the same greedy tokens, of sources in a padded batch")


# Encoders


@pytest.fixture(scope="module")
def encoders(
    optimum: Callable[[Jobs], dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Any, list[Any]]]:
    """For each family and task: the outputs of optimum and of our runtime for a padded batch."""
    ours, jobs = {}, {}
    for name in ENCODERS:
        for task, (head, kind) in HEADS.items():
            folder = tmp_path_factory.mktemp(name)
            model = write_encoder(folder / "model", tiny_encoder_config(name))
            classes = {"num_labels": 3} if "classification" in task else {}
            head.from_pretrained(model, **classes).save_pretrained(model)
            bundle = export(str(model), ExportConfig(out=folder / "bundle", weights="fp32", task=task))
            reader = load(bundle, threads=1, engine="exact")
            assert isinstance(reader, Encoder)
            ids, mask = padded_ids(reader.tokenizer.pad_id)
            ours[f"{name} {task}"] = reader.logits(ids, mask)
            inputs = {"input_ids": ids.tolist(), "attention_mask": mask.tolist()}
            jobs[f"{name} {task}"] = job(kind, bundle, inputs)
    found = optimum(jobs)
    return {asked: (found[asked], ours[asked]) for asked in jobs}


@pytest.mark.parametrize("task", HEADS)
@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_gives_the_same_output(name: str, task: Task, encoders: dict[str, tuple[Any, list[Any]]]) -> None:
    found, expected = encoders[f"{name} {task}"]
    assert "output" in found, found
    np.testing.assert_allclose(found["output"], expected, atol=1e-4)
    record(name, optimum="same outputs")
    held = "the same hidden states" if task == "feature-extraction" else "the same logits"
    seen(name, task, HEADS[task][1], f"{held} within 0.0001")


def test_a_tuned_encoder_of_real_weights_classifies_texts(
    optimum: Callable[[Jobs], dict[str, Any]], minilm_run: RunFolder, tmp_path: Path
) -> None:
    """There the texts are tokenized with the bundle's tokenizer files."""
    bundle = export(str(minilm_run.path), ExportConfig(out=tmp_path / "bundle", weights="fp32", max_tax=0.05))
    texts = ["A patient has chest pain.", "Which nerve runs through the wrist, and which muscles does it supply?"]
    asked = job("ORTModelForSequenceClassification", bundle, {"texts": texts})
    found = torch.tensor(optimum({"minilm": asked})["minilm"]["output"]).softmax(-1)
    classifier = load(bundle, engine="exact")
    assert isinstance(classifier, TextClassifier)
    ours = [list(one.scores.values()) for one in classifier.classify(texts)]
    np.testing.assert_allclose(found, ours, atol=1e-4)
    held = "the same probabilities within 0.0001, read with the bundle's own tokenizer files"
    seen("MiniLM", "text-classification", "ORTModelForSequenceClassification", held)
