"""A bundle opens only if nothing has changed, and files are written whole or not at all."""

import json
import os
import shutil
import time
from pathlib import Path

import pytest
from tiny_bundle import write_decoder

from edge_ft.artifacts import Bundle, RunFolder, kind_of, remembered
from edge_ft.artifacts import bundle as bundle_module
from edge_ft.errors import BundleError, UsageError
from edge_ft.files import atomic_folder, file_sha256, seal, write_json, write_text


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write_decoder(tmp_path / "bundle")


def test_an_unchanged_bundle_opens_and_has_a_size(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    files = [path for path in bundle.rglob("*") if path.is_file() and path.name != "manifest.json"]
    assert opened.size_bytes == sum(path.stat().st_size for path in files)
    assert opened.graph() == bundle / opened.manifest["model"]


def edit(bundle: Path, **changes: object) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    (bundle / "manifest.json").write_text(json.dumps({**manifest, **changes}))


def test_a_changed_byte_is_refused(bundle: Path) -> None:
    graph = Bundle.open(bundle).graph()
    content = bytearray(graph.read_bytes())
    content[len(content) // 2] ^= 1
    graph.write_bytes(content)
    with pytest.raises(BundleError, match="sha256 differs"):
        Bundle.open(bundle)


def test_a_missing_file_is_refused_by_name(bundle: Path) -> None:
    (bundle / "tokenizer.json").unlink()
    with pytest.raises(BundleError, match=r"lacks tokenizer\.json"):
        Bundle.open(bundle)


def test_an_unlisted_file_is_refused_by_name(bundle: Path) -> None:
    (bundle / "onnx" / "extra.onnx").write_text("x")
    with pytest.raises(BundleError, match=r"does not list: onnx/extra\.onnx"):
        Bundle.open(bundle)


def test_a_file_outside_the_bundle_cannot_be_listed(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "outside").write_text("x")
    edit(bundle, files={"../outside": {"sha256": "0", "bytes": 1}})
    with pytest.raises(BundleError):
        Bundle.open(bundle)


def test_another_version_is_refused(bundle: Path) -> None:
    edit(bundle, format_version=99)
    with pytest.raises(BundleError, match="version 99, this edge-ft reads version 1"):
        Bundle.open(bundle)


@pytest.mark.parametrize("content", ["{", "[]", '{"format_version": 1}', '{"format_version": 1, "files": {"a": 1}}'])
def test_a_broken_manifest_is_refused(bundle: Path, content: str) -> None:
    (bundle / "manifest.json").write_text(content)
    with pytest.raises(BundleError, match=r"manifest"):
        Bundle.open(bundle)


def test_a_folder_without_a_manifest_is_not_a_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="is not a bundle"):
        Bundle.open(tmp_path)


def test_an_accuracy_level_that_verification_refused_has_no_graph(bundle: Path) -> None:
    with pytest.raises(BundleError, match="no verified graph of accuracy level 3"):
        Bundle.open(bundle).graph(3)


def test_an_atomic_folder_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "out") as folder:
        (folder / "half").write_text("x")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    with atomic_folder(tmp_path / "out") as folder:
        (folder / "whole").write_text("x")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "whole"]


def test_an_atomic_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    write_text(tmp_path / "file", "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "file", "new \ud800")
    assert (tmp_path / "file").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """What identifies a finished run."""
    (tmp_path / "run" / "splits").mkdir(parents=True)
    (tmp_path / "run" / "report.json").write_text("{}")
    return tmp_path / "run"


def test_the_kind_of_a_source_is_bundle_run_or_model(bundle: Path, llama: Path, run: Path) -> None:
    assert [kind_of(str(path)) for path in (bundle, run, llama)] == ["bundle", "run", "model"]


def test_an_unfinished_run_is_refused(run: Path) -> None:
    assert RunFolder.open(run).path == run
    (run / "report.json").unlink()
    with pytest.raises(UsageError, match="no finished run"):
        RunFolder.open(run)


def test_json_without_nan_is_written(tmp_path: Path) -> None:
    write_json(tmp_path / "new" / "file.json", {"loss": 1.5, "name": "é"})
    assert (tmp_path / "new" / "file.json").read_text(encoding="utf-8") == '{\n  "loss": 1.5,\n  "name": "é"\n}\n'
    with pytest.raises(ValueError, match="nan"):
        write_json(tmp_path / "file.json", {"loss": float("nan")})
    assert not (tmp_path / "file.json").exists()


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Names of the files that are hashed, in a cache of this test and at a time when a fresh bundle is old."""
    seen: list[str] = []
    monkeypatch.setenv("EDGE_FT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remembered, "_TICK_NS", -(10**9))
    monkeypatch.setattr(bundle_module, "file_sha256", lambda file: (seen.append(file.name), file_sha256(file))[1])
    return seen


def test_a_bundle_in_order_is_hashed_once(bundle: Path, hashed: list[str]) -> None:
    Bundle.open(bundle)
    first = len(hashed)
    Bundle.open(bundle)
    assert len(hashed) == first > 0
    Bundle.open(bundle, hash_all=True)
    assert len(hashed) == 2 * first


def test_a_change_of_the_same_size_and_mtime_is_found(bundle: Path, hashed: list[str]) -> None:
    graph = Bundle.open(bundle).graph()
    before, content = graph.stat(), bytearray(graph.read_bytes())
    content[len(content) // 2] ^= 1
    time.sleep(0.02)  # a tick of the file system's clock
    graph.write_bytes(content)
    os.utime(graph, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(BundleError, match="sha256 differs"):
        Bundle.open(bundle)


def test_another_manifest_is_not_that_of_the_last_open(bundle: Path, hashed: list[str]) -> None:
    manifest = Bundle.open(bundle).manifest
    manifest["files"]["tokenizer.json"]["sha256"] = "0" * 64
    write_json(bundle / "manifest.json", seal(manifest))
    with pytest.raises(BundleError, match="sha256 differs"):
        Bundle.open(bundle)


def test_a_file_that_changed_just_now_is_hashed_again(
    bundle: Path, hashed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remembered, "_TICK_NS", 60 * 10**9)
    Bundle.open(bundle)
    first = len(hashed)
    Bundle.open(bundle)
    assert len(hashed) == 2 * first


def test_a_damaged_memory_or_none_means_hashing(bundle: Path, hashed: list[str], tmp_path: Path) -> None:
    Bundle.open(bundle)
    first = len(hashed)
    (file,) = (tmp_path / "cache" / "opened").iterdir()
    file.write_bytes(b"\xff{")
    Bundle.open(bundle)
    assert len(hashed) == 2 * first
    shutil.rmtree(tmp_path / "cache")
    (tmp_path / "cache").write_text("no folder")
    Bundle.open(bundle)
    assert len(hashed) == 3 * first
