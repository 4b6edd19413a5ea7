"""Run folders and bundles on disk, and files that are written whole or not at all.

Reports and manifests are read and written only here; `docs/bundle.md` describes the bundle.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_ft.errors import BundleError, UsageError
from edge_ft.manifest import find_misfit
from edge_ft.utf8 import read_json, read_utf8

__all__ = [
    "FORMAT_VERSION",
    "Bundle",
    "RunFolder",
    "atomic_file",
    "atomic_folder",
    "cache_folder",
    "disk_full",
    "file_sha256",
    "kind_of",
    "write_json",
    "write_jsonl",
    "write_text",
]

FORMAT_VERSION = 1


def cache_folder() -> Path:
    """The folder for what later commands reuse: EDGE_FT_CACHE, or ~/.cache/edge-ft."""
    return Path(os.environ.get("EDGE_FT_CACHE", Path.home() / ".cache" / "edge-ft"))


def file_sha256(path: Path) -> str:
    """Hex sha256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A temporary file beside `path`, which is renamed to `path` if the block succeeds and removed if it fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    neighbour = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield neighbour
        with neighbour.open("r+b") as file:
            os.fsync(file.fileno())
        neighbour.replace(path)
    finally:
        neighbour.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file by `atomic_file`."""
    with atomic_file(path) as file:
        file.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON by `write_text`.

    Raises:
        ValueError: a number is NaN or infinite, which JSON does not know.
    """
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_jsonl(path: Path, values: Iterable[Any]) -> None:
    """`write_text` of one JSON value a line; what JSON has no form for is written as text."""
    write_text(path, "".join(json.dumps(value, ensure_ascii=False, default=str) + "\n" for value in values))


def disk_full(error: BaseException) -> bool:
    """Whether a write failed because the disk is full; safetensors reports that in an error of its own."""
    full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    if isinstance(error, OSError):
        return error.errno in full
    return any(f"os error {code})" in str(error) for code in full)


def refuse_existing(out: Path) -> None:
    """Refuse to overwrite.

    Raises:
        UsageError: `out` exists.
    """
    if out.exists():
        raise UsageError(f"{out} exists already: give another --out or remove it")


@contextmanager
def atomic_folder(out: Path) -> Iterator[Path]:
    """A temporary folder beside `out`, which is renamed to `out` if the block succeeds and removed if it fails.

    Yields:
        The temporary folder.

    Raises:
        UsageError: `out` exists.
    """
    refuse_existing(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def kind_of(source: str) -> str:
    """What SOURCE names: `bundle` (a folder with a manifest), `run` (one with splits or a report), or `model`."""
    path = Path(source)
    if (path / "manifest.json").is_file():
        return "bundle"
    if (path / "splits").is_dir() or (path / "report.json").is_file():
        return "run"
    return "model"


@dataclass(frozen=True)
class RunFolder:
    """The folder that `tune` writes: adapter, tokenizer, splits, report, and the identity of the base."""

    path: Path

    @classmethod
    def open(cls, path: Path) -> "RunFolder":
        """Open a finished run.

        Returns:
            The run.

        Raises:
            UsageError: the folder is not a run, or the run did not finish.
        """
        run = cls(path)
        if not run.report_path.is_file():
            raise UsageError(
                f"{path} holds no finished run (report.json is missing): resume it with edge-ft tune --config "
                f"{run.config_path} --resume"
            )
        return run

    def is_begun(self) -> bool:
        """Whether `tune` made this folder, even if it wrote nothing into it yet."""
        return self.path.is_dir() and ((self.path / "splits").is_dir() or not any(self.path.iterdir()))

    @property
    def config_path(self) -> Path:
        """The resolved settings, in the format of --config."""
        return self.path / "config.yaml"

    @property
    def report_path(self) -> Path:
        """The report, which a finished run has."""
        return self.path / "report.json"

    @property
    def adapter(self) -> Path:
        """PEFT adapter folder (adapter_config.json, adapter_model.safetensors)."""
        return self.path / "adapter"

    @property
    def codes(self) -> Path:
        """The base's int4 codes where they were chosen over training rows."""
        return self.path / "codes.safetensors"

    @property
    def tokenizer(self) -> Path:
        """Folder with tokenizer.json and its settings."""
        return self.path / "tokenizer"

    def split(self, name: str) -> Path:
        """JSONL file with the rows of `train`, `validation` or `test`, as the user gave them."""
        return self.path / "splits" / f"{name}.jsonl"

    def settings(self) -> dict[str, Any]:
        """Read config.yaml.

        Returns:
            The settings; none before the file is written.

        Raises:
            UsageError: the file cannot be read as settings.
        """
        import yaml

        if not self.config_path.is_file():
            return {}
        try:
            settings = yaml.safe_load(read_utf8(self.config_path))
        except yaml.YAMLError as error:
            raise UsageError(f"{self.config_path} is not YAML: {error}") from error
        if not isinstance(settings, dict):
            raise UsageError(f"{self.config_path} must hold one `option: value` a line")
        return settings

    def write_settings(self, settings: dict[str, Any]) -> None:
        """Write config.yaml, which gives the same run again: with --resume, or with another --out."""
        import yaml

        write_text(self.config_path, yaml.safe_dump({**settings, "resume": False}, sort_keys=False))

    def report(self) -> dict[str, Any]:
        """The content of report.json."""
        report: dict[str, Any] = read_json(self.report_path)
        return report

    def base(self) -> dict[str, Any]:
        """Read the identity of the base.

        Returns:
            `model`, `path`, `content_sha256`, `format`, `block_size`, `calibration_rows`, `calibration` (figures of
            choosing int4 codes, or null) and `codes_sha256`.
        """
        base: dict[str, Any] = read_json(self.path / "base.json")
        return base

    def rendering(self) -> dict[str, Any]:
        """The rendering of the rows, for `edge_ft.data.Rendering.from_dict`."""
        rendering: dict[str, Any] = read_json(self.path / "rendering.json")
        return rendering


@dataclass(frozen=True)
class Bundle:
    """A folder with everything that a device needs; it opens only if no file has changed since the export."""

    path: Path
    manifest: dict[str, Any]

    @classmethod
    def open(cls, path: Path) -> "Bundle":
        """Read the manifest, and hash every file that it lists.

        Returns:
            The bundle.

        Raises:
            BundleError: not a bundle, of another version, or a file that is missing, changed or unlisted.
        """
        manifest_path = path / "manifest.json"
        if not path.exists():
            raise BundleError(f"{path} does not exist: give a bundle folder (edge-ft export makes one)")
        if not manifest_path.is_file():
            raise BundleError(f"{path} is not a bundle: it has no manifest.json (edge-ft export makes one)")
        manifest = read_json(manifest_path, BundleError, "export it again")
        version = manifest.get("format_version", FORMAT_VERSION) if isinstance(manifest, dict) else FORMAT_VERSION
        if version != FORMAT_VERSION:
            raise BundleError(
                f"{path} is of bundle version {version}, this edge-ft reads version {FORMAT_VERSION}: "
                "export it again or install the edge-ft that wrote it"
            )
        if wrong := find_misfit(manifest):
            raise BundleError(f"{manifest_path} is not as an export writes it: {wrong}; export it again")
        found = {
            file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file() or file.is_symlink()
        } - {"manifest.json"}
        if unlisted := sorted(found - manifest["files"].keys()):
            raise BundleError(f"{path} holds a file that its manifest does not list: {unlisted[0]}")
        for name, entry in manifest["files"].items():
            file = path / name
            if name not in found:
                raise BundleError(f"{path} lacks {name}, which its manifest lists: copy the bundle again")
            if file.stat().st_size != entry["bytes"] or file_sha256(file) != entry["sha256"]:
                raise BundleError(f"{file} is not the file that was exported (sha256 differs): copy the bundle again")
        return cls(path, manifest)

    @staticmethod
    def seal(folder: Path, manifest: dict[str, Any]) -> None:
        """Write the manifest, with the size and the sha256 of every file in `folder`."""
        files = {
            file.relative_to(folder).as_posix(): {"sha256": file_sha256(file), "bytes": file.stat().st_size}
            for file in sorted(folder.rglob("*"))
            if file.is_file() and file.name != "manifest.json"
        }
        write_json(folder / "manifest.json", {"format_version": FORMAT_VERSION, **manifest, "files": files})

    @property
    def task(self) -> str:
        """The task, as transformers' pipelines call it."""
        return str(self.manifest["task"])

    @property
    def max_length(self) -> int:
        """The model's limit in tokens.

        Raises:
            BundleError: the manifest does not say it.
        """
        if "max_length" not in self.manifest:
            raise BundleError(f"{self.path / 'manifest.json'} lacks 'max_length': export the model again")
        return int(self.manifest["max_length"])

    @property
    def verification(self) -> dict[str, Any]:
        """What the export measured.

        Raises:
            BundleError: the manifest has none, or not of every accuracy level.
        """
        found: dict[str, Any] = self.manifest.get("verification", {})
        missing = sorted({"limits", "rows_sha256", "nll", "by_accuracy_level"} - found.keys())
        missing += sorted(self.manifest["graphs"].keys() - found.get("by_accuracy_level", {}).keys())
        if missing:
            raise BundleError(f"{self.path / 'manifest.json'}: its verification lacks {missing[0]!r}: export it again")
        return found

    @property
    def size_bytes(self) -> int:
        """Bytes of all files that the manifest lists."""
        return sum(int(entry["bytes"]) for entry in self.manifest["files"].values())

    def graph(self, accuracy_level: int | None = None) -> Path:
        """The ONNX file of an accuracy level; None is the choice of the manifest.

        Returns:
            Its path.

        Raises:
            BundleError: verification did not pass that level, so the bundle has no graph of it.
        """
        if accuracy_level is None:
            return self.path / str(self.manifest["model"])
        graphs: dict[str, str] = self.manifest["graphs"]
        if str(accuracy_level) not in graphs:
            raise BundleError(
                f"{self.path} has no verified graph of accuracy level {accuracy_level}: it has {', '.join(graphs)}"
            )
        return self.path / graphs[str(accuracy_level)]

    def encoder_graph(self, accuracy_level: int | None = None) -> Path:
        """The ONNX file of the encoder that belongs to `graph(accuracy_level)`, of an encoder-decoder.

        Returns:
            Its path.

        Raises:
            BundleError: there is none.
        """
        graph = self.graph(accuracy_level).relative_to(self.path).as_posix()
        level = next((level for level, path in self.manifest["graphs"].items() if path == graph), None)
        encoder = self.manifest.get("encoder_graphs", {}).get(level)
        if encoder is None:
            raise BundleError(f"{self.path} names no encoder for {graph}: export it again")
        return self.path / str(encoder)
