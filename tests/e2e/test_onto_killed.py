"""`edge-ft export RUN --onto BUNDLE` as a process that is killed: the bundle is as before or as after, never broken."""

import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from once import once
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from edge_ft.artifacts import Bundle
from edge_ft.config import ExportConfig, VerifyConfig
from edge_ft.evaluate.verify import verify
from edge_ft.export import export

KILLED = """
import os, pathlib, signal, sys
left, after = int(sys.argv.pop(1)), sys.argv.pop(1) == "after"
replace = pathlib.Path.replace

def killed(self, target):
    global left
    left -= 1
    if left == 0 and not after:
        os.kill(os.getpid(), signal.SIGKILL)
    found = replace(self, target)
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return found

pathlib.Path.replace = killed
from edge_ft.cli import main
try:
    main()
except SystemExit as ended:
    assert not ended.code, ended.code
assert "torch" not in sys.modules and "onnx" not in sys.modules and "peft" not in sys.modules
"""


@pytest.fixture(scope="module")
def base_bundle(work: Path, llama: Path) -> Path:
    return once(work / "onto-float", lambda out: export(str(llama), ExportConfig(out=out, weights="fp32")))


@pytest.fixture(scope="module")
def adapter(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("adapter") / "mine"
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(llama), config)
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


def add(bundle: Path, adapter: Path, at: int, when: str = "before") -> int:
    command = ["export", str(adapter), "--onto", str(bundle), "--name", "mine", "--quiet"]
    done = subprocess.run([sys.executable, "-c", KILLED, str(at), when, *command], capture_output=True, text=True)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done.returncode


def test_a_kill_at_any_rename_leaves_the_old_or_the_new_bundle(
    base_bundle: Path, adapter: Path, tmp_path: Path
) -> None:
    bundle = Path(shutil.copytree(base_bundle, tmp_path / "bundle"))
    for at in (2, 3, 4):  # the numbers, the graph, the manifest
        assert add(bundle, adapter, at) == -signal.SIGKILL
        assert Bundle.open(bundle).manifest["lane"] == "base"
    assert add(bundle, adapter, 4, "after") == -signal.SIGKILL
    assert Bundle.open(bundle).manifest["adapters"]["default"] == "mine"
    verify(bundle, VerifyConfig())
    assert add(bundle, adapter, 99) == 0  # once more, without torch or ONNX libraries
    verify(bundle, VerifyConfig())
    listed = Bundle.open(bundle).manifest["files"].keys()
    assert {file.relative_to(bundle).as_posix() for file in bundle.rglob("*") if file.is_file()} - {
        "manifest.json"
    } == listed
