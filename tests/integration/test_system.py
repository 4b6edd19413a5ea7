"""Memory as one program reports it that another one started."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_the_peak_of_a_program_is_its_own_and_not_that_of_its_parent() -> None:
    """As getrusage's ru_maxrss would be."""
    script = (
        "import subprocess, sys\n"
        "held = b'1' * 300_000_000\n"
        "child = 'from edge_ft.system import peak_rss_bytes; print(peak_rss_bytes())'\n"
        "print(subprocess.run([sys.executable, '-c', child], stdout=subprocess.PIPE, text=True).stdout)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert 5_000_000 < int(done.stdout) < 200_000_000
