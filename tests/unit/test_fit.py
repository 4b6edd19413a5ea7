"""A tokenizer that gives ids for which the model has no embedding is refused when it is opened."""

import json
from pathlib import Path

import pytest
from small_tokenizers import add_token, write_bpe
from tiny_bundle import reseal, write_classifier, write_decoder
from tokenizers import Tokenizer, processors

from edge_ft.config import RunConfig, TuneConfig
from edge_ft.data import KnownIds, TextTokenizer
from edge_ft.errors import BundleError, ModelError, UsageError
from edge_ft.runtime import load

WAY_OUT = "resize the embeddings .* or remove the added tokens"


def test_a_vocabulary_as_large_as_the_embeddings_or_smaller_fits(tmp_path: Path) -> None:
    size = TextTokenizer.load(write_bpe(tmp_path)).vocab_size
    for rows in (size, size + 64):  # embeddings are often padded to a round number
        TextTokenizer.load(tmp_path, KnownIds(rows))


def test_an_added_token_without_an_embedding_is_refused(tmp_path: Path) -> None:
    rows = add_token(write_bpe(tmp_path), "<new>", special=False)
    with pytest.raises(ModelError, match=rf"'<new>' \(id {rows}\), .* ids below {rows}: {WAY_OUT}"):
        TextTokenizer.load(tmp_path, KnownIds(rows))
    with pytest.raises(ModelError, match="and 9 more tokens"):
        TextTokenizer.load(tmp_path, KnownIds(rows - 9))


@pytest.mark.parametrize("name", ["eos_token", "pad_token", "bos_token", "mask_token"])
def test_a_named_special_token_without_an_embedding_is_refused(name: str, tmp_path: Path) -> None:
    rows = add_token(write_bpe(tmp_path, **{name: "<late>"}), "<late>", special=True)
    with pytest.raises(ModelError, match=f"'<late>'.*{WAY_OUT}"):
        TextTokenizer.load(tmp_path, KnownIds(rows))


def test_an_unused_special_token_without_an_embedding_is_refused_where_a_template_writes_it(tmp_path: Path) -> None:
    # The text models of Gemma 3 have such a token, for images.
    rows = add_token(write_bpe(tmp_path), "<image>", special=True)
    tokenizer = TextTokenizer.load(tmp_path, KnownIds(rows))
    assert max(tokenizer.encode("an <image> of")) < rows
    with pytest.raises(ModelError, match=f"the template writes '<image>'.*{WAY_OUT}"):
        tokenizer.encode_template("an <image> of")


def test_padding_beyond_the_embeddings_is_refused(tmp_path: Path) -> None:
    write_bpe(tmp_path)
    known = KnownIds.from_config({"vocab_size": 500, "pad_token_id": 500})
    with pytest.raises(ModelError, match=r"pad_token_id 500.*ids below 500: correct it there, or set it to null"):
        TextTokenizer.load(tmp_path, known)


def test_the_ends_of_config_count_without_a_generation_config_and_within_the_embeddings(tmp_path: Path) -> None:
    write_bpe(tmp_path)
    known = KnownIds.from_config({"vocab_size": 500, "eos_token_id": [0, 50256]})
    assert TextTokenizer.load(tmp_path, known).stop_ids == {0, 2}
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 1}))
    assert TextTokenizer.load(tmp_path, known).stop_ids == {1, 2}


def test_a_bundle_is_held_against_its_own_config(tmp_path: Path) -> None:
    bundle = write_decoder(tmp_path / "bundle")
    rows = add_token(bundle, "<new>", special=False)
    (bundle / "config.json").write_text(json.dumps({"vocab_size": rows}))
    reseal(bundle)
    with pytest.raises(ModelError, match="'<new>'"):
        load(bundle)


def test_a_graph_with_other_classes_than_the_manifest_is_refused(tmp_path: Path) -> None:
    bundle = write_classifier(tmp_path / "bundle")
    reseal(bundle, lambda manifest: manifest["rendering"]["labels"].pop())
    with pytest.raises(BundleError, match="names 2 classes and its graph has 3 outputs"):
        load(bundle)


def test_one_segment_reads_both_texts_as_the_same(tmp_path: Path) -> None:
    folder = write_bert_like(tmp_path)
    for segments, expected in ((2, [0, 0, 0, 1, 1]), (1, [0] * 5), (None, [0, 0, 0, 1, 1])):
        tokenizer = TextTokenizer.load(folder, KnownIds(1000, segments))
        assert tokenizer.encode_framed("a", 32, "b").type_ids == expected


@pytest.mark.parametrize(("seed", "message"), [(-1, "at least 0"), (2**32, "at most 4294967295")])
def test_every_command_takes_the_same_seeds(seed: int, message: str) -> None:
    for config in (RunConfig, lambda seed: TuneConfig(model="m", data="d", out=Path("o"), seed=seed)):
        config(seed=2**32 - 1)
        with pytest.raises(UsageError, match=f"--seed must be {message}"):
            config(seed=seed)


def write_bert_like(folder: Path) -> Path:
    """A tokenizer that gives the second of two texts the type id 1."""
    tokenizer = Tokenizer.from_file(str(write_bpe(folder) / "tokenizer.json"))
    specials = [(text, tokenizer.token_to_id(text)) for text in ("<|im_start|>", "<|im_end|>")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A <|im_end|>",
        pair="<|im_start|> $A <|im_end|> $B:1 <|im_end|>:1",
        special_tokens=specials,
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder
