"""The training process of the `gpu` study: ours or PEFT + Trainer + bitsandbytes, once, on the device at hand.

Both read the same batches with the same schedule and optimizer, so that their losses compare too.
"""

import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, TaskType, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TrainerCallback, TrainingArguments

from edge_ft.bench.studies.baseline import CountingTrainer, batch_tensors, our_batches, our_optimizer
from edge_ft.bench.worker import answer_job
from edge_ft.config import TuneConfig
from edge_ft.evaluate.scoring import score
from edge_ft.models.logging import silence_libraries
from edge_ft.models.scorer import TorchScorer
from edge_ft.progress import Silent
from edge_ft.system import peak_rss_bytes
from edge_ft.tune.distributed import Ranks
from edge_ft.tune.job import Job, prepare_job
from edge_ft.tune.loop import fit
from edge_ft.tune.prepare import Prepared
from edge_ft.tune.trainable_model import load_trainable_model

__all__ = ["main", "work"]


def main() -> None:
    """Answer one job; see `edge_ft.bench.worker.answer_job`."""
    answer_job(work)


def work(job: dict[str, Any]) -> dict[str, Any]:
    """Train as `job["trainer"]` over `job["base_format"]`, with the settings `job["tune"]`.

    Returns:
        `nll_before`, `nll_after` (held-out rows, float32 arithmetic), `tokens_per_second` (without padding, after
        `job["warm_up"]` steps), `padding` (share of the tokens computed), `held_bytes` and `peak_bytes` (device memory
        before the first step, and at most from there on; None on a CPU), `compute`, `device`.
    """
    config = TuneConfig(out=Path("unused"), **job["tune"])
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    prepared_job = prepare_job(config, Silent())
    meter = _Meter(prepared_job.prepared, prepared_job.config, job["warm_up"], device)
    with silence_libraries():
        train = {"ours": _ours, "rival": _rival}[job["trainer"]]
        compute, before, after = train(prepared_job, meter)
    return {
        "nll_before": before,
        "nll_after": after,
        **meter.result(),
        "compute": compute,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "peak_rss_bytes": peak_rss_bytes(),
        "process_seconds": time.monotonic() - job["started"],
    }


class _Meter:
    """Time and device memory of the steps after the warm-up."""

    def __init__(self, prepared: Prepared, config: TuneConfig, warm_up: int, device: torch.device) -> None:
        assert config.max_steps is not None
        self.steps, self.warm_up, self.device = config.max_steps, warm_up, device
        train = prepared.examples["train"]
        self.batches = our_batches(train, self.steps, config)
        self.lengths = [[len(train[index].input_ids) for index in batch] for batch in self.batches]
        self.began = self.seconds = 0.0
        self.held: int | None = None
        self.peak: int | None = None

    def begin(self) -> None:
        """Called before the first step."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self.held = torch.cuda.memory_allocated(self.device)

    def step(self, step: int) -> None:
        """Called after each step, numbered from 1."""
        if step not in (self.warm_up, self.steps):
            return
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self.peak = torch.cuda.max_memory_allocated(self.device)
        now = time.perf_counter()
        self.began, self.seconds = (now, 0.0) if step == self.warm_up else (self.began, now - self.began)

    def result(self) -> dict[str, Any]:
        lengths = self.lengths[self.warm_up :]
        read, computed = sum(map(sum, lengths)), sum(len(batch) * max(batch) for batch in lengths)
        return {
            "tokens_per_second": read / self.seconds,
            "padding": 1 - read / computed,
            "tokens_per_step": read / len(lengths),
            "held_bytes": self.held,
            "peak_bytes": self.peak,
        }


def _nll(model: nn.Module, prepared: Prepared, pad_id: int) -> float:
    """Of the held-out rows."""
    scorer, rows = TorchScorer(model, prepared.task), prepared.examples["validation"]
    scores = score(scorer, rows, task=prepared.task, pad_id=pad_id, batch_size=8, progress=Silent(), stage="")
    return scores.mean_nll


def _ours(job: Job, meter: _Meter) -> tuple[str, float, float]:
    config, prepared, pad_id = job.config, job.prepared, job.tokenizer.pad_id
    model = load_trainable_model(job, Ranks(meter.device), Silent())
    before = _nll(model.peft_model, prepared, pad_id)
    fit(
        model.backend,
        prepared.examples["train"],
        prepared.examples["validation"][: config.rows_at_once],  # the loop must look at something
        config,
        task=prepared.task,
        pad_id=pad_id,
        progress=Silent(),
        log=lambda line: meter.step(line["step"]) if "loss" in line else None,
        on_best=lambda: None,
        on_plan=lambda _: meter.begin(),
    )
    return model.compute, before, _nll(model.peft_model, prepared, pad_id)


def _rival(job: Job, meter: _Meter) -> tuple[str, float, float]:
    """As the libraries' own guides write it: the base in bfloat16 or nf4, the adapter in float32, autocast."""
    config, prepared, pad_id = job.config, job.prepared, job.tokenizer.pad_id
    narrow = torch.bfloat16
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=narrow)
    model: Any = AutoModelForCausalLM.from_pretrained(
        job.base.path,
        dtype=narrow,
        device_map={"": str(meter.device)},
        quantization_config=nf4 if config.base_format == "nf4" else None,
    )
    model.config.use_cache = False
    if config.base_format == "nf4":
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    lora = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]
        target_modules="all-linear",
    )
    torch.manual_seed(config.seed)
    peft_model = get_peft_model(model, lora)
    before = _nll(peft_model, prepared, pad_id)
    task = prepared.task
    with tempfile.TemporaryDirectory() as folder:
        trainer = CountingTrainer(
            model=peft_model,
            args=TrainingArguments(
                output_dir=folder,
                max_steps=meter.steps,
                max_grad_norm=config.max_grad_norm,
                bf16=meter.device.type == "cuda",
                seed=config.seed,
                logging_strategy="no",
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                remove_unused_columns=False,
            ),
            train_dataset=[{"example": example} for example in prepared.examples["train"]],
            data_collator=lambda rows: batch_tensors([row["example"] for row in rows], pad_id, task),
            callbacks=[_Steps(meter)],
            optimizers=our_optimizer(peft_model, meter.steps, config),
            batches=meter.batches,
        )
        trainer.train()
    return "bf16", before, _nll(peft_model, prepared, pad_id)


class _Steps(TrainerCallback):
    def __init__(self, meter: _Meter) -> None:
        self.meter = meter

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.meter.begin()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.meter.step(state.global_step)


if __name__ == "__main__":
    main()
