"""Which subjects a bench measures: peers that are needed, peers that are measured already, lengths that fit."""

from typing import Any

import pytest

from edge_ft.bench.subjects import (
    Subject,
    Workload,
    check_lengths,
    graph_peers,
    name_variants,
    peer_requests,
    peer_subjects,
    torch_subject,
)
from edge_ft.errors import UsageError

WORKLOAD = Workload(prompt_tokens=12, new_tokens=4, threads=1)


def bundle(task: str = "text-generation", max_length: int = 512, source: str = "out/bundle") -> Subject:
    return Subject("edge-ft", source, task, max_length, 10, {"prompt_tokens": 12, "new_tokens": 4})


def found(content: str, adapter: str | None = None, **more: str) -> dict[str, Any]:
    base = {"name": f"org/{content}", "content_sha256": content}
    return {"base": base, "adapter": adapter, "task": "text-generation", "max_length": 512, "size_bytes": 1, **more}


def test_each_peer_names_the_models_that_it_needs() -> None:
    bundles = [bundle(source="a"), bundle("text2text-generation", source="b")]
    assert peer_requests((), bundles) == []
    assert peer_requests(("torch",), bundles) == [{"bundle": "a"}, {"bundle": "b"}]
    assert peer_requests(("ctranslate2",), bundles) == [
        {"bundle": "b", "compute_type": "int8"},
        {"bundle": "b", "compute_type": "float32"},
    ]


def test_a_peer_without_a_bundle_for_it_is_refused() -> None:
    with pytest.raises(UsageError, match="--peers ctranslate2 is for text2text-generation"):
        peer_requests(("ctranslate2",), [bundle()])
    with pytest.raises(UsageError, match="--peers genai is for text-generation bundles, and none of these is one"):
        graph_peers("genai", [bundle("text-classification")])


def test_an_engine_over_the_bundles_graphs_measures_the_tasks_that_it_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edge_ft.bench.subjects.find_spec", lambda _: object())
    bundles = [bundle(), bundle("text-classification"), bundle("text2text-generation")]
    for engine, tasks in (("openvino", ["text-generation", "text-classification"]), ("genai", ["text-generation"])):
        peers = graph_peers(engine, bundles)
        assert [peer.task for peer in peers] == tasks
        assert {(peer.engine, peer.job["do"]) for peer in peers} == {(engine, engine)}


def test_a_model_is_measured_once_in_each_engine() -> None:
    measured = [bundle(), torch_subject("run", found("x", adapter="run/adapter"), WORKLOAD)]
    wanted = [found("x"), found("x"), found("y"), found("x", compute_type="int8"), found("x", compute_type="float32")]
    peers = peer_subjects(wanted, measured, WORKLOAD)
    assert [(peer.engine, peer.source) for peer in peers] == [
        ("torch", "org/x"),  # the run measures it with an adapter
        ("torch", "org/y"),
        ("ctranslate2", "org/x-int8"),
        ("ctranslate2", "org/x-float32"),
    ]
    assert peer_subjects([found("y")], [torch_subject("y", found("y"), WORKLOAD)], WORKLOAD) == []


@pytest.mark.parametrize(
    ("task", "needed"), [("text-generation", 16), ("text2text-generation", 12), ("text-classification", 12)]
)
def test_a_model_has_to_read_the_prompt_and_its_answer(task: str, needed: int) -> None:
    check_lengths(bundle(task, needed))
    with pytest.raises(UsageError, match=f"can read {needed - 1} tokens and would be given {needed}"):
        check_lengths(bundle(task, needed - 1))


def test_subjects_of_one_source_have_different_variants() -> None:
    assert [subject.variant for subject in name_variants([bundle(), bundle()])] == ["bundle", "bundle#2"]
