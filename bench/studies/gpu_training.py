"""The trainings of the `gpu` study: ours, or PEFT + Trainer + bitsandbytes, once, on a GPU if there is one.

Both read the same batches with the same schedule and optimizer, so that their losses compare too.
"""

import time
from pathlib import Path
from typing import Any

import torch
from peft import prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TrainerCallback

from edge_ft.bench.studies.baseline import add_usual_lora, fit_trainer, our_batches, our_recipe
from edge_ft.bench.studies.baseline_curve import held_out_nll
from edge_ft.config import TuneConfig
from edge_ft.models.logging import silence_libraries
from edge_ft.progress import Silent
from edge_ft.system import device_memory
from edge_ft.tune.distributed import Processes
from edge_ft.tune.loop import Callbacks, TrainingRows, fit
from edge_ft.tune.prepare import Job, prepare_job
from edge_ft.tune.trainable_model import load_trainable_model

__all__ = ["train"]


def train(job: dict[str, Any]) -> dict[str, Any]:
    """Train as `job["trainer"]` (ours or baseline) with the settings `job["tune"]`.

    Returns:
        `nll_before`, `nll_after` (held-out rows, float32 arithmetic), `tokens_per_second` (without padding, after
        `job["warm_up"]` steps), `padding` (share of the tokens computed), `held_bytes` and `peak_bytes` (device memory
        before the first step, and at most from there on; None on a CPU), `compute`, `device`.
    """
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    prepared_job = prepare_job(TuneConfig(out=Path("unused"), **job["tune"]), Silent())
    meter = _Meter(prepared_job, job["warm_up"], device)
    train = {"ours": _ours, "baseline": _baseline}[job["trainer"]]
    with silence_libraries():
        compute, before, after = train(prepared_job, meter)
    return {
        "nll_before": before,
        "nll_after": after,
        **meter.result(),
        "compute": compute,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
    }


class _Meter:
    """Time and device memory of the steps after the warm-up."""

    def __init__(self, job: Job, warm_up: int, device: torch.device) -> None:
        assert job.config.max_steps is not None
        self.steps, self.warm_up, self.device = job.config.max_steps, warm_up, device
        examples = job.prepared.examples["train"]
        self.lengths = [[len(examples[row].input_ids) for row in batch] for batch in our_batches(job, self.steps)]
        self.began = self.seconds = 0.0
        self.held: int | None = None
        self.peak: int | None = None

    def begin(self) -> None:
        """Note the memory held before the first step."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self.held = torch.cuda.memory_allocated(self.device)

    def step(self, step: int) -> None:
        """Note that a step is done; the first one is 1."""
        if step not in (self.warm_up, self.steps):
            return
        if memory := device_memory(self.device):
            torch.cuda.synchronize(self.device)
            self.peak = memory.peak_bytes
        now = time.perf_counter()
        self.began, self.seconds = (now, 0.0) if step == self.warm_up else (self.began, now - self.began)

    def result(self) -> dict[str, Any]:
        """The figures of all steps after the warm-up."""
        lengths = self.lengths[self.warm_up :]
        read, computed = sum(map(sum, lengths)), sum(len(batch) * max(batch) for batch in lengths)
        return {
            "tokens_per_second": read / self.seconds,
            "padding": 1 - read / computed,
            "tokens_per_step": read / len(lengths),
            "held_bytes": self.held,
            "peak_bytes": self.peak,
        }


class _MeteredSteps(Callbacks):
    """Tells the meter of our loop's steps."""

    def __init__(self, meter: _Meter) -> None:
        self.meter = meter

    def on_plan(self, steps: int) -> None:
        self.meter.begin()

    def on_metrics(self, line: dict[str, Any]) -> None:
        if "loss" in line:
            self.meter.step(line["step"])


def _ours(job: Job, meter: _Meter) -> tuple[str, float, float]:
    model = load_trainable_model(job, Processes(meter.device), Silent())
    before = held_out_nll(model.peft_model, job)
    examples = job.prepared.examples
    held_out = examples["validation"][: job.config.rows_at_once]  # the loop has to evaluate some rows
    rows = TrainingRows(examples["train"], held_out, job.batching)
    fit(model.backend, rows, job.config, Silent(), _MeteredSteps(meter))
    return model.compute, before, held_out_nll(model.peft_model, job)


def _baseline(job: Job, meter: _Meter) -> tuple[str, float, float]:
    """As the libraries' own guides write it: the base in bfloat16 or nf4, the adapter in float32, autocast."""
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    model: Any = AutoModelForCausalLM.from_pretrained(
        job.base.path,
        dtype=torch.bfloat16,
        device_map={"": str(meter.device)},
        quantization_config=nf4 if job.config.base_format == "nf4" else None,
    )
    model.config.use_cache = False
    if job.config.base_format == "nf4":
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    torch.manual_seed(job.config.seed)
    peft_model = add_usual_lora(model, job)
    before = held_out_nll(peft_model, job)
    recipe = our_recipe(peft_model, meter.steps, job)
    fit_trainer(peft_model, job, _Steps(meter), {"bf16": meter.device.type == "cuda"}, recipe)
    return "bf16", before, held_out_nll(peft_model, job)


class _Steps(TrainerCallback):
    """Reports Trainer's steps to the meter."""

    def __init__(self, meter: _Meter) -> None:
        self.meter = meter

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.meter.begin()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.meter.step(state.global_step)
