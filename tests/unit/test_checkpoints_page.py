"""The page that `make checkpoints` writes from what tests recorded."""

from pathlib import Path

import pytest
from checkpoints_table import record_checkpoint

from edge_ft.bench.studies.checkpoints import main
from edge_ft.errors import UsageError


def test_what_tests_record_is_written_to_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results, page = tmp_path / "results", tmp_path / "checkpoints.md"
    with pytest.raises(UsageError, match="holds no results"):
        main(results, page)
    monkeypatch.setenv("CHECKPOINTS", str(results))
    record_checkpoint("GGUF", "split", fp32=1.23e-6)
    record_checkpoint("GGUF", "split", int4="same codes", said="both parts | are read")
    record_checkpoint("weights", "GPTQ", refused="/tmp/some/where/model.gptq is GPTQ: take another")
    main(results, page)
    written = page.read_text(encoding="utf-8")
    assert written.index("## Weights") < written.index("## GGUF files")
    assert r"| split | opened | 1e-06 | same codes | both parts \| are read |" in written
    assert "| GPTQ | refused | model.gptq is GPTQ: take another |" in written
    assert "From `tests/unit/test_checkpoints_page.py`." in written


def test_nothing_is_kept_unless_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CHECKPOINTS", raising=False)
    monkeypatch.chdir(tmp_path)
    record_checkpoint("weights", "bf16", fp32=0.0)
    assert not list(tmp_path.iterdir())
