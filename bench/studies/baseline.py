"""The rival: PEFT LoRA and transformers' Trainer as a good engineer would write it today, on our rows.

Trainer's own defaults stay but for what such a script sets: batches of rows of similar length, padded to the
longest of the batch, no cache while training, no reports and no saving. Its loss on the held-out rows is
measured by our scorer, and its seconds by the stopwatch of our loop, which stands still meanwhile.
"""

import math
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, TaskType, get_peft_model
from safetensors import safe_open
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from edge_ft.config import TuneConfig
from edge_ft.data import Example, collate, train_batches
from edge_ft.evaluate.scoring import score
from edge_ft.models.base_model import Base
from edge_ft.models.loading import ModelSpec, load_model
from edge_ft.models.logging import silence_libraries
from edge_ft.models.lora import PEFT_TASKS, add_lora
from edge_ft.models.scorer import TorchScorer
from edge_ft.progress import Silent
from edge_ft.tune.loop import learning_rate_at, planned_steps
from edge_ft.tune.prepare import Prepared
from edge_ft.tune.stopwatch import Stopwatch

__all__ = ["MODEL_CLASSES", "CountingTrainer", "batch_tensors", "our_batches", "our_optimizer", "train_rival"]

MODEL_CLASSES: dict[str, Any] = {
    "text-generation": AutoModelForCausalLM,
    "text-classification": AutoModelForSequenceClassification,
}
BATCH_SIZE = 8


def train_rival(
    base: Base, prepared: Prepared, pad_id: int, config: TuneConfig, *, learning_rate: float, job: dict[str, Any]
) -> dict[str, Any]:
    """Train the rival once.

    Args:
        config: What ours would be told. Epochs, rank, alpha, seed and `eval_steps` are taken from it; in the same
            recipe all else too.
        learning_rate: Peak rate.
        job: `batch_size`, `same_recipe`, and `weights`: a safetensors file of float weights to train over instead
            of the base's own, or None.

    Returns:
        `curve`, `steps` and `tokens` (read in training, without padding).
    """
    task, train = prepared.task, prepared.examples["train"]
    with silence_libraries():
        if job["same_recipe"]:
            model: Any = load_model(
                ModelSpec(base, task, "fp32", config.block_size, prepared.rendering.labels, config.seed)
            )
            if job["weights"]:
                _take_weights(model, Path(job["weights"]))
            peft_model = add_lora(model, base.family, task, config)
        else:
            torch.manual_seed(config.seed)
            labels = {"num_labels": len(prepared.rendering.labels), "ignore_mismatched_sizes": True}
            model = MODEL_CLASSES[task].from_pretrained(
                base.path, dtype=torch.float32, **({} if base.family.decoder else labels)
            )
            lora = LoraConfig(
                task_type=TaskType(PEFT_TASKS[task]),
                r=config.rank,
                lora_alpha=config.alpha,  # type: ignore[arg-type]
                target_modules="all-linear",
            )
            peft_model = get_peft_model(model, lora)
        if base.family.decoder:
            model.config.use_cache = False
        looks = _Looks(TorchScorer(peft_model, task), prepared, pad_id, config)
        with tempfile.TemporaryDirectory() as folder:
            arguments: dict[str, Any] = {
                "output_dir": folder,
                "learning_rate": learning_rate,
                "num_train_epochs": config.epochs,
                "per_device_train_batch_size": job["batch_size"],
                "train_sampling_strategy": "group_by_length",
                "seed": config.seed,
                "logging_strategy": "no",
                "save_strategy": "no",
                "report_to": [],
                "disable_tqdm": True,
                "remove_unused_columns": False,
                "dataloader_pin_memory": False,
            }
            optimizers: tuple[Any, Any] = (None, None)
            batches = None
            if job["same_recipe"]:
                steps = planned_steps(len(train), config)
                arguments |= {"max_steps": steps, "max_grad_norm": config.max_grad_norm}
                optimizers = our_optimizer(peft_model, steps, config)
                batches = our_batches(train, steps, config)
            trainer = CountingTrainer(
                model=peft_model,
                args=TrainingArguments(**arguments),
                train_dataset=[{"input_ids": example.input_ids, "example": example} for example in train],
                data_collator=lambda rows: batch_tensors([row["example"] for row in rows], pad_id, task),
                callbacks=[looks],
                optimizers=optimizers,
                batches=batches,
            )
            trainer.train()
    return {"curve": looks.curve, "steps": trainer.state.global_step, "tokens": trainer.tokens}


class _Looks(TrainerCallback):
    """Our score of the held-out rows before the first step, every `eval_steps`, and after the last."""

    def __init__(self, scorer: TorchScorer, prepared: Prepared, pad_id: int, config: TuneConfig) -> None:
        self.scorer, self.prepared, self.pad_id, self.config = scorer, prepared, pad_id, config
        self.curve: list[dict[str, Any]] = []
        self.watch = Stopwatch(time.monotonic)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.watch = Stopwatch(time.monotonic)
        self._look(0)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % (self.config.eval_steps or state.max_steps) == 0 or state.global_step == state.max_steps:
            self._look(state.global_step)

    def _look(self, step: int) -> None:
        with self.watch.paused():
            scores = score(
                self.scorer,
                self.prepared.examples["validation"],
                task=self.prepared.task,
                pad_id=self.pad_id,
                batch_size=BATCH_SIZE,
                progress=Silent(),
                stage="",
            )
        nll = scores.mean_nll
        self.curve.append(
            {
                "step": step,
                "seconds": self.watch.seconds,
                "cpu_seconds": self.watch.cpu_seconds,
                "nll": nll if math.isfinite(nll) else None,
            }
        )


class CountingTrainer(Trainer):
    """Trainer that counts tokens, and may be fed given batches."""

    def __init__(self, *, batches: list[list[int]] | None, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.batches = batches
        self.tokens = 0

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *arguments: Any) -> torch.Tensor:
        self.tokens += int(inputs["attention_mask"].sum())
        return super().training_step(model, inputs, *arguments)

    def get_train_dataloader(self) -> DataLoader[Any]:
        if self.batches is None:
            return super().get_train_dataloader()
        return DataLoader(self.train_dataset, batch_sampler=self.batches, collate_fn=self.data_collator)  # type: ignore[arg-type]


def batch_tensors(examples: Sequence[Example], pad_id: int, task: str) -> dict[str, torch.Tensor]:
    batch = collate(examples, pad_id, task)
    labels = batch["labels"][:, 0] if task == "text-classification" else batch["labels"]
    tensors = {
        "input_ids": torch.from_numpy(batch["input_ids"]),
        "attention_mask": torch.from_numpy(batch["attention_mask"]),
        "labels": torch.from_numpy(labels),
    }
    if "token_type_ids" in batch:  # of pairs
        tensors["token_type_ids"] = torch.from_numpy(batch["token_type_ids"])
    return tensors


def our_batches(train: Sequence[Example], steps: int, config: TuneConfig) -> list[list[int]]:
    """Indices of every batch that our loop would read, in its order."""
    lengths = [len(example.input_ids) for example in train]
    batches: list[list[int]] = []
    epoch = 0
    while len(batches) < steps:
        batches += train_batches(lengths, config.rows_at_once, config.seed, epoch)
        epoch += 1
    return batches[:steps]


def our_optimizer(model: Any, steps: int, config: TuneConfig) -> tuple[Any, Any]:
    """AdamW and the schedule of our loop."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # The rate is the schedule's alone.
    fused = trainable[0].is_cuda or None  # Trainer's own choice there
    optimizer = torch.optim.AdamW(trainable, lr=1.0, weight_decay=config.weight_decay, fused=fused)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda done: learning_rate_at(min(done + 1, steps), steps, config)
    )
    return optimizer, schedule


@torch.no_grad()
def _take_weights(model: nn.Module, file: Path) -> None:
    with safe_open(file, "pt") as weights:
        for name in weights.keys():  # noqa: SIM118 - safe_open is no mapping
            model.get_parameter(name).copy_(weights.get_tensor(name))
