"""Settings of `edge-ft export` and `edge-ft verify`."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Literal

from edge_ft.config.shared import ABOVE_0, Group, Minimum, RowsConfig, Task, Threads, Weights, check
from edge_ft.errors import UsageError

__all__ = ["ExportConfig", "VerifyConfig"]


@dataclass(frozen=True, kw_only=True)
class ExportConfig(RowsConfig):
    """Settings of an export; the fields of `RowsConfig` need `data`."""

    out: Annotated[Path | None, Group.INPUT] = None
    """Bundle folder to write, or with --format gguf a FILE.gguf; it must not exist."""
    onto: Annotated[Path | None, Group.INPUT] = None
    """Instead of --out, a bundle of lane base or adapter that gets the adapter of SOURCE (a run folder, or a folder in
    PEFT's format) and answers with it from then on; needs no torch."""
    name: Annotated[str | None, Group.INPUT] = None
    """Name of the adapter in the bundle of --onto, for edge-ft run --adapter NAME; an adapter of this name is replaced;
    default: that of the folder."""
    adapter: Annotated[Path | None, Group.INPUT] = None
    """PEFT adapter to add to a plain model SOURCE; any tool may have trained it."""
    task: Annotated[Task | None, Group.INPUT] = None
    """Task of a plain model SOURCE; a run folder has its own."""
    data: Annotated[str | None, Group.INPUT] = None
    """Rows on which to score a plain model SOURCE; a run folder has its own rows."""
    format: Annotated[Literal["bundle", "gguf"], Group.BUNDLE] = "bundle"
    """bundle: a folder for edge-ft run and ONNX Runtime; gguf: one file for llama.cpp with the same 4-bit codes, and
    with --lane adapter the adapter beside it as FILE.lora.gguf."""
    weights: Annotated[Weights | None, Group.BUNDLE] = None
    """Weight format of the bundle; int8-dynamic and int8-static (encoders) compute in int8 too; default: int4, but
    int8 with --lane adapter of a run over int8."""
    lane: Annotated[Literal["merged", "adapter"], Group.BUNDLE] = "merged"
    """merged: the adapter becomes part of the weights; adapter: the base keeps its codes and the adapter stays in
    float beside them."""
    block_size: Annotated[Literal[16, 32, 64, 128] | None, Group.BUNDLE] = None
    """Weights that share one scale in int4 and int8; default: that of the run, else 32."""
    finish: Annotated[int, Group.BUNDLE, Minimum(0)] = 0
    """Steps that train the scales of a merged int4 model after its codes are chosen, for --adapter over a plain model
    SOURCE with --data; a run has its own from edge-ft tune --finish-steps."""
    size_mb: Annotated[float | None, Group.BUNDLE, ABOVE_0] = None
    """Megabytes (10^6 bytes) that the bundle of an int4 run of a decoder may take: layers whose rounding costs the most
    loss get 8 bits, as many as fit; default: those that have them in the training."""
    trainable: Annotated[bool | None, Group.BUNDLE] = None
    """Whether the bundle can be tuned where it runs (edge-ft tune --model BUNDLE); default: if its model can be, in
    less than 2 MB; a bundle of the merged lane cannot."""
    genai_graph: Annotated[Literal["exact", "fast"], Group.BUNDLE] = "exact"
    """Graph that genai_config.json names for onnxruntime-genai: exact is the manifest's model, fast the one with int8
    activations if it passed with nearly the same loss."""
    max_tax: Annotated[float | None, Group.GATE, Minimum(0)] = None
    """Refuse a bundle whose loss exceeds that of the trained model by more than this, in nats per target token;
    default: 0.1 where an adapter that was trained over float weights ships in int4, and 0.02 elsewhere."""
    min_retained: Annotated[float | None, Group.GATE] = None
    """Refuse a bundle that keeps less than this share of the improvement in loss over the base; default: 0.5 where an
    adapter that was trained over float weights ships in int4, and 0.95 elsewhere."""
    max_metric_drop: Annotated[float, Group.GATE, Minimum(0)] = 0.02
    """Refuse a bundle whose task metric (0 to 1) is lower by more than this, unless the 95% interval of the drop
    includes 0; embeddings also if their mean cosine with those as trained is further below 1."""
    threads: Threads = None
    """CPU threads; default: OMP_NUM_THREADS, or all CPUs that the process may use."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.out is not None or self.onto is not None, "--out is required: see edge-ft export --help")
        check(self.name is None or self.onto is not None, "--name is for --onto: leave it out")
        if self.onto is None:
            return
        check(self.out is None, "--onto changes a bundle where it is: leave --out out")
        fixed = (
            "adapter",
            "task",
            "weights",
            "block_size",
            "size_mb",
            "format",
            "genai_graph",
            "pooling",
            "class_names",
        )
        for field in fields(self):
            flag = f"--{field.name.replace('_', '-')}"
            given = getattr(self, field.name) != field.default
            check(not (given and field.name in fixed), f"{flag} was settled when the bundle was made: leave it out")

    @property
    def target(self) -> Path:
        """What is written.

        Raises:
            UsageError: a bundle is changed instead, with `onto`.
        """
        if self.out is None:
            raise UsageError("--out is required: see edge-ft export --help")
        return self.out


@dataclass(frozen=True, kw_only=True)
class VerifyConfig(RowsConfig):
    """Settings of a verification; without `data` only the files and the graphs are checked."""

    data: Annotated[str | None, Group.INPUT] = None
    """Rows to score: the validation rows of the export must score as they did then, other rows are only scored."""
    max_tax: Annotated[float | None, Group.GATE, Minimum(0)] = None
    """Limit for the quantization tax on the export's validation rows (--data), and for the change of the probe-text
    loss of accuracy level 4 since the export, in nats per target token; default: the limit of the export."""
    threads: Threads = None
    """CPU threads; default: OMP_NUM_THREADS, or all CPUs that the process may use."""
