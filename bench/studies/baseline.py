"""The baseline of both races: PEFT LoRA and transformers' Trainer as a good engineer would write it, on our rows.

Trainer's defaults stay, except for what such a script sets: no reports, no saving, no cache while training. Its loss on
the held-out rows is measured by our scorer, and its seconds by the stopwatch of our loop, which is paused meanwhile.
"""

import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
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

from edge_ft.data import Example, collate, train_batches
from edge_ft.evaluate.scoring import Batching, score
from edge_ft.models.adapter import PEFT_TASKS
from edge_ft.models.base_model import Base
from edge_ft.models.loading import ModelSpec, load_model
from edge_ft.models.lora import add_lora
from edge_ft.models.scorer import TorchScorer
from edge_ft.progress import Silent
from edge_ft.tune.loop import learning_rate_at, planned_steps
from edge_ft.tune.prepare import Job
from edge_ft.tune.stopwatch import Stopwatch

__all__ = [
    "MODEL_CLASSES",
    "Recipe",
    "add_usual_lora",
    "fit_trainer",
    "held_out_nll",
    "our_batches",
    "our_recipe",
    "train_baseline",
]

MODEL_CLASSES: dict[str, Any] = {
    "text-generation": AutoModelForCausalLM,
    "text-classification": AutoModelForSequenceClassification,
}
BATCH_SIZE = 8


def held_out_nll(model: nn.Module, job: Job) -> float:
    """Mean loss of the held-out rows in float32, nats per target."""
    scores = score(
        TorchScorer(model, job.prepared.task),
        job.prepared.examples["validation"],
        Batching(job.prepared.task, job.tokenizer.pad_id, BATCH_SIZE),
        Silent(),
        "",
    )
    return scores.mean_nll


def train_baseline(
    job: Job, *, learning_rate: float, batch_size: int, same_recipe: bool, weights: str | None
) -> dict[str, Any]:
    """Train the baseline once in float32.

    Args:
        job: Base and rows. Of its settings, epochs, rank, alpha, seed and `eval_steps` are taken; in the same recipe
            all others too.
        learning_rate: Peak rate; the same recipe has its own.
        batch_size: Rows a step; the same recipe has its own.
        same_recipe: Train our LoRA layers on our batches with our optimizer and schedule.
        weights: Safetensors file of float weights to train over instead of the base's own, in the same recipe.

    Returns:
        `curve`, `steps` and `tokens` (read in training, without padding).
    """
    config = job.config
    arguments: dict[str, Any] = {
        "learning_rate": learning_rate,
        "num_train_epochs": config.epochs,
        "per_device_train_batch_size": batch_size,
        "train_sampling_strategy": "group_by_length",
        "dataloader_pin_memory": False,
    }
    if same_recipe:
        model = _our_model(job, weights)
        steps = planned_steps(len(job.prepared.examples["train"]), config)
        recipe = our_recipe(model, steps, job)
    else:
        model, recipe = _usual_model(job), None
    curve = _HeldOutCurve(model, job)
    trainer = fit_trainer(model, job, curve, arguments, recipe)
    return {"curve": curve.points, "steps": trainer.state.global_step, "tokens": trainer.tokens}


@dataclass(frozen=True)
class Recipe:
    """Our batches in our order, our AdamW and our schedule, for Trainer to take instead of its own."""

    batches: list[list[int]]
    """Indices of the rows of every step."""
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LambdaLR
    max_grad_norm: float


def our_recipe(model: nn.Module, steps: int, job: Job) -> Recipe:
    """Make what our loop would train `model` with in so many steps."""
    config = job.config
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # lr 1: the rate is the schedule's alone. fused: Trainer's own choice on a GPU.
    optimizer = torch.optim.AdamW(
        trainable, lr=1.0, weight_decay=config.weight_decay, fused=trainable[0].is_cuda or None
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda done: learning_rate_at(min(done + 1, steps), steps, config)
    )
    return Recipe(our_batches(job, steps), optimizer, schedule, config.max_grad_norm)


def our_batches(job: Job, steps: int) -> list[list[int]]:
    """Indices of the rows in each of our loop's first `steps` batches."""
    lengths = [len(example.input_ids) for example in job.prepared.examples["train"]]
    batches: list[list[int]] = []
    epoch = 0
    while len(batches) < steps:
        batches += train_batches(lengths, job.config.rows_at_once, job.config.seed, epoch)
        epoch += 1
    return batches[:steps]


def fit_trainer(
    model: nn.Module, job: Job, callback: TrainerCallback, arguments: dict[str, Any], recipe: Recipe | None
) -> "_CountingTrainer":
    """Train a PEFT model with transformers' Trainer.

    Args:
        model: It is trained in place.
        job: Its train rows are read.
        callback: Measures the training.
        arguments: Of `TrainingArguments`, beside those that all baselines share.
        recipe: Batches, optimizer and schedule instead of Trainer's own.

    Returns:
        The trainer, which has counted steps and tokens.
    """
    if recipe is not None:
        arguments = arguments | {"max_steps": len(recipe.batches), "max_grad_norm": recipe.max_grad_norm}
    pad_id, task = job.tokenizer.pad_id, job.prepared.task
    rows = [{"input_ids": example.input_ids, "example": example} for example in job.prepared.examples["train"]]
    with tempfile.TemporaryDirectory() as folder:
        trainer = _CountingTrainer(
            model=model,
            args=TrainingArguments(
                output_dir=folder,
                seed=job.config.seed,
                logging_strategy="no",
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                remove_unused_columns=False,
                **arguments,
            ),
            train_dataset=rows,
            data_collator=lambda rows: _batch_tensors([row["example"] for row in rows], pad_id, task),
            callbacks=[callback],
            optimizers=(None, None) if recipe is None else (recipe.optimizer, recipe.schedule),
            batches=None if recipe is None else recipe.batches,
        )
        trainer.train()
    return trainer


def add_usual_lora(model: nn.Module, job: Job) -> nn.Module:
    """Add LoRA to all linear layers, as PEFT's guides write it."""
    lora = LoraConfig(
        task_type=TaskType(PEFT_TASKS[job.prepared.task]),
        r=job.config.rank,
        lora_alpha=job.config.alpha,  # type: ignore[arg-type]
        target_modules="all-linear",
    )
    return get_peft_model(model, lora)  # type: ignore[arg-type]


def _usual_model(job: Job) -> nn.Module:
    base, labels = job.base, job.prepared.rendering.labels
    torch.manual_seed(job.config.seed)
    head = {} if base.family.decoder else {"num_labels": len(labels), "ignore_mismatched_sizes": True}
    model = MODEL_CLASSES[job.prepared.task].from_pretrained(base.path, dtype=torch.float32, **head)
    _without_cache(model, base)
    return add_usual_lora(model, job)


def _our_model(job: Job, weights: str | None) -> nn.Module:
    """The model with our LoRA layers, its float weights replaced by those of a file."""
    config, base, prepared = job.config, job.base, job.prepared
    model: Any = load_model(
        ModelSpec(base, prepared.task, "fp32", config.block_size, prepared.rendering.labels, config.seed)
    )
    if weights is not None:
        with safe_open(weights, "pt") as file, torch.no_grad():
            for name in file.keys():  # noqa: SIM118 - safe_open is no mapping
                model.get_parameter(name).copy_(file.get_tensor(name))
    _without_cache(model, base)
    return add_lora(model, base.family, prepared.task, config)


def _without_cache(model: Any, base: Base) -> None:
    if base.family.decoder:
        model.config.use_cache = False


class _HeldOutCurve(TrainerCallback):
    """Our score of the held-out rows before the first step, every `eval_steps`, and after the last."""

    def __init__(self, model: nn.Module, job: Job) -> None:
        self.model, self.job = model, job
        self.points: list[dict[str, Any]] = []
        self.watch = Stopwatch(time.monotonic)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.watch = Stopwatch(time.monotonic)
        self._evaluate(0)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        every = self.job.config.eval_steps or state.max_steps
        if state.global_step % every == 0 or state.global_step == state.max_steps:
            self._evaluate(state.global_step)

    def _evaluate(self, step: int) -> None:
        with self.watch.paused():
            nll = held_out_nll(self.model, self.job)
        self.points.append(
            {
                "step": step,
                "seconds": self.watch.seconds,
                "cpu_seconds": self.watch.cpu_seconds,
                "nll": nll if math.isfinite(nll) else None,
            }
        )


class _CountingTrainer(Trainer):
    """Trainer that counts tokens, and takes given batches."""

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


def _batch_tensors(examples: Sequence[Example], pad_id: int, task: str) -> dict[str, torch.Tensor]:
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
