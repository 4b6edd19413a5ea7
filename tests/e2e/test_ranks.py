"""Two processes that share each batch train the same adapter as one process with the whole batch."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from edge_ft.artifacts import RunFolder
from edge_ft.config import TuneConfig
from edge_ft.progress import Silent
from edge_ft.tune import tune
from edge_ft.tune.checkpoint import read_checkpoint
from edge_ft.tune.distributed import Processes

# Three rows a batch and three passes a step: shares of two rows and one; the last batch has one row for two processes.
SETTINGS: dict[str, Any] = {
    "max_steps": 6,
    "eval_steps": 3,
    "learning_rate": 5e-3,
    "split": (0.625, 0.25, 0.125),
    "threads": 1,
    "batch_size": 3,
    "gradient_accumulation": 3,
    "compute": "fp32",
}


def launched(flags: dict[str, Any], *processes: str) -> subprocess.Popen[str]:
    """`edge-ft tune` in two processes, as accelerate launch starts them without a GPU."""
    arguments = [
        text
        for name, value in flags.items()
        for text in (f"--{name.replace('_', '-')}", *map(str, np.atleast_1d(value)))
    ]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--main_process_port", "0", *processes, "-m", "edge_ft", "tune", *arguments]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"},
    )


def test_two_processes_train_the_same_adapter_as_one(llama: Path, sums: Path, tmp_path: Path) -> None:
    running = launched({"model": llama, "data": sums, "out": tmp_path / "two", **SETTINGS, "json": "-"})
    one = tune(TuneConfig(model=str(llama), data=str(sums), out=tmp_path / "one", **SETTINGS))
    output, errors = running.communicate(timeout=200)
    assert running.returncode == 0, errors
    two = RunFolder.open(tmp_path / "two")
    assert json.loads(output) == two.report()  # said once
    assert errors.count("6 steps, validation every 3") == 1

    assert two.report()["processes"] == 2
    assert two.report()["rows"] == one.report()["rows"]
    assert one.report()["rows"]["train"] % 3 == 1
    for run in (one, two):
        steps = [json.loads(line)["step"] for line in (run.path / "metrics.jsonl").read_text().splitlines()]
        assert steps == [0, 1, 2, 3, 3, 4, 5, 6, 6]
    assert {p.relative_to(one.path) for p in one.path.rglob("*")} == {
        p.relative_to(two.path) for p in two.path.rglob("*")
    }
    a, b = (load_file(run.adapter / "adapter_model.safetensors") for run in (one, two))
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_allclose(a[name], b[name], atol=5e-5, rtol=0)  # sums in another order
    for name, value in one.report()["nll"].items():
        assert two.report()["nll"][name] == pytest.approx(value, abs=1e-5)


def test_a_signal_stops_both_processes_at_the_same_step(llama: Path, sums: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    settings = {**SETTINGS, "max_steps": 5000, "checkpoint_steps": 2, "eval_steps": 4}
    running = launched({"model": llama, "data": sums, "out": out, **settings})
    until = time.monotonic() + 120
    while not (out / "checkpoint" / "state.json").is_file() and time.monotonic() < until and running.poll() is None:
        time.sleep(0.05)
    running.send_signal(signal.SIGTERM)
    _, errors = running.communicate(timeout=100)
    assert running.returncode != 0
    assert f"--config {out}/config.yaml --resume" in errors
    stopped = read_checkpoint(out)
    assert stopped is not None
    lines = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert max(lines) == stopped.state.steps


def test_a_warning_says_that_accelerates_cpu_launcher_ignores_num_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    class RecordedProgress(Silent):
        text = ""

        def say(self, text: str) -> None:
            RecordedProgress.text += text

    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    monkeypatch.setenv("MASTER_PORT", "29500")
    assert Processes.from_environment(RecordedProgress()).count == 1
    assert "torchrun" in RecordedProgress.text
    monkeypatch.delenv("MASTER_PORT")
    RecordedProgress.text = ""
    Processes.from_environment(RecordedProgress())
    assert RecordedProgress.text == ""
