"""Codes chosen over rows: which rows, which layers, that they are kept with the run, and what they change."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from tiny_models import DECODERS, tiny_encoder_config, write_decoder, write_encoder, write_t5

from edge_ft.config import Task
from edge_ft.data import Example, evenly_spaced, pack
from edge_ft.errors import ModelError
from edge_ft.models.base_model import find_base
from edge_ft.models.loading import ModelSpec, load_model
from edge_ft.models.scorer import HEAD_INPUTS, LOSSES, decoder_head_inputs, embed
from edge_ft.quant.calibration import MAX_TOKENS, Calibration, make_calibration
from edge_ft.quant.layers import QuantLinear
from edge_ft.quant.sensitivity import finer_layers
from edge_ft.quant.serialization import codes_sha256, frozen_layers, write_codes

CPU = torch.device("cpu")


def examples(task: Task, count: int = 24) -> list[Example]:
    """Rows of random tokens, of different lengths."""
    random = np.random.default_rng(0)
    found = []
    for row in range(count):
        ids = random.integers(3, 14, random.integers(4, 12)).tolist()
        labels = [0] if task in ("text-classification", "feature-extraction") else list(ids)
        pair = random.integers(3, 14, 9).tolist() if task == "feature-extraction" else []
        found.append(Example(row, ids, labels, 2, "", 0, pair_ids=pair))
    return found


@given(st.lists(st.integers(), max_size=50), st.integers(0, 60))
def test_rows_are_evenly_spaced(items: list[int], count: int) -> None:
    indices = evenly_spaced(range(len(items)), count)
    assert len(indices) == min(count, len(items)) == len(set(indices))
    assert indices == sorted(indices)
    if len(indices) > 1:
        gaps = np.diff([*indices, len(items)])
        assert gaps.max() - gaps.min() <= 1


@given(st.lists(st.integers(1, 3000), min_size=1, max_size=100), st.integers(1, 120))
def test_fewer_long_rows_are_selected(lengths: list[int], rows: int) -> None:
    found = make_calibration([Example(0, [1] * n, [1] * n, 0, "", 0) for n in lengths], rows, 0, "text-generation")
    assert found is not None
    count = len(found.batch["input_ids"])
    assert 1 <= count <= rows
    assert count == 1 or found.batch["input_ids"].size <= MAX_TOKENS


def test_zero_rows_switch_calibration_off() -> None:
    assert make_calibration(examples("text-generation"), 0, 0, "text-generation") is None


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {
        "llama": write_decoder(folder / "llama", "llama"),
        "gpt2": write_decoder(folder / "gpt2", "gpt2"),
        "opt": write_decoder(folder / "opt", "opt"),
        "t5": write_t5(folder / "t5"),
        "bert": write_encoder(folder / "bert", tiny_encoder_config("bert")),
        "albert": write_encoder(folder / "albert", tiny_encoder_config("albert")),
    }


def outcome(model: Any, task: Task, calibration: Calibration) -> np.ndarray:
    """What the head reads, a vector or the loss of each of the rows."""
    with torch.no_grad():
        if task == "feature-extraction":
            return np.asarray(embed(model, calibration.batch, CPU)[0])
        return np.asarray((HEAD_INPUTS.get(task) or LOSSES[task])(model, calibration.batch, CPU)[0])


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("llama", "text-generation"),
        ("gpt2", "text-generation"),
        ("opt", "text-generation"),
        ("t5", "text2text-generation"),
        ("bert", "text-classification"),
        ("bert", "feature-extraction"),
    ],
)
def test_calibration_lowers_the_error_on_its_rows(name: str, task: Task, models: dict[str, Path]) -> None:
    base, labels = find_base(str(models[name])), ("a", "b") if task == "text-classification" else ()
    packed = base.family.packs
    rows = make_calibration(examples(task), 24, base.dims.config.pad_token_id or 0, task, packed=packed)
    assert rows is not None
    exact, nearest, chosen = (
        load_model(ModelSpec(base, task, form, labels=labels, codes=codes))
        for form, codes in (("fp32", None), ("int4", None), ("int4", rows))  # type: ignore[arg-type]
    )
    changed = [
        layer
        for layer, module in frozen_layers(chosen).items()
        if any(
            (a != b).any()
            for a, b in zip(module.weight_arrays(), frozen_layers(nearest)[layer].weight_arrays(), strict=False)
        )
    ]
    # An embedding is chosen where it is a language model's head too.
    head, embedding = chosen.get_output_embeddings(), chosen.get_input_embeddings()
    tied = getattr(head, "qweight", None) is embedding.qweight
    untouched = {layer for layer, module in frozen_layers(chosen).items() if module is embedding and not tied}
    assert set(changed) == frozen_layers(chosen).keys() - untouched
    off = [np.square(outcome(model, task, rows) - outcome(exact, task, rows)).mean() for model in (chosen, nearest)]
    assert off[0] < off[1]
    again = load_model(ModelSpec(base, task, "int4", labels=labels, codes=rows))
    assert codes_sha256(again) == codes_sha256(chosen)


@pytest.mark.parametrize(("name", "task"), [("llama", "text-generation"), ("t5", "text2text-generation")])
def test_a_change_is_rounded_on_the_grid_of_the_codes_before(
    name: str, task: Task, models: dict[str, Path], tmp_path: Path
) -> None:
    base, file = find_base(str(models[name])), tmp_path / "codes.safetensors"
    rows = make_calibration(examples(task), 24, base.dims.config.pad_token_id or 0, task)
    spec = ModelSpec(base, task, "int4", codes=rows)
    before = load_model(spec)
    write_codes(file, before)
    layers, head = frozen_layers(before), before.get_output_embeddings()  # type: ignore[operator]
    linear = [layer for layer, module in layers.items() if isinstance(module, QuantLinear) and module is not head]
    random, changes = np.random.default_rng(0), {}
    for layer in linear[1::2]:
        shapes = ((2, layers[layer].in_features), (layers[layer].out_features, 2))
        changes[layer] = tuple(0.1 * random.normal(size=shape).astype(np.float32) for shape in shapes)
    after = frozen_layers(load_model(replace(spec, start=file, changes=changes)))  # type: ignore[arg-type]
    for layer, module in layers.items():
        (codes, *grid), (codes_after, *grid_after) = module.weight_arrays(), after[layer].weight_arrays()
        assert (layer in changes) == (not np.array_equal(codes, codes_after)), layer
        assert len(grid) == len(grid_after)  # 8 bits where there were
        if len(grid) == 2:
            np.testing.assert_array_equal(grid[1], grid_after[1])  # zero points; scales are fitted to the codes
    assert len(finer_layers(before)) > 0 or task != "text-generation"


def test_padding_does_not_change_the_codes(models: dict[str, Path]) -> None:
    base = find_base(str(models["llama"]))
    found = []
    for pad_id in (0, 7):
        rows = make_calibration(examples("text-generation"), 24, pad_id, "text-generation")
        found.append(codes_sha256(load_model(ModelSpec(base, "text-generation", "int4", codes=rows))))
    assert found[0] == found[1]


@pytest.mark.parametrize("name", DECODERS)
def test_rows_that_share_a_sequence_do_not_see_each_other(name: str, tmp_path: Path) -> None:
    base, random = find_base(str(write_decoder(tmp_path / name, name))), np.random.default_rng(0)
    lengths = 40, 17, 40, 3, 30, 12, 40, 9
    rows = [Example(row, random.integers(3, 60, n).tolist(), [], 0, "", 0) for row, n in enumerate(lengths)]
    found = make_calibration(rows, len(rows), 0, "text-generation", packed=base.family.packs)
    assert found is not None
    model = load_model(ModelSpec(base, "text-generation"))
    assert len(found.batch["input_ids"]) == (2 if base.family.packs else len(rows))
    alone = [pack([rows[row]], 0, 0) for row in found.batch["rows"]]
    with torch.no_grad():
        (inputs, labels), *each = (decoder_head_inputs(model, batch, CPU) for batch in (found.batch, *alone))
    assert torch.equal(labels, torch.cat([of_row for _, of_row in each]))
    torch.testing.assert_close(inputs, torch.cat([of_row for of_row, _ in each]), atol=1e-4, rtol=1e-4)


def test_shared_layers_are_rounded_without_calibration(models: dict[str, Path]) -> None:
    base, task = find_base(str(models["albert"])), "text-classification"
    rows = make_calibration(examples(task), 24, 0, task)  # type: ignore[arg-type]
    models_of = [load_model(ModelSpec(base, task, "int4", labels=("a", "b"), codes=codes)) for codes in (rows, None)]  # type: ignore[arg-type]
    assert codes_sha256(models_of[0]) == codes_sha256(models_of[1])


def test_a_damaged_model_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(models["llama"], folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.input_layernorm.weight"][3] = np.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    rows = make_calibration(examples("text-generation"), 8, 0, "text-generation")
    with pytest.raises(ModelError, match=r"the input of model\.layers\.1\..* is not finite: .* damaged"):
        load_model(ModelSpec(find_base(str(folder)), "text-generation", "int4", codes=rows))


def test_half_of_the_rows_of_an_embedding_model_are_second_texts(tmp_path: Path) -> None:
    rows = make_calibration(examples("feature-extraction", 4), 4, 0, "feature-extraction")
    assert rows is not None
    given_ids = examples("feature-extraction", 4)
    assert rows.batch["input_ids"][1, :9].tolist() == given_ids[1].pair_ids
    assert rows.batch["pair_input_ids"][1, : len(given_ids[1].input_ids)].tolist() == given_ids[1].input_ids
    assert rows.batch["input_ids"][2, : len(given_ids[2].input_ids)].tolist() == given_ids[2].input_ids
