"""The tutorials are scripts that run as they stand, here with tiny models and in the process of the test."""

import os
import runpy
import subprocess
import sys
import time
from pathlib import Path

import pytest
from in_process import run_cli
from tiny_models import write_bert, write_llama, write_reviews, write_sums

from edge_ft.artifacts import Bundle, RunFolder

TUTORIALS = Path(__file__).resolve().parents[2] / "docs" / "tutorials"
CLIENT = """#!/bin/sh
printf '%s\\0' "$(basename "$0")" "$@" > request.part && mv request.part request
while [ ! -e reply ]; do sleep 0.02; done
mv reply replied && cat replied && exit "$(cat code)"
"""
"""Stands for edge-ft and python. The test runs the commands: to load torch anew for each would take longer."""


def run_script(name: str, folder: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Run a tutorial in `folder`, which has its rows, and return the commands that it gave."""
    programs = folder / "bin"
    programs.mkdir()
    for program in ("edge-ft", "python"):
        (programs / program).write_text(CLIENT)
        (programs / program).chmod(0o755)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    environment = os.environ | {"MODEL": str(model), "PATH": f"{programs}:{os.environ['PATH']}"}
    given = []
    with subprocess.Popen(["bash", str(TUTORIALS / name)], env=environment) as script:
        try:
            while script.poll() is None:
                time.sleep(0.02)
                if (folder / "request").is_file():
                    given.append(serve(folder, monkeypatch))
        finally:
            script.kill()
    assert script.returncode == 0
    return given


def serve(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run the command that the script waits for, and return its name."""
    arguments = (folder / "request").read_text().split("\0")[:-1]
    (folder / "request").unlink()
    code, printed = run_program(monkeypatch, *arguments)
    assert code == 0, arguments
    (folder / "code").write_text(str(code))
    (folder / "printed").write_bytes(printed)
    (folder / "printed").rename(folder / "reply")
    return arguments[1 if arguments[0] == "edge-ft" else 0]


def run_program(monkeypatch: pytest.MonkeyPatch, program: str, *arguments: str) -> tuple[int, bytes]:
    """Exit code and stdout of edge-ft, or of a Python file."""
    if program == "python":
        monkeypatch.setattr(sys, "argv", list(arguments))
        runpy.run_path(arguments[0])
        return 0, b""
    own: list[str] = []
    if arguments[0] in ("plan", "tune") and "device-bundle" not in arguments:
        own = ["--compute", "fp32"]  # to compile bfloat16 kernels takes longer
    elif arguments[0] == "export" and "--trainable" not in arguments:
        # A tiny model loses more when merged weights are rounded again.
        own = [
            "--min-retained",
            "0.5",
            "--max-metric-drop",
            "1",
            *(() if "--max-tax" in arguments else ("--max-tax", "1")),
        ]
    return run_cli(monkeypatch, *arguments, *own)


def split_rows(folder: Path, rows: Path) -> None:
    lines = rows.read_text().splitlines(keepends=True)
    (folder / "rows").mkdir()
    for name, share in (("train", lines[:-24]), ("validation", lines[-24:-12]), ("test", lines[-12:])):
        (folder / "rows" / f"{name}.jsonl").write_text("".join(share))


def test_a_support_faq_with_a_decoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    split_rows(tmp_path, write_sums(tmp_path / "sums.jsonl"))
    given = run_script("support-faq.sh", tmp_path, write_llama(tmp_path / "model"), monkeypatch)
    assert given == ["plan", "tune", "export", "run", "eval"]
    assert RunFolder.open(tmp_path / "faq-run").report()["steps"] == 12
    assert Bundle.open(tmp_path / "faq-bundle").task == "text-generation"


def test_departments_with_an_encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    split_rows(tmp_path, write_reviews(tmp_path / "reviews.jsonl"))
    given = run_script(
        "departments.sh", tmp_path, write_bert(tmp_path / "model", max_position_embeddings=128), monkeypatch
    )
    assert given == ["tune", "export", "run", "run", "eval"]
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 12


def test_an_adapter_from_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    split_rows(tmp_path, write_reviews(tmp_path / "reviews.jsonl"))
    given = run_script(
        "adapter-from-elsewhere.sh", tmp_path, write_bert(tmp_path / "model", max_position_embeddings=128), monkeypatch
    )
    assert given == ["python", "export", "verify", "run"]
    assert Bundle.open(tmp_path / "foreign-bundle").manifest["lane"] == "merged"


def test_a_bundle_that_learns_on_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    split_rows(tmp_path, write_sums(tmp_path / "sums.jsonl"))
    given = run_script("learns-on-device.sh", tmp_path, write_llama(tmp_path / "model"), monkeypatch)
    assert given == ["export", "tune", "run", "export", "run", "run"]
    bundle = Bundle.open(tmp_path / "device-bundle")
    assert bundle.manifest["adapters"]["default"] == "support"
