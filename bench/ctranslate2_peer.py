"""CTranslate2 as a peer of encoder-decoder bundles: converts the float base once and times it token by token."""

import json
from pathlib import Path
from time import perf_counter
from typing import Any

from edge_ft.bench.meters import DecodeTimings
from edge_ft.data import TextTokenizer
from edge_ft.errors import ModelError, require
from edge_ft.files import atomic_folder, cache_folder

__all__ = ["Translator", "convert"]


def convert(found: dict[str, Any], compute_type: str) -> dict[str, Any]:
    """Convert a model for `Translator`, once, into the user's cache.

    Args:
        found: What `edge_ft.bench.torch_peer.find_bundle_base` returned.
        compute_type: int8 or float32, of the stored weights and of the products.

    Returns:
        `found` with `folder`, `compute_type`, and `size_bytes` of the converted model.

    Raises:
        ModelError: CTranslate2 cannot convert the model.
        MissingExtra: it is not installed.
    """
    converters = require("ctranslate2.converters", "peers")
    base = found["base"]
    folder = cache_folder() / f"ctranslate2-{base['content_sha256'][:16]}-{compute_type}"
    if not folder.is_dir():
        try:
            with atomic_folder(folder) as temporary:
                converter = converters.TransformersConverter(base["path"])
                converter.convert(str(temporary), quantization=compute_type, force=True)
        except (ValueError, RuntimeError, KeyError) as error:
            raise ModelError(f"CTranslate2 cannot convert {base['name']}: {error}") from error
    size = sum(file.stat().st_size for file in folder.iterdir())
    return found | {"folder": str(folder), "compute_type": compute_type, "size_bytes": size}


class Translator:
    """A converted model, decoding greedily."""

    def __init__(self, folder: Path, tokenizer: Path, compute_type: str, threads: int) -> None:
        ctranslate2 = require("ctranslate2", "peers")
        self.tokenizer = TextTokenizer.load(tokenizer)
        self._pieces: list[str] = json.loads((folder / "shared_vocabulary.json").read_text(encoding="utf-8"))
        self._translator = ctranslate2.Translator(
            str(folder), device="cpu", compute_type=compute_type, inter_threads=1, intra_threads=threads
        )

    def time_decode(self, prompt_ids: list[int], new_tokens: int) -> DecodeTimings:
        """Decode exactly `new_tokens` greedily and time each one; `prefill_s` is the time to the first one."""
        source = [self._pieces[token] for token in prompt_ids]
        marks = [perf_counter()]
        for _ in self._translator.generate_tokens(
            source, max_decoding_length=new_tokens, min_decoding_length=new_tokens
        ):
            marks.append(perf_counter())
        return DecodeTimings.between(marks)
