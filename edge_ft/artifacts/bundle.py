"""A bundle: the files that its manifest lists, checked at every open, and what the manifest says."""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_ft.artifacts.kinds import is_model, kind_of
from edge_ft.artifacts.remembered import is_remembered, remember, state_of
from edge_ft.artifacts.run_folder import RunFolder
from edge_ft.errors import BundleError
from edge_ft.files import file_sha256, is_as_sealed, seal, write_json
from edge_ft.manifest import find_misfit
from edge_ft.utf8 import read_json

__all__ = ["FORMAT_VERSION", "Bundle", "is_added"]

FORMAT_VERSION = 1
_ADDED = re.compile(r"^onnx/[^/]+\.[0-9a-f]{8}\.(onnx|safetensors)$")
_UNFINISHED = re.compile(r"(^|/)\.[^/]+\.\d+\.tmp$")


def is_added(name: str) -> bool:
    """Whether `edge-ft export --onto` wrote a file of a bundle; one that no manifest lists is left of a killed one."""
    return bool(_ADDED.search(name) or _UNFINISHED.search(name))


@dataclass(frozen=True)
class Bundle:
    """A folder with everything that a device needs; it opens only if no file has changed since the export."""

    path: Path
    manifest: dict[str, Any]

    @classmethod
    def open(cls, path: Path, *, hash_all: bool = False) -> "Bundle":
        """Read the manifest, and check every file that it lists.

        Files are hashed at the first open on a machine, and again when the manifest or the inode, size, mtime or ctime
        of any of them is not as at the last open that found all in order.

        Args:
            path: Folder of the bundle.
            hash_all: Hash every file in any case: only this finds bits that rotted on the disk.

        Returns:
            The bundle.

        Raises:
            BundleError: not a bundle, of another version, or a file that is missing, changed or unlisted.
            UsageError: a run that was trained over a bundle.
        """
        manifest = _read_manifest(path)
        found = {
            file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file() or file.is_symlink()
        } - {"manifest.json"}
        if unlisted := sorted(name for name in found - manifest["files"].keys() if not is_added(name)):
            raise BundleError(f"{path} holds a file that its manifest does not list: {unlisted[0]}")
        for name in manifest["files"]:
            if name not in found:
                raise BundleError(f"{path} lacks {name}, which its manifest lists: copy the bundle again")
        state = state_of(path, manifest)
        if not hash_all and is_remembered(path, state):
            return cls(path, manifest)
        for name, entry in manifest["files"].items():
            file = path / name
            if file.stat().st_size != entry["bytes"] or file_sha256(file) != entry["sha256"]:
                raise BundleError(f"{file} is not the file that was exported (sha256 differs): copy the bundle again")
        remember(path, state)
        return cls(path, manifest)

    @staticmethod
    def seal(folder: Path, manifest: dict[str, Any]) -> None:
        """Write the manifest, with the size and the sha256 of every file in `folder`."""
        files = {
            file.relative_to(folder).as_posix(): _entry(file)
            for file in sorted(folder.rglob("*"))
            if file.is_file() and file.name != "manifest.json"
        }
        write_json(folder / "manifest.json", seal({"format_version": FORMAT_VERSION, **manifest, "files": files}))

    def change(self, manifest: dict[str, Any]) -> "Bundle":
        """Replace the manifest by one with other files, all of which are written already, at one moment.

        Args:
            manifest: The new one; `files` lists what the bundle holds from now on, as do `files` of the old one.

        Returns:
            The bundle as it is then.
        """
        known: dict[str, Any] = self.manifest["files"]
        files = {name: known.get(name) or _entry(self.path / name) for name in manifest["files"]}
        changed = seal({**manifest, "files": files})
        write_json(self.path / "manifest.json", changed)
        found = Bundle(self.path, changed)
        found.remove_leftovers()
        return found

    def remove_leftovers(self) -> None:
        """Remove what a killed or refused change of the bundle left, and what it no longer holds."""
        for file in (*self.path.iterdir(), *(self.path / "onnx").iterdir()):
            name = file.relative_to(self.path).as_posix()
            if is_added(name) and name not in self.manifest["files"]:
                file.unlink(missing_ok=True)

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

    def train_index(self) -> dict[str, Any]:
        """Read the index of the training graphs of a bundle that can learn: their files, and the tensors they read.

        Returns:
            `layers`, `blocks`, `embed`, `head`, `tensors` and `hidden`; see `edge_ft.export.train_graphs`.

        Raises:
            BundleError: it cannot be read.
        """
        index: dict[str, Any] = read_json(self.path / self.manifest["train"]["index"], BundleError)
        return index

    def weights_sha256(self) -> str | None:
        """Return the sha256 over the files that hold the weights of a base that can learn, and the index of these."""
        if (index := self.manifest.get("train", {}).get("index")) is None:
            return None
        files = {str(place["file"]) for place in self.train_index()["tensors"].values()}
        listed = self.manifest["files"]
        return hashlib.sha256("".join(listed[name]["sha256"] for name in (index, *sorted(files))).encode()).hexdigest()

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


def _entry(file: Path) -> dict[str, Any]:
    """Return what a manifest says of a file."""
    return {"sha256": file_sha256(file), "bytes": file.stat().st_size}


def _read_manifest(path: Path) -> dict[str, Any]:
    """Return the manifest of a folder.

    Raises:
        BundleError: the folder is no bundle or of another version, or its manifest is damaged.
        UsageError: a run that was trained over a bundle.
    """
    manifest_path = path / "manifest.json"
    if not path.exists():
        raise BundleError(f"{path} does not exist: give a bundle folder (edge-ft export makes one)")
    if not manifest_path.is_file():
        what = "a run folder" if kind_of(str(path)) == "run" else "a model" if is_model(path) else ""
        if what == "a run folder" and RunFolder(path).report_path.is_file():
            RunFolder(path).refuse_over_bundle()
        if what:
            raise BundleError(f"{path} is {what}, not a bundle: edge-ft export {path} --out BUNDLE makes one of it")
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
    if not is_as_sealed(manifest_path, manifest):
        raise BundleError(
            f"{manifest_path} is damaged (its content does not have the hash `seal`): copy the bundle again, or "
            "remove `seal` from it if you edited it"
        )
    return manifest
