"""What manifest.json holds, as types: a bundle is opened only if its manifest fits them."""

from typing import Annotated, Any, Literal, NotRequired, TypedDict

from edge_ft.config import Minimum, misfit

__all__ = ["Manifest", "find_misfit"]

Level = Literal["1", "4"]
"""An accuracy level of ONNX Runtime's MatMulNBits, as a key."""


class File(TypedDict):
    """A file of the bundle."""

    sha256: str
    bytes: Annotated[int, Minimum(0)]


class LevelScores(TypedDict):
    """How the graph of one accuracy level scored at the export."""

    probe_nll: list[float]
    nll: NotRequired[float | None]


class Limits(TypedDict):
    """The limits of the gate."""

    max_tax: float


class Verification(TypedDict):
    """What the export measured; `verify` compares with it."""

    limits: NotRequired[Limits]
    rows_sha256: NotRequired[str | None]
    rows_read: NotRequired[Annotated[int, Minimum(0)]]
    rows_split: NotRequired[list[float] | None]
    nll: NotRequired[dict[str, float | None]]
    by_accuracy_level: NotRequired[dict[Level, LevelScores]]
    refused: NotRequired[list[str]]


class Tokenization(TypedDict):
    """Ids that an encoder-decoder's answers begin with."""

    decoder_start: NotRequired[Annotated[int, Minimum(0)] | None]


class NamedAdapter(TypedDict):
    """An adapter in the bundle."""

    file: str
    rendering: NotRequired[dict[str, Any]]


class BaseGraphs(TypedDict):
    """What answers without an adapter, where the bundle has graphs without LoRA inputs."""

    model: str
    graphs: dict[Level, str]
    encoder_graphs: NotRequired[dict[Level, str]]


class Adapters(TypedDict):
    """The graphs that take any adapter, and the adapters that the bundle holds."""

    graphs: dict[Level, str]
    encoder_graphs: NotRequired[dict[Level, str]]
    default: str | None
    names: dict[str, NamedAdapter]
    base: NotRequired[BaseGraphs]


class Train(TypedDict):
    """How the bundle learns, or why it cannot."""

    index: NotRequired[str]
    reason: NotRequired[str]


class Manifest(TypedDict):
    """manifest.json, as far as commands read it."""

    format_version: int
    task: str
    model: str
    graphs: dict[Level, str]
    lane: Literal["base", "merged", "adapter"]
    rendering: dict[str, Any]
    files: dict[str, File]
    max_length: NotRequired[Annotated[int, Minimum(1)]]
    seal: NotRequired[str]
    encoder_graphs: NotRequired[dict[Level, str]]
    cache: NotRequired[dict[str, Any]]
    tokenization: NotRequired[Tokenization]
    verification: NotRequired[Verification]
    adapters: NotRequired[Adapters]
    train: NotRequired[Train]


def find_misfit(manifest: Any) -> str | None:
    """Say what is wrong with a manifest; None where every value is of its type and every graph is a listed file."""
    if found := misfit(manifest, Manifest, "the manifest"):
        return found
    graphs = [manifest["model"], *manifest["graphs"].values(), *manifest.get("encoder_graphs", {}).values()]
    adapters = manifest.get("adapters", {})
    for part in (adapters, adapters.get("base", {})):
        graphs += [*part.get("graphs", {}).values(), *part.get("encoder_graphs", {}).values()]
    graphs += [adapters["base"]["model"]] if "base" in adapters else []
    graphs += [adapter["file"] for adapter in adapters.get("names", {}).values()]
    graphs += [index] if (index := manifest.get("train", {}).get("index")) else []
    if outside := [graph for graph in graphs if graph not in manifest["files"]]:
        return f"the manifest names the graph {outside[0]!r}, which is none of its files"
    if manifest["model"] not in manifest["graphs"].values():
        return f"the manifest's model {manifest['model']!r} is none of its graphs"
    return None
