"""What the fuzzer found, as one small test each."""

import json
from base64 import b64encode
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from in_process import run_cli

from edge_ft.adapter import find_adapter
from edge_ft.config import RunConfig, TuneConfig
from edge_ft.data import read_rows
from edge_ft.data.tokenizer_settings import check_charsmaps
from edge_ft.errors import DataError, ModelError, UsageError
from edge_ft.families import family_of
from edge_ft.files import is_as_sealed, seal
from edge_ft.models.base_model import Base
from edge_ft.tune.checkpoint import SCORES, _misfit_of_counters
from edge_ft.tune.loop import Fit


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": "(q_proj"},
        {"rank_pattern": {"[q": 4}},
        {"r": 10**12},
        {"trainable_token_indices": {"lm_head": 1e38}},
    ],
)
def test_an_adapter_with_a_damaged_setting_is_refused(tmp_path: Path, settings: dict[str, Any]) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 8} | settings))
    with pytest.raises(ModelError, match=r"adapter_config\.json is damaged"):
        find_adapter(tmp_path)


@pytest.mark.parametrize("settings", [{"rank": 10**30}, {"epochs": 1e300}, {"weight_decay": float("nan")}])
def test_settings_beyond_reason_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"--(rank|epochs|weight-decay) (must be at most|is nan)"):
        TuneConfig(model="m", data="d", out=Path("o"), **settings)
    with pytest.raises(UsageError, match="--temperature is inf"):
        RunConfig(temperature=float("inf"))


def test_a_sealed_file_with_a_number_that_json_does_not_know_is_damaged(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{\n}")
    assert not is_as_sealed(tmp_path / "a.json", seal({"a": 1.0}) | {"a": float("nan")})


@pytest.mark.parametrize("classes", [None, [], [["LlamaForCausalLM"]], 3.0, "LlamaForCausalLM"])
def test_odd_architectures_leave_the_familys_task(tmp_path: Path, classes: Any) -> None:
    base = Base("m", tmp_path, family_of("llama"), "", {"architectures": classes})
    assert base.task == base.family.tasks[0]


def test_a_character_map_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    for size, refused in ((8, False), (2**31, True)):
        charsmap = b64encode(size.to_bytes(4, "little") + bytes(8)).decode()
        parts = {"type": "Sequence", "normalizers": [{"type": "Precompiled", "precompiled_charsmap": charsmap}]}
        file.write_text(json.dumps({"normalizer": parts}))
        if refused:
            with pytest.raises(ModelError, match=r"tokenizer\.json is damaged"):
                check_charsmaps(file)
        else:
            check_charsmaps(file)


def test_a_name_of_a_rows_file_that_is_blank_is_said_to_be_one() -> None:
    with pytest.raises(DataError, match=r"the rows file .* does not exist"):
        read_rows(" ")


def test_a_long_unknown_option_is_not_repeated_as_a_whole(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli(monkeypatch, "run", "bundle", "--" + "x" * 5000)[0] == 2
    assert len(capsys.readouterr().err) < 600


@pytest.mark.parametrize(("name", "value"), [("steps", -1), ("rate_factor", []), ("best_step", None), ("last_nll", {})])
def test_counters_of_a_checkpoint_are_checked(name: str, value: Any) -> None:
    stored = {"evaluations_without_gain": "bad_looks", "evaluation_due": "look_due"}
    loop: dict[str, Any] = {
        stored.get(field.name, field.name): field.default if isinstance(field.default, int | float | str) else 1
        for field in fields(Fit)
        if field.name not in SCORES
    }
    assert _misfit_of_counters(dict(loop)) is None
    loop[name] = value
    assert name in str(_misfit_of_counters(loop))
