"""What the processes of the `shipping` study do: train the usual way, export ours, and score what ships."""

import time
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, TrainerCallback

from edge_ft.artifacts import Bundle, RunFolder
from edge_ft.bench.studies.baseline import Plain, fit_trainer, usual_arguments, usual_model
from edge_ft.bench.studies.baseline_curve import held_out_nll
from edge_ft.bench.studies.usual_formats import FORMATS, round_weights
from edge_ft.config import ExportConfig, TuneConfig
from edge_ft.data import Example
from edge_ft.errors import GateRefused
from edge_ft.evaluate.scoring import Batching, Scorer, score
from edge_ft.export import export
from edge_ft.export.bundle_weights import bundle_weights
from edge_ft.models.dims import ModelDims
from edge_ft.models.logging import silence_libraries
from edge_ft.models.products import choose_library
from edge_ft.models.scorer import TorchScorer
from edge_ft.progress import Silent
from edge_ft.quant.blockwise import Codes, dequantize
from edge_ft.runtime import load
from edge_ft.tune.prepare import Job, prepare_job

__all__ = ["export_ours", "score_ours", "score_usual", "train_usual"]


def train_usual(job: dict[str, Any]) -> dict[str, Any]:
    """Train PEFT LoRA over the float base with transformers' Trainer, and save the adapter.

    Args:
        job: `tune` (model and rows), `seed`, `epochs`, `learning_rate`, `batch_size`, `passes`, `threads`, `started`
            and `out`, a folder for the adapter of the best epoch.

    Returns:
        `validation_nll` (nats per target, of what is saved), `steps`, `learning_rate` and the seconds of the process.
    """
    torch.set_num_threads(job["threads"])
    settings = {"seed": job["seed"], "epochs": job["epochs"]}
    prepared = _prepare(job, settings)
    plain = Plain(job["learning_rate"], job["batch_size"], job["passes"])
    arguments = {
        "num_train_epochs": prepared.config.epochs,
        "train_sampling_strategy": "group_by_length",
        "dataloader_pin_memory": False,
        **usual_arguments(plain),
    }
    with silence_libraries():
        model = usual_model(prepared)
        trainer = fit_trainer(model, prepared, TrainerCallback(), arguments, None)
        model.save_pretrained(job["out"])  # type: ignore[operator]
    figures = {"seconds": time.monotonic() - job["started"], "cpu_seconds": time.process_time()}
    return {
        "learning_rate": job["learning_rate"],
        "steps": trainer.state.global_step,
        "validation_nll": held_out_nll(model, prepared, "validation"),
        **figures,
    }


def score_usual(job: dict[str, Any]) -> dict[str, Any]:
    """Merge an adapter into the float base, round the weights to a format, and score the test rows.

    Args:
        job: `tune`, `adapter` (folder), `format` (of `FORMATS`, or float), `threads` and `started`.

    Returns:
        As `_rows`, with `bytes` and `seconds` of the rounding.
    """
    torch.set_num_threads(job["threads"])
    choose_library(torch)
    prepared = _prepare(job, {})
    with silence_libraries():
        model: Any = AutoModelForCausalLM.from_pretrained(prepared.base.path, dtype=torch.float32)
        model = PeftModel.from_pretrained(model, job["adapter"]).merge_and_unload()
    parameters = dict(model.named_parameters())
    began = time.monotonic()
    if job["format"] == "float":
        size = sum(parameter.numel() * 4 for parameter in parameters.values())
    else:
        floats = {name: parameter.detach().numpy() for name, parameter in parameters.items()}
        rounded, size = round_weights(floats, FORMATS[job["format"]])
        for name, weight in rounded.items():
            parameters[name].data = torch.from_numpy(weight)
    seconds = time.monotonic() - began
    return {**_rows(TorchScorer(model, prepared.prepared.task), prepared), "bytes": size, "seconds": seconds}


def export_ours(job: dict[str, Any]) -> dict[str, Any]:
    """Export a run with the defaults of `edge-ft export`; what the gate refuses is kept and scored all the same.

    Args:
        job: `run`, `out`, `lane`, `threads` and `started`.

    Returns:
        `bundle`, `refused` (the gate's words or None), `tax` (on validation rows) and the seconds of the process.
    """
    out, refused = Path(job["out"]), None
    try:
        export(job["run"], ExportConfig(out=out, lane=job["lane"], threads=job["threads"]), Silent())
    except GateRefused as error:
        refused, out = str(error).partition(": ")[2], out.with_name(f"{out.name}.rejected")
    return {
        "bundle": str(out),
        "refused": refused,
        "tax": Bundle.open(out).manifest["verification"]["quantization_tax"],
        "seconds": time.monotonic() - job["started"],
        "cpu_seconds": time.process_time(),
    }


def score_ours(job: dict[str, Any]) -> dict[str, Any]:
    """Score the test rows with a bundle's exact graph, and with the scorer of the usual formats.

    Args:
        job: `tune`, `run`, `bundle`, `lane`, `threads` and `started`.

    Returns:
        As `_rows`, with `bytes` of all files but the tokenizer's, and `graph`, as `_rows`, of the exact graph.
    """
    torch.set_num_threads(job["threads"])
    choose_library(torch)
    prepared, bundle = _prepare(job, {}), Bundle.open(Path(job["bundle"]))
    graph = _rows(load(bundle.path, accuracy_level=1, threads=job["threads"]), prepared)
    with silence_libraries():
        model: Any = AutoModelForCausalLM.from_pretrained(prepared.base.path, dtype=torch.float32)
        parameters = dict(model.named_parameters())
        for name, weight in bundle_weights(bundle.graph(), ModelDims(model.config)).items():
            floats = dequantize(weight) if isinstance(weight, Codes) else weight
            parameters[name].data = torch.from_numpy(floats.copy())
        if job["lane"] == "adapter":
            model = PeftModel.from_pretrained(model, RunFolder.open(Path(job["run"])).adapter)
    tokenizer = ("tokenizer", "vocab", "merges", "special_tokens", "chat_template", "spiece")
    files = bundle.manifest["files"]
    size = sum(entry["bytes"] for name, entry in files.items() if not Path(name).name.startswith(tokenizer))
    rows = _rows(TorchScorer(model, prepared.prepared.task), prepared)
    return {**rows, "graph": graph, "bytes": size}


def _prepare(job: dict[str, Any], settings: dict[str, Any]) -> Job:
    return prepare_job(TuneConfig(out=Path("unused"), **job["tune"] | settings), Silent())


def _rows(scorer: Scorer, job: Job) -> dict[str, Any]:
    """Score the test rows: `nll` (nats), `tokens` and `correct` (targets that are the likeliest token) of each."""
    examples: list[Example] = job.prepared.examples["test"]
    scores = score(scorer, examples, Batching(job.prepared.task, job.tokenizer.pad_id), Silent(), "")
    return {
        "nll": [round(float(value), 6) for value in scores.nll],
        "tokens": scores.tokens.tolist(),
        "correct": scores.correct.tolist(),
    }
