"""A base with fewer tokens is a model folder that computes what the whole model computes for these tokens."""

import json
import shutil
import string
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tiny_models import DECODERS, T5_SHAPES, tiny_encoder_config, write_decoder, write_encoder, write_llama, write_t5
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

from edge_ft.config import Task
from edge_ft.errors import ModelError, WillNotFit
from edge_ft.files import cache_folder
from edge_ft.models import vocabulary
from edge_ft.models.base_model import Base, find_base
from edge_ft.models.loading import ModelSpec, load_model
from edge_ft.models.vocabulary import Vocabulary, choose_vocabulary, cut_base


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGE_FT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(vocabulary, "GENERAL", 3)


def used_by(base: Base, text: str) -> set[int]:
    return set(base.open_tokenizer().encode(text))


def logits(base: Base, task: Task, text: str) -> torch.Tensor:
    """[tokens, vocab]"""
    ids = torch.tensor([base.open_tokenizer().encode(text)])
    answer = {"decoder_input_ids": ids[:, :2]} if task == "text2text-generation" else {}
    with torch.no_grad():
        found: torch.Tensor = load_model(ModelSpec(base, task))(input_ids=ids, **answer).logits[0]
    return found


def check(folder: Path, task: Task, text: str) -> tuple[Base, Base]:
    """Cut a model to the tokens of a text, and compare what both compute for it; the whole and the cut base."""
    base = find_base(str(folder), task)
    chosen = choose_vocabulary(base, used_by(base, text))
    cut = cut_base(base, chosen, task)
    assert (cut.name, cut.dims.vocabulary) == (base.name, len(chosen.rows))
    assert cut.dims.vocabulary < base.dims.vocabulary
    torch.testing.assert_close(logits(cut, task, text), logits(base, task, text)[:, chosen.rows])
    return base, cut


@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder_gives_the_same_logits_for_the_kept_tokens(name: str, tmp_path: Path) -> None:
    check(write_decoder(tmp_path / "model", name), "text-generation", "hello world")


def test_an_untied_head_and_weights_of_two_bytes_are_cut_alike(tmp_path: Path) -> None:
    folder = write_llama(tmp_path / "model", tie=False)
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    _, cut = check(folder, "text-generation", "hello world")
    with safe_open(cut.path / "model.safetensors", "pt") as tensors:
        shapes = {key: tensors.get_slice(key) for key in ("model.embed_tokens.weight", "lm_head.weight")}
        assert {tuple(part.get_shape()) for part in shapes.values()} == {(cut.dims.vocabulary, 64)}
        assert {part.get_dtype() for part in shapes.values()} == {"BF16"}


@pytest.mark.parametrize("shape", T5_SHAPES)
def test_a_t5_gives_the_same_logits_and_starts_with_the_same_token(shape: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    words = [["▁seven", -9.0], ["▁hello", -4.0], ["answer", -9.0]]
    write_t5(folder, **T5_SHAPES[shape], vocab_size=73 + len(words))
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["vocab"][10:10] = words  # else all its pieces are letters
    (folder / "tokenizer.json").write_text(json.dumps(content))
    base, cut = check(folder, "text2text-generation", "hello world")
    before, after = (of.open_tokenizer().tokens() for of in (base, cut))
    ids = ("decoder_start_token_id", "pad_token_id", "eos_token_id")
    named = [[{at: text for text, at in tokens.items()}[of.config[name]] for name in ids]
             for tokens, of in ((before, base), (after, cut))]  # fmt: skip
    assert named == [["<pad>", "<pad>", "</s>"]] * 2


@pytest.mark.parametrize("name", ["bert", "roberta", "electra", "distilbert", "albert", "mpnet", "modernbert"])
def test_an_encoder_gives_the_same_logits_and_keeps_its_positions(name: str, tmp_path: Path) -> None:
    """The positions of RoBERTa begin after the id of its padding."""
    config = tiny_encoder_config(name)
    folder = write_encoder(tmp_path / "model", config)
    content = json.loads((folder / "tokenizer.json").read_text())
    letters = string.ascii_lowercase[1:]  # besides the word `a`: without letters no word could be left out
    for text in (*letters, *(f"##{letter}" for letter in string.ascii_lowercase)):
        content["model"]["vocab"][text] = config.vocab_size
        config.vocab_size += 1
    (folder / "tokenizer.json").write_text(json.dumps(content))
    torch.manual_seed(1)
    AutoModelForMaskedLM.from_config(config).save_pretrained(folder)
    check(folder, "fill-mask", "the film was")


def test_transformers_opens_it_with_the_same_special_tokens(llama: Path) -> None:
    base, cut = check(llama, "text-generation", "hello world")
    theirs = [AutoTokenizer.from_pretrained(of.path) for of in (base, cut)]
    assert [of.eos_token for of in theirs] == ["<|im_end|>"] * 2
    assert theirs[1].convert_tokens_to_ids("<|im_end|>") == cut.config["eos_token_id"]
    chat: list[dict[str, Any]] = [{"role": "user", "content": "hello world"}]
    assert len({of.apply_chat_template(chat, tokenize=False) for of in theirs}) == 1


def test_it_is_made_once_and_kept_under_the_tokens(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = find_base(str(llama))
    chosen = choose_vocabulary(base, used_by(base, "hello world"))
    first = cut_base(base, chosen, "text-generation")
    assert Vocabulary.read(first.path / "vocabulary.json") == chosen
    monkeypatch.setattr(vocabulary, "write_tensors", None)
    assert cut_base(base, chosen, "text-generation") == first
    assert [path.name for path in cache_folder().iterdir()] == [first.path.name]


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = find_base(str(llama))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 0))  # type: ignore[attr-defined]
    with pytest.raises(WillNotFit, match=r"with fewer tokens takes .* set EDGE_FT_CACHE to a folder on a larger disk"):
        cut_base(base, choose_vocabulary(base, {5}), "text-generation")
    assert not list(cache_folder().glob("*"))


def test_a_damaged_record_is_refused_by_name(tmp_path: Path) -> None:
    file = tmp_path / "vocabulary.json"
    file.write_text(json.dumps({"kept": [1]}))
    with pytest.raises(ModelError, match=r"vocabulary\.json is damaged"):
        Vocabulary.read(file)
