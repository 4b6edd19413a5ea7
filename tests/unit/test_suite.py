"""`make bench` measures what is there, once."""

import json
from pathlib import Path
from typing import Any

import pytest
from recorded_benches import classifiers, decoders

from edge_ft.bench.studies import suite
from edge_ft.bench.studies.claim_cases import CASES
from edge_ft.errors import UsageError


def write_bundle(folder: Path, name: str) -> None:
    bundle = folder / name / CASES[name].weights[0]
    bundle.mkdir(parents=True)
    (bundle / "manifest.json").write_text("{}")


def test_a_bundle_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[str] = []

    def bench(subjects: list[str], config: Any, progress: Any) -> list[dict[str, Any]]:
        measured.extend(subjects)
        return classifiers() if "minilm" in subjects[0] else decoders()

    monkeypatch.setattr(suite, "bench", bench)
    for name in ("smollm2-main", "minilm-main"):
        write_bundle(tmp_path / "claims", name)
    into = tmp_path / "results.md"
    into.write_text(f"before\n{suite.BEGIN}\nold\n{suite.END}\nafter\n")
    options: dict[str, Any] = {"bundles": tmp_path / "claims", "out": tmp_path / "out", "write": tmp_path / "suite.md"}
    with monkeypatch.context() as patch:
        patch.setattr(suite, "MINUTES", 0)
        suite.main(**options)
    assert measured == []  # the time is over before the first one
    for _ in range(2):
        suite.main(**options, into=into)
    assert [Path(folder).parent.name for folder in measured] == ["smollm2-main", "minilm-main"]
    assert json.loads((tmp_path / "out" / "minilm-main.json").read_text()) == classifiers()
    assert "<!doctype html>" in (tmp_path / "out" / "smollm2-main.html").read_text(encoding="utf-8")
    page = (tmp_path / "suite.md").read_text(encoding="utf-8")
    assert page.index("## smollm2") < page.index("decode_tps = tg16 @ d64 (tok/s)") < page.index("## minilm")
    short = into.read_text(encoding="utf-8")
    assert short.startswith("before\n") and short.endswith("after\n") and "old" not in short
    assert "| model | engine | size MB |" in short and "| minilm | edge-ft" in short and "decode tok/s" in short
    assert "one text ms" in short


def test_a_bundle_that_is_missing_or_cannot_be_measured_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def bench(subjects: list[str], config: Any, progress: Any) -> list[dict[str, Any]]:
        if "smollm2" in subjects[0]:
            raise UsageError("its base is gone")
        return classifiers()

    monkeypatch.setattr(suite, "bench", bench)
    write_bundle(tmp_path / "claims", "smollm2-main")
    options: dict[str, Any] = {"bundles": tmp_path / "claims", "out": tmp_path / "out", "write": tmp_path / "suite.md"}
    suite.main(**options)
    assert "smollm2-main is left out: its base is gone" in capsys.readouterr().out
    assert not (tmp_path / "suite.md").exists()
    write_bundle(tmp_path / "claims", "minilm-main")
    suite.main(**options)
    page = (tmp_path / "suite.md").read_text(encoding="utf-8")
    assert "## minilm" in page and "## smollm2" not in page


def test_a_file_without_a_place_for_the_table_is_refused_before_measuring(tmp_path: Path) -> None:
    write_bundle(tmp_path, "smollm2-main")
    (tmp_path / "page.md").write_text("text\n")
    with pytest.raises(UsageError, match=r"page\.md lacks the line"):
        suite.main(bundles=tmp_path, out=tmp_path / "out", into=tmp_path / "page.md")


def test_without_bundles_the_way_out_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"has no bundle of smollm2-main, .*: run make claims first"):
        suite.main(bundles=tmp_path, out=tmp_path / "out")
