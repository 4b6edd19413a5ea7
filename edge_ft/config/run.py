"""Settings of `edge-ft run`."""

from dataclasses import dataclass
from typing import Literal

from edge_ft.config.fields import check

__all__ = ["RunConfig"]


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """How `edge-ft run` answers."""

    max_new_tokens: int | None = None
    """Longest answer in tokens; default 256, or fewer where the model's limit is nearer."""
    temperature: float = 0.0
    """0 is greedy; above it tokens are sampled."""
    top_k: int = 0
    """Sample among the k likeliest tokens; 0 is all. fill-mask: tokens given for each mask; 0 is 5."""
    top_p: float = 1.0
    """Sample among the likeliest tokens that hold this much probability."""
    min_p: float = 0.0
    """Leave out tokens less likely than this share of the likeliest."""
    repetition_penalty: float = 1.0
    """Above 1 makes tokens that were already seen less likely (CTRL, arXiv:1909.05858)."""
    seed: int = 0
    """Seed of the sampling."""
    num_beams: int = 1
    """Answers that an encoder-decoder follows side by side, to give the likeliest; 1 is greedy or sampled."""
    length_penalty: float = 1.0
    """With beams: an answer's log-probability is divided by its tokens to this power; above 0 favours long answers."""
    text_pair: str | None = None
    """Second text, for a model that was trained on pairs."""
    stop: tuple[str, ...] = ()
    """Strings at which the answer ends (they are not part of it)."""
    labels: tuple[str, ...] = ()
    """Choose among these answers instead of writing one (text-generation), with a score for each; auto: those that the
    training rows had, where they were few."""
    system: str | None = None
    """System message put before a chat."""
    chat_template: str | None = None
    """auto, none or a jinja file; default what the bundle was trained with."""
    adapter: str | None = None
    """none: answer with the base of an adapter-lane bundle."""
    accuracy_level: Literal[1, 4] | None = None
    """1: exact; 4: activations in int8, if the bundle's verification passed it; default the manifest's."""
    threads: int | None = None
    """CPU threads; default all cores."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "labels", tuple(name for names in self.labels for name in names.split(",") if name))
        check(self.max_new_tokens is None or self.max_new_tokens >= 1, "--max-new-tokens must be at least 1")
        check(self.temperature >= 0, "--temperature cannot be negative")
        check(self.top_k >= 0, "--top-k cannot be negative")
        check(0 < self.top_p <= 1, "--top-p must be in (0, 1]")
        check(0 <= self.min_p <= 1, "--min-p must be in [0, 1]")
        check(self.repetition_penalty > 0, "--repetition-penalty must be above 0")
        check(self.num_beams >= 1, "--num-beams must be at least 1")
        check(
            self.num_beams == 1 or (self.temperature == 0 and self.repetition_penalty == 1),
            "--num-beams follows the likeliest answers: leave --temperature and --repetition-penalty out",
        )
        check(
            self.num_beams > 1 or self.length_penalty == 1, "--length-penalty compares beams: give --num-beams above 1"
        )
        check(self.threads is None or self.threads >= 1, "--threads must be at least 1")
