"""`verify` refuses a bundle that scores differently than at its export, or lost too much."""

import json
import shutil
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from recorded_progress import RecordedProgress
from small_tokenizers import CHATML

from edge_ft.artifacts import Bundle, RunFolder
from edge_ft.config import EvalConfig, ExportConfig, VerifyConfig
from edge_ft.data import clock, fingerprint, read_rows
from edge_ft.errors import AuditRefused, BundleError, GateRefused, UsageError
from edge_ft.evaluate import evaluate
from edge_ft.evaluate.verify import verify
from edge_ft.export import export

CUTS = 41
"""Tokens that cut an answer of the fixtures' rows, and no prompt."""


def rows(run: RunFolder, name: str = "test") -> str:
    return str(run.split(name))


def write(file: Path, lines: list[dict[str, Any]]) -> str:
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(file)


def forge(bundle: Bundle, tmp_path: Path, change: Any) -> Path:
    """Return a copy of the bundle with a changed verification in its manifest."""
    folder = tmp_path / "forged"
    shutil.copytree(bundle.path, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest["verification"])
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.mark.parametrize("name", ["llama_bundle", "llama_adapter_bundle", "bert_bundle", "bert_adapter_bundle"])
def test_a_bundle_verifies_where_it_was_made(name: str, request: pytest.FixtureRequest) -> None:
    found = verify(request.getfixturevalue(name).path, VerifyConfig())
    assert found["probe_difference"]["1"] < 1e-5


def test_the_exports_own_rows_must_score_as_they_did(
    llama_bundle: Bundle, llama_run: RunFolder, tmp_path: Path
) -> None:
    config = VerifyConfig(data=rows(llama_run, "validation"), max_tax=1.0)
    assert verify(llama_bundle.path, config)["same_rows"] is True

    def lower(found: Any) -> None:
        exact = found["by_accuracy_level"]["1"]
        exact["nll"] -= 0.1

    changed = forge(llama_bundle, tmp_path, lower)
    with pytest.raises(GateRefused, match="the export's rows score"):
        verify(changed, config)


def test_a_tax_above_the_limit_is_refused_again(llama_bundle: Bundle, llama_run: RunFolder, tmp_path: Path) -> None:
    def better_before(found: dict[str, Any]) -> None:
        found["nll"]["trained"] -= 1.0  # so that the tax is near 1, whatever rounding costs on this processor

    taxed = forge(llama_bundle, tmp_path, better_before)
    data = rows(llama_run, "validation")
    assert verify(taxed, VerifyConfig(data=data, max_tax=1.5))["same_rows"] is True
    with pytest.raises(GateRefused, match=r"quantization tax .* is above --max-tax 0\.5"):
        verify(taxed, VerifyConfig(data=data, max_tax=0.5))


def test_a_machine_that_computes_differently_is_refused(llama_bundle: Bundle, tmp_path: Path) -> None:
    def elsewhere(found: dict[str, Any]) -> None:
        level = found["by_accuracy_level"]["1"]
        level["probe_nll"] = [nll + 1 for nll in level["probe_nll"]]

    with pytest.raises(GateRefused, match="level 1 scores the probe texts"):
        verify(forge(llama_bundle, tmp_path, elsewhere), VerifyConfig())


def test_on_other_rows_an_adapter_must_beat_its_base(
    llama_adapter_bundle: Bundle, llama_run: RunFolder, tmp_path: Path
) -> None:
    found = verify(llama_adapter_bundle.path, VerifyConfig(data=rows(llama_run)))
    assert found["same_rows"] is False
    assert found["nll"] < found["base_nll"]
    wrong = tmp_path / "wrong.jsonl"
    own = [row.fields for row in read_rows(str(llama_run.split("validation")))]
    lines = [{**row, "completion": row["completion"][::-1]} for row in own]  # spelled backwards
    wrong.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(GateRefused, match="no better than its base"):
        verify(llama_adapter_bundle.path, VerifyConfig(data=str(wrong)))


def test_a_tampered_bundle_does_not_verify(llama_bundle: Bundle, tmp_path: Path) -> None:
    changed = forge(llama_bundle, tmp_path, lambda found: None)
    (changed / "config.json").write_text("{}")
    with pytest.raises(BundleError, match="sha256"):
        verify(changed, VerifyConfig())


def test_a_refused_bundle_does_not_verify(llama_bundle: Bundle, tmp_path: Path) -> None:
    refused = forge(llama_bundle, tmp_path, lambda found: found.update(refused=["too much was lost"]))
    with pytest.raises(GateRefused, match="its export was refused: too much was lost"):
        verify(refused, VerifyConfig())


def test_the_default_limit_is_that_of_the_export(llama_bundle: Bundle, llama_run: RunFolder) -> None:
    assert llama_bundle.manifest["verification"]["limits"]["max_tax"] == 1
    assert verify(llama_bundle.path, VerifyConfig(data=rows(llama_run, "validation")))["same_rows"] is True


def test_rows_after_those_of_the_export_are_ignored(
    llama_bundle: Bundle, llama_run: RunFolder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    few = len(read_rows(rows(llama_run, "validation")))
    longer = tmp_path / "longer.jsonl"
    longer.write_text(Path(rows(llama_run, "validation")).read_text() + Path(rows(llama_run)).read_text())
    found = verify(llama_bundle.path, VerifyConfig(data=str(longer)))
    assert (found["same_rows"], found["rows"]) == (True, few)

    monkeypatch.setattr("edge_ft.evaluate.verify.VERIFY_ROWS", few)  # earlier exports always read as many as there were
    earlier = forge(llama_bundle, tmp_path / "earlier", lambda found: found.pop("rows_read"))
    assert verify(earlier, VerifyConfig(data=str(longer)))["same_rows"] is True


def test_a_refused_bundle_is_not_scored_again(llama_bundle: Bundle, tmp_path: Path) -> None:
    def refused(found: dict[str, Any]) -> None:
        found["refused"] = ["no gain", "too much tax"]
        del found["by_accuracy_level"]  # without it, scoring would fail in another way

    with pytest.raises(GateRefused, match="no gain; too much tax"):
        verify(forge(llama_bundle, tmp_path, refused), VerifyConfig())


def test_rows_without_an_answer_are_dropped_as_export_drops_them(
    llama_bundle: Bundle, llama_run: RunFolder, tmp_path: Path
) -> None:
    lines = [json.loads(line) for line in Path(rows(llama_run, "validation")).read_text().splitlines()]
    data = write(tmp_path / "rows.jsonl", [{"prompt": "hello " * 300, "completion": " seven"}, *lines])
    digest = fingerprint(read_rows(data))
    progress = RecordedProgress()
    found = verify(
        forge(llama_bundle, tmp_path, lambda found: found.update(rows_sha256=digest, rows_read=len(lines) + 1)),
        VerifyConfig(data=data),
        progress,
    )
    assert (found["same_rows"], found["rows"], found["dropped"], found["cut"]) == (True, len(lines), 1, 1)
    assert any("1 row(s) are not scored" in line for line in progress.lines)


def test_rows_without_any_answer_are_refused(llama_bundle: Bundle, llama_run: RunFolder, tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", [{"prompt": "hello " * 300, "completion": " seven"}])
    with pytest.raises(AuditRefused, match="no row has an answer to score"):
        verify(llama_bundle.path, VerifyConfig(data=data))
    with pytest.raises(AuditRefused, match="no row has an answer to score"):
        evaluate(str(llama_run.path), EvalConfig(data=data))


def test_other_rows_of_a_merged_bundle_are_only_scored(llama_bundle: Bundle, tmp_path: Path) -> None:
    data = write(tmp_path / "wrong.jsonl", [{"prompt": "hello", "completion": "\x01\x02\x03\x04"}])
    found = verify(llama_bundle.path, VerifyConfig(data=data, max_tax=0.0))
    assert found["same_rows"] is False
    assert found["nll"] > 1
    assert "base_nll" not in found


def test_the_exports_rows_rendered_differently_are_other_rows(llama_bundle: Bundle, llama_run: RunFolder) -> None:
    for option in ({"max_length": CUTS}, {"chat_template": "none"}):
        assert (
            verify(llama_bundle.path, VerifyConfig(data=rows(llama_run, "validation"), **option))["same_rows"] is False
        )


def test_a_negative_limit_of_the_tax_is_refused() -> None:
    with pytest.raises(UsageError, match="--max-tax"):
        VerifyConfig(max_tax=-0.1)


def test_a_bundle_whose_template_prints_the_date_verifies_tomorrow(
    llama: Path, sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Clock(datetime):
        today = datetime(2026, 2, 28)

        @classmethod
        def now(cls, tz: object = None) -> datetime:  # type: ignore[override]
            return cls.today

    monkeypatch.setattr(clock, "datetime", Clock)
    template = tmp_path / "dated.jinja"
    template.write_text("{{ strftime_now('%d %b %Y') }}" + CHATML)
    config = ExportConfig(out=tmp_path / "bundle", data=str(sums), chat_template=str(template), weights="fp32")
    bundle = export(str(llama), config)
    monkeypatch.setattr(Clock, "today", datetime(2027, 3, 1))
    assert verify(bundle.path, VerifyConfig(data=str(sums)))["same_rows"] is True

    # Earlier versions recorded no date: scores of another day are not compared.
    manifest = json.loads((bundle.path / "manifest.json").read_text())
    del manifest["rendering"]["rendered_at"]
    (bundle.path / "manifest.json").write_text(json.dumps(manifest))
    progress = RecordedProgress()
    assert verify(bundle.path, VerifyConfig(data=str(sums)), progress)["same_rows"] is False
    assert any("prints today's date" in text for text in progress.lines)
