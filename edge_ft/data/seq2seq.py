"""What an encoder-decoder reads and what it answers: two sequences of their own, each with its own end."""

import sys
from typing import NamedTuple

from edge_ft.data.columns import Columns
from edge_ft.data.tokenizer import TextTokenizer
from edge_ft.errors import DataError

__all__ = ["Pair", "check_pairs", "encode_pair", "encode_source"]


class Pair(NamedTuple):
    """One row in token ids."""

    source: list[int]
    """For the encoder: the prompt as the tokenizer's own post-processor frames it (T5: `</s>` behind it)."""
    target: list[int]
    """For the decoder to say: the completion and EOS. What it starts from is the model's decoder_start_token_id."""
    cut: int
    """Tokens beyond the limit, of both."""
    cut_targets: int
    """Those of the target among them."""


def check_pairs(columns: Columns, chat_template: str | None) -> None:
    """Refuse rows that are no pairs of prompt and completion.

    Raises:
        DataError: chats, texts alone, or a chat template.
    """
    if chat_template not in (None, "none"):
        raise DataError("--chat-template is for decoders: an encoder-decoder reads its prompt as --prompt writes it")
    if columns.kind == "messages" or columns.prompt is None:
        what = "chats" if columns.kind == "messages" else "texts alone"
        raise DataError(f"text2text-generation needs a prompt and a completion, and these rows are {what}")


def encode_source(tokenizer: TextTokenizer, prompt: str, limit: int | None = None) -> tuple[list[int], int]:
    """Ids of a prompt, framed and at most `limit` long, and how many tokens were cut off its end."""
    framed = tokenizer.encode_classifier(prompt, sys.maxsize if limit is None else limit)
    return framed.ids, framed.cut


def encode_pair(tokenizer: TextTokenizer, prompt: str, completion: str, eos: int, limit: int) -> Pair:
    """Both sides of a row, each at most `limit` tokens long; a target that is cut has no EOS, for it does not end."""
    source, cut = encode_source(tokenizer, prompt, limit)
    target = [*tokenizer.encode(completion), eos]
    lost = max(len(target) - limit, 0)
    return Pair(source, target[:limit], cut + lost, lost)
