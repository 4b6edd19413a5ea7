"""fp32 bundles open in optimum's ORTModel classes, which need another transformers and so another environment."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from edge_ft.artifacts import RunFolder
from edge_ft.config import ExportConfig
from edge_ft.export import export
from edge_ft.runtime import TextClassifier, load

TEXTS = ["A patient has chest pain.", "Which nerve runs through the wrist, and which muscles does it supply?"]

CLASSIFY = """
import json, sys
from optimum.onnxruntime import ORTModelForSequenceClassification
from transformers import AutoConfig, AutoTokenizer

bundle, texts = sys.argv[1], json.loads(sys.argv[2])
model = ORTModelForSequenceClassification.from_pretrained(
    bundle, subfolder="onnx", file_name="model.onnx", config=AutoConfig.from_pretrained(bundle)
)
inputs = AutoTokenizer.from_pretrained(bundle)(texts, padding=True, return_tensors="pt")
print(json.dumps(model(**inputs).logits.softmax(-1).tolist()))
"""


@pytest.fixture(scope="module")
def optimum(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of a fresh environment with optimum-onnx."""
    folder = tmp_path_factory.mktemp("optimum")
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    wanted = ["optimum-onnx", "onnxruntime", f"torch=={torch.__version__.partition('+')[0]}"]
    subprocess.run([folder / "bin" / "pip", "install", "--quiet", *wanted], check=True)
    return folder / "bin" / "python"


@pytest.mark.long
def test_optimum_classifies_with_the_fp32_graph(optimum: Path, minilm_run: RunFolder, tmp_path: Path) -> None:
    bundle = export(str(minilm_run.path), ExportConfig(out=tmp_path / "bundle", weights="fp32", max_tax=0.05))
    command = [optimum, "-c", CLASSIFY, bundle.path, json.dumps(TEXTS)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    classifier = load(bundle)
    assert isinstance(classifier, TextClassifier)
    ours = [list(found.scores.values()) for found in classifier.classify(TEXTS)]
    np.testing.assert_allclose(json.loads(done.stdout), ours, atol=1e-4)
