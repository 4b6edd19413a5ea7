"""What earlier commands wrote is read only if it is of the declared types."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, TypedDict

import pytest
from tiny_bundle import write_classifier, write_decoder

from edge_ft.artifacts import Bundle
from edge_ft.config import Minimum, VerifyConfig, from_plain, misfit
from edge_ft.errors import BundleError, UsageError
from edge_ft.evaluate.verify import verify
from edge_ft.runtime import load


class Part(TypedDict):
    name: str
    size: NotRequired[Annotated[int, Minimum(1)]]


@dataclass(frozen=True)
class Whole:
    kind: Literal["a", "b"]
    names: tuple[str, ...] = ()
    share: float | None = None


@pytest.mark.parametrize(
    ("value", "hint", "says"),
    [
        ({"name": "x", "more": 1}, Part, None),
        ({"size": 1}, Part, "it lacks 'name'"),
        ({"name": None}, Part, "it.name is None, not a text"),
        ({"name": "x", "size": 0}, Part, "it.size is 0, below 1"),
        ({"name": "x", "size": True}, Part, "it.size is True, not a whole number"),
        ([], Part, "it is [], not an object"),
        ({"kind": "c"}, Whole, "it.kind is 'c', not one of a, b"),
        ({"kind": "a", "odd": 1}, Whole, "it has 'odd', which this edge-ft does not know"),
        ({"kind": "a", "names": [1]}, Whole, "it.names[0] is 1, not a text"),
        ({"kind": "a", "share": float("nan")}, Whole, "it.share is nan, not a number"),
        ({"1": "x", "3": "y"}, dict[Literal["1", "4"], str], "the key '3' of it is '3', not one of 1, 4"),
        (2**63, int, f"it is {2**63}, not a whole number"),
    ],
)
def test_values_of_other_types_are_named(value: Any, hint: Any, says: str | None) -> None:
    assert misfit(value, hint, "it") == says


def test_a_dataclass_is_built_from_its_plain_values() -> None:
    assert from_plain(Whole, {"kind": "b", "names": ["x"]}, "it") == Whole("b", ("x",))


def write_manifest(bundle: Path, **changes: Any) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    (bundle / "manifest.json").write_text(json.dumps({**manifest, **changes}))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model": "../elsewhere/model.onnx"}, "none of its files"),
        ({"graphs": {"1": "tokenizer.json"}}, "none of its graphs"),
        ({"graphs": {"2": "onnx/model.onnx"}}, "not one of 1, 4"),
        ({"graphs": ["onnx/model.onnx"]}, "graphs is"),
        ({"task": 7}, "task is 7"),
        ({"files": []}, "files is"),
        ({"max_length": 0}, "below 1"),
    ],
)
def test_a_manifest_of_another_shape_is_refused(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    write_manifest(bundle := write_decoder(tmp_path / "bundle"), **changes)
    with pytest.raises(BundleError, match=says):
        Bundle.open(bundle)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"cache": {"layers": 2}}, "lacks"),
        ({"cache": {"layers": 2, "kv_heads": 2, "head_dim": "16"}}, "head_dim"),
        ({"cache": {"layers": 3, "kv_heads": 2, "head_dim": 16}}, "cannot run"),
        ({"rendering": {}}, "rendering lacks"),
        ({"task": "feature-extraction"}, "renders rows for text-generation"),
    ],
)
def test_parts_of_a_manifest_that_do_not_fit_are_refused(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    write_manifest(bundle := write_decoder(tmp_path / "bundle"), **changes)
    with pytest.raises(UsageError, match=says):
        load(bundle).generate("hello")  # type: ignore[union-attr]


def test_a_bundle_without_a_verification_cannot_be_verified(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="its verification lacks 'by_accuracy_level'"):
        verify(write_classifier(tmp_path / "bundle"), VerifyConfig())
