"""How far distributions are from those of the float model; llama.cpp as a peer, without its package."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from small_tokenizers import write_bpe

from edge_ft.bench.divergence import (
    POSITIONS,
    compare_distributions,
    divergence,
    labelled_positions,
    longest_row,
    write_reference,
)
from edge_ft.bench.llama_cpp_peer import LlamaCppDecoder, make_files
from edge_ft.bench.subjects import Subject, drop_slower, llama_cpp_peers
from edge_ft.data import IGNORED, Example
from edge_ft.errors import MissingExtra, UsageError


def logs(rows: list[list[float]]) -> Any:
    return np.log(np.array(rows, np.float32))


def test_the_figures_are_those_of_their_definitions() -> None:
    reference, found = logs([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]]), logs([[0.25, 0.5, 0.25], [0.1, 0.8, 0.1]])
    figures = divergence(reference, found, np.array([0, 1]))
    assert figures.kl_divergence["value"] == pytest.approx((0.5 * np.log(2) - 0.25 * np.log(2)) / 2, rel=1e-6)
    assert figures.delta_p_rms["value"] == pytest.approx(np.sqrt(0.25**2 / 2), rel=1e-6)
    assert figures.same_top_token["value"] == 0.5
    for metric in (figures.kl_divergence, figures.delta_p_rms, figures.same_top_token):
        assert metric["low"] <= metric["value"] <= metric["high"]


def test_a_model_does_not_differ_from_itself() -> None:
    one = logs([[0.5, 0.5 - 1e-9, 1e-9], [0.2, 0.3, 0.5]])
    figures = divergence(one, one, np.array([2, 2]))
    assert (figures.kl_divergence["value"], figures.delta_p_rms["value"]) == (0, 0)
    assert figures.same_top_token["value"] == 1


def test_a_token_that_neither_gives_a_probability_adds_nothing() -> None:
    with np.errstate(divide="ignore"):
        padded = logs([[0.5, 0.5, 0.0]])
    assert divergence(padded, padded, np.array([0])).kl_divergence["value"] == 0


def test_positions_are_the_labelled_ones_of_the_first_rows() -> None:
    def row(size: int, first: int) -> Example:
        labels = [IGNORED] * first + list(range(size - first))
        return Example(0, list(range(size)), labels, prompt_length=0, reference="", cut=0)

    found = list(labelled_positions([row(5, 5), row(6, 4), row(POSITIONS * 2, 0), row(9, 1)]))
    assert found[0] == ([0, 1, 2, 3, 4, 5], [4, 5])
    assert found[1][1] == list(range(1, POSITIONS - 1))  # the first token has nothing before it
    assert len(found[1][0]) == POSITIONS - 1
    assert sum(len(positions) for _, positions in found) == POSITIONS


def test_subjects_are_compared_at_the_same_positions(tmp_path: Path) -> None:
    def model(shift: float) -> Any:
        def found(ids: list[int], positions: list[int]) -> Any:
            scores = np.array([[ids[at - 1] * 0.1, shift, 0.3] for at in positions], np.float32)
            return scores - np.log(np.exp(scores).sum(-1, keepdims=True))

        return found

    write_reference(tmp_path, [([1, 2, 0], [1, 2]), ([2, 1], [1])], model(0.2))
    assert longest_row(tmp_path) == 3
    same = compare_distributions(tmp_path, model(0.2))
    assert same["positions"] == 3
    assert same["kl_divergence"]["value"] == 0
    assert compare_distributions(tmp_path, model(0.9))["kl_divergence"]["value"] > 0.01


def bundle() -> Subject:
    job = {"do": "bundle", "bundle": "out/b", "accuracy_level": 1, "prompt_tokens": 3, "new_tokens": 3}
    return Subject("edge-ft", "out/b", "text-generation", 512, 10, job, "b")


def files() -> dict[str, Any]:
    names = ("Q4_0", "Q4_0, 8-bit head", "own codes")
    return {
        "files": {name: {"path": f"{at}.gguf", "size_bytes": at, "rounded_from": None} for at, name in enumerate(names)}
    }


def test_of_the_two_q4_0_files_the_faster_one_counts() -> None:
    peers = llama_cpp_peers([bundle()], [files()])
    assert [peer.variant for peer in peers] == ["b (Q4_0)", "b (Q4_0, 8-bit head)", "b (own codes)"]
    four, eight, own = peers
    assert (eight.engine, eight.job["file"], eight.size_bytes) == ("llama.cpp", "1.gguf", 1)
    for fast, slow in ((four, eight), (eight, four)):
        samples = {peer: [{"decode_tps": 1.0}, {"decode_tps": 2.0}, {"decode_tps": 9.0}] for peer in peers}
        samples[fast] = [{"decode_tps": 3.0}]
        kept, notes = drop_slower([bundle(), *peers], samples)
        assert slow not in kept
        assert {fast, own} <= set(kept)
        assert notes == {fast: {"faster_of": {fast.job["weights"]: 3.0, slow.job["weights"]: 2.0}}}


def test_a_file_that_did_not_fit_stays_in_the_report() -> None:
    peers = llama_cpp_peers([bundle()], [files()])
    kept, _ = drop_slower(peers, {peer: [] for peer in peers})
    assert kept == peers


class Server:
    """Answers as xllamacpp's; `messages` are streamed, `reply` is the answer to a request without a stream."""

    def __init__(self, messages: list[Any], reply: Any = None) -> None:
        self.messages, self.reply, self.requests = messages, reply, []

    def handle_completions(self, request: dict[str, Any], receive: Any = None) -> Any:
        self.requests.append(request)
        for message in self.messages if receive else ():
            receive(message)
        return self.reply


@pytest.fixture
def peer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes a decoder over a server."""

    def make(server: Server) -> LlamaCppDecoder:
        threads = SimpleNamespace(n_threads=0)
        kind = SimpleNamespace(name="GGML_TYPE_F16")
        settings = SimpleNamespace(
            model=SimpleNamespace(),
            cpuparams=threads,
            cpuparams_batch=SimpleNamespace(),
            cache_type_k=kind,
            cache_type_v=kind,
            flash_attn_type=SimpleNamespace(name="LLAMA_FLASH_ATTN_TYPE_AUTO"),
            no_extra_bufts=False,
        )
        module = SimpleNamespace(
            CommonParams=lambda: settings, Server=lambda _: server, get_system_info=lambda: "AVX2 = 1"
        )
        monkeypatch.setitem(sys.modules, "xllamacpp", module)
        write_bpe(tmp_path)
        (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 300}), encoding="utf-8")
        decoder = LlamaCppDecoder(tmp_path / "m.gguf", tmp_path, 2, 300)
        assert decoder.settings["n_ctx"] == 512  # 300 in steps of 256
        assert (decoder.settings["cache_type_k"], decoder.settings["flash_attn"]) == ("F16", "auto")
        return decoder

    return make


def message(tokens: int, elapsed: float, end: str | None = None) -> dict[str, Any]:
    timings = {"prompt_ms": 500.0, "predicted_n": tokens, "predicted_ms": elapsed}
    return {"choices": [{"finish_reason": end}], "timings": timings}


def test_times_are_llama_cpps_own(peer: Any) -> None:
    # the second message brings two tokens, since the first half of a letter is held back
    server = Server([message(1, 0.1), message(3, 40.0), message(4, 50.0), message(4, 50.0, "length")])
    timings = peer(server).time_decode([5, 6], 4)
    assert timings.prefill_s == timings.ttft_s == 0.5
    assert timings.decode_s == pytest.approx((0.02, 0.02, 0.01))
    (request,) = server.requests
    assert (request["prompt"], request["ignore_eos"], request["cache_prompt"]) == ([5, 6], True, False)


def test_what_llama_cpp_refuses_or_leaves_out_is_an_error(peer: Any) -> None:
    with pytest.raises(UsageError, match=r"llama\.cpp refused the prompt: too long"):
        peer(Server([{"error": "too long"}])).time_decode([5], 4)
    with pytest.raises(UsageError, match=r"generated 2 tokens, not 4"):
        peer(Server([message(1, 0.1), message(2, 9.0, "stop")])).time_decode([5], 4)


def test_log_probabilities_are_by_token(peer: Any) -> None:
    listed = [{"id": 2, "logprob": -0.5}, {"id": 0, "logprob": -1.5}]
    reply = {"choices": [{"logprobs": {"content": [{"top_logprobs": listed}]}}]}
    assert peer(Server([], reply)).log_probabilities([5], 3).tolist() == [-1.5, -np.inf, -0.5]


def test_the_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    with pytest.raises(MissingExtra, match=r"xllamacpp.*edge-ft\[peers\]"):
        make_files(tmp_path)
