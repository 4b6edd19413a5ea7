"""Pretrain a small T5 that restores the capitals and punctuation of a sentence.

A T5 that is trained on sentences alone memorises them instead of copying its source. So it begins with words in random
order, where only the source determines the next word (docs/decisions/014).
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from edge_ft.bench.studies.datasets import Rows, sentence_rows, transcript_of
from edge_ft.data import Example, TextTokenizer, collate, encode_pair
from edge_ft.errors import require
from edge_ft.evaluate.metrics import token_f1
from edge_ft.files import write_json, write_text
from edge_ft.progress import Progress

__all__ = ["T5Recipe", "pretrain_t5", "split_sentences", "write_t5_tokenizer"]

PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"


@dataclass(frozen=True)
class T5Recipe:
    """How the model is pretrained; each recipe has its own folder in the cache."""

    width: int = 128
    layers: int = 2
    heads: int = 4
    inner: int = 512
    vocabulary: int = 4096
    """Large enough that most words are one token: the token to copy next follows from the one before."""
    batch: int = 64
    steps: int = 2500
    learning_rate: float = 0.02
    """Of Adafactor, relative to each weight's size: T5's embeddings are a hundred times its queries."""
    jumbled: float = 0.8
    """Share of rows that are random words instead of a sentence at the first step; it falls to 0 at the last one."""
    seed: int = 0


def split_sentences(held_out: int = 200) -> tuple[Rows, Rows]:
    """English sentences to train on and to hold out, the same at every call."""
    rows = sorted(sentence_rows(), key=lambda row: sha256(row["written"].encode()).digest())
    return rows[held_out:], rows[:held_out]


def write_t5_tokenizer(folder: Path, texts: Sequence[str], vocabulary: int) -> None:
    """Write a unigram tokenizer like T5's: `<pad>` is 0 and begins every answer, `</s>` is 1 and ends every text."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=vocabulary, special_tokens=[PAD, END, UNKNOWN], unk_token=UNKNOWN, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {END}", special_tokens=[(END, 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    # The class that reads tokenizer.json unchanged: T5's own would add a hundred sentinel tokens.
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": PAD, "eos_token": END, "unk_token": UNKNOWN}
    write_json(folder / "tokenizer_config.json", names)


def pretrain_t5(folder: Path, recipe: T5Recipe, progress: Progress) -> None:
    """Train tokenizer and model, and write them to `folder` with the figures of the held-out sentences."""
    torch = require("torch", "train")
    from transformers import T5Config, T5ForConditionalGeneration

    from edge_ft.models.scorer import TorchScorer

    train, held_out = split_sentences()
    progress.say(f"reading {len(train)} sentences")
    write_t5_tokenizer(folder, [text for row in train for text in row.values()], recipe.vocabulary)
    tokenizer = TextTokenizer.load(folder)
    others = _encode(tokenizer, held_out)
    torch.manual_seed(recipe.seed)
    settings: dict[str, Any] = {
        "vocab_size": tokenizer.vocab_size,
        "d_model": recipe.width,
        "d_kv": recipe.width // recipe.heads,
        "d_ff": recipe.inner,
        "num_layers": recipe.layers,
        "num_heads": recipe.heads,
        "dropout_rate": 0.0,
        "decoder_start_token_id": 0,
    }
    model = T5ForConditionalGeneration(T5Config(**settings))
    started = time.monotonic()
    tokens = _train(model, tokenizer, train, recipe, progress)
    seconds = time.monotonic() - started
    scorer = TorchScorer(model, "text2text-generation", tokenizer.stop_ids)
    nll, _ = scorer.token_nll(collate(others, tokenizer.pad_id, "text2text-generation"))
    sample = others[:64]
    answers = [tokenizer.decode(ids) for ids in scorer.answer_batch([example.input_ids for example in sample], 64)]
    pairs = list(zip(answers, sample, strict=True))
    model.save_pretrained(folder)
    figures = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "tokens": tokens,
        "seconds": round(seconds, 1),
        "held_out_sentences": len(others),
        "held_out_nll": round(float(nll.sum()) / sum(example.targets for example in others), 3),
        "token_f1": round(float(np.mean([token_f1(text, example.reference) for text, example in pairs])), 3),
        "verbatim_match": round(float(np.mean([text == example.reference for text, example in pairs])), 3),
    }
    write_json(folder / "pretraining.json", figures)
    write_text(folder / "README.md", "Pretrained from scratch by `python -m edge_ft.bench.studies pretrain t5`.\n")
    progress.say(", ".join(f"{name} {value}" for name, value in figures.items()))


def _encode(tokenizer: TextTokenizer, rows: Rows) -> list[Example]:
    return [
        encode_pair(tokenizer, number, row["transcript"], row["written"], 1, 128) for number, row in enumerate(rows, 1)
    ]


def _train(model: Any, tokenizer: TextTokenizer, rows: Rows, recipe: T5Recipe, progress: Progress) -> int:
    """Train with Adafactor, warm-up and a cosine; returns the number of tokens read and written."""
    import torch
    from transformers.optimization import Adafactor

    optimizer = Adafactor(
        model.parameters(), lr=recipe.learning_rate, relative_step=False, scale_parameter=True, warmup_init=False
    )
    model.train()
    random = Random(recipe.seed)
    words = [word for row in rows for word in row["written"].split()]
    warmup = max(1, recipe.steps // 20)
    tokens = 0
    for step in range(recipe.steps):
        jumbled = recipe.jumbled * (1 - step / recipe.steps)
        chosen = [
            _jumble(words, random) if random.random() < jumbled else random.choice(rows) for _ in range(recipe.batch)
        ]
        batch = collate(_encode(tokenizer, chosen), 0, "text2text-generation")
        done = max(0, step - warmup) / recipe.steps
        rate = recipe.learning_rate * min((step + 1) / warmup, 0.02 + 0.49 * (1 + math.cos(math.pi * done)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = model(
            input_ids=torch.from_numpy(batch["input_ids"]),
            attention_mask=torch.from_numpy(batch["attention_mask"]),
            labels=torch.from_numpy(batch["labels"]),
        ).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        tokens += int(batch["attention_mask"].sum()) + int((batch["labels"] != -100).sum())
        progress.advance("pretraining", step + 1, recipe.steps, f"loss {loss.item():.3f}")
    return tokens


def _jumble(words: Sequence[str], random: Random) -> dict[str, str]:
    """A row of 2 to 10 words that no sentence has in this order."""
    written = " ".join(random.choices(words, k=random.randint(2, 10)))
    return {"transcript": transcript_of(written), "written": written}
