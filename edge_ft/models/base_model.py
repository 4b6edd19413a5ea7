"""Find a base model (hub id, folder or GGUF file) and read its properties, without loading its weights."""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from edge_ft.artifacts import kind_of
from edge_ft.config import Pooling, ProblemType, Task
from edge_ft.data import KnownIds, TextTokenizer, class_numbers
from edge_ft.errors import ModelError, did_you_mean
from edge_ft.families import Family, family_of
from edge_ft.files import file_sha256
from edge_ft.models.checkpoint import Checkpoint, open_checkpoint
from edge_ft.models.dims import ModelDims, check_supported, read_config
from edge_ft.models.gguf import convert_gguf
from edge_ft.models.gguf_files import pick_gguf
from edge_ft.models.gguf_header import is_gguf
from edge_ft.models.slow_tokenizer import tokenizer_folder
from edge_ft.progress import Progress
from edge_ft.utf8 import read_json

__all__ = ["Base", "find_base"]

TASK_OF_CLASS: dict[str, Task] = {
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForMaskedLM": "fill-mask",
    "ForCausalLM": "text-generation",
    "ForConditionalGeneration": "text2text-generation",
    "Model": "feature-extraction",
}
"""Task by the suffix of the name of a transformers class."""


@dataclass(frozen=True)
class Base:
    """A base model on disk: a folder with config.json, safetensors weights and a tokenizer."""

    name: str
    """As the user gave it."""
    path: Path
    family: Family
    content_sha256: str
    """Over config.json and every file that holds weights of the model."""
    config: dict[str, Any]
    """config.json"""

    @cached_property
    def dims(self) -> ModelDims:
        """Dimensions of the model."""
        return ModelDims(read_config(self.family.name, self.config, self.path / "config.json"))

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The tensors of its files."""
        return open_checkpoint(self.path, self.config)

    def as_recorded(self, identity: Mapping[str, Any]) -> "Base":
        """Return the base with the hash that a run recorded, if that is this base's.

        Runs used to record the hash of all safetensors files of the folder. That is accepted where files beside the
        model made no difference: where the codes of the run are compared too.
        """
        recorded = identity.get("content_sha256")
        if recorded == self.content_sha256 or identity.get("codes_sha256") is None:
            return self
        known = recorded == _content_sha256(self.path, sorted(self.path.glob("*.safetensors")))
        return replace(self, content_sha256=str(recorded)) if known else self

    @property
    def max_length(self) -> int:
        """Tokens for which the model has positions."""
        unused = int(self.config.get("pad_token_id", 1)) + 1 if self.family.positions_after_pad else 0
        return self.dims.positions - unused

    @property
    def known_ids(self) -> KnownIds:
        """The token ids and token_type_ids for which the model has embeddings."""
        known = KnownIds.from_config(self.dims.config.to_dict())
        assert known is not None  # transformers fills in what config.json leaves out
        return known

    def open_tokenizer(self) -> TextTokenizer:
        """Return the checkpoint's tokenizer; one without a tokenizer.json is converted, once, into the user's cache.

        Raises:
            ModelError: there is none, it cannot be read or converted, or it has tokens that the model does not know.
        """
        return TextTokenizer.load(tokenizer_folder(self.path), self.known_ids)

    @property
    def task(self) -> Task:
        """Task of the checkpoint by the name of its class; else the first task of its family."""
        classes = self.config.get("architectures")
        written = str(classes[0]) if isinstance(classes, list) and classes else ""
        found = next((task for ending, task in TASK_OF_CLASS.items() if written.endswith(ending)), None)
        return found if found in self.family.tasks else self.family.tasks[0]

    @property
    def problem_type(self) -> ProblemType | None:
        """What the logits of the checkpoint's text-classification head are, if its config says; else None."""
        found: ProblemType | None = self.config.get("problem_type")
        single = len(self.labels("text-classification")) == 1
        return found or ("regression" if single else None)

    @property
    def pooling(self) -> tuple[Pooling, bool]:
        """Pooling of the checkpoint's sentence-transformers files, and whether a vector has length 1.

        Without such files the mean, of length 1.

        Raises:
            ModelError: the files name another pooling than the mean or the first token, or cannot be read.
        """
        file = self.path / "modules.json"
        if not file.is_file():
            return "mean", True
        try:
            listed = read_json(file, ModelError)
            modules = {str(module["type"]).rpartition(".")[2]: str(module["path"]) for module in listed}
            settings = read_json(self.path / modules["Pooling"] / "config.json", ModelError)
            modes = [name for name, on in settings.items() if name.startswith("pooling_mode_") and on is True]
        except (KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{file} cannot be read as sentence-transformers': {error!r}") from error
        known: dict[str, Pooling] = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
        other = sorted(modules.keys() - {"Transformer", "Pooling", "Normalize"})
        if other or len(modes) != 1 or modes[0] not in known:
            raise ModelError(
                f"{self.path} pools by {', '.join([*other, *modes])}: only the mean of the tokens or the first token "
                "can be exported; choose one with --pooling"
            )
        return known[modes[0]], "Normalize" in modules

    def labels(self, task: Task) -> tuple[str, ...]:
        """Return the checkpoint's class names for `task` in the order of its logits; () if it has no head for it.

        Raises:
            ModelError: a weight file cannot be read, or the names are unusable.
        """
        if task != self.task or not self.family.trained_head(task):
            return ()
        known = self.family.class_weights(task)
        endings = tuple(f".{name}" for name in known)
        found = [key for key in self.checkpoint.tensors if key in known or key.endswith(endings)]
        return self._class_names(self.checkpoint.tensors[found[0]].shape[0]) if found else ()

    def with_class_names(self, names: tuple[str, ...]) -> "Base":
        """Return the base with other names for the outputs of its own head."""
        return replace(self, config={**self.config, "id2label": {str(at): name for at, name in enumerate(names)}})

    def _class_names(self, size: int) -> tuple[str, ...]:
        """Return the names of a head's outputs; transformers leaves out names that are LABEL_0, LABEL_1 ...

        Raises:
            ModelError: id2label is no object with a name of its own for each output.
        """
        named = self.config.get("id2label") or {}
        if not isinstance(named, dict) or not all(isinstance(name, str | int) for name in named.values()):
            raise ModelError(f"{self.path / 'config.json'}: id2label must be an object of class names by number")
        names = tuple(str(named.get(str(index), f"LABEL_{index}")).strip() for index in range(size))
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ModelError(
                f"{self.path / 'config.json'}: id2label gives several outputs the name {twice[0]!r}: "
                "give each a name of its own"
            )
        return names

    def has_head_for(self, task: Task, labels: tuple[str, ...]) -> bool:
        """Return whether the checkpoint has a head for these classes, given by their names or their numbers."""
        own = self.labels(task)
        return bool(own) and labels in (own, class_numbers(own))

    @property
    def license(self) -> str | None:
        """The `license:` of the model card's front matter, if it has one."""
        card = self.path / "README.md"
        # As bytes: only this line matters, whatever the encoding of the others.
        found = re.search(rb"^license:\s*(\S+)", card.read_bytes(), re.MULTILINE) if card.is_file() else None
        return found[1].decode(errors="replace") if found else None


def find_base(model: str, task: Task | None = None, progress: Progress | None = None) -> Base:
    """Find the base model of a hub id, local folder or GGUF file (converted once, into the user's cache).

    Args:
        model: As the user gave it.
        task: The task that the family must support; None: any.
        progress: Receives the state of a conversion, and what was left aside in the folder; None is silent.

    Returns:
        The base.

    Raises:
        ModelError: nothing there, no safetensors weights, or a family or task that is not supported.
    """
    folder = _find_folder(model, task, progress)
    config = read_json(folder / "config.json", ModelError)
    if not isinstance(config, dict):
        raise ModelError(f"{folder / 'config.json'} is not a model's config: it must be one JSON object")
    family = family_of(str(config.get("model_type")), task)
    base = Base(model, folder, family, "", config)
    if family.decoder:
        check_supported(base.dims, folder / "config.json")
    if family.kind == "encoder" and config.get("is_decoder"):
        raise ModelError(f"{folder} is a {family.name} with is_decoder set: it cannot be exported")
    if family.kind == "encoder-decoder" and getattr(base.dims.config, "decoder_start_token_id", None) is None:
        raise ModelError(f"{folder / 'config.json'} has no decoder_start_token_id, with which an answer begins")
    if progress is not None:
        for note in base.checkpoint.notes:
            progress.say(note)
    return replace(base, content_sha256=_content_sha256(folder, sorted(base.checkpoint.files)))


def _content_sha256(folder: Path, files: list[Path]) -> str:
    return hashlib.sha256("".join(map(file_sha256, [folder / "config.json", *files])).encode()).hexdigest()


def _find_folder(model: str, task: Task | None, progress: Progress | None) -> Path:
    """Return the checkpoint folder of a hub id, local folder or GGUF file; arguments as for `find_base`.

    Raises:
        ModelError: there is none.
    """
    path = Path(model).expanduser()
    if path.is_file() and not (path.suffix == ".gguf" or is_gguf(path)):
        raise ModelError(f"{path} is neither a folder nor a GGUF file: name the folder of the model")
    complete = (path / "config.json").is_file()
    if not (complete and any(path.glob("*.safetensors"))) and (file := pick_gguf(path)):
        return convert_gguf(file, task, progress)
    if complete:
        return path
    if (path / "adapter_config.json").is_file():
        raise ModelError(f"{path} is a PEFT adapter: give the model that it was trained on, and --adapter {path}")
    if kind_of(str(path)) == "run":
        raise ModelError(
            f"{path} is a run folder, not a model: name the model that it was trained on, or go on with "
            f"edge-ft tune --config {path / 'config.yaml'} --resume"
        )
    if path.is_dir():
        raise ModelError(
            f"{path} is not a model folder: it holds neither config.json nor a GGUF file; name the model file or its "
            "folder"
        )
    return _download(model)


def _download(model: str) -> Path:
    """Return the local snapshot of a hub id.

    Raises:
        ModelError: it is no hub id, or the hub does not serve it.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    path = Path(model)
    looks_like_path = (
        path.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1 or path.suffix == ".gguf"
    )
    neighbours = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    near = did_you_mean(path.name, neighbours)
    if looks_like_path:
        raise ModelError(f"there is no model at {model}{near}")
    try:
        header = Path(snapshot_download(model, allow_patterns=["config.json"]))
        if not (header / "config.json").is_file():
            raise ModelError(
                f"{model} has no config.json on the hub: if it holds GGUF files, download one of them (hf download "
                f"{model} NAME.gguf; of a split model all parts) and name the file"
            )
        # An architecture that is not supported is refused before its weights are downloaded.
        family_of(str(read_json(header / "config.json", ModelError).get("model_type")))
        tokenizers = ["*.model", "vocab.txt", "merges.txt"]  # of checkpoints without a tokenizer.json
        patterns = ["*.json", "*.safetensors", "*.jinja", "README.md", *tokenizers]
        return Path(snapshot_download(model, allow_patterns=patterns))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0].removeprefix("Got: ") if str(error) else type(error).__name__
        raise ModelError(
            f"{model} is not a local folder{near} and cannot be downloaded from the hub (check the name and the "
            f"network): {reason}"
        ) from error
