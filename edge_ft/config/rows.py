"""How rows are read, which most commands can be told."""

from dataclasses import dataclass
from typing import Literal

from edge_ft.config.fields import accept_python_values, check
from edge_ft.config.names import Pooling, ProblemType

__all__ = ["RowsConfig"]


@dataclass(frozen=True, kw_only=True)
class RowsConfig:
    """How columns of a file become what the model reads."""

    pooling: Pooling | None = None
    """What of a text's hidden states is its embedding (feature-extraction); default what the model's own files say,
    else mean."""

    prompt: str | None = None
    """Template for the prompt, e.g. "{passage} {question}"; the text is as written, \\n and \\t are newline and tab."""
    completion: str | None = None
    """Template for the answer to learn, e.g. "{answer}"."""
    text_pair: str | None = None
    """Template for a second text that is read with the first, e.g. "{passage}" (text-classification)."""
    label: str | None = None
    """Column of the class, of several (a list) or of a number (text-classification), or of the words' tags
    (token-classification)."""
    problem_type: ProblemType | None = None
    """What the label column holds (text-classification); default: lists are several classes, numbers that are not
    all whole are regression, all else one class."""
    chat_template: str | None = None
    """auto (the model's own), none, or a jinja file; default auto, with --prompt none."""
    max_length: int | Literal["auto"] | None = None
    """Longest sequence in tokens; default the model's limit, at most 1024. Longer rows are cut, and said. auto (tune):
    so many that 99% of the rows are whole, in steps of 32. Of an encoder-decoder, prompt and answer each."""

    def __post_init__(self) -> None:
        accept_python_values(self)
        check(
            self.max_length in (None, "auto") or (isinstance(self.max_length, int) and self.max_length >= 8),
            "--max-length must be at least 8 tokens, or auto",
        )
        check(
            self.completion is None or self.prompt is not None,
            "--completion needs --prompt: give both templates",
        )
        check(
            self.text_pair is None or self.prompt is not None,
            "--text-pair needs --prompt: give the templates of both texts",
        )
