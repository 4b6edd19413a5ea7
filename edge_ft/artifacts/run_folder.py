"""The folder of a run: its files, their hashes, and what each of them says."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_ft.errors import UsageError
from edge_ft.files import file_sha256, is_as_sealed, is_rewritten, json_text, seal, write_json, write_text
from edge_ft.utf8 import read_json, read_utf8

__all__ = ["RunFolder"]

_RESTORE = "copy the run folder again, or remove files.json to use it as it is"


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
    def base_path(self) -> Path:
        """The identity of the base, which a run has that has begun."""
        return self.path / "base.json"

    @property
    def plan_path(self) -> Path:
        """The estimate of time, memory and disk."""
        return self.path / "plan.json"

    @property
    def metrics_path(self) -> Path:
        """The log of steps and evaluations, a JSON value a line."""
        return self.path / "metrics.jsonl"

    @property
    def page_path(self) -> Path:
        """The report as a page for a browser."""
        return self.path / "report.html"

    @property
    def adapter(self) -> Path:
        """PEFT adapter folder (adapter_config.json, adapter_model.safetensors)."""
        return self.path / "adapter"

    @property
    def adapter_weights(self) -> Path:
        """A and B of the adapter, and a trained head."""
        return self.adapter / "adapter_model.safetensors"

    @property
    def codes(self) -> Path:
        """The base's int4 codes where they were chosen over training rows."""
        return self.path / "codes.safetensors"

    @property
    def vocabulary(self) -> Path:
        """Of a run over a base with fewer tokens, their ids in the whole model."""
        return self.path / "vocabulary.json"

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
        file, weights = self.merged / "merged.json", self.adapter_weights
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

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl; none where there is no such file."""
        if not self.metrics_path.is_file():
            return []
        return [json.loads(line) for line in read_utf8(self.metrics_path).splitlines()]

    def base(self) -> dict[str, Any]:
        """Read the identity of the base.

        Returns:
            `model`, `path`, `content_sha256`, `format`, `block_size`, `scales`, `calibration_rows`, `calibration`
            (figures of choosing int4 codes, or null) and `codes_sha256`.
        """
        base: dict[str, Any] = read_json(self.base_path)
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
