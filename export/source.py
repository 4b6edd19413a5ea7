"""What is exported: a run folder or a model brought to one form."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import nn

from edge_ft.artifacts import RunFolder, kind_of
from edge_ft.config import INT8_ACTIVATIONS, BaseFormat, ExportConfig, Task, Weights
from edge_ft.data import (
    Example,
    Rendering,
    Row,
    TextTokenizer,
    column_names,
    encode_rows,
    find_columns,
    find_labels,
    fingerprint,
    plain_rendering,
    read_rows,
)
from edge_ft.errors import DataError, ModelError, UsageError
from edge_ft.evaluate.loading import find_run_base, open_run_model
from edge_ft.evaluate.scoring import scorable
from edge_ft.evaluate.verify import VERIFY_ROWS
from edge_ft.models.base_model import Base, find_base
from edge_ft.models.loading import BITS, ModelSpec, load_model, quantize_over
from edge_ft.models.lora import adapter_task, load_adapter, merge_adapter
from edge_ft.progress import Progress
from edge_ft.quant.calibration import choose_rows, spread
from edge_ft.quant.layers import is_within, quantize_model

__all__ = ["Source", "open_export_source"]

CALIBRATION_ROWS = 128
"""Train rows that int8-static reads: ranges are those of the layers, and more rows hardly widen them."""


@dataclass(frozen=True)
class Source:
    """A base, perhaps an adapter on it, and the rows that verification scores."""

    base: Base
    task: Task
    adapter: Path | None
    trained_format: BaseFormat
    """What the adapter was trained over; float for one that was trained elsewhere."""
    weights: Weights
    """Format of the weights that ship."""
    block_size: int
    tokenizer: TextTokenizer
    rendering: Rendering
    validation: list[Example]
    test: list[Example]
    calibration: list[Example]
    """Train rows that give int8-static its ranges, or over which int4 codes are chosen; none for other weights."""
    rows_sha256: str | None
    """Fingerprint of the validation rows."""
    data_fingerprint: str | None
    run: RunFolder | None
    seed: int

    def load(self, base_format: BaseFormat | Weights) -> Any:
        """The base alone, in float or on the grid; fp16 is float whose matrices float16 holds exactly."""
        narrow = base_format == "fp16"
        held: dict[str, BaseFormat] = dict.fromkeys(("fp16", *INT8_ACTIVATIONS), "fp32")
        form = held.get(base_format) or cast(BaseFormat, base_format)
        codes = None
        if self.run is not None and self.run.codes.is_file() and self.block_size == self.run.base()["block_size"]:
            codes = self.run.codes
        spec = ModelSpec.from_rendering(self.base, self.rendering, form, self.block_size, self.seed, codes)
        model = load_model(spec)
        if narrow:
            self._round_to_fp16(model)
        return model

    def load_trained(self) -> Any:
        """The model as it was trained: the base in its format, the adapter beside it."""
        assert self.adapter is not None
        if self.run is not None:
            return open_run_model(self.run)[0]
        return load_adapter(self.load(self.trained_format), self.adapter)

    def load_shipped(self, lane: str, progress: Progress) -> Any:
        """The model that ships: merged in float and then rounded, or the base with the adapter beside it.

        With activations in int8 its layers are float still (the graph's are rounded), and its embedding is codes.
        """
        if self.weights in INT8_ACTIVATIONS:
            model = self.load("fp32")
            model = model if self.adapter is None else merge_adapter(model, self.adapter)
            layers = tuple(name for name, module in model.named_modules() if isinstance(module, nn.Linear))
            quantize_model(model, self.block_size, layers, 8)
            return model
        if self.adapter is None:
            return self.load(self.weights)
        if lane == "adapter":
            return load_adapter(self.load(self.weights), self.adapter)
        merged = merge_adapter(self.load("fp32"), self.adapter)
        if self.weights == "fp16":
            self._round_to_fp16(merged)
        elif self.weights == "int4" and self.calibration:
            rows = choose_rows(self.calibration, len(self.calibration), self.tokenizer.pad_id, self.task, progress)
            assert rows is not None
            quantize_over(merged, self.task, self.block_size, self._keep, rows)
        elif self.weights == "int4" or self.weights == "int8":
            quantize_model(merged, self.block_size, self._keep, BITS[self.weights])
        return merged

    @property
    def _keep(self) -> tuple[str, ...]:
        """What stays float32 whatever the rest is: a head that is trained in full."""
        return self.base.family.trained_head(self.task)

    def _round_to_fp16(self, model: nn.Module) -> None:
        largest = torch.finfo(torch.float16).max
        for name, parameter in model.named_parameters():
            if parameter.ndim < 2 or is_within(name, self._keep):
                continue  # norms and biases are not worth a rounding
            if parameter.abs().max() > largest:
                raise ModelError(f"{name} holds a value beyond float16's {largest:.0f}: export with --weights fp32")
            parameter.data = parameter.data.half().float()


def open_export_source(source: str, config: ExportConfig) -> Source:
    """Read what `edge-ft export SOURCE` names.

    Raises:
        UsageError: a source that cannot be exported, or options that do not fit it.
    """
    kind = kind_of(source)
    if kind == "bundle":
        raise UsageError(f"{source} is a bundle already: export takes a run folder or a model")
    return _from_run(RunFolder.open(Path(source)), config) if kind == "run" else _from_model(source, config)


def _from_run(run: RunFolder, config: ExportConfig) -> Source:
    for flag, value in (
        ("--adapter", config.adapter),
        ("--data", config.data),
        ("--task", config.task),
        ("--pooling", config.pooling),
    ):
        if value is not None:
            raise UsageError(f"{flag} is for a model: the run folder {run.path} brings its own")
    identity, report = run.base(), run.report()
    trained_format: BaseFormat = identity["format"]
    weights = config.weights or "int4"
    if config.lane == "adapter":
        if trained_format == "nf4" or trained_format == "bf16":
            raise UsageError(
                f"{run.path} was trained over {trained_format}, which bundles do not hold: export it with --lane merged"
            )
        weights = config.weights or trained_format
    base = find_run_base(run)
    _refuse_int8_activations(weights, base, config.lane)
    tokenizer = TextTokenizer.load(run.tokenizer)
    rendering = Rendering.from_dict(run.rendering())
    rows = read_rows(str(run.split("validation")))[:VERIFY_ROWS]
    test = read_rows(str(run.split("test"))) if run.split("test").stat().st_size else []
    read = {"int8-static": CALIBRATION_ROWS, "int4": identity.get("calibration_rows", 0)}.get(weights, 0)
    if weights == "int4" and base.dims.repeats_layers:
        read = 0
    train = spread(read_rows(str(run.split("train"))), read) if read else []
    return Source(
        base=base,
        task=report["task"],
        adapter=run.adapter,
        trained_format=trained_format,
        weights=weights,
        block_size=config.block_size or int(identity["block_size"]),
        tokenizer=tokenizer,
        rendering=rendering,
        validation=scorable(encode_rows(rendering, tokenizer, rows)),
        test=scorable(encode_rows(rendering, tokenizer, test)),
        calibration=encode_rows(rendering, tokenizer, train),
        rows_sha256=fingerprint(rows),
        data_fingerprint=identity["data_fingerprint"],
        run=run,
        seed=int(report["seed"]),
    )


def _from_model(source: str, config: ExportConfig) -> Source:
    base = find_base(source, config.task)
    weights = config.weights or "int4"
    _refuse_int8_activations(weights, base, config.lane if config.adapter else "base")
    if weights == "int8-static" and config.data is None:
        raise UsageError("--weights int8-static measures its ranges on rows, and a model brings none: give --data")
    tokenizer = TextTokenizer.load(base.path)
    # An adapter that cannot be used is refused before any work.
    task = config.task or (adapter_task(config.adapter) if config.adapter is not None else None) or base.task
    rows = read_rows(config.data)[:VERIFY_ROWS] if config.data is not None else []
    labels = _labels(base, task, config, rows) if base.family.trained_head(task) else ()
    rendering = plain_rendering(base, config, rows, tokenizer, task, labels)
    examples = scorable(encode_rows(rendering, tokenizer, rows))
    rendering = replace(rendering, labels=labels)  # rows may name classes by number; the bundle names them by name
    if rows and not examples:
        raise DataError(f"{config.data}: no row has an answer to score")
    return Source(
        base=base,
        task=task,
        adapter=config.adapter,
        trained_format="fp32",
        weights=weights,
        block_size=config.block_size or 32,
        tokenizer=tokenizer,
        rendering=rendering,
        validation=examples,
        test=[],
        calibration=examples[:CALIBRATION_ROWS] if weights == "int8-static" else [],
        rows_sha256=fingerprint(rows) if rows else None,
        data_fingerprint=None,
        run=None,
        seed=0,
    )


def _refuse_int8_activations(weights: Weights, base: Base, lane: str) -> None:
    """Where they cannot hold what they promise."""
    if weights in INT8_ACTIVATIONS and base.family.kind != "encoder":
        raise UsageError(
            f"--weights {weights} is for encoders and {base.family.name} is none: export it with int8, whose graph of "
            "accuracy level 4 has activations in int8 too"
        )
    if weights in INT8_ACTIVATIONS and lane == "adapter":
        raise UsageError(
            f"--weights {weights} has no adapter lane: that is exactly what was trained, and activations in int8 are "
            "not; use --lane merged"
        )


def _labels(base: Base, task: Task, config: ExportConfig, rows: list[Row]) -> tuple[str, ...]:
    """Class names: the checkpoint's; for the head that an adapter brings, the rows' if they are as many, else LABEL_i.

    Raises:
        ModelError: neither the model nor the adapter has a head.
    """
    own, size = base.labels(task), 0
    if config.adapter is not None:
        with safe_open(config.adapter / "adapter_model.safetensors", "np") as weights:
            for key in weights.keys():  # noqa: SIM118 - not a dict
                if key.endswith(base.family.class_weights(task)):
                    size = weights.get_slice(key).get_shape()[0]
    if size in (0, len(own)):
        if not own:
            raise ModelError(f"{base.path} has no head for {task}: tune it first")
        return own
    found = find_labels(rows, find_columns(column_names(rows), config, task)) if rows else ()
    return found if len(found) == size else tuple(f"LABEL_{index}" for index in range(size))
