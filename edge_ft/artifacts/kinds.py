"""What a path names, by the files in it."""

from pathlib import Path

__all__ = ["is_model", "kind_of"]


def kind_of(source: str) -> str:
    """What SOURCE names: `bundle` (a folder with a manifest), `run` (one with splits or a report), or `model`."""
    path = Path(source)
    if (path / "manifest.json").is_file():
        return "bundle"
    if (path / "splits").is_dir() or (path / "report.json").is_file():
        return "run"
    return "model"


def is_model(path: Path) -> bool:
    """Whether a path is a model on disk: a GGUF, or a checkpoint's folder."""
    return path.suffix == ".gguf" or (path / "config.json").is_file()
