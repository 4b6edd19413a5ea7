"""Records as `edge_ft.bench.bench` returns them, of nothing that was measured."""

from typing import Any

from edge_ft.bench.report import records_of, units_of
from edge_ft.bench.subjects import Subject

ENVIRONMENT: dict[str, Any] = {
    "cpu": "A processor",
    "cores": 2,
    "memory_bytes": 8 * 10**9,
    "os": "Linux",
    "threads": 2,
    "prompt_tokens": 64,
    "new_tokens": 16,
    "memory_limit_bytes": None,
    "memory_limiter": None,
    "depths": [],
    "edge-ft": "0.1.0",
}
SECRET = "what the user wrote"
"""A row of the user's."""


def _results(task: str, cost: float) -> list[dict[str, Any]]:
    results = []
    for repeat in (1.0, 1.1, 1.3):
        result: dict[str, Any] = dict.fromkeys(units_of(task, 64), cost * repeat)
        result |= {"decode_tps": 40 / cost * repeat, "peak_rss_bytes": 2e8 * cost}
        name = "itl_s_p50" if task == "text-generation" else "latency_s_64"
        result["times"] = {name: [0.03 * cost * repeat * (1 + at % 7 / 20) for at in range(20)]}
        results.append(result)
    return results


def subject_records(task: str, engine: str, variant: str, cost: float, nll: float | None) -> list[dict[str, Any]]:
    """Records of a subject that needs `cost` times as much of everything as another one."""
    subject = Subject(engine, variant, task, 512, int(9e7 * cost), {}, variant)
    records = records_of(subject, _results(task, cost), ENVIRONMENT, None)
    if nll is not None:
        score = {"metric": "nll", "unit": "nats/token", "value": nll, "samples": [nll], "interval": [nll - 1, nll + 1]}
        records.append({"subject": engine, "variant": variant, **score, "environment": ENVIRONMENT})
    return records


def decoders(nll: bool = True, answers: bool = True) -> list[dict[str, Any]]:
    """Four engines over a decoder, of which two were scored and asked."""
    named = {"edge-ft": (1.0, 1.6), "torch": (5.0, 1.58), "llama.cpp": (1.1, None), "openvino": (1.02, None)}
    records = []
    for engine, (cost, loss) in named.items():
        records += subject_records("text-generation", engine, "SmolLM2-135M-int4", cost, loss if nll else None)
        if answers and loss is not None:
            asked = [{"prompt": "What <b>is</b> it?", "reference": SECRET, "answer": f"{engine} & a long answer " * 20}]
            answer: dict[str, Any] = {"metric": "answers", "unit": "", "value": 1, "samples": [1], "answers": asked}
            records.append({"subject": engine, "variant": "SmolLM2-135M-int4", **answer, "environment": ENVIRONMENT})
    return records


def classifiers() -> list[dict[str, Any]]:
    """Two classifiers that were not scored."""
    return [
        *subject_records("text-classification", "edge-ft", "minilm-int8", 0.5, None),
        *subject_records("text-classification", "edge-ft", "minilm-int4", 0.6, None),
    ]
