"""A trainable bundle as the base of a training: what `edge_ft.models.base_model.Base` is for a checkpoint."""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from edge_ft.artifacts import Bundle
from edge_ft.config import Pooling, ProblemType, Task
from edge_ft.data import TextTokenizer
from edge_ft.errors import ModelError, UsageError
from edge_ft.families import Family, family_of

__all__ = ["BundleBase", "find_bundle_base"]


@dataclass(frozen=True)
class BundleDims:
    """Dimensions of the model that a plan and the learning rate ask for."""

    hidden: int
    layers: int
    shares_layers: bool = False


@dataclass(frozen=True)
class BundleBase:
    """A bundle that can learn."""

    name: str
    """As the user gave it."""
    bundle: Bundle
    family: Family
    class_names: tuple[str, ...] = ()
    """Other names for the classes of its head; (): those of the bundle."""

    @property
    def path(self) -> Path:
        """Folder of the bundle."""
        return self.bundle.path

    @cached_property
    def index(self) -> dict[str, Any]:
        """What its training graphs are made of."""
        return self.bundle.train_index()

    @cached_property
    def content_sha256(self) -> str:
        """Of its weights and of the index that says where they are."""
        return str(self.bundle.weights_sha256())

    @property
    def dims(self) -> BundleDims:
        """Dimensions of the model."""
        return BundleDims(int(self.index["hidden"]), len(self.index["layers"]))

    @property
    def max_length(self) -> int:
        """Tokens for which the model has positions."""
        return self.bundle.max_length

    @property
    def problem_type(self) -> ProblemType | None:
        """What the logits of the bundle's classification head are."""
        found: ProblemType | None = self.bundle.manifest["rendering"].get("problem_type")
        return found

    @property
    def pooling(self) -> tuple[Pooling, bool]:
        """How a text becomes one embedding."""
        return self.bundle.manifest["rendering"].get("pooling") or "mean", True

    def labels(self, task: Task) -> tuple[str, ...]:
        """Return the class names of the bundle's head for `task`."""
        same = task == self.bundle.task
        return self.class_names or tuple(self.bundle.manifest["rendering"].get("labels") or ()) if same else ()

    def with_class_names(self, names: tuple[str, ...]) -> "BundleBase":
        """Return it with other names for the classes of its head."""
        return replace(self, class_names=names)

    def open_tokenizer(self) -> TextTokenizer:
        """Return the bundle's tokenizer."""
        return TextTokenizer.of_bundle(self.path)


def find_bundle_base(model: str, task: Task | None) -> BundleBase:
    """Open a bundle to train on it.

    Args:
        model: As the user gave it.
        task: The task that it must have; None: any.

    Returns:
        The base.

    Raises:
        BundleError: not a bundle, or a file that is missing, changed or unlisted.
        UsageError: a bundle that cannot learn; the message says why.
        ModelError: it has another task.
    """
    bundle = Bundle.open(Path(model))
    train = bundle.manifest.get("train")
    if train is None or "index" not in train:
        why = "it was exported before bundles could" if train is None else train["reason"]
        raise UsageError(f"the bundle {model} cannot learn: {why}")
    if task is not None and task != bundle.task:
        raise ModelError(f"the bundle {model} does {bundle.task}, not {task}")
    return BundleBase(model, bundle, family_of(str(bundle.manifest["family"]), bundle.task))  # type: ignore[arg-type]
