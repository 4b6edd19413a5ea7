"""What a run and an export say of themselves, with all that their pages show."""

from typing import Any

__all__ = ["LOG", "PLAN", "SECRET_ROW", "manifest", "report"]

SECRET_ROW = "my account is <b>4711</b>"
LOG = [
    {"step": 0, "validation_nll": 3.0, "rows": 9, "seconds": 0.1},
    *({"step": n, "loss": 3.0 - n / 10, "learning_rate": 1e-3 / n, "tokens": 90, "seconds": 0.1} for n in range(1, 11)),
    {"step": 10, "validation_nll": 2.1, "rows": 9, "seconds": 0.1},
]
PLAN = {
    "tokens": {"p50": 20, "p95": 40, "max": 60, "total": 900},
    "max_length": 64,
    "recommended": {"stages": {"load": 1.5, "train": 9.0}, "peak_rss_bytes": 8e8},
}


def _metric(value: float) -> dict[str, float]:
    return {"value": value, "low": value - 0.1, "high": value + 0.1}


def report(**more: Any) -> dict[str, Any]:
    """The content of a report.json."""
    sample = {"split": "test", "row": 1, "prompt": SECRET_ROW, "reference": "thanks", "base": "no", "tuned": "thanks"}
    finding = {"code": "cut-rows", "severity": "warning", "rows": [3, 4], "message": "2 rows were cut after 64 tokens"}
    known = {
        "model": "models/tiny",
        "task": "text-generation",
        "rows": {"train": 90, "validation": 9, "test": 9},
        "findings": [finding],
        "nll": {"base": 3.0, "best": 2.1, "test_base": 3.1, "test": 2.2},
        "metrics": {"token_accuracy": {"test_base": _metric(0.2), "test": _metric(0.6)}},
        "answers": {
            "split": "test",
            "rows": 8,
            "max_new_tokens": 16,
            "metrics": {"chrf": {"base": _metric(0.2), "tuned": None}},
        },
        "slices": [{"split": "test", "rows": 3, "tokens": [2, 5], "nll": {"base": 3.2, "tuned": 2.4}}],
        "samples": [sample],
        "overfitting": {"train_nll": 2.0, "validation_nll": 2.1},
        "guards": {"skipped": 0},
        "best_step": 10,
        "steps": 10,
        "seconds": 12.0,
        "cpu_seconds": 21.0,
        "threads": 2,
        "timings": {"load": 2.0, "train": 10.0},
        "device": "cpu",
        "peak_rss_bytes": 9e8,
        "peak_device_bytes": None,
        "tokens_per_second": 90.0,
        "seed": 0,
        "machine": "Linux",
        "versions": {"edge-ft": "0.1.0"},
        "command": "edge-ft tune --model models/tiny",
    }
    return known | more


def manifest(**more: Any) -> dict[str, Any]:
    """The content of a manifest.json; `more` is of its verification."""
    scores = {
        "rows": 9,
        "nll": {"base": 3.0, "trained": 2.1, "shipped": 2.13},
        "metrics": {"token_accuracy": {"base": _metric(0.2), "trained": _metric(0.6), "shipped": _metric(0.59)}},
    }
    level = {"nll": 2.13, "quantization_tax": 0.03, "argmax_agreement": 0.98, "shipped_minus_last_evaluated": 1e-6}
    return {
        "task": "text-generation",
        "family": "llama",
        "lane": "merged",
        "quantization": {"method": "gptq", "bits": 4, "overrides": {}},
        "files": {"onnx/model_q4.onnx_data": {"bytes": 7_000_000}, "tokenizer.json": {"bytes": 1_000_000}},
        "provenance": {"base": {"model": "models/tiny", "license": None}, "versions": {"edge-ft": "0.1.0"}},
        "verification": {
            **scores,
            "test": scores,
            "quantization_tax": 0.03,
            "retained_gain": 0.967,
            "limits": {"max_tax": 0.05, "min_retained": 0.95},
            "gain": _metric(0.9),
            "by_accuracy_level": {"1": {**level, "passed": True}},
            "refused": [],
        }
        | more,
    }
