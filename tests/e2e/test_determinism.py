"""Same settings, machine and threads: the same adapter, bundle and answer, in processes with other hash seeds."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

from tiny_models import tiny_encoder_config, write_encoder

from edge_ft.artifacts import RunFolder

EXPORT = """
import sys
from edge_ft.config import ExportConfig, RunConfig
from edge_ft.export import export
from edge_ft.runtime.run import run_text
source, out, *text = sys.argv[1:]
limits = {"max_tax": 9.0, "min_retained": -9.0, "max_metric_drop": 1.0} if text else {"task": "feature-extraction"}
bundle = export(source, ExportConfig(out=out, threads=1, **limits))
if text:
    print(run_text(bundle.path, text[0], RunConfig(accuracy_level=1, threads=1, max_new_tokens=32), None)["text"])
"""


def python(hash_seed: int, *arguments: object) -> str:
    environment = {**os.environ, "PYTHONHASHSEED": str(hash_seed), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def contents(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_the_command_of_the_report_gives_the_same_adapter_bundle_and_answer(
    llama: Path, sums: Path, tmp_path: Path
) -> None:
    first = RunFolder(tmp_path / "run")
    python(
        1,
        *("-m", "edge_ft", "tune", "--model", llama, "--data", sums, "--out", first.path, "--max-steps", 12),
        *("--finish-steps", 2),
        *("--learning-rate", 1e-2, "--dropout", 0.1, "--threads", 1, "--compute", "fp32", "--quiet"),
    )
    edge_ft, *arguments = shlex.split(first.report()["command"])
    assert edge_ft == "edge-ft"
    python(2, "-m", "edge_ft", *arguments, "--quiet")
    again = RunFolder(tmp_path / "run-again")
    for file in ("adapter/adapter_model.safetensors", "merged/codes.safetensors"):
        assert (first.path / file).read_bytes() == (again.path / file).read_bytes()

    answers = [
        python(seed, "-c", EXPORT, run.path, tmp_path / f"bundle-{seed}", "hello 3 the answer")
        for seed, run in ((3, first), (4, again))
    ]
    assert answers[0] == answers[1] != "\n"
    assert contents(tmp_path / "bundle-3") == contents(tmp_path / "bundle-4")


def test_a_graph_has_the_same_names_in_every_process(tmp_path: Path) -> None:
    """transformers computes the rotary tables of ModernBERT's two kinds of layers in the order of a set."""
    model = write_encoder(tmp_path / "model", tiny_encoder_config("modernbert"))
    for seed in (1, 2, 3):
        python(seed, "-c", EXPORT, model, tmp_path / str(seed))
    first = contents(tmp_path / "1")
    for seed in (2, 3):
        differ = {name for name, content in contents(tmp_path / str(seed)).items() if content != first[name]}
        assert not differ
