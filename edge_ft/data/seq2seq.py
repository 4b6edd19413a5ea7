"""Rows of an encoder-decoder: prompt and answer are two sequences, each with its own end."""

import sys
from typing import NamedTuple

from edge_ft.data.columns import Columns
from edge_ft.data.tokenizer import TextTokenizer
from edge_ft.errors import DataError

__all__ = ["Pair", "check_pairs", "encode_pair", "encode_source"]


class Pair(NamedTuple):
    """One row in token ids."""

    source: list[int]
    """For the encoder: the prompt with the special tokens that the tokenizer adds (T5: `</s>` at its end)."""
    target: list[int]
    """For the decoder to learn: the completion and EOS; it starts from the model's decoder_start_token_id."""
    cut: int
    """Tokens of both that were cut off."""
    cut_targets: int
    """Tokens of the target that were cut off."""


def check_pairs(columns: Columns, chat_template: str | None) -> None:
    """Check that rows are pairs of prompt and completion.

    Raises:
        DataError: the rows are chats or single texts, or a chat template was given.
    """
    if chat_template not in (None, "none"):
        raise DataError(
            "--chat-template is for decoders: an encoder-decoder reads the prompt as --prompt writes it, leave it out"
        )
    if columns.kind == "messages" or columns.prompt is None:
        what = "chats" if columns.kind == "messages" else "single texts"
        raise DataError(
            f"text2text-generation needs a prompt and a completion, and these rows are {what}: "
            "name the columns with --prompt and --completion"
        )


def encode_source(tokenizer: TextTokenizer, prompt: str, limit: int | None = None) -> tuple[list[int], int]:
    """Return the ids of a prompt with its special tokens, at most `limit`, and how many tokens were cut off."""
    framed = tokenizer.encode_framed(prompt, sys.maxsize if limit is None else limit)
    return framed.ids, framed.cut


def encode_pair(tokenizer: TextTokenizer, prompt: str, completion: str, eos: int, limit: int) -> Pair:
    """Return both sequences of a row, each of at most `limit` tokens; a target that was cut has no EOS."""
    source, cut = encode_source(tokenizer, prompt, limit)
    target = [*tokenizer.encode(completion), eos]
    lost = max(len(target) - limit, 0)
    return Pair(source, target[:limit], cut + lost, lost)
