"""Tokenizers small enough to be made in a test: every byte is a token, and so are a few words."""

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

CHATML = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""Adds a system prompt where there is none, as SmolLM2's template does."""


def write_bpe(
    folder: Path,
    *,
    specials: tuple[str, ...] = ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    bos: str | None = None,
    chat_template: str | None = CHATML,
    **config: Any,
) -> Path:
    """A byte-level BPE tokenizer that puts `bos` in front of a text; the last special token is both pad and EOS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        special_tokens=[AddedToken(text, special=True, normalized=False) for text in specials],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        vocab_size=len(specials) + 256 + 40,
        show_progress=False,
    )
    tokenizer.train_from_iterator(["hello world, the answer is\n\n\n\nseven hello the answer"] * 3, trainer)
    if bos is not None:
        ids = [(bos, tokenizer.token_to_id(bos))]
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=ids)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"eos_token": specials[-1], "pad_token": specials[-1], "bos_token": bos or specials[0], **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    if chat_template is not None:
        (folder / "chat_template.jinja").write_text(chat_template, encoding="utf-8")
    return folder


def write_unigram(folder: Path) -> Path:
    """A Unigram tokenizer as T5's, in whose vocabulary `</s>` is also a piece that can match in a text."""
    pieces = [("<unk>", 0.0), ("</s>", 0.0), ("▁", -2.0), *((letter, -3.0) for letter in "abcdefs</>")]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.add_special_tokens(["</s>", "<unk>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def write_t5_tokenizer(folder: Path) -> int:
    """A Unigram tokenizer as T5's (pad 0, `</s>` 1 after every text, unk 2); returns the size of the vocabulary."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,!?ABCDEFGHIJKLMNOPQRSTUVWXYZ'-"
    # Not trained: the trainer numbers pieces of the same score in another order each time.
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((letter, -3.0) for letter in letters)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return tokenizer.get_vocab_size()


def add_token(folder: Path, text: str, *, special: bool) -> int:
    """Add a token to the folder's tokenizer and return the number of tokens before."""
    file = folder / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(file))
    before = tokenizer.get_vocab_size()
    (tokenizer.add_special_tokens if special else tokenizer.add_tokens)([AddedToken(text, special=special)])
    tokenizer.save(str(file))
    return before
