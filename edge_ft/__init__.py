"""edge-ft: LoRA over a quantized base, exported to ONNX, run and measured without torch."""

from pathlib import Path

__all__ = ["__version__"]
__version__ = "0.1.0"

# A checkout keeps export/ and bench/ beside this folder; a wheel carries them inside it.
_here = Path(__file__).resolve().parent
if not (_here / "export").is_dir() and (_here.parent / "export" / "__init__.py").is_file():
    __path__.append(str(_here.parent))
