"""From rows to token ids and loss masks: the same in training and at run time, without torch."""

from edge_ft.data.audit import CODES, Finding, audit, format_rows, preview, shorten, template_marks
from edge_ft.data.batches import (
    IGNORED,
    Batch,
    Example,
    batch_tokens,
    collate,
    eval_batches,
    pad,
    target_mask,
    train_batches,
)
from edge_ft.data.chat import render_chat
from edge_ft.data.class_audit import absent_class, count_classes
from edge_ft.data.classes import class_index, class_numbers, is_unnamed
from edge_ft.data.clock import clock_at, reads_clock
from edge_ft.data.columns import Columns, bare_columns, find_columns, find_problem, guess_task
from edge_ft.data.encoders import encode_words, split_words
from edge_ft.data.encoding import (
    answer_ids,
    encode_example,
    encode_pair,
    encode_prompt,
    encode_rows,
    find_answers,
    show_example,
)
from edge_ft.data.readers import Row, Rows, column_names, read_rows, split_names
from edge_ft.data.records import Message, Record, answer_of, fill_text, find_labels, has_answer, is_empty, record
from edge_ft.data.references import answer_tokens, untrained_references
from edge_ft.data.rendering import (
    Rendering,
    longest_sequence,
    make_rendering,
    plain_rendering,
    trained_rendering,
    with_pooling,
)
from edge_ft.data.special_ids import SpecialIds, stop_ids
from edge_ft.data.split import fingerprint, overlap, split_rows
from edge_ft.data.tokenizer import Filled, Framed, KnownIds, TextTokenizer

__all__ = [
    "CODES",
    "IGNORED",
    "Batch",
    "Columns",
    "Example",
    "Filled",
    "Finding",
    "Framed",
    "KnownIds",
    "Message",
    "Record",
    "Rendering",
    "Row",
    "Rows",
    "SpecialIds",
    "TextTokenizer",
    "absent_class",
    "answer_ids",
    "answer_of",
    "answer_tokens",
    "audit",
    "bare_columns",
    "batch_tokens",
    "class_index",
    "class_numbers",
    "clock_at",
    "collate",
    "column_names",
    "count_classes",
    "encode_example",
    "encode_pair",
    "encode_prompt",
    "encode_rows",
    "encode_words",
    "eval_batches",
    "fill_text",
    "find_answers",
    "find_columns",
    "find_labels",
    "find_problem",
    "fingerprint",
    "format_rows",
    "guess_task",
    "has_answer",
    "is_empty",
    "is_unnamed",
    "longest_sequence",
    "make_rendering",
    "overlap",
    "pad",
    "plain_rendering",
    "preview",
    "read_rows",
    "reads_clock",
    "record",
    "render_chat",
    "shorten",
    "show_example",
    "split_names",
    "split_rows",
    "split_words",
    "stop_ids",
    "target_mask",
    "template_marks",
    "train_batches",
    "trained_rendering",
    "untrained_references",
    "with_pooling",
]
