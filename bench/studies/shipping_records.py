"""What the `shipping` study found, a file for each case: in git, so that the page holds what several machines did."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_ft.files import write_text

__all__ = ["Done", "Seed", "Shipped", "keep_seed", "kept_cases"]


@dataclass(frozen=True)
class Shipped:
    """One file, scored."""

    nll: NDArray[np.float64]
    """[rows], nats."""
    tokens: NDArray[np.int64]
    """[rows], targets."""
    verbatim: float
    """Share of rows all of whose targets were the likeliest token."""
    likeliest: float
    """Share of targets that were the likeliest token."""
    size_bytes: int
    costs: Mapping[str, float]
    """`seconds`, `cpu_seconds` and `peak_rss_bytes`."""
    trained: float | None
    """Loss of the model as trained; None: that of the usual way's float model."""
    refused: str | None
    """What the gate said, if it refused it."""
    graph: float | None
    """Loss by the exact graph, of ours."""

    @classmethod
    def of(
        cls,
        scored: Mapping[str, Any],
        costs: Mapping[str, float],
        trained: float | None = None,
        refused: str | None = None,
    ) -> "Shipped":
        """Read a result of `shipping_jobs`."""
        tokens, correct, graph = np.array(scored["tokens"]), np.array(scored["correct"]), scored.get("graph")
        return cls(
            np.array(scored["nll"]),
            tokens,
            float(np.mean(correct == tokens)),
            float(correct.sum() / tokens.sum()),
            scored["bytes"],
            {name: costs[name] for name in ("seconds", "cpu_seconds", "peak_rss_bytes")},
            trained,
            refused,
            None if graph is None else sum(graph["nll"]) / sum(graph["tokens"]),
        )

    @property
    def loss(self) -> float:
        """Nats per target token."""
        return float(self.nll.sum() / self.tokens.sum())


@dataclass(frozen=True)
class Seed:
    """What one seed of a case gave."""

    seed: int
    swept: Sequence[float]
    """Learning rates of the usual way."""
    rate: float
    """The best of them."""
    revision: str
    """Of ours."""
    threads: int
    """Of each process."""
    usual: Mapping[str, Shipped]
    """By format; `float` is what was trained."""
    ours: Mapping[str, Shipped]
    """By lane."""


Done = Mapping[str, Sequence[Seed]]
"""By case."""


def keep_seed(folder: Path, case: str, found: Seed) -> None:
    """Write a seed of a case into `folder`, in the place of what the same seed gave before."""
    others = [seed for seed in _read(folder / f"{case}.json") if seed.seed != found.seed]
    seeds = sorted([*others, found], key=lambda seed: seed.seed)
    lines = []
    for seed in seeds:
        opening = {name: getattr(seed, name) for name in ("seed", "swept", "rate", "revision", "threads")}
        ways = ", ".join(f'"{way}": {_lines(getattr(seed, way))}' for way in ("usual", "ours"))
        tokens = json.dumps(seed.ours["merged"].tokens.tolist())
        lines.append(f'{json.dumps(opening)[:-1]}, "tokens": {tokens}, {ways}}}')
    write_text(folder / f"{case}.json", "[\n" + ",\n".join(lines) + "\n]\n")


def kept_cases(folder: Path, names: Sequence[str]) -> Done:
    """Read the cases of `names` that `folder` has, in their order."""
    found = {name: _read(folder / f"{name}.json") for name in names}
    return {name: seeds for name, seeds in found.items() if seeds}


def _lines(files: Mapping[str, Shipped]) -> str:
    """A JSON object, a line for each file. Losses of rows are rounded to a thousandth of a nat."""
    return "{\n" + ",\n".join(f"{json.dumps(name)}: {json.dumps(_of(one))}" for name, one in files.items()) + "\n}"


def _of(one: Shipped) -> dict[str, Any]:
    found: dict[str, Any] = {
        "shipped": round(one.loss, 5),
        "trained": None if one.trained is None else round(one.trained, 5),
        "graph": None if one.graph is None else round(one.graph, 5),
        "verbatim": round(one.verbatim, 4),
        "likeliest": round(one.likeliest, 4),
        "size_bytes": one.size_bytes,
        "refused": one.refused,
        "costs": {name: round(value) for name, value in one.costs.items()},
    }
    return {name: value for name, value in found.items() if value is not None} | {"nll": [round(x, 3) for x in one.nll]}


def _read(file: Path) -> list[Seed]:
    if not file.is_file():
        return []
    return [_seed(entry) for entry in json.loads(file.read_text(encoding="utf-8"))]


def _seed(entry: Mapping[str, Any]) -> Seed:
    tokens = np.array(entry["tokens"])

    def files(way: str) -> dict[str, Shipped]:
        return {
            name: Shipped(
                np.array(one["nll"]),
                tokens,
                **{key: one[key] for key in ("verbatim", "likeliest", "size_bytes", "costs")},
                **{key: one.get(key) for key in ("trained", "refused", "graph")},
            )
            for name, one in entry[way].items()
        }

    opening = {name: entry[name] for name in ("seed", "swept", "rate", "revision", "threads")}
    return Seed(**opening, usual=files("usual"), ours=files("ours"))
