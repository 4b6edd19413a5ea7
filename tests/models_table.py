"""What tests of models and clients record for docs/models.md and docs/bundle.md when `make models` runs them."""

import json
import os
from importlib.metadata import version
from pathlib import Path

__all__ = ["OPENVINO_EXACT", "record", "record_client", "release"]

OPENVINO_EXACT = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
"""By default OpenVINO rounds activations to int8 on processors that have instructions for it."""


def record(model: str, **columns: str) -> None:
    """Add cells to the row of a model in the folder that MODELS names; does nothing without that variable."""
    if "MODELS" not in os.environ:
        return
    file = Path(os.environ["MODELS"]) / f"{model}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    row = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"model": model}
    file.write_text(json.dumps(row | columns), encoding="utf-8")


def record_client(model: str, task: str, weights: str, client: str, held: str, *, refused: str | None = None) -> None:
    """Record that the current test saw a client open a model's bundle, or refuse it; does nothing without MODELS.

    Args:
        model: A family, or a shape of it after a dash.
        weights: Format and, where it matters, lane.
        client: Name and `release` of what opens the bundle.
        held: What equals the output of our runtime.
        refused: Why this model is not opened.
    """
    if "MODELS" not in os.environ:
        return
    file = Path(os.environ["MODELS"]) / "clients.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    test = os.environ["PYTEST_CURRENT_TEST"].partition("::")[0]
    row = {"model": model, "task": task, "weights": weights, "client": client, "held": held, "test": test}
    with file.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(row | {"refused": refused}) + "\n")


def release(package: str) -> str:
    """The first two numbers of its version."""
    return ".".join(version(package).split(".")[:2])
