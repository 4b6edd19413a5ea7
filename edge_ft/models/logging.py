"""Silence the messages of transformers and PEFT."""

import contextlib
import io
import warnings
from collections.abc import Iterator

from transformers.utils import logging

__all__ = ["silence_libraries"]


@contextlib.contextmanager
def silence_libraries() -> Iterator[None]:
    """Hide the progress bars, hints and warnings of transformers and PEFT while inside; exceptions pass."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        # The GGUF reader's progress bar is tqdm's own, written to stderr.
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
