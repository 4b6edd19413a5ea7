"""Imports that must not happen: the training stack with the runtime, engines in the bench's parent process."""

import os
import subprocess
import sys
from pathlib import Path


def test_the_runtime_needs_no_training_stack() -> None:
    program = (
        "import sys, edge_ft.runtime\n"
        "heavy = {'torch', 'transformers', 'peft', 'onnx', 'datasets', 'safetensors'} & set(sys.modules)\n"
        "sys.exit(', '.join(heavy) or 0)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_the_benchs_parent_process_imports_no_engine() -> None:
    check = (
        "import sys, edge_ft.bench, edge_ft.bench.report\n"
        "print(sorted({'torch', 'onnxruntime', 'numpy', 'transformers', 'tokenizers'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_onnxruntime_reports_nothing_about_the_device(tmp_path: Path) -> None:
    """The official builds write an identifier and a database of events as they are imported, and upload them."""
    places = {name: str(tmp_path / name) for name in ("HOME", "TMPDIR", "XDG_CACHE_HOME")}
    for place in places.values():
        Path(place).mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"} | places
    subprocess.run([sys.executable, "-c", "import edge_ft.runtime"], check=True, env=environment)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
