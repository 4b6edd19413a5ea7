"""Imports that must not happen: the training stack with the runtime, engines in the bench's parent process."""

import subprocess
import sys


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
