"""Presets are settings in plain files: each one changes what a tune does, and flags win over them."""

from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from edge_ft.config import PlanConfig, TuneConfig, preset_file
from edge_ft.errors import UsageError

NAMES = ["default", "final-layers", "low-memory", "thorough"]


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_has_settings_of_tune_and_a_comment(name: str) -> None:
    text = preset_file(name).read_text(encoding="utf-8")
    assert set(yaml.safe_load(text)) <= {field.name for field in fields(TuneConfig)}
    assert text.startswith("# ")


def test_the_default_preset_equals_the_defaults() -> None:
    given = {"model": "m", "data": "d", "out": Path("o")}
    assert TuneConfig.from_preset("default", **given) == TuneConfig(**given)


def test_given_settings_override_a_preset() -> None:
    found = PlanConfig.from_preset("thorough", model="m", data="d", epochs=1.0)
    assert (found.epochs, found.patience) == (1.0, 2)


def test_an_unknown_preset_is_refused_with_a_similar_one() -> None:
    with pytest.raises(UsageError, match="did you mean 'low-memory'"):
        TuneConfig.from_preset("lowmemory", model="m", data="d", out=Path("o"))
