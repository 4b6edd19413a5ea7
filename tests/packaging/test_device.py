"""With the base install alone, as on a device: bundles open, verify, answer, learn, and are scored and measured."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from once import once
from trainable_bundles import trainable_bundle

from edge_ft.artifacts import Bundle, RunFolder

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def device(work: Path) -> Path:
    """Programs of a virtual environment with nothing but `pip install .`"""

    def install(folder: Path) -> None:
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run([folder / "bin" / "pip", "install", "--quiet", str(ROOT)], check=True)

    return once(work / "device", install) / "bin"


def edge_ft(device: Path, *arguments: str | Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [device / "edge-ft", *map(str, arguments)], input=stdin, capture_output=True, text=True, cwd=device.parent
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done


def test_the_base_install_brings_no_training_stack(device: Path) -> None:
    listed = subprocess.run([device / "pip", "list", "--format", "json"], capture_output=True, text=True, check=True)
    installed = {package["name"].lower() for package in json.loads(listed.stdout)}
    assert "onnxruntime" in installed
    assert not installed & {"torch", "transformers", "peft", "onnx", "datasets"}


@pytest.mark.parametrize("name", ["smollm2_bundle", "smollm2_adapter_bundle", "minilm_bundle"])
def test_a_real_bundle_verifies_answers_and_is_measured(
    device: Path, name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    bundle: Bundle = request.getfixturevalue(name)
    verified = edge_ft(device, "verify", bundle.path, "--json", "-", "--quiet")
    assert verified.returncode == 0, verified.stderr
    assert json.loads(verified.stdout)["probe_difference"]["1"] < 1e-3

    answered = edge_ft(device, "run", bundle.path, "--json", "-", stdin="the rain has stopped")
    assert answered.returncode == 0, answered.stderr
    answer = json.loads(answered.stdout)
    if bundle.task == "text-classification":
        assert answer["label"] in bundle.manifest["rendering"]["labels"]
    else:
        assert "rain" in answer["text"].lower()

    measured = edge_ft(device, "bench", bundle.path, "--repeats", "1", "--new-tokens", "4", "--json", "-", "--quiet")
    assert measured.returncode == 0, measured.stderr
    metrics = {record["metric"]: record["value"] for record in json.loads(measured.stdout)}
    assert metrics["peak_rss_bytes"] > 50e6
    assert metrics["size_bytes"] == bundle.size_bytes


def test_a_bundle_is_scored_over_rows(device: Path, smollm2_bundle: Bundle, smollm2_rows: dict[str, Path]) -> None:
    scored = edge_ft(
        device, "eval", smollm2_bundle.path, "--data", smollm2_rows["test"], "--no-generate", "--json", "-", "--quiet"
    )
    expected = smollm2_bundle.manifest["verification"]["test"]["nll"]["shipped"]
    assert json.loads(scored.stdout)["nll"] == pytest.approx(expected, abs=1e-3)


def test_a_bundle_learns_and_keeps_what_it_learned(device: Path, llama: Path, sums: Path, tmp_path: Path) -> None:
    bundle, run = trainable_bundle(llama, tmp_path / "bundle").path, tmp_path / "run"
    steps = ("--max-steps", "12", "--learning-rate", "1e-2", "--split", "0.6", "0.2", "0.2")
    learned = edge_ft(device, "tune", "--model", bundle, "--data", sums, *steps, "--out", run)
    assert learned.returncode == 0, learned.stderr
    losses = RunFolder.open(run).report()["nll"]
    assert losses["best"] < losses["base"] - 1
    assert f"edge-ft export {run} --onto {bundle}" in learned.stdout + learned.stderr

    answered = edge_ft(device, "run", bundle, "--adapter", run, "--max-new-tokens", "4", "--json", "-", stdin="1 + 2 =")
    assert json.loads(answered.stdout)["new_tokens"] > 0

    def loss(*source: str | Path) -> float:
        given = ("--data", run / "splits" / "test.jsonl", "--no-generate", "--json", "-", "--quiet")
        scored = edge_ft(device, "eval", *source, *given)
        assert scored.returncode == 0, scored.stderr
        return float(json.loads(scored.stdout)["nll"])

    tuned, base = (pytest.approx(losses[column], abs=1e-4) for column in ("test", "test_base"))
    assert loss(run) == tuned == loss(bundle, "--adapter", run)
    assert loss(run, "--adapter", "none") == base
    for arguments in (("run", run, "hello"), ("export", run, "--out", tmp_path / "other"), ("bench", run)):
        refused = edge_ft(device, *arguments)
        assert refused.returncode == 2
        assert f"edge-ft export {run} --onto {bundle}" in refused.stderr

    kept = edge_ft(device, "export", run, "--onto", bundle, "--name", "mine")
    assert kept.returncode == 0, kept.stderr
    assert loss(bundle) == tuned
    assert loss(run) == tuned
    assert loss(bundle, "--adapter", "none") == base


def test_commands_that_need_torch_name_the_pip_command(device: Path, smollm2_bundle: Bundle, tmp_path: Path) -> None:
    for arguments in (
        ("tune", "--model", "m", "--data", "d", "--out", tmp_path / "run"),
        ("export", "m", "--out", tmp_path / "bundle"),
        ("bench", smollm2_bundle.path, "--peers", "torch"),
    ):
        refused = edge_ft(device, *arguments)
        assert refused.returncode == 2
        assert "pip install 'edge-ft[train]'" in refused.stderr
