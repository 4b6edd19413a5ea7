"""The tokens that begin, end and pad the texts of a model that generates: one source for every file of its bundle."""

from dataclasses import dataclass
from typing import Any

from edge_ft.data.chat import end_of_turn
from edge_ft.data.rendering import Rendering
from edge_ft.data.tokenizer import TextTokenizer

__all__ = ["SpecialIds", "stop_ids"]


@dataclass(frozen=True)
class SpecialIds:
    """Ids as `generation_config.json`, `genai_config.json`, `config.json` and the manifest name them."""

    bos: int | None
    """What is put before a text, else the tokenizer's named BOS; None: it names none."""
    ends: tuple[int, ...]
    """What ends an answer, first the one that this rendering puts after an answer."""
    pad: int

    @classmethod
    def of(cls, rendering: Rendering, tokenizer: TextTokenizer) -> "SpecialIds":
        """Return the ids for answers to prompts of this rendering: the model's own, and what the rendering uses."""
        template = rendering.chat_template
        learned = (rendering.appended_eos, None if template is None else end_of_turn(template, tokenizer))
        own = (tokenizer.eos_id, *sorted(tokenizer.stop_ids))
        ends = dict.fromkeys(end for end in (*learned, *own) if end is not None)
        bos = rendering.bos if rendering.bos is not None else tokenizer.named_bos_id
        return cls(bos, tuple(ends), tokenizer.pad_id)

    def settings(self) -> dict[str, Any]:
        """Return the ids under transformers' names; a single end as a number."""
        ends = self.ends[0] if len(self.ends) == 1 else list(self.ends) or None
        return {"bos_token_id": self.bos, "eos_token_id": ends, "pad_token_id": self.pad}


def stop_ids(rendering: Rendering, tokenizer: TextTokenizer) -> frozenset[int]:
    """Return the ids that end an answer: the model's own, and the one that this rendering puts after an answer."""
    return frozenset(SpecialIds.of(rendering, tokenizer).ends)
