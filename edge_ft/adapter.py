"""The folder of a PEFT adapter: found, read and checked before any weights are loaded."""

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypedDict

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, deserialize, safe_open

from edge_ft.config import Minimum, Task, misfit
from edge_ft.errors import ModelError, did_you_mean
from edge_ft.files import file_sha256
from edge_ft.utf8 import read_json

__all__ = ["PEFT_TASKS", "Adapter", "find_adapter"]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX, LORA_A, LORA_B = "base_model.model.", ".lora_A.", ".lora_B."

PEFT_TASKS: dict[Task, str | None] = {
    "text-generation": "CAUSAL_LM",
    "text2text-generation": "SEQ_2_SEQ_LM",
    "text-classification": "SEQ_CLS",
    "token-classification": "TOKEN_CLS",
    "feature-extraction": "FEATURE_EXTRACTION",
    "fill-mask": None,  # PEFT has no name for it
}

VIRTUAL_TOKENS = ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT", "ADAPTION_PROMPT")
"""Types of adapters that put trained vectors before a text."""
PLAIN_STARTS = ("gaussian", "orthogonal", "eva")
"""Values of init_lora_weights that leave the weights of the base as they are."""
VARIANTS = {
    "use_dora": "DoRA",
    "lora_bias": "biases of LoRA layers (lora_bias)",
    "trainable_token_indices": "trained tokens (trainable_token_indices)",
    "target_parameters": "parameters outside linear layers (target_parameters)",
    "use_qalora": "QALoRA",
    "use_bdlora": "BD-LoRA",
    "monteclora_config": "MonteCLoRA",
}
"""Fields of adapter_config.json whose result is more than A and B of linear layers, and how messages call it."""
EMBEDDINGS = ("embed_tokens", "embed_in", "wte", "shared", "word_embeddings", "tok_embeddings", "lm_head", "embed_out")
"""Last names of modules with a row for each token, in the supported families."""


LARGEST_RANK = 65536
TokenIds = list[Annotated[int, Minimum(0)]]


class Settings(TypedDict):
    """adapter_config.json, as far as an export reads it itself."""

    r: NotRequired[Annotated[int, Minimum(1)]]
    lora_alpha: NotRequired[float]
    bias: NotRequired[str]
    target_modules: NotRequired[list[str] | str | None]
    modules_to_save: NotRequired[list[str] | None]
    rank_pattern: NotRequired[dict[str, Annotated[int, Minimum(1)]] | None]
    alpha_pattern: NotRequired[dict[str, float] | None]
    trainable_token_indices: NotRequired[TokenIds | dict[str, TokenIds] | None]
    base_model_name_or_path: NotRequired[str | None]


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter as PEFT saves it."""

    path: Path
    """The folder with adapter_config.json and adapter_model.safetensors."""
    config: dict[str, Any]
    """adapter_config.json"""
    shapes: dict[str, tuple[int, ...]]
    """Shape of each tensor by its name in the file."""

    @property
    def weights(self) -> Path:
        """The file of the tensors."""
        return self.path / WEIGHTS

    @property
    def task(self) -> Task | None:
        """The task in the config; None if it has none, or PEFT has no name for it."""
        named = self.config.get("task_type")
        return next((task for task, name in PEFT_TASKS.items() if name is not None and name == named), None)

    @cached_property
    def sha256(self) -> str:
        """Hex sha256 of the weights."""
        return file_sha256(self.weights)

    @property
    def trained_on(self) -> str | None:
        """Name or path of the model on which it was trained, as PEFT wrote it down."""
        return self.config.get("base_model_name_or_path") or None

    @cached_property
    def model_config(self) -> dict[str, Any]:
        """The content of a transformers config.json beside the adapter; nothing without one.

        Raises:
            ModelError: it cannot be read.
        """
        file = self.path / "config.json"
        return _json_object(file) if file.is_file() else {}

    @property
    def class_names(self) -> tuple[str, ...]:
        """Class names of its run, or in its config.json, in the order of the logits; () where it names none."""
        run = self.path.parent / "rendering.json"  # of an edge-ft run
        if run.is_file() and (labels := _json_object(run).get("labels")):
            return tuple(map(str, labels))
        names = self.model_config.get("id2label") or {}
        ordered = tuple(str(names.get(str(index), f"LABEL_{index}")) for index in range(len(names)))
        return () if all(name == f"LABEL_{index}" for index, name in enumerate(ordered)) else ordered

    def vocabulary(self, base: int) -> int:
        """Return the rows of the embedding with which it was trained, on a base that has `base` rows.

        Raises:
            ModelError: its tensors disagree.
        """
        found: dict[int, str] = {}
        for name, shape in self.shapes.items():
            module, _, part = name.removesuffix(".weight").rpartition(".")
            last = module.removesuffix(".token_adapter").rpartition(".")[2]
            if part in EMBEDDINGS or (part == "base_layer" and last in EMBEDDINGS):
                found[shape[0]] = name
            elif part == "lora_embedding_A" and last in EMBEDDINGS:
                found[shape[1]] = name
            elif part == "lora_B" and last in EMBEDDINGS[-2:]:
                found[shape[0]] = name
        if len(found) > 1:
            (first, one), (second, other), *_ = found.items()
            raise ModelError(f"the adapter {self.path} is damaged: {one} has {first} tokens and {other} {second}")
        least = max((token + 1 for tokens in self.trained_tokens.values() for token in tokens), default=0)
        return next(iter(found), max(base, least))

    @property
    def trained_tokens(self) -> dict[str, list[int]]:
        """Token ids that it trained alone, by the name of the module; "" is the input embedding."""
        tokens = self.config.get("trainable_token_indices") or {}
        return {"": tokens} if isinstance(tokens, list) else tokens

    def read(
        self,
    ) -> tuple[dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]], dict[str, NDArray[np.float32]]]:
        """Read the tensors, without PEFT.

        Returns:
            By the layer's name, A [rank, in] and B [out, rank], B multiplied by PEFT's scaling: alpha / rank, with
            rsLoRA alpha / sqrt(rank), both by layer. And by name the parameters that were trained as a whole.

        Raises:
            ModelError: a matrix is missing, of an unknown type, or not finite.
        """
        tensors = {name.removeprefix(PREFIX): tensor for name, tensor in _read(self.weights).items()}
        pairs = {}
        for name, tensor in tensors.items():
            if not np.isfinite(tensor).all():
                raise ModelError(
                    f"the adapter {self.path} is of no use: {name} holds values that are not finite, its training "
                    "diverged"
                )
            module, is_a, _ = name.partition(LORA_A)
            if not is_a:
                continue
            b = tensors.get(name.replace(LORA_A, LORA_B))
            if b is None or tensor.ndim != 2 or b.ndim != 2 or len(tensor) != b.shape[1]:
                raise ModelError(f"the adapter {self.path} lacks the other half of {name}: copy it again")
            pairs[module] = tensor, b * np.float32(self._scaling(module, len(tensor)))
        if not pairs:
            raise ModelError(f"the adapter {self.path} has no A and B of any layer: save it again")
        return pairs, {name: tensor for name, tensor in tensors.items() if ".lora_" not in name}

    def _scaling(self, module: str, rank: int) -> float:
        """Return what PEFT multiplies B A x by in a layer."""
        patterns = self.config.get("alpha_pattern") or {}
        alpha = next((value for key, value in patterns.items() if _fits(key, module)), self.config.get("lora_alpha", 8))
        return float(alpha / (rank**0.5 if self.config.get("use_rslora") else rank))

    def beyond_lora_inputs(self, head: tuple[str, ...]) -> str | None:
        """Find what inputs A and B of linear layers cannot hold.

        Args:
            head: Modules that may be whole: a classifier's head.

        Returns:
            Its name for a message; None if they hold all of it.
        """
        for field, what in VARIANTS.items():
            if self.config.get(field):
                return what
        last = {name.rpartition(".")[2] for name in head}
        for name in self.config.get("modules_to_save") or ():
            if name.rpartition(".")[2] not in last | {"classifier", "score"}:
                return f"the whole of {name} (modules_to_save)"
        for tensor in self.shapes:
            if ".lora_embedding_" in tensor:
                return f"an adapted embedding ({tensor})"
        if self.config.get("bias", "none") != "none":
            return f"trained biases (bias={self.config['bias']!r})"
        return None


def _fits(pattern: str, module: str) -> bool:
    """Whether a key of rank_pattern or alpha_pattern is for a layer, as PEFT decides."""
    return re.match(rf"(.*\.)?({pattern})$", module) is not None


def find_adapter(folder: Path) -> Adapter:
    """Find the LoRA adapter in a folder, or in the only one of its subfolders that holds one.

    Args:
        folder: As PEFT saved it; or of a trainer with one checkpoint, or an edge-ft run.

    Returns:
        The adapter.

    Raises:
        ModelError: there is none or a choice of several, it is of another type or damaged, or it uses an option that
            an export would lose.
    """
    path = _adapter_folder(folder)
    config = _json_object(path / CONFIG)
    _refuse_unsupported(path, config)
    if found := misfit(config, Settings, CONFIG):
        raise ModelError(f"{path / CONFIG} is damaged: {found}; save the adapter again")
    if (rank := max([config.get("r", 1), *(config.get("rank_pattern") or {}).values()])) > LARGEST_RANK:
        raise ModelError(f"{path / CONFIG} is damaged: it has a rank of {rank}; save the adapter again")
    for field in ("target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"):
        value = config.get(field)
        for pattern in [value] if isinstance(value, str) else value if isinstance(value, dict) else ():
            try:
                re.compile(pattern)
            except re.error as error:
                raise ModelError(
                    f"{path / CONFIG} is damaged: {field} has {pattern!r}, which is no regular expression ({error}); "
                    "save the adapter again"
                ) from error
    if not (path / WEIGHTS).is_file():
        if (path / "adapter_model.bin").is_file():
            raise ModelError(
                f"{path} has pickled weights (adapter_model.bin), which are never loaded: load it with PEFT where it "
                "was trained and save it again (save_pretrained writes safetensors)"
            )
        raise ModelError(f"{path} lacks {WEIGHTS}: save the adapter again, or copy all of its files")
    try:
        with safe_open(path / WEIGHTS, "np") as weights:
            shapes = {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path / WEIGHTS} cannot be read, it is damaged ({error}): copy it again") from error
    return Adapter(path, config, shapes)


def _read(weights: Path) -> dict[str, NDArray[np.float32]]:
    """Return the tensors of a file as float32; numpy itself knows no bfloat16.

    Raises:
        ModelError: a tensor is of another type.
    """
    found = {}
    for name, tensor in deserialize(weights.read_bytes()):
        kind, data = tensor["dtype"], tensor["data"]
        if kind == "BF16":
            values = (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32)
        elif kind in ("F16", "F32", "F64"):
            values = np.frombuffer(data, f"f{int(kind[1:]) // 8}").astype(np.float32)
        else:
            raise ModelError(f"{weights}: {name} is of type {kind}, not of float: save the adapter again in float32")
        found[name] = values.reshape(tensor["shape"])
    return found


def _adapter_folder(folder: Path) -> Path:
    """Return the folder that holds adapter_config.json.

    Raises:
        ModelError: there is none, or several.
    """
    folder = folder.expanduser()
    if not folder.is_dir():
        neighbours = [entry.name for entry in folder.parent.iterdir()] if folder.parent.is_dir() else []
        if folder.is_file():
            raise ModelError(f"the adapter {folder} is a file: name its folder, which holds {CONFIG}")
        raise ModelError(
            f"the adapter {folder} does not exist{did_you_mean(folder.name, neighbours)} (an adapter on a hub must be "
            "downloaded first)"
        )
    if (folder / CONFIG).is_file():
        return folder
    inside = sorted((file.parent for file in folder.glob(f"*/{CONFIG}")), key=_natural)
    if not inside:
        raise ModelError(f"{folder} is not a PEFT adapter: it has no {CONFIG}, and no subfolder that has one")
    if len(inside) > 1:
        names = ", ".join(child.name for child in inside[:8]) + (", …" if len(inside) > 8 else "")
        raise ModelError(f"{folder} holds {len(inside)} adapters ({names}): name one, --adapter {inside[-1]}")
    return inside[0]


def _natural(path: Path) -> list[tuple[int, str]]:
    """Sort checkpoint-500 before checkpoint-1000."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", path.name)]


def _json_object(file: Path) -> dict[str, Any]:
    content = read_json(file, ModelError, "save the adapter again, or copy it again")
    if not isinstance(content, dict):
        raise ModelError(f"{file} must hold one JSON object: save the adapter again")
    return content


def _refuse_unsupported(path: Path, config: dict[str, Any]) -> None:
    """Refuse an adapter that is not LoRA, or whose result depends on more than its weights and its base.

    Raises:
        ModelError: it is one; the message names the way out.
    """
    kind = config.get("peft_type")
    if kind is None:
        raise ModelError(f"{path / CONFIG} names no peft_type: another library than PEFT wrote it, save it with PEFT")
    if kind in VIRTUAL_TOKENS:
        raise ModelError(
            f"{path} is a {kind} adapter, which puts trained vectors before each text: no exported graph can take "
            "these, train a LoRA adapter instead"
        )
    if kind != "LORA":
        raise ModelError(
            f"{path} is a {kind} adapter, and only LORA is read here: merge it into its base with PEFT "
            "(merge_and_unload, then save_pretrained) and export the merged model"
        )
    for field in ("layer_replication", "alora_invocation_tokens", "arrow_config", "kasa_config"):
        if config.get(field):
            raise ModelError(f"{path} uses {field}, which cannot be exported: train it without")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start not in PLAIN_STARTS:
        raise ModelError(
            f"{path} was initialised with init_lora_weights={start!r}, which changed its base: on the original base it "
            "would be wrong. Convert it where it was trained, save_pretrained(DIR, "
            "path_initial_model_for_weight_conversion=…), or merge it there and export the merged model"
        )
