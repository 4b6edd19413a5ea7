"""llama.cpp as a peer of decoder bundles: their weights as GGUF, run by the prebuilt wheel `xllamacpp`.

It is set up as its users would for speed: weights repacked for the processor at loading, flash attention where
llama.cpp chooses it, a float16 cache, one slot, the whole prompt in one batch.
"""

import hashlib
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_ft.bench.meters import DecodeTimings
from edge_ft.data import Rendering, SpecialIds, TextTokenizer
from edge_ft.errors import ModelError, UsageError, require
from edge_ft.files import atomic_folder, cache_folder, write_json
from edge_ft.utf8 import read_json

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["LlamaCppDecoder", "make_files"]

FILES = {"Q4_0": ("Q4_0", "Q4_0"), "Q4_0, 8-bit head": ("Q4_0", "Q8_0"), "own codes": (None, None)}
"""Files that are made of a bundle: types of the matrices, and of the token embedding and head; None: the bundle's codes
as they are (Q4_1)."""
WRITER = 2
"""Part of the files' name in the cache: raised when they are written in another way."""
MADE = "made.json"
CONTEXT_STEP = 256
"""llama.cpp rounds the length of its cache up to a multiple of this."""


def make_files(bundle: Path) -> dict[str, Any]:
    """Write a bundle's weights as GGUF files, once, into the user's cache.

    Args:
        bundle: Of a decoder with 4-bit weights.

    Returns:
        `{"files": {name in FILES: {"path", "size_bytes", "rounded_from"}}}`: what Q4_0 was rounded from is the float
        base of a bundle that was not tuned, else the bundle's own 4-bit weights.

    Raises:
        UsageError: GGUF cannot hold the bundle's model.
        MissingExtra: xllamacpp or gguf is not installed.
    """
    require("xllamacpp", "peers")
    require("gguf", "train")
    from edge_ft.artifacts import Bundle

    opened = Bundle.open(bundle)
    identity = f"{WRITER} {sorted((name, file['sha256']) for name, file in opened.manifest['files'].items())}"
    folder = cache_folder() / f"llama-cpp-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"
    if not folder.is_dir():
        with atomic_folder(folder) as temporary:
            _write_files(opened, temporary)
    source = read_json(folder / MADE)["rounded_from"]
    made = {}
    for at, (name, (matrices, _)) in enumerate(FILES.items()):
        path = folder / f"{at}.gguf"
        rounded = source if matrices else None
        made[name] = {"path": str(path), "size_bytes": path.stat().st_size, "rounded_from": rounded}
    return {"files": made}


def _write_files(bundle: Any, folder: Path) -> None:
    """Write a file for each of `FILES`.

    Raises:
        UsageError: GGUF cannot hold the model.
    """
    from edge_ft.export.bundle_weights import bundle_weights
    from edge_ft.export.gguf_metadata import lost_settings
    from edge_ft.export.gguf_model import GgufModel, write_gguf_model
    from edge_ft.models.dims import ModelDims, read_config
    from edge_ft.models.gguf import plan_conversion
    from edge_ft.models.gguf_header import read_header

    settings = read_json(bundle.path / "config.json")
    config = read_config(settings["model_type"], settings, bundle.path / "config.json")
    tokenizer = TextTokenizer.of_bundle(bundle.path)
    rendering = Rendering.from_dict(bundle.manifest["rendering"])
    model = GgufModel(
        bundle.path.name, None, config, tokenizer, SpecialIds.of(rendering, tokenizer), rendering.chat_template
    )
    weights = bundle_weights(bundle.graph(), ModelDims(config))
    base = _float_weights(bundle)
    write_json(folder / MADE, {"rounded_from": "own codes" if base is None else "float base"})
    for at, (matrices, head) in enumerate(FILES.values()):
        file = folder / f"{at}.gguf"
        write_gguf_model(file, model, weights if matrices is None else _rounded(weights, base, matrices, str(head)))
        try:
            plan = plan_conversion(read_header(file))
        except ModelError as error:
            raise UsageError(f"--peers llama.cpp: {bundle.path} cannot be written as GGUF: {error}") from error
        if lost := lost_settings(config, plan.config):
            raise UsageError(f"--peers llama.cpp: a GGUF file cannot hold {bundle.path}: {'; '.join(lost)}")


def _float_weights(bundle: Any) -> dict[str, Any] | None:
    """Return the float weights that a bundle was rounded from; None where it was tuned, or its base is gone."""
    from edge_ft.models.base_model import find_base
    from edge_ft.models.loading import ModelSpec, load_model

    identity = bundle.manifest["provenance"]["base"]
    if bundle.manifest["lane"] != "base":
        return None
    try:
        base = find_base(identity["model"])
    except ModelError:
        return None
    if base.content_sha256 != identity["content_sha256"]:
        return None
    model = load_model(ModelSpec(base, bundle.task))
    return {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}


def _rounded(weights: Mapping[str, Any], base: Mapping[str, Any] | None, matrices: str, head: str) -> dict[str, Any]:
    """Return the weights with codes as llama.cpp's own rounding of the float base, or else of the codes, gives them."""
    from gguf import GGMLQuantizationType, quants

    from edge_ft.export.gguf_file import Blocks
    from edge_ft.quant.blockwise import Codes, dequantize

    found: dict[str, Any] = {}
    for name, weight in weights.items():
        if isinstance(weight, Codes):
            kind = head if name.rpartition(".")[0].endswith(("embed_tokens", "lm_head")) else matrices
            floats = dequantize(weight) if base is None else base[name]
            weight = Blocks(quants.quantize(floats, GGMLQuantizationType[kind]), kind)
        found[name] = weight
    return found


class LlamaCppDecoder:
    """A decoder with the calls of `edge_ft.runtime.TextGenerator`, timed by llama.cpp itself.

    The process must end with `os._exit`: llama.cpp's threads do not stop for the interpreter.

    Raises:
        UsageError: llama.cpp cannot open the file.
    """

    def __init__(self, file: Path, bundle: Path, threads: int, positions: int) -> None:
        xllamacpp = require("xllamacpp", "peers")
        self.tokenizer = TextTokenizer.of_bundle(bundle)
        settings = xllamacpp.CommonParams()
        settings.model.path = str(file)
        settings.n_ctx = -(-positions // CONTEXT_STEP) * CONTEXT_STEP
        settings.n_parallel = 1
        settings.n_batch = settings.n_ubatch = settings.n_ctx
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = threads
        settings.warmup = False  # the first answer is the cold start, as of every subject
        settings.cache_ram_mib = 0  # no prompts kept for later
        settings.ui = settings.endpoint_slots = False
        self.settings = {
            "n_ctx": settings.n_ctx,
            "n_ubatch": settings.n_ubatch,
            "n_threads": threads,
            "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "default"),
            "flash_attn": settings.flash_attn_type.name.removeprefix("LLAMA_FLASH_ATTN_TYPE_").lower(),
            "cache_type_k": settings.cache_type_k.name.removeprefix("GGML_TYPE_"),
            "cache_type_v": settings.cache_type_v.name.removeprefix("GGML_TYPE_"),
            "repack": not settings.no_extra_bufts,
            "system": " ".join(xllamacpp.get_system_info().split()),
        }
        try:
            self._server = xllamacpp.Server(settings)
        except RuntimeError as error:
            raise UsageError(f"llama.cpp cannot open {file}: {error}") from error

    def time_decode(self, prompt_ids: list[int], new_tokens: int) -> DecodeTimings:
        """Decode exactly `new_tokens` greedily, past any stop token.

        Returns:
            llama.cpp's own times. Where one message brings several tokens (the bytes of a letter), they share its time.

        Raises:
            UsageError: llama.cpp refused the prompt, or generated another number of tokens.
        """
        request = {
            "prompt": prompt_ids,
            "n_predict": new_tokens,
            "ignore_eos": True,
            "temperature": 0.0,
            "cache_prompt": False,
            "stream": True,
            "timings_per_token": True,
        }
        timings = [message["timings"] for message in self._messages(request) if "timings" in message]
        prefill, decode = timings[-1]["prompt_ms"] / 1e3, []
        tokens, elapsed = 1, 0.0
        for timing in timings:
            count = min(timing["predicted_n"], new_tokens) - tokens
            if count > 0:
                decode += [(timing["predicted_ms"] - elapsed) / 1e3 / count] * count
                tokens, elapsed = tokens + count, timing["predicted_ms"]
        if len(decode) != new_tokens - 1:
            raise UsageError(f"llama.cpp generated {tokens} tokens, not {new_tokens}")
        return DecodeTimings(prefill, prefill, tuple(decode))

    def log_probabilities(self, ids: list[int], vocabulary: int) -> "NDArray[np.float32]":
        """Return the log-probability [vocab] of each next token after `ids`; a prefix read before is not read again."""
        import numpy as np

        request = {"prompt": ids, "n_predict": 1, "temperature": 0.0, "logprobs": vocabulary, "cache_prompt": True}
        reply = self._server.handle_completions(request)
        found = np.full(vocabulary, -np.inf, np.float32)
        for entry in reply["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
            found[entry["id"]] = entry["logprob"]
        return found

    def _messages(self, request: dict[str, Any]) -> list[dict[str, Any]]:
        """Return all messages of a streamed completion.

        Raises:
            UsageError: llama.cpp refused the request.
        """
        received: list[dict[str, Any]] = []
        ended = threading.Event()

        def receive(message: Any) -> bool:
            for part in message if isinstance(message, list) else [message]:
                received.append(part)
                choices = part.get("choices") or [{}]
                if "error" in part or choices[0].get("finish_reason"):
                    ended.set()
            return False

        self._server.handle_completions(request, receive)
        ended.wait(600)
        if failed := next((part["error"] for part in received if "error" in part), None):
            raise UsageError(f"llama.cpp refused the prompt: {failed}")
        return received
