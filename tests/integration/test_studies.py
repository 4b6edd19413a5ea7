"""`python -m edge_ft.bench.studies NAME`: the names, and the exit codes of what goes wrong."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from edge_ft.bench.studies import __main__ as studies

NAMES = {file.stem for file in Path(studies.__file__).parent.glob("*.py") if "\ndef main(" in file.read_text()}
NAMES = {name for name in NAMES if name != "__main__" and not name.endswith("_worker")}


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The exit code of a study that is started with these arguments."""
    monkeypatch.setattr(sys, "argv", ["studies", *arguments])
    with pytest.raises(SystemExit) as ended:
        studies.main()
    return int(ended.value.code or 0)


def test_help_lists_every_study_without_importing_any() -> None:
    script = (
        "import sys, edge_ft.bench.studies.__main__ as m\n"
        "m.app('--help', exit_on_error=False)\n"
        "print(sorted({'torch', 'numpy', 'edge_ft.bench.studies.demo'} & sys.modules.keys()))"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1, "CPU seconds, 0.2 as a rule"
    for name in NAMES:
        assert f" {name} " in done.stdout
    assert done.stdout.strip().endswith("[]")


def test_an_unknown_study_is_refused_with_the_nearest_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(monkeypatch, "claim") == 2
    assert 'Did you mean "claims"?' in capsys.readouterr().err


def test_an_unknown_option_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(monkeypatch, "claims", "--onl", "recipe") == 2
    assert "--onl" in capsys.readouterr().err


def test_an_error_of_a_study_ends_with_its_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(monkeypatch, "claims", "--only", "recipes") == 2
    assert "did you mean 'recipe'" in capsys.readouterr().err
