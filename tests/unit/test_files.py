"""Files that show damage, and folders that one process writes at a time."""

import fcntl
import json
import os
from pathlib import Path

import pytest

from edge_ft.artifacts import RunFolder
from edge_ft.errors import UsageError
from edge_ft.files import is_as_sealed, locked, seal, write_json

DOCUMENT = {"format": 1, "loss": 0.1, "names": ("a", "ü"), "none": None}


def test_a_sealed_document_opens_as_it_was_written_and_not_with_another_number(tmp_path: Path) -> None:
    file = tmp_path / "file.json"
    write_json(file, seal(DOCUMENT))
    assert is_as_sealed(file, json.loads(file.read_text()))
    file.write_text(file.read_text().replace("0.1", "0.3"))
    assert not is_as_sealed(file, json.loads(file.read_text()))


def test_every_flipped_bit_of_a_sealed_document_shows_or_changes_nothing(tmp_path: Path) -> None:
    file = tmp_path / "file.json"
    write_json(file, seal(DOCUMENT))
    whole, content = file.read_bytes(), json.loads(file.read_text())
    for at in range(8 * len(whole)):
        damaged = bytearray(whole)
        damaged[at // 8] ^= 1 << at % 8
        file.write_bytes(damaged)
        try:
            found = json.loads(damaged.decode())
        except ValueError:
            continue
        if "seal" in found:  # else it is read as one of an earlier release, which had none
            assert found == content or not is_as_sealed(file, found)


def test_a_document_of_an_earlier_release_and_one_that_was_rewritten_on_purpose_open(tmp_path: Path) -> None:
    file = tmp_path / "file.json"
    write_json(file, DOCUMENT)
    assert is_as_sealed(file, json.loads(file.read_text()))
    file.write_text(json.dumps({**seal(DOCUMENT), "loss": 0.3}))
    assert is_as_sealed(file, json.loads(file.read_text()))


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A finished run with a list of its files."""
    folder = RunFolder(tmp_path / "run")
    (folder.path / "splits").mkdir(parents=True)
    folder.split("test").write_text('{"text": "a"}\n')
    folder.seal_files({"steps": 3})
    write_json(folder.report_path, {"steps": 3})
    return folder


def test_a_run_opens_with_the_files_that_were_written(run: RunFolder) -> None:
    assert RunFolder.open(run.path) == run
    listed = json.loads(run.files_path.read_text())["files"]
    assert listed.keys() == {"report.json", "splits/test.jsonl"}
    assert listed["splits/test.jsonl"]["bytes"] == 14


@pytest.mark.parametrize("name", ["splits/test.jsonl", "report.json", "files.json"])
def test_a_damaged_file_of_a_run_is_refused_by_name(run: RunFolder, name: str) -> None:
    file = run.path / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)
    with pytest.raises(UsageError, match=f"{name} .*: copy the run folder again, or remove files.json"):
        RunFolder.open(run.path)
    run.files_path.unlink()
    assert RunFolder.open(run.path) == run


def test_a_missing_file_of_a_run_is_refused_by_name(run: RunFolder) -> None:
    run.split("test").unlink()
    with pytest.raises(UsageError, match=r"lacks splits/test\.jsonl"):
        RunFolder.open(run.path)


def test_there_is_no_list_while_files_are_changed(run: RunFolder) -> None:
    with pytest.raises(ZeroDivisionError), run.changed():
        assert not run.files_path.exists()
        raise ZeroDivisionError
    assert not run.files_path.exists()


def test_a_second_process_is_refused_by_name(tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    with (
        locked(out),
        pytest.raises(UsageError, match=f"out is being written by another edge-ft .process {os.getpid()}"),
        locked(out),
    ):
        raise AssertionError
    assert not out.parent.exists()


def test_what_a_killed_process_left_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / ".out.lock").write_text("1")
    (tmp_path / ".out.1.tmp").mkdir()
    (tmp_path / ".out.1.tmp" / "half").write_text("x")
    (tmp_path / ".other.1.tmp").mkdir()
    with locked(tmp_path / "out"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == [".other.1.tmp"]


def test_a_file_system_without_locks_locks_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with locked(tmp_path / "out"), locked(tmp_path / "out"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with (
        pytest.raises(UsageError, match=r"cannot be written .*: give another --out"),
        locked(tmp_path / "file" / "out"),
    ):
        raise AssertionError
