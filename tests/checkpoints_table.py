"""What tests of real-world checkpoints record for docs/checkpoints.md when `make checkpoints` runs them.

A row is one oddity of a model folder, file, adapter or tokenizer. A test that opens it compares logits and records the
largest differences; a test in which it is refused records the message:

    from checkpoints_table import largest_errors, record_checkpoint

    errors = largest_errors(str(folder), reference, batch)          # reference: the plain transformers model
    assert max(errors.values()) < 1e-4
    record_checkpoint("weights", "sharded, an older single file beside", **errors)

    with pytest.raises(ModelError, match="GPTQ") as caught:
        find_base(str(folder))
    record_checkpoint("weights", "GPTQ", refused=str(caught.value))

`make checkpoints` runs every test file that imports this module: nothing is to be registered. A further call for the
same part and kind adds cells to its row. Rows stand in the order of their parts (`weights`, `GGUF`, `adapters`,
`tokenizers`), and in it sorted by kind.
"""

import copy
import json
import os
import re
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from edge_ft.config import BaseFormat, Task
from edge_ft.models.base_model import find_base
from edge_ft.models.loading import BITS, ModelSpec, load_model
from edge_ft.quant.blockwise import Bits, dequantize, quantize
from edge_ft.quant.layers import QuantEmbedding, QuantLinear

__all__ = ["Part", "dequantized", "largest_errors", "record_checkpoint"]

Part = Literal["weights", "GGUF", "adapters", "tokenizers"]


def record_checkpoint(
    part: Part,
    kind: str,
    *,
    fp32: float | str | None = None,
    int4: float | str | None = None,
    int8: float | str | None = None,
    said: str | None = None,
    refused: str | None = None,
) -> None:
    """Add cells to the row of an oddity in the folder that CHECKPOINTS names; does nothing without that variable.

    Args:
        part: The table that it stands in.
        kind: The oddity in a few words, the key of its row.
        fp32: Largest difference of the logits to transformers; a text where something else is compared.
        int4: Largest difference to transformers over the dequantized codes; a text as above.
        int8: As `int4`.
        said: What edge-ft says while it opens it (a warning, a finding).
        refused: The message with which it is refused; None where it is opened.
    """
    if "CHECKPOINTS" not in os.environ:
        return
    cells = {
        "fp32": fp32 if fp32 is None or isinstance(fp32, str) else f"{fp32:.0e}",
        "int4": int4 if int4 is None or isinstance(int4, str) else f"{int4:.0e}",
        "int8": int8 if int8 is None or isinstance(int8, str) else f"{int8:.0e}",
        "said": _without_folders(said),
        "refused": _without_folders(refused),
        "test": os.environ["PYTEST_CURRENT_TEST"].partition("::")[0],
    }
    file = Path(os.environ["CHECKPOINTS"]) / f"{sha256(f'{part} {kind}'.encode()).hexdigest()[:16]}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    row = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"part": part, "kind": kind}
    row |= {name: cell for name, cell in cells.items() if cell is not None}
    file.write_text(json.dumps(row), encoding="utf-8")


def _without_folders(text: str | None) -> str | None:
    """Shorten each absolute path to its last name: the folders of a test session are nobody's business."""
    return None if text is None else re.sub(r"(?:/[\w.+-]+)+/(?=[\w.+-])", "", text)


def largest_errors(
    model: str,
    reference: nn.Module,
    batch: dict[str, Tensor],
    task: Task = "text-generation",
    formats: tuple[BaseFormat, ...] = ("fp32", "int4", "int8"),
    labels: tuple[str, ...] = (),
) -> dict[str, float]:
    """Load a model in each format and compare its logits with those of transformers.

    Args:
        model: A folder or file, as `--model` takes it.
        reference: The plain float32 transformers model that it must equal. For int4 and int8 its weights are rounded
            to the codes first, in every layer that edge-ft quantizes: a wrong weight shows in every format.
        batch: Inputs of both, for example `input_ids` and `attention_mask`.
        task: Of the model.
        formats: Which to load.
        labels: Classes of a classifier, as for `ModelSpec`.

    Returns:
        The largest absolute difference of any logit, by format.
    """
    base, errors = find_base(model), {}
    for base_format in formats:
        ours = load_model(ModelSpec(base, task, base_format, labels=labels))
        theirs = reference if base_format not in BITS else dequantized(reference, ours, BITS[base_format])
        with torch.no_grad():
            found, expected = ours(**batch), theirs.eval()(**batch)
        name = "logits" if "logits" in expected else "last_hidden_state"
        errors[base_format] = float((found[name] - expected[name]).abs().max())
    return errors


def dequantized(reference: nn.Module, ours: Any, bits: Bits, block_size: int = 32) -> nn.Module:
    """Return a copy of a transformers model with each weight rounded to codes that `ours` holds as codes.

    The rows of an embedding with float16 scales are rounded to float16, too.
    """
    rounded, model = set(), copy.deepcopy(reference)
    for name, module in ours.named_modules():
        if not isinstance(module, QuantLinear | QuantEmbedding):
            continue
        layer = model.get_submodule(name)
        weight = layer.get_parameter("weight")
        if id(weight) in rounded:
            continue  # tied: rounded with the embedding
        rounded.add(id(weight))
        across = isinstance(layer, Conv1D)
        values = (weight.data.T if across else weight.data).float().numpy()
        grid = torch.from_numpy(dequantize(quantize(values, block_size, bits)))
        weight.data = grid.T.contiguous() if across else grid
    halved = {
        id(model.get_submodule(name).get_parameter("weight"))
        for name, module in ours.named_modules()
        if isinstance(module, QuantEmbedding) and module.half_rows
    }
    for layer in model.modules():
        if isinstance(layer, nn.Embedding) and id(layer.weight) in halved:  # a tied head is not rounded further
            layer.weight = nn.Parameter(layer.weight.half().float())
    return model
