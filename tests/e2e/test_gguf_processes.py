"""Processes that convert the same GGUF file at once."""

import os
import subprocess
import sys
from pathlib import Path

from tiny_gguf import write_gguf

CONVERT = """
import sys, time
from pathlib import Path
from edge_ft.models import gguf
from edge_ft.progress import Lines
written = gguf.write_safetensors
def slow(*arguments):
    time.sleep(2)
    written(*arguments)
gguf.write_safetensors = slow
print(gguf.convert_gguf(Path(sys.argv[1]), progress=Lines()))
"""


def test_one_converts_and_the_others_wait_for_it(llama: Path, tmp_path: Path) -> None:
    file = write_gguf(llama, tmp_path / "model.gguf")
    environment = {**os.environ, "EDGE_FT_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", CONVERT, str(file)]
    processes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        for _ in range(3)
    ]
    results = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], results
    assert len({folder for folder, _ in results}) == 1
    assert sum("converting" in said and "into the cache" in said for _, said in results) == 1
    assert not list((tmp_path / "cache").glob("*.tmp"))
