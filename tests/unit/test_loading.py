"""A base is loaded completely or refused, and a head is used only for the classes that it was trained for."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import write_bert, write_llama
from transformers import AutoConfig, BertForSequenceClassification

from edge_ft.errors import ModelError
from edge_ft.models.base_model import find_base
from edge_ft.models.loading import BITS, ModelSpec, load_model
from edge_ft.quant.blockwise import Grid
from edge_ft.quant.conversion import quantize_model, round_to_bf16
from edge_ft.quant.nf4 import round_to_nf4


def edit_config(folder: Path, **changes: object) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


def write_headed(folder: Path, names: tuple[str, ...]) -> Path:
    """A BERT with a classification head, its classes in this order."""
    write_bert(folder)
    config = AutoConfig.from_pretrained(folder, num_labels=len(names), id2label=dict(enumerate(names)))
    torch.manual_seed(3)
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder


def test_missing_weights_are_not_initialised_at_random(tmp_path: Path) -> None:
    folder = edit_config(write_llama(tmp_path / "model"), num_hidden_layers=3)
    with pytest.raises(ModelError, match=r"lacks the weights of model\.layers\.2.* and 8 more"):
        load_model(ModelSpec(find_base(str(folder)), "text-generation"))


def test_an_encoder_without_a_head_is_refused_for_classification(bert: Path) -> None:
    with pytest.raises(ModelError, match="no head for text-classification, tune it first"):
        load_model(ModelSpec(find_base(str(bert)), "text-classification"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"head_dim": 24}, "multiples of 16"), ({"model_type": "bloom"}, "'bloom' are not supported")],
)
def test_a_model_that_cannot_be_exported_is_refused_at_once(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        find_base(str(edit_config(write_llama(tmp_path / "model"), **changes)))


def test_a_weight_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    folder = write_llama(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="NaN"):
        load_model(ModelSpec(find_base(str(folder)), "text-generation", "int4"))


def test_a_config_that_is_not_an_object_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ModelError, match="one JSON object"):
        find_base(str(tmp_path))


def test_a_head_without_names_has_default_names(tmp_path: Path) -> None:
    folder = write_headed(tmp_path / "model", ("LABEL_0", "LABEL_1"))
    assert find_base(str(folder)).labels("text-classification") == ("LABEL_0", "LABEL_1")


@pytest.mark.parametrize(
    ("names", "says"),
    [
        ({"0": "cat", "1": "cat"}, "several outputs the name 'cat'"),
        (["cat", "dog"], "id2label must be an object"),
        ({"0": ["cat"], "1": "dog"}, "id2label must be an object"),
    ],
)
def test_unusable_names_of_classes_are_refused(tmp_path: Path, names: Any, says: str) -> None:
    folder = edit_config(write_headed(tmp_path / "model", ("no", "yes")), id2label=names)
    with pytest.raises(ModelError, match=says):
        find_base(str(folder)).labels("text-classification")
    numbered = edit_config(folder, id2label={"0": 10, "1": 20})
    assert find_base(str(numbered)).labels("text-classification") == ("10", "20")


def test_class_numbers_follow_the_order_of_the_head(tmp_path: Path) -> None:
    folder = write_headed(tmp_path / "model", ("no", "yes"))
    assert find_base(str(folder)).has_head_for("text-classification", ("0", "1"))
    assert not find_base(str(folder)).has_head_for("text-classification", ("yes", "no"))


@pytest.mark.parametrize("bits", ["int4", "int8", "nf4", "bf16"])
@pytest.mark.parametrize("name", ["llama", "untied", "bert"])
def test_loading_by_tensor_gives_the_codes_of_the_whole_model(
    name: str, bits: Any, llama: Path, bert: Path, tmp_path: Path
) -> None:
    folder = {"llama": llama, "bert": bert}.get(name) or write_llama(tmp_path / "untied", tie=False)
    base = find_base(str(folder))
    labels = () if base.family.decoder else ("a", "b", "c")
    task = base.family.tasks[0]
    read = load_model(ModelSpec(base, task, bits, labels=labels))
    whole, keep = load_model(ModelSpec(base, task, labels=labels)), base.family.trained_head(task)
    if bits in BITS:
        quantize_model(whole, Grid(32), keep, BITS[bits])
    else:
        {"nf4": round_to_nf4, "bf16": round_to_bf16}[bits](whole, keep)
    found, expected = read.state_dict(), whole.state_dict()
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        if not key.startswith("classifier") and "pooler" not in key:  # initialised in another order
            assert torch.equal(found[key], tensor), key
    assert not read.training and not any(p.requires_grad or p.is_meta for p in read.parameters())


@pytest.mark.parametrize("base_format", ["int4", "nf4"])
def test_an_embedding_that_stays_float_stays_tied(base_format: Any, tmp_path: Path) -> None:
    """At int4 where its width is not whole blocks."""
    base = find_base(str(write_llama(tmp_path / "model", hidden_size=48, head_dim=16)))
    model = load_model(ModelSpec(base, "text-generation", base_format))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not any(parameter.is_meta for parameter in model.parameters())


def test_unknown_names_are_left_to_transformers(llama: Path, tmp_path: Path) -> None:
    """As in old checkpoints, which transformers renames while it loads them."""
    folder = tmp_path / "old"
    shutil.copytree(llama, folder)
    (weights,) = folder.glob("*.safetensors")
    tensors = load_file(weights)
    lost = {f"other.{key}" if key.endswith("norm.weight") else key: value for key, value in tensors.items()}
    save_file(lost, weights, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="lacks the weights of"):
        load_model(ModelSpec(find_base(str(folder)), "text-generation", "int4"))
