"""edge-ft: LoRA over a quantized base, exported to ONNX, run and measured without torch."""

import os
from pathlib import Path

from edge_ft.openmp import set_waiting

__all__ = ["__version__"]
__version__ = "0.1.0"

set_waiting(os.environ)
# Read by oneDNN, and by torch about what it keeps of it: the code made for each of the last 1024 shapes of a product,
# and batches are of many lengths. 200 batches of MiniLM left 1,262 MiB with the process when only the first of the
# two was bounded, and 1,045 with both, in the same time.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
os.environ.setdefault("LRU_CACHE_CAPACITY", "64")

# Read by onnxruntime when it is imported: without it the official builds write an identifier of the device and a
# database of events into the home folder, and upload them.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

# A checkout keeps export/ and bench/ beside this folder; a wheel carries them inside it.
_here = Path(__file__).resolve().parent
if not (_here / "export").is_dir() and (_here.parent / "export" / "__init__.py").is_file():
    __path__.append(str(_here.parent))
