"""Find a base (hub id, folder or GGUF file), identify it, and load it in float or on the grid."""

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from edge_ft.artifacts import atomic_folder, cache_folder, file_sha256, write_text
from edge_ft.base.bf16 import round_to_bf16
from edge_ft.base.calibrate import Calibration, calibrate, float_reader
from edge_ft.base.codes import read_codes
from edge_ft.base.grid import Bits
from edge_ft.base.linear import is_within, quantize_model, turn_conv1d
from edge_ft.base.mpnet import use_attention_interface
from edge_ft.base.quiet import quiet_libraries
from edge_ft.base.sizes import Sizes, read_config
from edge_ft.base.supported import refuse_unsupported
from edge_ft.config import BaseFormat, Pooling, ProblemType, Task
from edge_ft.data import class_numbers
from edge_ft.errors import ModelError, did_you_mean, require
from edge_ft.families import CLASSIFIERS, Family, family_of

__all__ = ["Base", "find_base", "load_model"]

BITS: dict[BaseFormat, Bits] = {"int4": 4, "int8": 8}
MADE_FOR: dict[str, Task] = {
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForMaskedLM": "fill-mask",
    "ForCausalLM": "text-generation",
    "ForConditionalGeneration": "text2text-generation",
    "Model": "feature-extraction",
}
"""How transformers ends the names of its classes."""
Read = Callable[[str, slice], Tensor]
"""Gives some rows of the float parameter of a name."""
ADAPTED: dict[str, Callable[[Any], None]] = {"mpnet": use_attention_interface}
"""Families of which transformers' own module lacks something that all others have."""


@dataclass(frozen=True)
class Base:
    """A base model on disk: a folder with config.json, safetensors weights and a tokenizer."""

    name: str
    """As the user gave it."""
    path: Path
    family: Family
    content_sha256: str
    """Over config.json and every weight file."""
    config: dict[str, Any]
    """config.json"""

    @cached_property
    def sizes(self) -> Sizes:
        """Layers, heads, vocabulary and the like."""
        return Sizes(read_config(self.family.name, self.config, self.path / "config.json"))

    @property
    def max_length(self) -> int:
        """Tokens that the model's positions are enough for."""
        unused = int(self.config.get("pad_token_id", 1)) + 1 if self.family.positions_after_pad else 0
        return self.sizes.positions - unused

    @property
    def task(self) -> Task:
        """What the checkpoint was made for, by the name of its class; else what its family does first."""
        written = next(iter(self.config.get("architectures") or ()), "")
        found = next((task for ending, task in MADE_FOR.items() if written.endswith(ending)), None)
        return found if found in self.family.tasks else self.family.tasks[0]

    @property
    def problem_type(self) -> ProblemType | None:
        """What the checkpoint's own text-classification head gives, where its config says."""
        found: ProblemType | None = self.config.get("problem_type")
        single = len(self.labels("text-classification")) == 1
        return found or ("regression" if single else None)

    @property
    def pooling(self) -> tuple[Pooling, bool]:
        """How the checkpoint's sentence-transformers files make one vector of a text, and whether of length 1; without
        such files the mean, of length 1.

        Raises:
            ModelError: they say something else than a mean or the first token.
        """
        file = self.path / "modules.json"
        if not file.is_file():
            return "mean", True
        try:
            modules = {str(module["type"]).rpartition(".")[2]: str(module["path"]) for module in _json(file)}
            settings = _json(self.path / modules["Pooling"] / "config.json")
            modes = [name for name, on in settings.items() if name.startswith("pooling_mode_") and on is True]
        except (KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{file} cannot be read as sentence-transformers': {error!r}") from error
        known: dict[str, Pooling] = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
        other = sorted(modules.keys() - {"Transformer", "Pooling", "Normalize"})
        if other or len(modes) != 1 or modes[0] not in known:
            raise ModelError(
                f"{self.path} makes vectors by {', '.join([*other, *modes])}: only the mean of the tokens or the first "
                "one can be exported; --pooling chooses"
            )
        return known[modes[0]], "Normalize" in modules

    def labels(self, task: Task) -> tuple[str, ...]:
        """Class names that the checkpoint brings for `task`, in the order of its head; none where it has no head."""
        if task != self.task or not self.family.trained_head(task):
            return ()
        known = self.family.class_weights(task)
        for file in sorted(self.path.glob("*.safetensors")):
            try:
                with safe_open(file, "np") as weights:
                    found = [key for key in weights.keys() if key in known]  # noqa: SIM118
                    size = weights.get_slice(found[0]).get_shape()[0] if found else 0
            except SafetensorError as error:
                raise ModelError(f"{file} cannot be read as safetensors: {error}") from error
            if size:
                # transformers leaves out names that are LABEL_0, LABEL_1 ...
                names: dict[str, str] = self.config.get("id2label") or {}
                return tuple(names.get(str(index), f"LABEL_{index}") for index in range(size))
        return ()

    def brings_head_of(self, task: Task, labels: tuple[str, ...]) -> bool:
        """Whether the checkpoint's head is one of these classes: by their names, or by their numbers."""
        own = self.labels(task)
        return bool(own) and labels in (own, class_numbers(own))

    @property
    def license(self) -> str | None:
        """The `license:` of the model card's front matter, if it has one."""
        card = self.path / "README.md"
        found = (
            re.search(r"^license:\s*(\S+)", card.read_text(encoding="utf-8"), re.MULTILINE) if card.is_file() else None
        )
        return found[1] if found else None


def find_base(model: str, task: Task | None = None) -> Base:
    """Find the folder of a hub id, local folder, or GGUF file (converted once into the user's cache).

    Raises:
        ModelError: nothing there, no safetensors weights, or a family or task that is not supported.
    """
    path = Path(model).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        folder = _convert_gguf(path)
    elif path.is_dir():
        folder = path
        if not (path / "config.json").is_file():
            ggufs = sorted(path.glob("*.gguf"))
            if len(ggufs) != 1:
                found = f"{len(ggufs)} GGUF files" if ggufs else "neither config.json nor a GGUF file"
                raise ModelError(f"{path} is not a model folder: it holds {found}; name the model file or its folder")
            folder = _convert_gguf(ggufs[0])
    else:
        folder = _download(model)
    config = _json(folder / "config.json")
    if not isinstance(config, dict):
        raise ModelError(f"{folder / 'config.json'} is not a model's config: it must be one JSON object")
    family = family_of(str(config.get("model_type")), task)
    if family.decoder:
        refuse_unsupported(Sizes(read_config(family.name, config, folder / "config.json")), folder)
    if family.kind == "encoder" and config.get("is_decoder"):
        raise ModelError(f"{folder} is a {family.name} that was made a decoder (is_decoder): that cannot be exported")
    base = Base(model, folder, family, "", config)
    if family.kind == "encoder-decoder" and getattr(base.sizes.config, "decoder_start_token_id", None) is None:
        raise ModelError(f"{folder / 'config.json'} names no decoder_start_token_id, from which an answer begins")
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise ModelError(
            f"{folder} holds no *.safetensors weights (pickled weights are never loaded): convert them first"
        )
    digest = hashlib.sha256()
    for file in [folder / "config.json", *weights]:
        digest.update(file_sha256(file).encode())
    return replace(base, content_sha256=digest.hexdigest())


def load_model(
    base: Base,
    task: Task,
    base_format: BaseFormat = "fp32",
    block_size: int = 32,
    labels: tuple[str, ...] = (),
    seed: int = 0,
    problem_type: ProblemType | None = None,
    pooling: Pooling | None = None,
    codes: Path | Calibration | None = None,
) -> nn.Module:
    """The task model of a base, frozen: in float32, or rounded: int4, int8 and bf16 with the embedding, nf4
    without.

    Codes are made of one weight after the other, so that the float model is never in memory; those of int4 are
    read from the file `codes`, or chosen over its rows, else each weight by itself. A classification
    head that the checkpoint lacks, or has for other classes, is drawn from `seed`, and stays float.

    Raises:
        ModelError: the weights cannot be loaded, or some are missing.
    """
    from optimum.exporters.tasks import TasksManager

    settings: dict[str, Any] = {}
    if task in CLASSIFIERS and labels:
        settings = {
            "num_labels": len(labels),
            "id2label": dict(enumerate(labels)),
            "label2id": {label: index for index, label in enumerate(labels)},
            "problem_type": problem_type,
        }
    fresh = base.family.trained_head(task) if labels else ()
    unread = base.family.heads[task] if task == "feature-extraction" else ()  # vectors are of the last hidden states
    model_class = TasksManager.get_model_class_for_task(task, framework="pt")
    absent, file = (*fresh, *unread), codes if isinstance(codes, Path) else None
    model, read = None, None
    try:
        with quiet_libraries():
            if base_format != "fp32":
                model, read = _quantized(
                    base, model_class, task, settings, base_format, block_size, absent, seed, file
                ) or (None, None)
            if model is None:
                model = _whole(base, model_class, task, settings, absent, seed)
                if base.family.fan_in_fan_out:
                    turn_conv1d(model)
                if isinstance(codes, Calibration):
                    read = float_reader(model)
                if base_format != "fp32":
                    _round(model, base, task, base_format, block_size, read, file)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise ModelError(f"{base.path} cannot be loaded as {task}: {error}") from error
    if fresh and base.labels(task) and not base.brings_head_of(task, labels):
        head = model.get_submodule(fresh[-1])
        head = getattr(head, "out_proj", head)
        torch.manual_seed(seed)
        nn.init.normal_(head.weight, std=model.config.initializer_range)
        nn.init.zeros_(head.bias)
    for name in unread:
        setattr(model, name, None)
    if task == "feature-extraction":
        model.config.pooling = pooling or "mean"
    if base.family.name in ADAPTED:
        ADAPTED[base.family.name](model)
    if isinstance(codes, Calibration) and base_format == "int4":
        assert read is not None
        calibrate(model.eval(), task, read, codes)
    return model.eval().requires_grad_(False)


def _whole(
    base: Base, model_class: Any, task: Task, settings: dict[str, Any], fresh: tuple[str, ...], seed: int
) -> Any:
    """The float model, as transformers loads it."""
    torch.manual_seed(seed)
    model, found = model_class.from_pretrained(
        base.path,
        output_loading_info=True,
        dtype=torch.float32,
        trust_remote_code=False,
        use_safetensors=True,
        **(settings | {"ignore_mismatched_sizes": True} if settings else {}),
    )
    absent = {*found["missing_keys"], *(name for name, *_ in found["mismatched_keys"])}
    mend = "tune it first" if base.family.trained_head(task) else "take a checkpoint that was saved with one"
    if lost := sorted(key for key in absent if not is_within(key, fresh)):
        raise ModelError(
            f"{base.path} lacks the weights of {lost[0]}"
            + (f" and {len(lost) - 1} more" if len(lost) > 1 else "")
            + (f": it has no head for {task}, {mend}" if is_within(lost[0], base.family.heads[task]) else "")
        )
    return model


def _quantized(
    base: Base,
    model_class: Any,
    task: Task,
    settings: dict[str, Any],
    base_format: BaseFormat,
    block_size: int,
    fresh: tuple[str, ...],
    seed: int,
    codes: Path | None,
) -> tuple[Any, Read] | None:
    """The quantized model, read one tensor at a time, and what reads it; None where the file's names are not the
    model's."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(base.path, trust_remote_code=False, **settings)
    with init_empty_weights(include_buffers=False):
        model = model_class.from_config(config, dtype=torch.float32, trust_remote_code=False)
    model.tie_weights()
    places: dict[str, Path] = {}
    shapes: dict[str, list[int]] = {}
    # A headless checkpoint leaves the name of the body out.
    prefixes = ("", f"{model.base_model_prefix}.")
    for file in sorted(base.path.glob("*.safetensors")):
        with safe_open(file, "pt") as weights:
            for key in weights.keys():  # noqa: SIM118
                places[key], shapes[key] = file, weights.get_slice(key).get_shape()
    tied: dict[str, str] = model.all_tied_weights_keys
    for target, source in list(tied.items()):
        if target in shapes and source in shapes and _differ(places, target, source):
            # As from_pretrained does (FLAN-T5's head is one, whatever its config says).
            parent, _, attribute = target.rpartition(".")
            setattr(
                model.get_submodule(parent),
                attribute,
                nn.Parameter(torch.empty(shapes[target], device="meta"), requires_grad=False),
            )
            del tied[target]
    parameters = dict(model.named_parameters())  # a tied one once
    first = {id(parameter): name for name, parameter in parameters.items()}
    tied = {name: first[id(parameter)] for name, parameter in model.named_parameters(remove_duplicate=False)}
    keys = {
        name: key
        for name, parameter in parameters.items()
        for key in (name.removeprefix(prefix) for prefix in prefixes)
        if shapes.get(key) == list(parameter.shape)
    }
    drawn = {name for name in parameters if name not in keys}
    modules = {name.rpartition(".")[0] for name in drawn}
    whole_modules = {name for name in parameters if name.rpartition(".")[0] in modules} == drawn
    if not whole_modules or not all(is_within(name, fresh) for name in drawn):
        return None

    turned = turn_conv1d(model) if base.family.fan_in_fan_out else set()

    def read(name: str, rows: slice) -> Tensor:
        """A copy, from a mapping of its own: the pages of a mapped file stay in memory as long as it is mapped."""
        key = keys[tied[name]]
        with safe_open(places[key], "pt") as weights:
            stored = weights.get_slice(key)
            part = stored[:, rows].T if name in turned else stored[rows]
            return part.to(torch.float32, copy=True)

    _round(model, base, task, base_format, block_size, read, codes)
    for name in [name for name, parameter in model.named_parameters() if parameter.is_meta]:
        parent, _, attribute = name.rpartition(".")
        value = torch.empty(parameters[name].shape) if name in drawn else read(name, slice(None))
        setattr(model.get_submodule(parent), attribute, nn.Parameter(value))
    for target, source in tied.items():  # to an embedding that stays float
        parent, _, attribute = target.rpartition(".")
        if getattr(getattr(model.get_submodule(parent), attribute), "is_meta", False):
            setattr(model.get_submodule(parent), attribute, model.get_parameter(source))
    torch.manual_seed(seed)
    for name, module in model.named_modules():
        if name in modules:
            model._init_weights(module)
    return model, read


def _differ(places: dict[str, Path], first: str, second: str) -> bool:
    """Whether two stored matrices of one shape differ."""
    with safe_open(places[first], "pt") as a, safe_open(places[second], "pt") as b:
        one, other = a.get_slice(first), b.get_slice(second)
        rows, step = one.get_shape()[0], 4096
        return one.get_shape() != other.get_shape() or any(
            not torch.equal(one[start : start + step], other[start : start + step]) for start in range(0, rows, step)
        )


def _round(
    model: nn.Module,
    base: Base,
    task: Task,
    base_format: BaseFormat,
    block_size: int,
    read: Read | None,
    codes: Path | None,
) -> None:
    """Bring a model's layers to `base_format`, in place; `read` as for `quantize_model`, int4's from a file."""
    keep = base.family.trained_head(task)
    if base_format == "nf4":
        require("bitsandbytes", "train")
        from edge_ft.base.nf4 import round_to_nf4

        round_to_nf4(model, keep, read)
    elif base_format == "bf16":
        round_to_bf16(model, keep, read)
    else:
        chosen = {"known": read_codes(codes)} if codes is not None and base_format == "int4" else {}
        quantize_model(model, block_size, keep, BITS[base_format], read, **chosen)


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} cannot be read: {error}") from error


def _convert_gguf(file: Path) -> Path:
    """A float folder made once from a GGUF file, kept in the user's cache under the file's hash."""
    from gguf import GGUFReader
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig

    folder = cache_folder() / f"gguf-{file_sha256(file)[:16]}"
    if folder.is_dir():
        return folder
    try:
        with quiet_libraries(), atomic_folder(folder) as temporary:
            # The family is checked on the header, before hundreds of MB are converted.
            family_of(AutoConfig.from_pretrained(file.parent, gguf_file=file.name).model_type, "text-generation")
            model = AutoModelForCausalLM.from_pretrained(
                file.parent, gguf_file=file.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
            )
            # Dequantized weights are plain floats: left there, the entry would make the next load pack them again.
            if hasattr(model.config, "quantization_config"):
                del model.config.quantization_config
            model.save_pretrained(temporary)
            AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(temporary)
            licence = GGUFReader(file).get_field("general.license")
            if licence is not None:
                write_text(temporary / "README.md", f"---\nlicense: {licence.contents()}\n---\n")
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ModelError(f"{file} cannot be read as a GGUF model: {error}") from error
    return folder


def _download(model: str) -> Path:
    """The local snapshot of a hub id."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    path = Path(model)
    looks_like_path = (
        path.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1 or path.suffix == ".gguf"
    )
    neighbours = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    near = did_you_mean(path.name, neighbours)
    if looks_like_path or near:
        raise ModelError(f"there is no model at {model}{near}")
    try:
        header = Path(snapshot_download(model, allow_patterns=["config.json"]))
        # An architecture that cannot be used is said before its weights are downloaded.
        family_of(str(json.loads((header / "config.json").read_text(encoding="utf-8")).get("model_type")))
        return Path(snapshot_download(model, allow_patterns=["*.json", "*.safetensors", "*.jinja", "README.md"]))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(f"{model} is neither a local folder nor a model that the hub serves: {reason}") from error
