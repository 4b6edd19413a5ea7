"""The folder of an adapter: what is found in it, and what is refused by name, with the true reason and a way out."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints_table import record_checkpoint
from foreign_adapters import save_foreign
from safetensors.torch import load_file, save_file
from tiny_models import write_decoder, write_llama

from edge_ft.adapter import find_adapter
from edge_ft.errors import ModelError
from edge_ft.export.foreign import unknown_settings
from edge_ft.models.adapted import load_adapter, merge_adapter
from edge_ft.models.base_model import find_base
from edge_ft.models.loading import ModelSpec, load_model

Tensors = dict[str, torch.Tensor]


def base_model(llama: Path, base_format: Any = "fp32") -> Any:
    return load_model(ModelSpec(find_base(str(llama)), "text-generation", base_format))


@pytest.fixture
def adapter(llama: Path, tmp_path: Path) -> Path:
    return save_foreign(llama, tmp_path / "adapter")


def configure(adapter: Path, **settings: Any) -> None:
    file = adapter / "adapter_config.json"
    config = json.loads(file.read_text()) | settings
    file.write_text(json.dumps({name: value for name, value in config.items() if value != "gone"}))


def change(adapter: Path, edit: Callable[[Tensors], None]) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    edit(tensors)
    save_file(tensors, adapter / "adapter_model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("settings", "kind", "said"),
    [
        ({"peft_type": "IA3"}, "IA3", "IA3 adapter.*merge_and_unload"),
        ({"peft_type": "LOHA"}, "LoHa", "LOHA adapter.*merge_and_unload"),
        ({"peft_type": "ADALORA"}, "AdaLoRA", "ADALORA adapter.*merge_and_unload"),
        ({"peft_type": "PROMPT_TUNING"}, "prompt tuning", "trained vectors before each text.*train a LoRA"),
        ({"peft_type": "gone"}, "not of PEFT", "names no peft_type"),
        ({"init_lora_weights": "pissa"}, "PiSSA, not converted", "pissa.*path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "olora"}, "OLoRA, not converted", "olora.*merge it there"),
        ({"init_lora_weights": "corda"}, "CorDA, not converted", "corda.*merge it there"),
        ({"init_lora_weights": "loftq", "loftq_config": {}}, "LoftQ", "loftq.*merge it there"),
        ({"layer_replication": [[0, 2]]}, "layer_replication", "layer_replication"),
        ({"alora_invocation_tokens": [1, 2]}, "aLoRA", "alora_invocation_tokens"),
    ],
)
def test_what_no_export_can_hold_is_refused_by_name(adapter: Path, settings: Any, kind: str, said: str) -> None:
    configure(adapter, **settings)
    with pytest.raises(ModelError, match=said) as caught:
        find_adapter(adapter)
    record_checkpoint("adapters", kind, refused=str(caught.value))


@pytest.mark.parametrize("start", [True, False, "gaussian", "orthogonal", "eva"])
def test_starts_that_leave_the_base_alone_are_taken(adapter: Path, start: Any) -> None:
    configure(adapter, init_lora_weights=start)
    assert find_adapter(adapter).config["init_lora_weights"] == start


def test_pickled_weights_are_never_loaded(adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(ModelError, match=r"pickled weights.*save it again") as caught:
        find_adapter(adapter)
    record_checkpoint("adapters", "adapter_model.bin", refused=str(caught.value))


def test_a_folder_without_weights_or_config_says_which(adapter: Path, tmp_path: Path) -> None:
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"lacks adapter_model\.safetensors"):
        find_adapter(adapter)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"is not a PEFT adapter: it has no adapter_config\.json"):
        find_adapter(tmp_path / "empty")
    with pytest.raises(ModelError, match=r"does not exist \(did you mean 'adapter'\?\)"):
        find_adapter(tmp_path / "adaptor")
    with pytest.raises(ModelError, match="is a file: name its folder"):
        find_adapter(adapter / "adapter_config.json")


@pytest.mark.parametrize(
    ("name", "value"),
    [("trainable_token_indices", {"lm_head": 1e38}), ("r", -1), ("rank_pattern", [8]), ("modules_to_save", "lm_head")],
)
def test_a_setting_of_another_type_is_refused_by_name(adapter: Path, name: str, value: Any) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {name: value}))
    with pytest.raises(ModelError, match=rf"adapter_config\.json is damaged: .*{name}"):
        find_adapter(adapter)


@pytest.mark.parametrize("content", [b"", b"\x80\0\0\0\0\0\0\0{", b"version https://git-lfs.github.com/spec/v1\n"])
def test_damaged_weights_are_refused(adapter: Path, content: bytes) -> None:
    (adapter / "adapter_model.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match=r"adapter_model\.safetensors cannot be read, it is damaged"):
        find_adapter(adapter)


@pytest.mark.parametrize("content", ["[1]", "{", "null"])
def test_a_config_that_is_no_object_is_refused(adapter: Path, content: str) -> None:
    (adapter / "adapter_config.json").write_text(content)
    with pytest.raises(ModelError, match=r"adapter_config\.json"):
        find_adapter(adapter)


def test_the_only_adapter_inside_is_found_and_of_several_one_must_be_named(adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(adapter, out / "checkpoint-1000")
    (out / "runs").mkdir()
    assert find_adapter(out).path == out / "checkpoint-1000"
    shutil.copytree(adapter, out / "checkpoint-500")
    with pytest.raises(ModelError, match=r"2 adapters \(checkpoint-500, checkpoint-1000\): name one.*checkpoint-1000$"):
        find_adapter(out)
    shutil.copytree(adapter, out, dirs_exist_ok=True)  # the final one, as trainers save it beside its checkpoints
    assert find_adapter(out).path == out


def test_a_config_of_an_old_peft_is_enough(llama: Path, adapter: Path) -> None:
    old = {"base_model_name_or_path": "x", "bias": "none", "fan_in_fan_out": False, "inference_mode": True}
    old |= {"lora_alpha": 8, "lora_dropout": 0.0, "modules_to_save": None, "peft_type": "LORA", "r": 4}
    old |= {"target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    whole = merge_adapter(base_model(llama), adapter)
    (adapter / "adapter_config.json").write_text(json.dumps(old))
    found = merge_adapter(base_model(llama), adapter)
    for name, parameter in whole.named_parameters():
        torch.testing.assert_close(found.get_parameter(name), parameter, rtol=0, atol=0)


def test_settings_of_a_newer_peft_are_named(llama: Path, adapter: Path) -> None:
    configure(adapter, use_something_new=True, something_unused=None)
    assert unknown_settings(find_adapter(adapter)) == ["use_something_new"]
    load_adapter(base_model(llama), adapter)


LAST = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"


def _lose(tensors: Tensors) -> None:
    del tensors[LAST]


def _rename(tensors: Tensors) -> None:
    tensors[LAST.replace("q_proj", "query")] = tensors.pop(LAST)


def _narrow(tensors: Tensors) -> None:
    tensors[LAST] = tensors[LAST][:-1].clone()


def _shard(tensors: Tensors) -> None:
    tensors[LAST] = torch.zeros(0)


def _training_name(tensors: Tensors) -> None:
    tensors[LAST.replace(".weight", ".default.weight")] = tensors.pop(LAST)


def _add(tensors: Tensors) -> None:
    tensors[LAST.replace("q_proj", "k_proj")] = tensors[LAST][:32].clone()


def _diverge(tensors: Tensors) -> None:
    tensors[LAST][0, 0] = float("nan")


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (_lose, r"lacks .*layers\.1\.self_attn\.q_proj\.lora_B.*damaged"),
        (_rename, r"query\.lora_B.*which this model lacks"),
        (_narrow, r"layers\.1\.self_attn\.q_proj\.lora_B\.weight of shape \[63, 4\], this model \[64, 4\]"),
        (_shard, r"only a part of .*q_proj\.lora_B.*ZeRO-3"),
        (_training_name, r"a name inside a training: save it with PEFT's save_pretrained"),
        (_add, r"k_proj\.lora_B\.weight, which adapter_config\.json does not name as trained"),
        (_diverge, r"q_proj\.lora_B\.weight holds values that are not finite"),
    ],
)
def test_a_torn_adapter_is_refused_with_the_tensor_and_the_reason(
    llama: Path, adapter: Path, edit: Callable[[Tensors], None], said: str
) -> None:
    change(adapter, edit)
    with pytest.raises(ModelError, match=said) as caught:
        load_adapter(base_model(llama), adapter)
    kind = {"_lose": "a tensor missing", "_narrow": "a tensor of another shape", "_shard": "a shard of ZeRO-3"}
    if edit.__name__ in kind:
        record_checkpoint("adapters", kind[edit.__name__], refused=str(caught.value))


def test_an_adapter_of_another_model_is_refused(llama: Path, adapter: Path, tmp_path: Path) -> None:
    configure(adapter, target_modules=["c_attn"])
    with pytest.raises(ModelError, match="c_attn"):
        load_adapter(base_model(llama), adapter)
    deeper = write_llama(tmp_path / "deeper", num_hidden_layers=3)
    with pytest.raises(ModelError, match=r"has .*layers\.2.*which this model lacks.*trained on .*deeper") as caught:
        load_adapter(base_model(llama), save_foreign(deeper, tmp_path / "deep"))
    record_checkpoint("adapters", "of a deeper model", refused=str(caught.value))
    wider = write_llama(tmp_path / "wider", hidden_size=128)
    with pytest.raises(ModelError, match=r"shape \[128, 4\], this model \[64, 4\]: it is of another model"):
        load_adapter(base_model(llama), save_foreign(wider, tmp_path / "wide"))


@pytest.mark.filterwarnings("ignore")
def test_new_tokens_whose_weights_were_not_saved_are_refused(llama: Path, tmp_path: Path) -> None:
    untied = write_llama(tmp_path / "untied", tie=False)
    size = base_model(untied).config.vocab_size + 2
    adapter = save_foreign(untied, tmp_path / "adapter", vocabulary=size)
    change(adapter, lambda tensors: tensors.__delitem__("base_model.model.lm_head.weight"))
    with pytest.raises(ModelError, match=r"weights of the new ones in lm_head were not saved.*save_embedding_layers"):
        load_adapter(base_model(untied), adapter)
    with pytest.raises(ModelError, match=r"vocabulary of \d+ tokens.*--lane merged"):
        load_adapter(base_model(untied, "int4"), adapter)


@pytest.mark.filterwarnings("ignore")
def test_two_sizes_of_the_vocabulary_are_refused(tmp_path: Path) -> None:
    untied = write_llama(tmp_path / "untied", tie=False)
    adapter = save_foreign(untied, tmp_path / "adapter", target_modules=["q_proj", "lm_head"])
    key = "base_model.model.lm_head.base_layer.weight"
    change(adapter, lambda tensors: tensors.update({key: tensors[key][:-1].clone()}))
    with pytest.raises(ModelError, match=r"damaged.*lm_head\.\w+.*tokens and .*lm_head"):
        load_adapter(base_model(untied), adapter)


def test_what_no_lora_input_can_hold_is_named(llama: Path, tmp_path: Path) -> None:
    def beyond(**settings: Any) -> str | None:
        shutil.rmtree(tmp_path / "made", ignore_errors=True)
        return find_adapter(save_foreign(llama, tmp_path / "made", **settings)).beyond_lora_inputs(())

    assert beyond(use_rslora=True) is None
    assert beyond(use_dora=True) == "DoRA"
    assert "norm (modules_to_save)" in str(beyond(modules_to_save=["norm"]))
    assert "trained tokens" in str(beyond(trainable_token_indices=[3]))
    assert "trained biases" in str(beyond(bias="all"))


@pytest.mark.filterwarnings("ignore")
def test_a_merge_that_computes_something_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft.tuners.lora import Linear

    gpt2 = write_decoder(tmp_path / "gpt2", "gpt2")
    adapter = save_foreign(gpt2, tmp_path / "adapter", target_modules=["c_attn"], fan_in_fan_out=True)
    whole = Linear.get_delta_weight
    monkeypatch.setattr(Linear, "get_delta_weight", lambda self, name: whole(self, name) * 1.5)
    with pytest.raises(ModelError, match="computes something else once PEFT has merged it"):
        merge_adapter(base_model(gpt2), adapter)
