"""Every file of a bundle names the same tokens that begin, end and pad a text, and no path of this machine."""

import json
from pathlib import Path
from typing import Any

import pytest
from small_tokenizers import write_bpe
from tiny_models import write_llama, write_t5
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from edge_ft.artifacts import Bundle
from edge_ft.config import ExportConfig
from edge_ft.export import export
from edge_ft.runtime import load
from edge_ft.runtime.open_bundle import GenerativeBundle


def named_by(bundle: Bundle) -> dict[str, Any]:
    """The stop tokens by file, as the library that reads it takes them."""
    generation = GenerationConfig.from_pretrained(bundle.path).eos_token_id
    config = AutoConfig.from_pretrained(bundle.path).eos_token_id
    found = {
        "generation_config.json": generation if isinstance(generation, list) else [generation],
        "config.json": config if isinstance(config, list) else [config],
        "manifest.json": bundle.manifest["special_ids"]["ends"],
    }
    genai = bundle.path / "genai_config.json"
    if genai.exists():
        found["genai_config.json"] = json.loads(genai.read_text())["model"]["eos_token_id"]
    opened = load(bundle, engine="exact")
    assert isinstance(opened, GenerativeBundle)
    assert opened.stop_ids == set(found["manifest.json"])
    assert AutoTokenizer.from_pretrained(bundle.path).eos_token_id in found["manifest.json"]
    return found


@pytest.mark.parametrize(
    ("generation_ends", "ends"),
    [(None, [2, 0]), (0, [2, 0]), ([0, 1], [2, 0, 1])],
)
def test_the_end_of_a_turn_and_the_named_eos_are_in_every_file(
    generation_ends: Any, ends: list[int], tmp_path: Path
) -> None:
    """The template ends turns with <|im_end|> (2), the tokenizer names <|endoftext|> (0)."""
    base = write_llama(tmp_path / "base", eos_token_id=0)
    write_bpe(base, eos_token="<|endoftext|>", name_or_path=str(base))
    (base / "generation_config.json").unlink()
    if generation_ends is not None:
        (base / "generation_config.json").write_text(json.dumps({"eos_token_id": generation_ends, "temperature": 0.6}))
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "hello", "completion": "seven"}) + "\n")
    bundle = export(str(base), ExportConfig(out=tmp_path / "bundle", weights="fp32", data=str(rows)))
    assert named_by(bundle) == dict.fromkeys(
        ("generation_config.json", "config.json", "manifest.json", "genai_config.json"), ends
    )
    generation = json.loads((bundle.path / "generation_config.json").read_text())
    assert generation.get("temperature") == (None if generation_ends is None else 0.6), "the rest stays as it is"
    # The manifest says where the base was found.
    for file in set(bundle.path.glob("*.json*")) - {bundle.path / "manifest.json"}:
        assert str(tmp_path) not in file.read_text(), file


def test_one_end_is_a_number(tmp_path: Path) -> None:
    bundle = export(str(write_t5(tmp_path / "base")), ExportConfig(out=tmp_path / "bundle", weights="fp32"))
    assert set(map(tuple, named_by(bundle).values())) == {(1,)}
    assert json.loads((bundle.path / "generation_config.json").read_text())["eos_token_id"] == 1


def test_the_bundle_has_one_chat_template(tmp_path: Path) -> None:
    base = write_llama(tmp_path / "base")
    write_bpe(base, chat_template=None)
    config = json.loads((base / "tokenizer_config.json").read_text())
    (base / "chat_template.jinja").unlink()
    (base / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": "{{ messages[0].content }}"}))
    template = tmp_path / "own.jinja"
    template.write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}")
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "hello", "completion": "seven"}) + "\n")
    settings = ExportConfig(out=tmp_path / "bundle", weights="fp32", data=str(rows), chat_template=str(template))
    bundle = export(str(base), settings)
    found = AutoTokenizer.from_pretrained(bundle.path)
    assert found.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "user: x<|im_end|>"
    assert "chat_template" not in json.loads((bundle.path / "tokenizer_config.json").read_text())


def test_classes_have_the_same_names_in_every_file(bert_bundle: Bundle) -> None:
    config = AutoConfig.from_pretrained(bert_bundle.path)
    names = bert_bundle.manifest["rendering"]["labels"]
    assert [config.id2label[index] for index in range(config.num_labels)] == names
    assert config.label2id == {name: index for index, name in enumerate(names)}
