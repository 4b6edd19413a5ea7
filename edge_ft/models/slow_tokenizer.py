"""A tokenizer without tokenizer.json: vocab.txt, vocab.json with merges.txt, or a SentencePiece or tiktoken model."""

import hashlib
import shutil
from pathlib import Path

from tokenizers import Tokenizer

from edge_ft.data import SLOW_FILES
from edge_ft.errors import ModelError
from edge_ft.files import atomic_folder, cache_folder, file_sha256
from edge_ft.models.logging import silence_libraries

__all__ = ["tokenizer_folder"]

SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "generation_config.json")


def tokenizer_folder(folder: Path) -> Path:
    """Return the folder that holds the tokenizer.json of a checkpoint, converted from its other files if there is none.

    Args:
        folder: The checkpoint.

    Returns:
        `folder` itself; or one in the user's cache, under the hash of what was converted.

    Raises:
        ModelError: transformers cannot convert the files.
    """
    slow = [name for name in SLOW_FILES if (folder / name).is_file()]
    if (folder / "tokenizer.json").is_file() or not slow:
        return folder
    # config.json decides the class of the tokenizer where its own settings do not.
    sources = [folder / name for name in (*slow, "merges.txt", "config.json", *SETTINGS) if (folder / name).is_file()]
    digest = hashlib.sha256("".join(f"{file.name} {file_sha256(file)}\n" for file in sources).encode())
    converted = cache_folder() / f"tokenizer-{digest.hexdigest()[:16]}"
    if converted.is_dir():
        return converted
    from transformers import AutoTokenizer

    try:
        with silence_libraries(), atomic_folder(converted) as temporary:
            AutoTokenizer.from_pretrained(folder, trust_remote_code=False).save_pretrained(temporary)
            Tokenizer.from_file(str(temporary / "tokenizer.json"))  # which tokenizers without a fast form lack
            if (folder / "generation_config.json").is_file():
                shutil.copyfile(folder / "generation_config.json", temporary / "generation_config.json")
    # The libraries raise errors of every kind, a bare Exception among them.
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        needed = "pip install sentencepiece tiktoken, or " if any(name.endswith(".model") for name in slow) else ""
        raise ModelError(
            f"{folder} has no tokenizer.json, and its {slow[0]} cannot be converted to one ({reason}): {needed}save "
            "the fast tokenizer there where it loads, with AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
        ) from error
    return converted
