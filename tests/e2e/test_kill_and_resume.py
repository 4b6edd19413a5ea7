"""`edge-ft tune` as a process: stopped by a signal or a full disk, it resumes and ends with the same adapter."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from resumed_runs import LONG, adapter, lines, settings, stopped_at

from edge_ft.artifacts import RunFolder
from edge_ft.config import TuneConfig
from edge_ft.tune import tune
from edge_ft.tune.checkpoint import read_checkpoint


def test_the_printed_command_resumes_the_run(
    llama: Path, sums: Path, tmp_path: Path, whole: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    stopped_at(settings(llama, sums, run), 7, monkeypatch)
    command = [sys.executable, "-m", "edge_ft", "tune", "--config", str(run / "config.yaml"), "--resume"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "resuming from step 7" in done.stderr
    assert adapter(RunFolder.open(run)) == adapter(whole)
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert "nothing was changed" in again.stderr


def process(config: TuneConfig, **environment: str) -> subprocess.Popen[str]:
    """Start `edge-ft tune` as a process."""
    file = config.out.with_name(f"{config.out.name}.yaml")
    plain = {name: value for name, value in vars(config).items() if value is not None}
    plain |= {"out": str(config.out), "split": list(config.split), "target_modules": list(config.target_modules)}
    file.write_text(yaml.safe_dump({**plain, "allow": [], "resume": config.resume}))
    script = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\nfrom edge_ft.cli import main; main()"
    )
    command = [sys.executable, "-c", script, "tune", "--config", str(file)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment}
    )


def wait_for_step(run: Path, step: int, running: subprocess.Popen[str]) -> None:
    """Wait for a checkpoint of `step` or a later one."""
    until = time.monotonic() + 120
    while time.monotonic() < until and running.poll() is None:
        try:
            if json.loads((run / "checkpoint" / "state.json").read_text())["step"] >= step:
                return
        except (OSError, ValueError):
            pass
        time.sleep(0.01)
    raise AssertionError(running.communicate())


def killed_and_resumed(llama: Path, sums: Path, tmp_path: Path, moments: int, steps: int) -> None:
    once = tune(settings(llama, sums, tmp_path / "once", **{**LONG, "max_steps": steps}))
    config = settings(llama, sums, tmp_path / "run", **{**LONG, "max_steps": steps}, resume=True)
    at, moment = 1, random.Random(moments)
    for _ in range(moments):
        running = process(config)
        wait_for_step(config.out, at, running)
        time.sleep(moment.uniform(0, 0.3))
        running.kill()
        running.communicate()
        assert running.returncode == -signal.SIGKILL
        found = read_checkpoint(config.out)
        assert found is not None
        assert found.state.steps >= at
        at = found.state.steps + 2
    run = tune(config)
    assert run.report()["resumed_from_step"] == at - 2
    assert adapter(run) == adapter(once)
    assert lines(run) == lines(once)


def test_kill_9_at_two_moments(llama: Path, sums: Path, tmp_path: Path) -> None:
    killed_and_resumed(llama, sums, tmp_path, moments=2, steps=150)


@pytest.mark.long
def test_kill_9_at_ten_moments(llama: Path, sums: Path, tmp_path: Path) -> None:
    killed_and_resumed(llama, sums, tmp_path, moments=10, steps=600)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_signal_saves_and_names_the_command_that_resumes(
    llama: Path, sums: Path, tmp_path: Path, number: signal.Signals
) -> None:
    rare = settings(llama, sums, tmp_path / "run", **{**LONG, "max_steps": 5000, "checkpoint_steps": 2})
    running = process(rare)
    wait_for_step(rare.out, 2, running)
    running.send_signal(number)
    _, errors = running.communicate()
    assert running.returncode == 130, errors
    assert f"edge-ft tune --config {rare.out}/config.yaml --resume" in errors.splitlines()[-1]
    found = read_checkpoint(rare.out)
    assert found is not None
    steps = [json.loads(line)["step"] for line in (rare.out / "metrics.jsonl").read_text().splitlines()]
    assert f"from step {found.state.steps}" in errors
    assert max(steps) == found.state.steps


def test_a_file_size_limit_leaves_the_older_checkpoint(
    llama: Path, sums: Path, tmp_path: Path, whole: RunFolder
) -> None:
    """From step 4 on the system refuses to write a large file."""
    config = settings(llama, sums, tmp_path / "run")
    script = (
        "import resource, sys; from pathlib import Path; from edge_ft.config import TuneConfig\n"
        "from edge_ft.tune import tune; import yaml; from edge_ft.tune.torch_backend import TorchBackend\n"
        "update, done = TorchBackend.update, []\n"
        "def limited(self, *arguments):\n"
        "    done.append(1)\n"
        "    if len(done) == 4: resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))\n"
        "    return update(self, *arguments)\n"
        "TorchBackend.update = limited\n"
        "tune(TuneConfig(**yaml.safe_load(Path(sys.argv[1]).read_text())))\n"
    )
    plain = {**vars(config), "out": str(config.out), "split": list(config.split), "target_modules": ["all-linear"]}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({**plain, "allow": []}))
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "config.yaml")], capture_output=True, text=True)
    assert "WillNotFit: the disk is full" in done.stderr  # the adapter of the evaluation at step 4 is too large as well
    found = read_checkpoint(config.out)
    assert found is not None
    assert found.state.steps == 3
    run = tune(replace(config, resume=True))
    assert (adapter(run), lines(run)) == (adapter(whole), lines(whole))
