"""What the folder of an adapter brings besides A and B wins over the base's, and is said."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from checkpoints_table import record_checkpoint
from foreign_adapters import save_foreign
from small_tokenizers import write_bpe
from tiny_models import write_bert

from edge_ft.config import ExportConfig
from edge_ft.data import TextTokenizer
from edge_ft.errors import DataError, ModelError, UsageError
from edge_ft.export.bundle import make_manifest
from edge_ft.export.opening import open_export_source
from edge_ft.export.source import ExportSource

TEMPLATE = "{% for message in messages %}{{ message['content'] }}<|im_end|>{% endfor %}"


@pytest.fixture
def adapter(llama: Path, tmp_path: Path) -> Path:
    return save_foreign(llama, tmp_path / "adapter")


def opened(base: Path, adapter: Path, **settings: Any) -> ExportSource:
    return open_export_source(str(base), ExportConfig(out=adapter / "none", adapter=adapter, **settings))


def rows(path: Path, *lines: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def test_a_bare_adapter_ships_the_bases_tokenizer_and_template(llama: Path, adapter: Path) -> None:
    source = opened(llama, adapter)
    assert source.tokenizer.chat_template == TextTokenizer.load(llama).chat_template
    assert source.notes == (f"adapter {adapter}",)


@pytest.mark.parametrize("place", ["chat_template.jinja", "tokenizer_config.json"])
def test_the_adapters_chat_template_wins(llama: Path, adapter: Path, tmp_path: Path, place: str) -> None:
    if place == "chat_template.jinja":
        (adapter / place).write_text(TEMPLATE)
    else:
        settings = {"chat_template": TEMPLATE, "eos_token": "<|im_end|>"}
        (adapter / place).write_text(json.dumps(settings))
    data = rows(
        tmp_path / "rows.jsonl",
        {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "seven"}]},
    )
    source = opened(llama, adapter, data=data)
    assert source.rendering.chat_template == TEMPLATE
    assert "chat template win over the model's" in source.notes[0]
    assert TEMPLATE not in source.tokenizer.files()[0].read_text()
    said = make_manifest(source, {1: "x"}, 1)["provenance"]["adapter"]
    assert said["notes"] == list(source.notes)
    record_checkpoint("adapters", f"its own chat template ({place})", fp32="its template ships", said=source.notes[0])


def test_the_adapters_tokenizer_and_end_of_text_win(llama: Path, adapter: Path) -> None:
    write_bpe(adapter, specials=("<|im_start|>", "<|im_end|>", "<|endoftext|>"), chat_template=None)
    source = opened(llama, adapter)
    assert source.tokenizer.special_tokens["eos_token"] == "<|endoftext|>"
    assert source.tokenizer.chat_template == TextTokenizer.load(llama).chat_template  # of the base: it has none itself
    assert "tokenizer (" in source.notes[0]
    assert "end of a text (<|endoftext|>)" in source.notes[0]
    assert {file.parent for file in source.tokenizer.files() if file.name.startswith("tokenizer")} == {adapter}
    record_checkpoint("adapters", "its own tokenizer and EOS", fp32="its tokenizer ships", said=source.notes[0])


def test_the_adapters_generation_settings_win(llama: Path, adapter: Path) -> None:
    (adapter / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2]}))
    source = opened(llama, adapter)
    assert source.tokenizer.stop_ids == {1, 2}
    assert "generation settings" in source.notes[0]


def test_a_tokenizer_without_its_fast_form_is_refused(llama: Path, adapter: Path) -> None:
    (adapter / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(ModelError, match=r"tokenizer of its own in tokenizer\.model, but no tokenizer\.json"):
        opened(llama, adapter)


def test_tokens_without_weights_are_refused(llama: Path, adapter: Path) -> None:
    write_bpe(adapter, specials=("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|new{n}|>" for n in range(9))))
    with pytest.raises(ModelError, match=r"has \d+ tokens, the model \d+: .*save_embedding_layers=True") as caught:
        opened(llama, adapter)
    record_checkpoint("adapters", "new tokens without weights", refused=str(caught.value))


def test_another_base_than_that_of_the_training_is_said(llama: Path, adapter: Path) -> None:
    def doubt(trained_on: str | None) -> bool:
        file = adapter / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": trained_on}))
        return any("if these are different models" in note for note in opened(llama, adapter).notes)

    assert doubt("meta-llama/Llama-3.2-1B-Instruct")
    assert not doubt(None)
    assert not doubt(str(llama))
    assert not doubt(f"someone/{llama.name}")
    assert not doubt(f"/home/x/.cache/huggingface/hub/models--someone--{llama.name}/snapshots/0a1b")
    assert not doubt(f"unsloth/{llama.name.title()}-unsloth-bnb-4bit")


def test_settings_of_a_newer_peft_are_said(llama: Path, adapter: Path) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"use_something_new": True}))
    assert any("use_something_new" in note for note in opened(llama, adapter).notes)
    record_checkpoint("adapters", "settings of a newer PEFT", fp32="ignored", said=opened(llama, adapter).notes[-1])


def test_the_adapter_lane_refuses_what_a_and_b_cannot_hold_before_any_work(llama: Path, tmp_path: Path) -> None:
    for name, settings, said in (
        ("dora", {"use_dora": True}, "DoRA"),
        ("norm", {"modules_to_save": ["norm"]}, r"the whole of norm \(modules_to_save\)"),
        ("tokens", {"trainable_token_indices": [3]}, "trained tokens"),
    ):
        folder = save_foreign(llama, tmp_path / name, **settings)
        with pytest.raises(ModelError, match=rf"{said}.*use --lane merged") as caught:
            opened(llama, folder, lane="adapter")
        record_checkpoint("adapters", f"{name}, adapter lane", refused=str(caught.value))
        assert opened(llama, folder).lane == "merged"


def test_an_adapter_as_source_says_how_it_is_given(adapter: Path) -> None:
    with pytest.raises(ModelError, match=r"is a PEFT adapter.*--adapter"):
        open_export_source(str(adapter), ExportConfig(out=adapter / "none"))


@pytest.fixture
def classifier(bert: Path, tmp_path: Path) -> Path:
    return save_foreign(bert, tmp_path / "classifier", "SEQ_CLS", target_modules=["query"])


def test_class_names_are_the_adapters_own(bert: Path, classifier: Path, tmp_path: Path) -> None:
    names = {"0": "negative", "1": "positive", "2": "mixed"}
    (classifier / "config.json").write_text(json.dumps({"model_type": "bert", "id2label": names}))
    data = rows(tmp_path / "rows.jsonl", *({"text": "good film", "label": name} for name in ("mixed", "negative")))
    source = opened(bert, classifier, data=data)
    assert source.rendering.labels == ("negative", "positive", "mixed")
    assert [example.labels for example in source.rows.validation] == [[2], [0]]
    assert "class names" in source.notes[0]
    record_checkpoint("adapters", "class names in its config.json", fp32="mapped by name", said=source.notes[0])


def test_class_names_that_nobody_knows_are_asked_for(bert: Path, classifier: Path, tmp_path: Path) -> None:
    texts = [{"text": "good film", "label": name} for name in ("b", "c", "a")]
    data = rows(tmp_path / "rows.jsonl", *texts)
    with pytest.raises(DataError, match=r"names classes \(a, b, c\).*3 outputs without names.*--class-names") as caught:
        opened(bert, classifier, data=data)
    record_checkpoint("adapters", "class names in the rows alone", refused=str(caught.value))
    source = opened(bert, classifier, data=data, class_names=("c", "a", "b"))
    assert source.rendering.labels == ("c", "a", "b")
    assert [example.labels for example in source.rows.validation] == [[2], [0], [1]]
    with pytest.raises(UsageError, match=r"--class-names gives 2 names, the head has 3 outputs"):
        opened(bert, classifier, class_names=("c", "a"))
    with pytest.raises(UsageError, match=r"--class-names is for classes and tags, and the task is feature-extraction"):
        open_export_source(str(bert), ExportConfig(out=tmp_path / "none", class_names=("c", "a")))
    numbers = rows(tmp_path / "numbers.jsonl", *({"text": "good film", "label": n} for n in range(3)))
    assert opened(bert, classifier, data=numbers).rendering.labels == ("LABEL_0", "LABEL_1", "LABEL_2")


def test_a_head_of_one_output_predicts_a_number(bert: Path, tmp_path: Path) -> None:
    adapter = save_foreign(bert, tmp_path / "number", "SEQ_CLS", target_modules=["query"], num_labels=1)
    data = rows(tmp_path / "rows.jsonl", *({"text": "good film", "label": stars} for stars in (1, 4)))
    source = opened(bert, adapter, data=data)
    assert source.rendering.problem_type == "regression"
    assert [example.labels for example in source.rows.validation] == [[1.0], [4.0]]
    assert opened(bert, adapter).rendering.problem_type == "regression", "without rows, too"


def test_a_task_that_the_family_does_not_have_is_refused(llama: Path, tmp_path: Path) -> None:
    adapter = save_foreign(llama, tmp_path / "classifier", "SEQ_CLS")
    with pytest.raises(ModelError, match=r"llama.*text-classification"):
        opened(llama, adapter)


SUMS = [{"prompt": f"{n}+1=", "completion": str(n + 1)} for n in range(40)]


def test_rows_that_are_all_equal_leave_none_for_the_gate(llama: Path, adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nearly all of its rows are equal.*leaves none to score"):
        opened(llama, adapter, data=rows(tmp_path / "rows.jsonl", *SUMS[:1] * 40))
    two = opened(llama, adapter, data=rows(tmp_path / "two.jsonl", *SUMS[:2] * 20))
    assert two.rows.validation
    assert not two.rows.test
    assert any("too few different rows for test rows" in note for note in two.notes)


def test_a_gate_that_goes_by_few_rows_says_so(llama: Path, adapter: Path, tmp_path: Path) -> None:
    few = opened(llama, adapter, data=rows(tmp_path / "few.jsonl", *SUMS[:3]))
    assert few.notes[-1].endswith("the gate goes by 3 row(s), too few to know the loss by")
    enough = opened(llama, adapter, data=rows(tmp_path / "rows.jsonl", *SUMS[:29]))
    assert not any("the gate goes by" in note for note in enough.notes)


def test_answers_without_text_are_said(llama: Path, adapter: Path, tmp_path: Path) -> None:
    empty = [{**row, "completion": ""} for row in SUMS[:2]]
    source = opened(llama, adapter, data=rows(tmp_path / "rows.jsonl", *SUMS[2:20], *empty))
    assert "2 of 20 rows have an empty answer (rows 19, 20) [empty-completion]" in source.notes[-1]


def test_a_single_text_cannot_be_told_from_others(bert: Path, tmp_path: Path) -> None:
    adapter = save_foreign(bert, tmp_path / "embedder", "FEATURE_EXTRACTION", target_modules=["query"])
    pair = {"anchor": "good film", "positive": "bad film"}
    with pytest.raises(DataError, match="give at least 2"):
        opened(bert, adapter, data=rows(tmp_path / "rows.jsonl", pair))


def test_a_head_module_that_nobody_saved_is_refused(classifier: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    bare = write_bert(tmp_path / "bare")
    file = bare / "model.safetensors"
    save_file(
        {name: tensor for name, tensor in load_file(file).items() if "pooler" not in name}, file, {"format": "pt"}
    )
    with pytest.raises(ModelError, match=r"neither .* has the weights of bert\.pooler"):
        opened(bare, classifier)


def test_the_runs_folder_is_taken_for_its_adapter(llama: Path, adapter: Path, tmp_path: Path) -> None:
    shutil.copytree(adapter, tmp_path / "run" / "adapter")
    source = opened(llama, tmp_path / "run")
    assert source.adapter is not None
    assert source.adapter.path == tmp_path / "run" / "adapter"
    assert str(source.adapter.path) in source.notes[0]
