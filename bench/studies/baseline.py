"""The baseline of both races: PEFT LoRA and transformers' Trainer as a good engineer would write it, on our rows.

Trainer's defaults stay, except for what such a script sets: no reports, no cache while training, and an evaluation of
the validation rows after each epoch, of which the best weights are kept. Its loss on the held-out rows is measured by
our scorer, and its seconds by the stopwatch of our loop, which is paused meanwhile. Trainer's own evaluations are on a
clock of their own, so that one training says how long it takes with them and without.
"""

import math
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
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

from edge_ft.adapter import PEFT_TASKS
from edge_ft.bench.studies.baseline_curve import Clocks, HeldOutCurve, held_out_nll
from edge_ft.data import Example, collate, train_batches
from edge_ft.models.base_model import Base
from edge_ft.models.loading import ModelSpec, load_model
from edge_ft.models.lora import add_lora
from edge_ft.tune.prepare import Job
from edge_ft.tune.schedule import learning_rate_at, planned_steps

__all__ = [
    "MODEL_CLASSES",
    "Plain",
    "Recipe",
    "add_usual_lora",
    "fit_trainer",
    "our_batches",
    "our_recipe",
    "train_baseline",
    "usual_arguments",
    "usual_model",
]

MODEL_CLASSES: dict[str, Any] = {
    "text-generation": AutoModelForCausalLM,
    "text-classification": AutoModelForSequenceClassification,
}
BATCH_SIZE = 8


@dataclass(frozen=True)
class Plain:
    """What a baseline with Trainer's own recipe is given."""

    learning_rate: float
    """Peak rate."""
    batch_size: int
    """Rows a step."""
    passes: int = 1
    """Passes that a step takes its rows in (`gradient_accumulation_steps`)."""
    max_minutes: float | None = None
    """Train so many steps less that they fit, by one measured step; the schedule ends there."""


def train_baseline(
    job: Job, started: float, plain: Plain | None = None, *, weights: str | None = None
) -> dict[str, Any]:
    """Train the baseline once in float32.

    Args:
        job: Base and rows. Of its settings, epochs, rank, alpha, seed and `eval_steps` are taken; in the same recipe
            all others too.
        started: `time.monotonic()` when the process began.
        plain: Train with Trainer's recipe, as its users would; scored on the test rows. None: the same recipe, our
            LoRA layers on our batches with our optimizer and schedule; scored on the validation rows, as ours is.
        weights: Safetensors file of float weights to train over instead of the base's own, in the same recipe.

    Returns:
        `curve`, `steps`, `tokens` (read in training, without padding), `stopped` (steps or minutes), `test_nll`
        (at its end; None in the same recipe) and the seconds of the whole process, as `Clocks.figures` has them.
    """
    clocks = Clocks(started)
    arguments: dict[str, Any] = {
        "num_train_epochs": job.config.epochs,
        "per_device_train_batch_size": BATCH_SIZE,
        "train_sampling_strategy": "group_by_length",
        "dataloader_pin_memory": False,
    }
    if plain is None:
        model = _our_model(job, weights)
        steps = planned_steps(len(job.prepared.examples["train"]), job.config)
        recipe = our_recipe(model, steps, job)
        curve = HeldOutCurve(model, job, clocks, "validation")
    else:
        model, recipe = usual_model(job), None
        with clocks.excluded():
            arguments |= usual_arguments(plain) | _steps_in_time(model, job, plain)
        curve = HeldOutCurve(model, job, clocks, "test", plain.max_minutes)
    trainer = fit_trainer(model, job, curve, arguments, recipe, clocks.evaluating)
    figures = clocks.figures()
    test_nll = None
    if plain is not None:
        is_last = trainer.state.best_global_step in (None, trainer.state.global_step)
        test_nll = curve.points[-1]["nll"] if is_last else held_out_nll(model, job, curve.split)
    return {
        "curve": curve.points,
        "steps": trainer.state.global_step,
        "tokens": trainer.tokens,
        "stopped": curve.stopped or ("minutes" if "max_steps" in arguments else "steps"),
        "test_nll": test_nll,
        **figures,
    }


def usual_arguments(plain: Plain) -> dict[str, Any]:
    """Of `TrainingArguments`: the rate and the rows of a step, and an evaluation after each epoch."""
    return {
        "learning_rate": plain.learning_rate,
        "per_device_train_batch_size": plain.batch_size // plain.passes,
        "per_device_eval_batch_size": plain.batch_size // plain.passes,
        "gradient_accumulation_steps": plain.passes,
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "save_total_limit": 1,
        "load_best_model_at_end": True,
        "label_names": ["labels"],  # PEFT hides them from Trainer
    }


def _steps_in_time(model: nn.Module, job: Job, plain: Plain) -> dict[str, int]:
    """`max_steps` where the epochs take longer than `plain.max_minutes`, by a step of rows of middling length."""
    if plain.max_minutes is None:
        return {}
    rows = sorted(job.prepared.examples["train"], key=lambda example: len(example.input_ids))
    middle = max(0, (len(rows) - plain.batch_size) // 2)
    batch = _batch_tensors(rows[middle : middle + plain.batch_size], job.tokenizer.pad_id, job.prepared.task)
    for _ in range(2):  # the first pass pays for allocations
        began = time.monotonic()
        model.train()(**batch).loss.backward()
        seconds = time.monotonic() - began
    model.zero_grad()
    assert job.config.epochs is not None
    planned = math.ceil(math.ceil(len(rows) / plain.batch_size) * job.config.epochs)
    steps = max(1, int(plain.max_minutes * 60 / seconds))
    return {"max_steps": steps} if steps < planned else {}


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
    model: nn.Module,
    job: Job,
    callback: TrainerCallback,
    arguments: dict[str, Any],
    recipe: Recipe | None,
    evaluating: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> "_CountingTrainer":
    """Train a PEFT model with transformers' Trainer, and save its adapter.

    Args:
        model: It is trained in place.
        job: Its train rows are read, and its validation rows if `arguments` say so.
        callback: Measures the training.
        arguments: Of `TrainingArguments`, beside those that all baselines share.
        recipe: Batches, optimizer and schedule instead of Trainer's own.
        evaluating: A context around what Trainer does for evaluations.

    Returns:
        The trainer, which has counted steps and tokens.
    """
    if recipe is not None:
        arguments = arguments | {"max_steps": len(recipe.batches), "max_grad_norm": recipe.max_grad_norm}
    pad_id, task = job.tokenizer.pad_id, job.prepared.task
    rows = {
        split: [{"input_ids": example.input_ids, "example": example} for example in job.prepared.examples[split]]
        for split in ("train", "validation")
    }
    with tempfile.TemporaryDirectory() as folder:
        trainer = _CountingTrainer(
            model=model,
            args=TrainingArguments(
                output_dir=folder,
                seed=job.config.seed,
                logging_strategy="no",
                report_to=[],
                disable_tqdm=True,
                remove_unused_columns=False,
                **({"save_strategy": "no"} | arguments),
            ),
            train_dataset=rows["train"],
            eval_dataset=rows["validation"],
            data_collator=lambda rows: _batch_tensors([row["example"] for row in rows], pad_id, task),
            callbacks=[callback],
            optimizers=(None, None) if recipe is None else (recipe.optimizer, recipe.schedule),
            batches=None if recipe is None else recipe.batches,
            evaluating=evaluating,
        )
        trainer.train()
        model.save_pretrained(Path(folder) / "adapter")  # type: ignore[operator]
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


def usual_model(job: Job) -> nn.Module:
    """Load the float base with LoRA on all linear layers, as PEFT's guides write it."""
    base, labels = job.base, job.prepared.rendering.labels
    torch.manual_seed(job.config.seed)
    head = {} if base.family.decoder else {"num_labels": len(labels), "ignore_mismatched_sizes": True}
    model = MODEL_CLASSES[job.prepared.task].from_pretrained(base.path, dtype=torch.float32, **head)
    _without_cache(model, base)
    return add_usual_lora(model, job)


def _our_model(job: Job, weights: str | None) -> nn.Module:
    """The model with our LoRA layers, its float weights replaced by those of a file."""
    config, base, prepared = job.config, job.base, job.prepared
    model: Any = load_model(ModelSpec(base, prepared.task, "fp32", labels=prepared.rendering.labels, seed=config.seed))
    if weights is not None:
        with safe_open(weights, "pt") as file, torch.no_grad():
            for name in file.keys():  # noqa: SIM118 - safe_open is no mapping
                model.get_parameter(name).copy_(file.get_tensor(name))
    _without_cache(model, base)
    return add_lora(model, base.family, prepared.task, config)


def _without_cache(model: Any, base: Base) -> None:
    if base.family.decoder:
        model.config.use_cache = False


class _CountingTrainer(Trainer):
    """Trainer that counts tokens, takes given batches, and says when it evaluates."""

    def __init__(
        self,
        *,
        batches: list[list[int]] | None,
        evaluating: Callable[[], AbstractContextManager[None]],
        **arguments: Any,
    ) -> None:
        super().__init__(**arguments)
        self.batches, self.evaluating = batches, evaluating
        self.tokens = 0

    def _maybe_log_save_evaluate(self, *arguments: Any, **more: Any) -> None:
        with self.evaluating() if self.control.should_evaluate or self.control.should_save else nullcontext():
            super()._maybe_log_save_evaluate(*arguments, **more)

    def _load_best_model(self) -> None:
        with self.evaluating():
            super()._load_best_model()

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
