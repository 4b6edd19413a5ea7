"""Pretrain small models on real text, for families whose weights no package holds; kept in the user's cache.

python -m edge_ft.bench.studies pretrain gpt2|t5 --out DIR
"""

import json
import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from cyclopts import Parameter
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from edge_ft.bench.studies.datasets import gpt2_files, passages
from edge_ft.bench.studies.pretrain_t5 import T5Recipe, pretrain_t5
from edge_ft.errors import UsageError, require
from edge_ft.files import atomic_folder, cache_folder, refuse_existing, write_json, write_text
from edge_ft.progress import Lines, Progress

__all__ = [
    "PRETRAINED",
    "fit",
    "perplexity",
    "pretrained",
    "split_passages",
    "windows",
    "write_gpt2_tokenizer",
]

END = "<|endoftext|>"


@dataclass(frozen=True)
class Recipe:
    """How a model is pretrained; each recipe has its own folder in the cache."""

    width: int = 192
    layers: int = 4
    heads: int = 4
    vocabulary: int = 4096
    """GPT-2's first tokens: with all 50,257 the embedding would be most of so small a model."""
    length: int = 128
    """Tokens of a training sequence, and the positions that the model has."""
    batch: int = 8
    steps: int = 2000
    """2 million tokens: after 0.4 million it knew little more than the frequencies of words (perplexity 503)."""
    learning_rate: float = 2e-3
    seed: int = 0


def pretrained(name: str, progress: Progress) -> Path:
    """Pretrain a model unless the user's cache holds it.

    Returns:
        Its folder in the cache.

    Raises:
        UsageError: there is no such model, or its packages are not installed.
    """
    if name not in PRETRAINED:
        raise UsageError(f"there is no recipe for {name!r}: take {' or '.join(PRETRAINED)}")
    recipe, train = PRETRAINED[name]
    digest = sha256(repr(recipe).encode()).hexdigest()[:16]
    folder = cache_folder() / f"pretrained-{name}-{digest}"
    if not folder.is_dir():
        with atomic_folder(folder) as temporary:
            train(temporary, recipe, progress)
    return folder


def split_passages(held_out: int = 400) -> tuple[list[str], list[str]]:
    """English passages to train on and to hold out, the same at every call."""
    texts = sorted(passages(), key=lambda text: sha256(text.encode()).digest())
    return texts[held_out:], texts[:held_out]


def write_gpt2_tokenizer(folder: Path, vocabulary: int = 50257) -> Tokenizer:
    """Write GPT-2's byte-level BPE with its first `vocabulary` tokens; the last of them ends a text."""
    encoder, merges_file = gpt2_files()
    ids: dict[str, int] = json.loads(encoder.read_text(encoding="utf-8"))
    kept = {token: number for token, number in ids.items() if number < vocabulary - 1 and token != END}
    lines = merges_file.read_text(encoding="utf-8").splitlines()[1:]
    merges = [(first, second) for first, second in map(str.split, filter(None, lines)) if first + second in kept]
    tokenizer = Tokenizer(models.BPE({**kept, END: vocabulary - 1}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END])
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", {"eos_token": END, "bos_token": END, "model_max_length": 1024})
    return tokenizer


def _gpt2(folder: Path, recipe: Recipe, progress: Progress) -> None:
    torch = require("torch", "train")
    from transformers import GPT2Config, GPT2LMHeadModel

    tokenizer = write_gpt2_tokenizer(folder, recipe.vocabulary)
    train, held_out = split_passages()
    progress.say(f"reading {len(train)} passages")
    stream, held_out_stream = (_stream(tokenizer, texts) for texts in (train, held_out))
    torch.manual_seed(recipe.seed)
    end = recipe.vocabulary - 1
    config = GPT2Config(
        vocab_size=recipe.vocabulary,
        n_positions=recipe.length,
        n_embd=recipe.width,
        n_layer=recipe.layers,
        n_head=recipe.heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=end,
        eos_token_id=end,
    )
    model = GPT2LMHeadModel(config)
    started = time.monotonic()
    batches = windows(stream, recipe.length, (recipe.steps, recipe.batch), recipe.seed)
    fit(model, batches, recipe.learning_rate, progress)
    model.save_pretrained(folder)
    figures = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "tokens": recipe.steps * recipe.batch * recipe.length,
        "seconds": round(time.monotonic() - started, 1),
        "held_out_passages": len(held_out),
        "held_out_perplexity": round(perplexity(model, held_out_stream, recipe.length), 2),
    }
    write_json(folder / "pretraining.json", figures)
    write_text(folder / "README.md", "Pretrained from scratch by `python -m edge_ft.bench.studies pretrain gpt2`.\n")
    progress.say(", ".join(f"{name} {value}" for name, value in figures.items()))


def _stream(tokenizer: Tokenizer, texts: Sequence[str]) -> NDArray[np.int64]:
    """The tokens of all texts, each with an end-of-text token."""
    end = tokenizer.token_to_id(END)
    encoded = tokenizer.encode_batch(list(texts))
    return np.fromiter(chain.from_iterable([*encoding.ids, end] for encoding in encoded), np.int64)


def windows(stream: NDArray[np.int64], length: int, shape: tuple[int, int], seed: int) -> NDArray[np.int64]:
    """[*shape, length + 1]: pieces of the stream in random order, each at most once; shape is [steps, batch]."""
    count = shape[0] * shape[1]
    starts = np.arange(0, len(stream) - length - 1, length)
    chosen = np.random.default_rng(seed).permutation(starts)[:count]
    if len(chosen) < count:
        raise UsageError(f"{len(stream)} tokens are too few for {shape[0]} steps")
    return stream[chosen[:, None] + np.arange(length + 1)].reshape(*shape, -1)


def fit(model: Any, batches: NDArray[np.int64], learning_rate: float, progress: Progress) -> None:
    """Train all weights of a causal model on token windows [steps, batch, length + 1], at a rate that falls to 5%."""
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1, betas=(0.9, 0.95), fused=True)
    model.train()
    steps = len(batches)
    warmup = max(1, steps // 20)
    for step, batch in enumerate(batches):
        done = max(0, step - warmup) / steps
        rate = learning_rate * min((step + 1) / warmup, 0.05 + 0.475 * (1 + math.cos(math.pi * done)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        ids = torch.from_numpy(batch)
        logits = model(input_ids=ids[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        progress.advance("pretraining", step + 1, steps, f"loss {loss.item():.3f}")


def perplexity(model: Any, stream: NDArray[np.int64], length: int) -> float:
    """Perplexity over consecutive windows of the stream; the first token of each is not scored."""
    import torch

    model.eval()
    total, count = 0.0, 0
    with torch.inference_mode():
        for start in range(0, len(stream) - length, length):
            ids = torch.from_numpy(stream[None, start : start + length + 1])
            logits = model(input_ids=ids[:, :-1]).logits[0]
            total += float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
            count += length
    return math.exp(total / count)


PRETRAINED: dict[str, tuple[Any, Callable[[Path, Any, Progress], None]]] = {
    "gpt2": (Recipe(), _gpt2),
    "t5": (T5Recipe(), pretrain_t5),
}
"""By model type, the recipe and the function that trains a model into a folder."""


def main(name: str, *, out: Annotated[Path | None, Parameter(name="--out")] = None) -> None:
    """Pretrain a small model, or take it from the cache.

    Args:
        name: gpt2 or t5.
        out: Folder to copy the model to; default: only print where the cache has it.
    """
    if out is not None:
        refuse_existing(out)
    folder = pretrained(name, Lines())
    if out is not None:
        shutil.copytree(folder, out)
    print(out or folder)
