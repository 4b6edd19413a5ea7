"""The measuring process: reads a job as JSON on stdin and writes its result as JSON on stdout.

`python -m edge_ft.bench.worker` is started by `edge_ft.bench.subprocess_job`. Only the engine that the job names is
imported, so that the process's memory is that of what it measures.
"""

import importlib.util
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_ft.bench.report import BATCHES, classifier_lengths
from edge_ft.config import TEXT_TASKS
from edge_ft.errors import EdgeFTError, UsageError, require
from edge_ft.openmp import WAITING
from edge_ft.system import peak_rss_bytes

if TYPE_CHECKING:
    from edge_ft.bench.genai_peer import GenAIDecoder
    from edge_ft.bench.llama_cpp_peer import LlamaCppDecoder
    from edge_ft.bench.openvino_peer import OpenVINOClassifier, OpenVINODecoder
    from edge_ft.bench.torch_peer import TorchClassifier, TorchDecoder
    from edge_ft.data import TextTokenizer
    from edge_ft.runtime import TextClassifier, TextGenerator

__all__ = [
    "answer_job",
    "at_depths",
    "classifier_ids",
    "leave_openmp_alone",
    "main",
    "measure_decoder",
    "prompt_ids",
]

_TEXT = (
    "The pump in the cellar runs at night, when power is cheap. It lifts water from a well of forty metres into "
    "a tank under the roof, and stops when a float closes the valve. Twice a year somebody cleans the filter, "
    "writes the date on a card beside the door, and checks that the pressure is between two and three bar. "
    "Last March the card was missing; the filter had not been cleaned, and the pump drew more than its share. "
)
"""What every subject reads, cut or repeated to the requested length; it needs no rows of the user."""
_TEXTS = 20
"""Single texts timed at each length of a classifier."""
_ROWS, _BATCHES = 8, 4
"""Rows of a batch, and batches timed, at each length of a classifier."""
_OPENMP = ("torch", "llama.cpp", "ctranslate2")
"""Engines whose threads are OpenMP's."""


def main() -> None:
    """Answer one job of `edge-ft bench`."""
    answer_job(_work)
    if "xllamacpp" in sys.modules:
        os._exit(0)  # llama.cpp's threads do not end with the interpreter


def _work(job: dict[str, Any]) -> dict[str, Any]:
    if job["do"] == "find":
        return _find(job)
    if job["do"] == "choose":
        from edge_ft.runtime import load

        engine = load(job["bundle"], threads=job["threads"]).engine
        return {"engine": None if engine is None else engine.plain()}
    if job["do"] == "limits":
        from edge_ft.bench.limits import measure_limits

        return measure_limits(job)
    if job["do"] == "gguf":
        from edge_ft.bench.llama_cpp_peer import make_files

        return make_files(Path(job["bundle"]))
    if "compared" in job:
        return _compare(job)
    if "reference" in job:
        from edge_ft.bench.quality import reference

        return reference(job)
    if "score" in job:
        from edge_ft.bench.quality import score

        return score(job)
    if "answer" in job:
        from edge_ft.bench.answers import answer

        return answer(job)
    return _measure(job)


def answer_job(work: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Read a job from stdin and write `{"result": …}` to stdout.

    Args:
        work: Does the job; for an `EdgeFTError` that it raises, `{"error": [class, message]}` is written.
    """
    # What a library prints goes to stderr, so that stdout holds the answer alone.
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answer:
        os.dup2(2, 1)
        job = json.load(sys.stdin)
        if affinity := job.pop("affinity", None):
            os.sched_setaffinity(0, affinity)  # before any library counts the CPUs or starts threads
        if (parent := job.pop("parent", None)) is not None:
            threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
        try:
            reply: dict[str, Any] = {"result": work(job)}
        except EdgeFTError as error:
            reply = {"error": [type(error).__name__, str(error)]}
        json.dump(reply, answer)


def _end_with(parent: int) -> None:
    """Wait until the process at the other end of a pipe has ended, then end this one."""
    os.read(parent, 1)
    os._exit(1)


def prompt_ids(tokenizer: "TextTokenizer", length: int) -> list[int]:
    """The fixed text as exactly `length` ids, the tokenizer's BOS included."""
    text = tokenizer.encode(_TEXT)
    before = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    return (before + text * (length // len(text) + 1))[:length]


def classifier_ids(tokenizer: "TextTokenizer", length: int) -> list[int]:
    """Encode the fixed text as exactly `length` ids.

    Args:
        tokenizer: Of the model that is measured.
        length: Tokens, those that the tokenizer puts around a text ([CLS] and [SEP]) included.

    Returns:
        The ids.

    Raises:
        UsageError: `length` is too small for the tokens around a text.
    """
    copies = length // len(tokenizer.encode(_TEXT)) + 1
    ids = tokenizer.encode_framed(_TEXT * copies, length).ids
    if len(ids) != length:
        raise UsageError(f"--prompt-tokens {length} is too few: this model puts {len(ids)} tokens around a text")
    return ids


def _find(job: dict[str, Any]) -> dict[str, Any]:
    """Check and download what jobs of other engines load, so that measuring begins with files on disk."""
    wanted: list[dict[str, str]] = job["wanted"]
    if importlib.util.find_spec("torch") is None:
        for source in (item["source"] for item in wanted if "source" in item):
            if not Path(source).exists():
                # Without torch this is a device, and the user meant a bundle: do not ask for torch.
                raise UsageError(f"there is no bundle, run folder or model at {source}")
    from edge_ft.artifacts import RunFolder, kind_of

    for source in (item["source"] for item in wanted if "source" in item):
        if kind_of(source) == "run":
            RunFolder.open(Path(source)).refuse_over_bundle()
    require("torch", "train")
    from edge_ft.bench.torch_peer import find, find_bundle_base

    found = [find(item["source"]) if "source" in item else find_bundle_base(item["bundle"]) for item in wanted]
    for at, item in enumerate(wanted):
        if "compute_type" in item:
            from edge_ft.bench.ctranslate2_peer import convert

            found[at] = convert(found[at], item["compute_type"])
    return {"found": found}


def leave_openmp_alone() -> None:
    """Let OpenMP's threads wait as users of other engines have it, before one is imported: they spin, and long."""
    for name in WAITING:
        os.environ.pop(name, None)


def _starter(job: dict[str, Any]) -> Callable[[], Any]:
    """What opens the job's subject, its engine imported."""
    if job["do"] in _OPENMP:
        leave_openmp_alone()
    if job["do"] == "ctranslate2":
        from edge_ft.bench.ctranslate2_peer import Translator

        folder, tokenizer = Path(job["folder"]), Path(job["tokenizer"])
        return partial(Translator, folder, tokenizer, job["compute_type"], job["threads"])
    if job["do"] == "bundle":
        from edge_ft.runtime import load

        level = None if job.get("engine") else job.get("accuracy_level")
        return partial(load, job["bundle"], threads=job["threads"], accuracy_level=level)
    if job["do"] == "openvino":
        from edge_ft.bench.openvino_peer import OpenVINOClassifier, OpenVINODecoder

        kind = OpenVINODecoder if job["task"] in TEXT_TASKS else OpenVINOClassifier
        # The main graph: OpenVINO takes no notice of ONNX Runtime's accuracy levels.
        return partial(kind, Path(job["bundle"]), None, job["threads"])
    if job["do"] == "genai":
        from edge_ft.bench.genai_peer import GenAIDecoder

        return partial(GenAIDecoder, Path(job["bundle"]), job["threads"])
    if job["do"] == "llama.cpp":
        from edge_ft.bench.llama_cpp_peer import LlamaCppDecoder

        positions = max(job.get("depths") or [0]) + job["prompt_tokens"] + job["new_tokens"]
        if "compared" in job:
            from edge_ft.bench.divergence import longest_row

            positions = longest_row(Path(job["compared"])) + 1
        return partial(LlamaCppDecoder, Path(job["file"]), Path(job["bundle"]), job["threads"], positions)
    # The job `find` has downloaded everything.
    os.environ["HF_HUB_OFFLINE"] = "1"
    from edge_ft.bench.torch_peer import load_peer, prepare

    return partial(load_peer, prepare(job), job)


def _compare(job: dict[str, Any]) -> dict[str, Any]:
    """Compare the distributions of the job's subject with those of its float model."""
    from edge_ft.bench import divergence
    from edge_ft.utf8 import read_json

    if job["do"] == "llama.cpp":
        vocabulary = read_json(Path(job["bundle"]) / "config.json")["vocab_size"]
        found = divergence.llama_cpp_log_probabilities(_starter(job)(), vocabulary)
    else:
        from edge_ft.runtime import load

        level = job.get("accuracy_level")  # the graph that is scored, also where a faster one is timed
        exact = load(job["bundle"], threads=job["threads"], accuracy_level=level, engine="exact")
        found = divergence.bundle_log_probabilities(exact)
    return divergence.compare_distributions(Path(job["compared"]), found)


def _measure(job: dict[str, Any]) -> dict[str, Any]:
    """Every metric of the job's subject except its size, and the `settings` of an engine that says them."""
    start = _starter(job)
    began = time.perf_counter()
    engine = start()
    load_s = time.perf_counter() - began
    measure = measure_decoder if job["task"] in TEXT_TASKS else _measure_classifier
    found = {"load_s": load_s, **measure(engine, job), "peak_rss_bytes": peak_rss_bytes()}
    if hasattr(engine, "settings"):
        found["settings"] = engine.settings
    if job["do"] == "llama.cpp":
        found["settings"] |= {name: job[name] for name in ("weights", "rounded_from")}
    # After the peak was read: memory is that of the prompt, not of a longer context.
    if job["task"] != "text-generation":
        return found
    # A limit on memory is for one text, and a process that exceeds it would be reported as not fitting.
    with_batches = job["do"] == "bundle" and job["batches"]
    return found | at_depths(engine, job) | (_in_batches(engine, job) if with_batches else {})


def measure_decoder(
    engine: "TextGenerator | TorchDecoder | OpenVINODecoder | GenAIDecoder | LlamaCppDecoder", job: dict[str, Any]
) -> dict[str, Any]:
    """Speeds of a decoder or encoder-decoder: a first answer that warms up, then the one that is timed.

    Args:
        engine: Its `time_decode` is called with the prompt.
        job: The measuring job.

    Returns:
        Metrics, and `times`: every time between tokens.
    """
    import numpy as np

    # An encoder-decoder's text ends with EOS.
    encode = classifier_ids if job["task"] == "text2text-generation" else prompt_ids
    ids = encode(engine.tokenizer, job["prompt_tokens"])
    began = time.monotonic()
    first = engine.time_decode(ids, job["new_tokens"])  # the cold start; it warms up the second one
    timings = engine.time_decode(ids, job["new_tokens"])
    p50, p90, p99 = np.percentile(timings.decode_s, [50, 90, 99]).tolist()
    return {
        "cold_start_s": began + first.ttft_s - job["started"],
        "ttft_s": timings.ttft_s,
        "prefill_tps": len(ids) / timings.prefill_s,
        "decode_tps": len(timings.decode_s) / sum(timings.decode_s),
        "itl_s_p50": p50,
        "itl_s_p90": p90,
        "itl_s_p99": p99,
        "times": {"itl_s_p50": _rounded(timings.decode_s)},
    }


def at_depths(engine: Any, job: dict[str, Any]) -> dict[str, float | None]:
    """Speeds after some tokens of context, of any engine alike.

    The prefill after a context is the time of context and prompt together less the time of the context alone.

    Args:
        engine: A decoder.
        job: The measuring job, with `depths`.

    Returns:
        Metrics, and the process's peak memory by then; None where the model cannot read so much, or where the
        difference is lost in the noise.
    """
    found: dict[str, float | None] = {}
    prompt, new = job["prompt_tokens"], job["new_tokens"]
    for depth in job.get("depths", ()):
        decode, prefill, memory = f"decode_tps_d{depth}", f"prefill_tps_d{depth}", f"peak_rss_d{depth}_bytes"
        if depth + prompt + new > job["max_length"]:
            found |= {decode: None, prefill: None, memory: None}
            continue
        context = engine.time_decode(prompt_ids(engine.tokenizer, max(depth, 1)), new)
        found[decode] = len(context.decode_s) / sum(context.decode_s)
        if depth:
            whole = engine.time_decode(prompt_ids(engine.tokenizer, depth + prompt), 2)
            seconds = whole.prefill_s - context.prefill_s
            found[prefill] = prompt / seconds if seconds > 0 else None
        found[memory] = peak_rss_bytes()
    return found


def _in_batches(engine: "TextGenerator", job: dict[str, Any]) -> dict[str, float | None]:
    """Tokens per second of all texts of a batch, each with the prompt of the job.

    Args:
        engine: An open bundle.
        job: The measuring job.

    Returns:
        Metrics; None where memory is too short.
    """
    found: dict[str, float | None] = {}
    ids, new = prompt_ids(engine.tokenizer, job["prompt_tokens"]), job["new_tokens"]
    for texts in BATCHES:
        seconds = engine.time_batch(ids, texts, new)
        found[f"batch_tps_{texts}"] = texts * (new - 1) / seconds if seconds else None
    return found


def _measure_classifier(
    engine: "TextClassifier | TorchClassifier | OpenVINOClassifier", job: dict[str, Any]
) -> dict[str, Any]:
    import numpy as np

    def seconds(rows: int, length: int) -> float:
        input_ids = np.array([classifier_ids(engine.tokenizer, length)] * rows, np.int64)  # [rows, length]
        attention_mask = np.ones_like(input_ids)
        began = time.perf_counter()
        engine.logits(input_ids, attention_mask)
        return time.perf_counter() - began

    seconds(1, job["prompt_tokens"])
    found: dict[str, Any] = {"cold_start_s": time.monotonic() - job["started"], "times": {}}
    for length in classifier_lengths(job["prompt_tokens"]):
        seconds(1, length)
        latencies = [seconds(1, length) for _ in range(_TEXTS)]
        seconds(_ROWS, length)
        batches = [seconds(_ROWS, length) for _ in range(_BATCHES)]
        found["times"][f"latency_s_{length}"] = _rounded(latencies)
        p50, p99 = np.percentile(latencies, [50, 99]).tolist()
        found |= {
            f"latency_s_{length}": p50,
            f"latency_s_p99_{length}": p99,
            f"rows_per_s_{length}": _ROWS * _BATCHES / sum(batches),
        }
    return found


def _rounded(seconds: Iterable[float]) -> list[float]:
    """To microseconds, which is finer than they repeat."""
    return [round(value, 6) for value in seconds]


if __name__ == "__main__":
    main()
