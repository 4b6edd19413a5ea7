"""Which other engines are measured beside the bundles, and over which models: `--peers`."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from importlib.util import find_spec
from typing import Any

from edge_ft.bench.subjects import Subject, Workload, torch_subject
from edge_ft.errors import MissingExtra, UsageError

__all__ = ["openvino_subject", "peer_requests", "peer_subjects"]


def peer_requests(peers: Sequence[str], bundles: Sequence[Subject]) -> list[dict[str, str]]:
    """List the models that peers need, as the worker's job `find` reads them.

    Args:
        peers: Names of the engines.
        bundles: The bundles to compare with.

    Returns:
        For torch one request a bundle, for CTranslate2 two (int8 and float32) for each bundle of an encoder-decoder.

    Raises:
        UsageError: CTranslate2 is named, and no bundle is of an encoder-decoder.
    """
    requests = [{"bundle": bundle.source} for bundle in bundles] if "torch" in peers else []
    if "ctranslate2" in peers:
        seq2seq = [bundle.source for bundle in bundles if bundle.task == "text2text-generation"]
        if not seq2seq:
            raise UsageError("--peers ctranslate2 is for text2text-generation bundles, and none of these is one")
        requests += [{"bundle": source, "compute_type": kind} for source in seq2seq for kind in ("int8", "float32")]
    return requests


def peer_subjects(found: Iterable[dict[str, Any]], measured: Sequence[Subject], workload: Workload) -> list[Subject]:
    """Make the peers out of what the worker found for `peer_requests`.

    Args:
        found: A model for each request.
        measured: Subjects that the user named.
        workload: What each peer computes.

    Returns:
        The peers; a model that is measured in the same engine already is left out.
    """
    peers: list[Subject] = []
    for model in found:
        peer = _peer(model, workload)
        if not any(_same_model(peer, subject) for subject in [*measured, *peers]):
            peers.append(peer)
    return peers


def openvino_subject(bundle: Subject) -> Subject:
    """The same graph, opened by OpenVINO.

    Args:
        bundle: A bundle, already named.

    Returns:
        The subject, of the same name.

    Raises:
        UsageError: the bundle is no classifier.
        MissingExtra: OpenVINO is not installed.
    """
    if bundle.task != "text-classification":
        raise UsageError(f"--peers openvino measures classifiers, and {bundle.source} is for {bundle.task}")
    if find_spec("openvino") is None:
        raise MissingExtra("--peers openvino needs the package 'openvino': pip install 'edge-ft[peers]'")
    return replace(bundle, engine="openvino", job={**bundle.job, "do": "openvino"})


def _peer(found: dict[str, Any], workload: Workload) -> Subject:
    """The float model of a bundle under torch, or converted for CTranslate2."""
    name = found["base"]["name"]
    if "compute_type" not in found:
        return torch_subject(name, found, workload)
    job = {"do": "ctranslate2", **found, **asdict(workload)}
    variant = f"{name}-{found['compute_type']}"
    return Subject("ctranslate2", variant, found["task"], found["max_length"], found["size_bytes"], job)


def _same_model(a: Subject, b: Subject) -> bool:
    """Whether two subjects measure the same weights in the same engine other than ours."""
    if a.engine != b.engine or a.engine == "edge-ft":
        return False
    same_base = a.job["base"]["content_sha256"] == b.job["base"]["content_sha256"]
    return same_base and all(a.job.get(key) == b.job.get(key) for key in ("adapter", "compute_type"))
