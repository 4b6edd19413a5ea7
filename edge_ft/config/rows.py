"""Settings of how rows are read, which most commands share."""

from dataclasses import dataclass
from typing import Annotated, Literal

from edge_ft.config.fields import Group, Pooling, ProblemType, accept_python_values, check

__all__ = ["RowsConfig"]


@dataclass(frozen=True, kw_only=True)
class RowsConfig:
    """How the columns of a file become the text that the model reads."""

    prompt: Annotated[str | None, Group.ROWS] = None
    r"""Template of the prompt, e.g. "{passage} {question}"; \n is a newline and \t a tab."""
    completion: Annotated[str | None, Group.ROWS] = None
    """Template of the answer to train on, e.g. "{answer}"; needs --prompt."""
    text_pair: Annotated[str | None, Group.ROWS] = None
    """Template of a second text that the model reads with the first, e.g. "{passage}" (text-classification)."""
    label: Annotated[str | None, Group.ROWS] = None
    """Column with a class, a list of classes or a number (text-classification), or with a tag for each word
    (token-classification)."""
    problem_type: Annotated[ProblemType | None, Group.ROWS] = None
    """Kind of the labels (text-classification); default: multi-label for lists, regression for numbers that are not
    all whole, else single-label."""
    pooling: Annotated[Pooling | None, Group.ROWS] = None
    """How the embeddings of the tokens become one (feature-extraction); default: as the model's files say, else
    mean."""
    chat_template: Annotated[str | None, Group.ROWS] = None
    """Chat template: auto (the model's own), none, or a Jinja file; default: auto, or none with --prompt."""
    max_length: Annotated[int | Literal["auto"] | None, Group.ROWS] = None
    """Maximum length in tokens, to which longer rows are cut; auto (tune) is long enough for 99% of the rows; default:
    the model's limit, at most 1024."""

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
