"""What the tests of families found out, kept for docs/models.md where `make models` asks for it."""

import json
import os
from pathlib import Path

__all__ = ["record"]


def record(model: str, **columns: str) -> None:
    """Add cells to the row of a model, in the folder that MODELS names; without it nothing is kept."""
    if "MODELS" not in os.environ:
        return
    file = Path(os.environ["MODELS"]) / f"{model}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    row = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"model": model}
    file.write_text(json.dumps(row | columns), encoding="utf-8")
