"""A training that Ctrl-Z stops for a while goes on at SIGCONT; the time in between counts nowhere."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from once import once
from trainable_bundles import trainable_bundle

from edge_ft.artifacts import RunFolder

PAUSE, STEPS = 3.0, 40


@pytest.fixture(scope="module")
def bundle(work: Path, llama: Path) -> Path:
    return once(work / "learning-llama-chat.bundle", lambda out: trainable_bundle(llama, out))


def wait_for(file: Path, process: subprocess.Popen[str]) -> None:
    until = time.monotonic() + 120
    while not file.is_file():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.01)


def is_stopped(process: subprocess.Popen[str]) -> bool:
    return Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("backend", ["bundle", pytest.param("torch", marks=pytest.mark.long)])
def test_the_clock_stands_still_while_the_process_is_stopped(
    backend: str, bundle: Path, llama: Path, sums: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    model = bundle if backend == "bundle" else llama
    length = ("--max-steps", f"{STEPS}", "--checkpoint-steps", "4", "--threads", "1")
    torch = () if backend == "bundle" else ("--compute", "fp32", "--memory", "normal")
    command = [sys.executable, "-m", "edge_ft", "tune", "--model", str(model), "--data", str(sums), "--out", str(run)]
    began = time.monotonic()
    with subprocess.Popen(
        [*command, *length, *torch], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            wait_for(run / "checkpoint" / "state.json", process)
            process.send_signal(signal.SIGTSTP)
            while not is_stopped(process):
                assert process.poll() is None, process.communicate()
                time.sleep(0.01)
            time.sleep(PAUSE)
            assert is_stopped(process)
            process.send_signal(signal.SIGCONT)
            _, said = process.communicate(timeout=120)
        finally:
            process.kill()
    whole = time.monotonic() - began
    assert process.returncode == 0, said
    report = RunFolder.open(run).report()
    assert report["steps"] == STEPS and report["stopped"] == "steps"
    assert report["seconds"] < whole - PAUSE
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    tokens = sum(line["tokens"] for line in lines if "loss" in line)
    assert tokens / report["tokens_per_second"] < whole - PAUSE
