"""Run folders and bundles on disk.

Reports and manifests are read and written only here; `docs/bundle.md` describes the bundle.
"""

import hashlib
import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_ft.errors import BundleError, UsageError
from edge_ft.files import cache_folder, file_sha256, is_as_sealed, is_rewritten, json_text, seal, write_json, write_text
from edge_ft.manifest import find_misfit
from edge_ft.utf8 import read_json, read_utf8

__all__ = ["FORMAT_VERSION", "Bundle", "RunFolder", "is_added", "kind_of"]

FORMAT_VERSION = 1
_ADDED = re.compile(r"^onnx/[^/]+\.[0-9a-f]{8}\.(onnx|safetensors)$")
_UNFINISHED = re.compile(r"(^|/)\.[^/]+\.\d+\.tmp$")
_TICK_NS = 2 * 10**9
"""The coarsest clock of a file system in use, FAT's."""
_RESTORE = "copy the run folder again, or remove files.json to use it as it is"


def is_added(name: str) -> bool:
    """Whether `edge-ft export --onto` wrote a file of a bundle; one that no manifest lists is left of a killed one."""
    return bool(_ADDED.search(name) or _UNFINISHED.search(name))


def kind_of(source: str) -> str:
    """What SOURCE names: `bundle` (a folder with a manifest), `run` (one with splits or a report), or `model`."""
    path = Path(source)
    if (path / "manifest.json").is_file():
        return "bundle"
    if (path / "splits").is_dir() or (path / "report.json").is_file():
        return "run"
    return "model"


def _is_model(path: Path) -> bool:
    return path.suffix == ".gguf" or (path / "config.json").is_file()


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
        run.check_files()
        return run

    def seal_files(self, report: dict[str, Any] | None = None) -> None:
        """Write files.json: size and sha256 of every file of the run, but for what is only for --resume.

        Args:
            report: What report.json is about to hold; None before the end of the run.
        """
        files = {
            name: {"sha256": file_sha256(file), "bytes": file.stat().st_size}
            for file in sorted(self.path.rglob("*"))
            if file.is_file()
            and not (name := file.relative_to(self.path).as_posix()).startswith((".", "checkpoint/"))
            and name not in (self.files_path.name, self.report_path.name)
        }
        if report is not None:
            data = json_text(report).encode()
            entry = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
            files[self.report_path.name] = entry
        write_json(self.files_path, seal({"files": files}))

    @contextmanager
    def changed(self) -> Iterator[None]:
        """Write files of the run in this block: there is no files.json until all are written."""
        self.files_path.unlink(missing_ok=True)
        yield
        self.seal_files()

    def check_files(self, *names: str) -> None:
        """Hold files against files.json; a run without one, made before there were any, is not checked.

        Args:
            names: Those to check; none: all that are listed.

        Raises:
            UsageError: one is missing or is not the file that was written.
        """
        if not self.files_path.is_file():
            return
        document = read_json(self.files_path, advice=_RESTORE)
        try:
            files = {str(name): str(entry["sha256"]) for name, entry in document["files"].items()}
        except (KeyError, TypeError, AttributeError) as error:
            raise UsageError(f"{self.files_path} cannot be read ({error!r}): {_RESTORE}") from error
        if not is_as_sealed(self.files_path, document):
            raise UsageError(f"{self.files_path} is damaged (its content does not have the hash `seal`): {_RESTORE}")
        for name in names or files:
            file = self.path / name
            if name in files and not file.is_file():
                raise UsageError(f"{self.path} lacks {name}, which its files.json lists: {_RESTORE}")
            if name in files and file_sha256(file) != files[name] and not is_rewritten(file):
                raise UsageError(f"{file} is not the file that was written (sha256 differs): {_RESTORE}")

    def is_begun(self) -> bool:
        """Whether `tune` made this folder, even if it wrote nothing into it yet."""
        return self.path.is_dir() and ((self.path / "splits").is_dir() or not any(self.path.iterdir()))

    @property
    def config_path(self) -> Path:
        """The resolved settings, in the format of --config."""
        return self.path / "config.yaml"

    @property
    def files_path(self) -> Path:
        """Size and sha256 of the run's files."""
        return self.path / "files.json"

    @property
    def report_path(self) -> Path:
        """The report, which a finished run has."""
        return self.path / "report.json"

    @property
    def page_path(self) -> Path:
        """The report as a page for a browser."""
        return self.path / "report.html"

    @property
    def adapter(self) -> Path:
        """PEFT adapter folder (adapter_config.json, adapter_model.safetensors)."""
        return self.path / "adapter"

    @property
    def codes(self) -> Path:
        """The base's int4 codes where they were chosen over training rows."""
        return self.path / "codes.safetensors"

    @property
    def scores(self) -> Path:
        """Scores of the validation rows in float32, by the base and by the tuned model; of some runs only."""
        return self.path / "scores.safetensors"

    @property
    def merged(self) -> Path:
        """Folder with the codes of the merged model, if the run had a finishing phase."""
        return self.path / "merged"

    @property
    def merged_codes(self) -> Path:
        """Codes and scales of the merged model."""
        return self.merged / "codes.safetensors"

    def finished(self) -> dict[str, Any] | None:
        """Read merged.json.

        Returns:
            `adapter_sha256`, `codes_sha256`, `block_size` and `figures`; None where the run has no merged model, or
            one of another adapter, or the file is not the one that was written.
        """
        file, weights = self.merged / "merged.json", self.adapter / "adapter_model.safetensors"
        if not (file.is_file() and self.merged_codes.is_file() and weights.is_file()):
            return None
        with suppress(UsageError):
            document: dict[str, Any] = read_json(file)
            whole = isinstance(document, dict) and is_as_sealed(file, document)
            if whole and document.get("adapter_sha256") == file_sha256(weights):
                return document
        return None

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
            `model`, `path`, `content_sha256`, `format`, `block_size`, `scales`, `calibration_rows`, `calibration`
            (figures of choosing int4 codes, or null) and `codes_sha256`.
        """
        base: dict[str, Any] = read_json(self.path / "base.json")
        return base

    @property
    def bundle(self) -> Path | None:
        """The bundle that it was trained over, which may be gone; None: it was trained over a model."""
        if "onnxruntime" not in self.report().get("versions", {}):
            return None
        base = self.base()
        return next((Path(base[key]) for key in ("path", "model") if Path(base[key]).is_dir()), Path(base["model"]))

    def refuse_over_bundle(self) -> None:
        """Refuse a run over a bundle where a model is needed.

        Raises:
            UsageError: it is one; the message says what to do instead.
        """
        if (bundle := self.bundle) is not None:
            raise UsageError(
                f"{self.path} is a run over the bundle {bundle}, which answers with it (edge-ft run {bundle} --adapter "
                f"{self.path}) or keeps it (edge-ft export {self.path} --onto {bundle})"
            )

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
        manifest_path = path / "manifest.json"
        if not path.exists():
            raise BundleError(f"{path} does not exist: give a bundle folder (edge-ft export makes one)")
        if not manifest_path.is_file():
            what = "a run folder" if kind_of(str(path)) == "run" else "a model" if _is_model(path) else ""
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
        found = {
            file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file() or file.is_symlink()
        } - {"manifest.json"}
        if unlisted := sorted(name for name in found - manifest["files"].keys() if not is_added(name)):
            raise BundleError(f"{path} holds a file that its manifest does not list: {unlisted[0]}")
        for name in manifest["files"]:
            if name not in found:
                raise BundleError(f"{path} lacks {name}, which its manifest lists: copy the bundle again")
        state = _state_of(path, manifest)
        if not hash_all and _is_remembered(path, state):
            return cls(path, manifest)
        for name, entry in manifest["files"].items():
            file = path / name
            if file.stat().st_size != entry["bytes"] or file_sha256(file) != entry["sha256"]:
                raise BundleError(f"{file} is not the file that was exported (sha256 differs): copy the bundle again")
        _remember(path, state)
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

    def weights_sha256(self) -> str | None:
        """Return the sha256 over the files that hold the weights of a base that can learn, and the index of these."""
        if (index := self.manifest.get("train", {}).get("index")) is None:
            return None
        files = {str(place["file"]) for place in read_json(self.path / index, BundleError)["tensors"].values()}
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


State = dict[str, list[int | str]]
"""For each file of a bundle the sha256 of its manifest, then device, inode, size, mtime and ctime."""


def _state_of(path: Path, manifest: dict[str, Any]) -> State:
    found = {name: (path / name).stat() for name in manifest["files"]}
    return {
        name: [
            *(manifest["files"][name]["sha256"], stat.st_dev, stat.st_ino, stat.st_size),
            *(stat.st_mtime_ns, stat.st_ctime_ns),
        ]
        for name, stat in found.items()
    }


def _memory_of(path: Path) -> Path:
    """The file that says in which state a bundle was when its files were last found to be in order."""
    return cache_folder() / "opened" / f"{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:32]}.json"


def _is_remembered(path: Path, state: State) -> bool:
    # Windows has no time of the last change of a file that a program cannot set.
    with suppress(OSError, ValueError):
        return os.name != "nt" and bool(json.loads(_memory_of(path).read_text("utf-8")) == state)
    return False


def _remember(path: Path, state: State) -> None:
    """Keep the state of a bundle whose files are in order, unless one changed so lately that its times may not show it.

    A file that is written twice within a tick of the file system's clock has the same times after both.
    """
    newest = max((int(at) for *_, mtime, ctime in state.values() for at in (mtime, ctime)), default=0)
    if time.time_ns() - newest > _TICK_NS:
        with suppress(OSError):  # a read-only or full cache: hashed again next time
            write_json(_memory_of(path), state)
