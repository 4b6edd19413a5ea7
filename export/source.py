"""What is exported: a run folder or a model, in one form."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import nn

from edge_ft.adapter import Adapter
from edge_ft.artifacts import RunFolder
from edge_ft.config import INT8_ACTIVATIONS, BaseFormat, Task, Weights
from edge_ft.data import (
    Example,
    Rendering,
    SpecialIds,
    TextTokenizer,
)
from edge_ft.errors import ModelError, UsageError
from edge_ft.evaluate.kept_scores import find_scores
from edge_ft.evaluate.loading import open_run_model
from edge_ft.evaluate.scoring import RowScores
from edge_ft.export.figures import ExportRows
from edge_ft.export.size import fit
from edge_ft.models.adapted import load_adapter, merge_adapter, take_vocabulary
from edge_ft.models.base_model import Base
from edge_ft.models.dims import ModelDims
from edge_ft.models.loading import BITS, Changes, Finer, ModelSpec, load_model, quantize_calibrated
from edge_ft.progress import Progress, heartbeat
from edge_ft.quant.blockwise import Grid
from edge_ft.quant.calibration import Calibration, make_calibration
from edge_ft.quant.conversion import is_within, quantize_model, restore_conv1d
from edge_ft.quant.serialization import codes_sha256, stored_finer

__all__ = ["ExportSource"]

FLOATS: tuple[BaseFormat, ...] = ("bf16", "fp32")


@dataclass(frozen=True)
class ExportSource:
    """A base, its adapter if there is one, and the options that decide what ships."""

    base: Base
    adapter: Adapter | None
    trained_format: BaseFormat
    """Format of the base that the adapter was trained over; fp32 for an adapter that was trained elsewhere."""
    weights: Weights
    """Format of the weights that ship."""
    lane: Literal["base", "merged", "adapter"]
    """base: there is no adapter."""
    grid: Grid
    """How int4 and int8 weights are rounded."""
    tokenizer: TextTokenizer
    rendering: Rendering
    rows: ExportRows
    data_fingerprint: str | None
    run: RunFolder | None
    seed: int
    """Initialises a classification head that the checkpoint lacks."""
    size_mb: float | None = None
    """Megabytes that the bundle may take, where the user says so."""
    notes: tuple[str, ...] = ()
    """What the user should know about an adapter that was trained elsewhere: what it brings, and doubts."""

    @property
    def task(self) -> Task:
        """The bundle's task."""
        return self.rendering.task

    @property
    def dims(self) -> ModelDims:
        """Dimensions of the model that ships."""
        dims = self.base.dims
        return dims if self.adapter is None else dims.with_vocabulary(self.adapter.vocabulary(dims.vocabulary))

    @property
    def codes(self) -> Path | None:
        """The file with the base's codes, where it ships as the run rounded it."""
        if self.run is None or not self.run.codes.is_file() or self.grid != Grid.recorded(self.run.base()):
            return None
        return self.run.codes

    @property
    def special_ids(self) -> SpecialIds:
        """The tokens that begin, end and pad texts."""
        return SpecialIds.of(self.rendering, self.tokenizer)

    def load(
        self, base_format: BaseFormat | Weights, progress: Progress | None = None, codes: Path | None = None
    ) -> Any:
        """Load the base without its adapter.

        Args:
            base_format: A base format, or weights that ship: fp16 is float32 whose matrices float16 represents
                exactly; int8-dynamic and int8-static are float32.
            progress: Receives what is not used of the checkpoint.
            codes: File with int4 codes; None: those of the run's base, if they fit.

        Returns:
            The task model, in evaluation mode.
        """
        codes = codes or self.codes
        held = cast(BaseFormat, "fp32" if base_format in ("fp16", *INT8_ACTIVATIONS) else base_format)
        spec = ModelSpec.from_rendering(self.base, self.rendering, held, self.grid, self.seed, codes)
        if self.adapter is None or self.dims.vocabulary == self.base.dims.vocabulary:
            model = load_model(spec, progress)
            if base_format == "fp16":
                self._round_to_fp16(model)
            return model
        # The rows have tokens that the base lacks.
        model = load_model(replace(spec, base_format="fp32"), progress)
        take_vocabulary(model, self.adapter)
        self._round(model, "fp16" if base_format == "fp16" else held)
        return model

    def known_scores(self, model: Literal["base", "tuned"], examples: list[Example]) -> RowScores | None:
        """Return the run's own scores of rows by its base or its tuned model; None unless they are those of `load`."""
        if self.run is None or not self.run.scores.is_file():
            return None
        identity = self.run.base()
        trained = (identity["format"], Grid.recorded(identity), identity["content_sha256"])
        if model == "base" and trained != (self._untuned_format, self.grid, self.base.content_sha256):
            return None
        return find_scores(self.run.scores, model, examples)

    @property
    def _untuned_format(self) -> BaseFormat | Weights:
        """Format of the base that the tuned model is compared with: that of the training, where that is float."""
        return self.trained_format if self.run is not None and self.trained_format in FLOATS else self.weights

    @property
    def rounds_what_was_float(self) -> bool:
        """Whether int4 ships of an adapter that was trained over float weights."""
        return self.adapter is not None and self.weights == "int4" and self.trained_format in FLOATS

    def load_untuned(self) -> Any:
        """Return the base without its adapter, as it is compared with the tuned model."""
        return self.load(self._untuned_format)

    def load_trained(self) -> Any:
        """Return the model as trained: the base in its training format, with the adapter beside it."""
        assert self.adapter is not None
        if self.run is not None:
            return open_run_model(self.run)[0]
        model = self.load(self.trained_format)
        if self.base.family.fan_in_fan_out:
            restore_conv1d(model, self.base.family.layers)
        return load_adapter(model, self.adapter)

    def load_shipped(self, progress: Progress) -> Any:
        """Load the model that ships.

        Args:
            progress: Receives the steps.

        Returns:
            The base in its shipped format, with the adapter merged in (lane merged) or beside it (lane adapter). If
            activations ship in int8, linear layers are still float here, and the embedding is int8 codes.
        """
        if (finished := self._finished(progress)) is not None:
            return finished
        beside = self.adapter if self.lane == "adapter" else None
        held = beside is not None and self.codes is not None
        chooses = self.weights == "int4" and bool(self.rows.calibration) and not held
        changes = self._plain_changes(beside) if chooses and self.size_mb is None else None
        if changes is not None:
            with heartbeat(progress, f"loading {self.base.name}, quantizing to int4 with GPTQ"):
                rows, finer = self._calibration(progress), self._run_finer
                spec = ModelSpec.from_rendering(self.base, self.rendering, "int4", self.grid, self.seed, rows, changes)
                model = load_model(replace(spec, finer=finer), progress)
            return model if beside is None else load_adapter(model, beside)
        with heartbeat(progress, f"loading {self.base.name}"):
            if self.lane != "merged" and self.weights not in INT8_ACTIVATIONS and not chooses:
                model = self.load(self.weights, progress)
                return model if beside is None else load_adapter(model, beside)
            model = self.load("fp32", progress)
            if self.adapter is not None and beside is None:
                model = merge_adapter(model, self.adapter)
        if chooses:
            rows, grid, keep, finer = self._calibration(progress), self.grid, self._float_modules, self._run_finer
            if self.size_mb is not None:
                grid, finer = fit(model, grid, keep, self.tokenizer.files(), self.size_mb * 1e6)
            with heartbeat(progress, "quantizing to int4 with GPTQ"):
                quantize_calibrated(model, self.task, grid, keep, rows, finer)
        elif self.weights != "fp32":
            with heartbeat(progress, f"rounding the weights to {self.weights}"):
                self._round(model, self.weights)
        return model if beside is None else load_adapter(model, beside)

    def _plain_changes(self, beside: Adapter | None) -> Changes | None:
        """Return what the adapter adds to each layer's weight, if that is all that distinguishes what ships.

        Then codes are chosen while weights are read one after the other, without the float model in memory.

        Args:
            beside: The adapter, where it stays beside the weights.

        Returns:
            A and B by layer; None for what else an adapter can hold: a vocabulary, a head, whole modules, variants.
        """
        if self.dims.vocabulary != self.base.dims.vocabulary:
            return None
        if self.adapter is None or beside is not None:
            return {}
        if self.run is None or self.adapter.beyond_lora_inputs(()) is not None:
            return None
        pairs, whole = self.adapter.read()
        return None if whole or not all(is_within(name, self.base.family.stacks) for name in pairs) else pairs

    def _calibration(self, progress: Progress) -> Calibration:
        """Return the rows that codes are chosen on."""
        examples, packs = self.rows.calibration, self.base.family.packs
        rows = make_calibration(examples, len(examples), self.tokenizer.pad_id, self.task, progress, packed=packs)
        assert rows is not None
        return rows

    @property
    def _run_finer(self) -> Finer:
        """The rows with 8 bits of the run's base, where it has codes."""
        return None if self.codes is None else stored_finer(self.codes)

    def _finished(self, progress: Progress) -> Any | None:
        """Return the merged model that the run ended on, if that is what ships.

        Raises:
            UsageError: its codes are not those that the run ended on.
        """
        run = self.run
        if run is None or self.lane != "merged" or self.weights != "int4" or not run.merged.is_dir():
            return None
        if self.size_mb is not None:
            progress.say("--size-mb: codes are chosen again, without trained scales")
            return None
        known = run.finished()
        if known is None or Grid.recorded(known) != self.grid:
            why = "is of another adapter" if known is None else "was rounded in another way"
            progress.say(f"the merged model in {run.merged} {why}: codes are chosen again, without trained scales")
            return None
        with heartbeat(progress, f"loading the merged model of {run.path}"):
            model = self.load("int4", progress, run.merged_codes)
        if codes_sha256(model) != known["codes_sha256"]:
            raise UsageError(f"{run.merged_codes} holds other codes than the run ended on: copy the run folder again")
        return model

    def _round(self, model: nn.Module, weights: BaseFormat | Weights) -> None:
        """Round the weights of a float model in place, each by itself."""
        if weights == "fp16":
            self._round_to_fp16(model)
        elif weights == "int4" or weights == "int8":
            quantize_model(model, self.grid, self._float_modules, BITS[weights])
        elif weights in INT8_ACTIVATIONS:
            layers = tuple(name for name, module in model.named_modules() if isinstance(module, nn.Linear))
            quantize_model(model, self.grid, layers, 8)

    @property
    def _float_modules(self) -> tuple[str, ...]:
        """Modules that stay float32 in every format: a head that is trained in full."""
        return self.base.family.trained_head(self.task)

    def _round_to_fp16(self, model: nn.Module) -> None:
        """Round matrices in place to values that float16 represents exactly.

        Raises:
            ModelError: a value exceeds float16's range.
        """
        largest = torch.finfo(torch.float16).max
        for name, parameter in model.named_parameters():
            if parameter.ndim < 2 or is_within(name, self._float_modules):
                continue  # norms and biases are too small to be worth rounding
            if parameter.abs().max() > largest:
                raise ModelError(f"{name} has a value beyond float16's {largest:.0f}: export with --weights fp32")
            parameter.data = parameter.data.half().float()
