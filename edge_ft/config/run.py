"""Settings of `edge-ft run`."""

from dataclasses import dataclass
from typing import Annotated, Literal

from edge_ft.config.shared import ABOVE_0, Group, Minimum, Seed, Threads, check, check_minimums

__all__ = ["RunConfig"]


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """How a bundle answers."""

    adapter: Annotated[str | None, Group.INPUT] = None
    """Answer with another adapter: a run folder, an adapter in PEFT's format, the name of one in the bundle, or none
    for the base; default: the bundle's own."""
    engine: Annotated[Literal["auto", "exact"], Group.INPUT] = "auto"
    """auto: the fastest graphs here of those that the export's verification passed, measured for about two seconds at
    the first run and remembered; exact: the manifest's model, whose answers are the same each time."""
    accuracy_level: Annotated[Literal[1, 4] | None, Group.INPUT] = None
    """Graph to use: 1 computes in float, 4 with int8 activations, if the bundle has that graph; default: as --engine
    says."""
    text_pair: Annotated[str | None, Group.INPUT] = None
    """Second text, for a model trained on pairs of texts."""
    system: Annotated[str | None, Group.INPUT] = None
    """System message that begins a chat."""
    chat_template: Annotated[str | None, Group.INPUT] = None
    """Chat template: auto (the model's own), none, or a Jinja file; default: that of the training."""
    max_new_tokens: Annotated[int | None, Group.GENERATION, Minimum(1)] = None
    """Maximum length of an answer in tokens; default: 256, or less where the model's limit is nearer."""
    overflow: Annotated[Literal["error", "truncate-left", "shift"], Group.GENERATION] = "error"
    """Where prompt and answer exceed the model's limit (decoders): error refuses, truncate-left drops the beginning of
    the prompt, shift drops it and goes on dropping as the answer grows."""
    temperature: Annotated[float, Group.GENERATION, Minimum(0)] = 0.0
    """Sampling temperature; 0 is greedy decoding."""
    top_k: Annotated[int, Group.GENERATION, Minimum(0)] = 0
    """Sample from the k likeliest tokens, 0 from all; for fill-mask, candidates per mask (0 gives 5)."""
    top_p: Annotated[float, Group.GENERATION] = 1.0
    """Sample from the likeliest tokens whose probabilities sum to this (nucleus sampling)."""
    min_p: Annotated[float, Group.GENERATION] = 0.0
    """Do not sample tokens below this share of the highest probability."""
    repetition_penalty: Annotated[float, Group.GENERATION, ABOVE_0] = 1.0
    """Above 1, tokens that occurred before become less likely (CTRL, arXiv:1909.05858)."""
    seed: Annotated[Seed, Group.GENERATION] = 0
    """Random seed of the sampling."""
    num_beams: Annotated[int, Group.GENERATION, Minimum(1)] = 1
    """Beams of beam search (encoder-decoders); 1 is no beam search."""
    length_penalty: Annotated[float, Group.GENERATION] = 1.0
    """Beam search divides an answer's log-probability by its length to this power; above 0 favours long answers."""
    stop: Annotated[tuple[str, ...], Group.GENERATION] = ()
    """Strings that end an answer; they are not part of it."""
    labels: Annotated[tuple[str, ...], Group.GENERATION] = ()
    """Choose the likeliest of these answers instead of generating one (text-generation): a,b,c, or one answer with
    each --labels where an answer holds a comma; auto: the answers stored in the bundle, if the training rows had few
    different ones."""
    threads: Threads = None
    """CPU threads; default: OMP_NUM_THREADS, or all CPUs that the process may use."""

    def __post_init__(self) -> None:
        if len(self.labels) == 1:
            names = (name.strip() for name in self.labels[0].split(","))
            object.__setattr__(self, "labels", tuple(name for name in names if name))
        check_minimums(self)
        check(
            self.engine == "auto" or self.accuracy_level is None,
            "--engine exact runs the manifest's model: leave --accuracy-level out",
        )
        check(
            self.overflow == "error" or not self.labels,
            "--overflow is for answers that are generated: leave it out with --labels",
        )
        check(0 < self.top_p <= 1, "--top-p must be above 0 and at most 1")
        check(0 <= self.min_p <= 1, "--min-p must be from 0 to 1")
        check(
            self.num_beams == 1 or (self.temperature == 0 and self.repetition_penalty == 1),
            "--num-beams does not sample: leave --temperature and --repetition-penalty out",
        )
        check(
            self.num_beams > 1 or self.length_penalty == 1,
            "--length-penalty is for beam search: give --num-beams above 1",
        )
