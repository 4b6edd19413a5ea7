"""The page of the `shipping` study, its records and its plots."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from statistics import mean as average
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from edge_ft.bench.report import markdown_table
from edge_ft.bench.studies.curves import interval
from edge_ft.bench.studies.usual_formats import FORMATS
from edge_ft.evaluate.metrics import Metric, mean
from edge_ft.files import write_text
from edge_ft.plots import Axis, Point, scatter

__all__ = ["Seed", "Shipped", "write_page"]

LIMIT = "Q4_0, 8-bit head"
"""The format whose bytes are the limit of the comparison at equal bytes."""
HIGHEST = 0.5
"""Nats above float training of the highest point of the plot."""
INTRODUCTION = """# What ships, compared with what ships

`make shipping` (`python -m edge_ft.bench.studies shipping`) trains SmolLM2-135M-Instruct on 240 rows the usual way
and ours, makes 4-bit files of both, and scores those on the same 200 held-out rows. It resumes where it was stopped,
and writes this page; [studies.md](studies.md#shipping) describes the method.

- *Usual*: PEFT LoRA and transformers' `Trainer` over the float model, at the best of the learning rates {rates} by
  validation loss, best epoch, merged in float, then rounded by the tool of the row. *Ours*: `edge-ft tune` and
  `edge-ft export` with their defaults (revision `{revision}`).
- *Loss* is in nats per target token (completion and end of text). One scorer in torch reads the weights of every file
  as float32, so that kernels do not differ; *exact graph* is ours once more in ONNX Runtime.
- *Verbatim* is the share of rows that greedy decoding answers exactly; *tokens* the share of target tokens that were
  the likeliest.
- *MB*: all files that running it needs, but for the tokenizer. Of the usual formats it is the weights alone, with one
  copy of embedding and head.
- *Minutes* and *CPU minutes* are of the training that ships, and of rounding or `edge-ft export`; the usual way's
  sweep is not in it. Other work was on the machine.
- *On-grid* is the checkpoint of the package, which was rounded to 4 bits when it was published; *off-grid* is that
  after 200 steps in float on other text and with scaled channels (`off_grid`).
- *HQQ* has zero points in float, with which it finds a grid again on which the weights lie: on-grid its relative
  error is 0.008, where the adapter is 0.005 of a weight and other tools round by 0.08, so that it rounds off what was
  learned (the untuned model has 3.05 on `asdiv`). Off-grid its error is 0.055: such weights are still near that grid.
- Brackets are 95% intervals: of a difference by a bootstrap of rows in pairs (losses averaged over the seeds), of a
  mean over seeds by Student's t.
- Not measured here: Olive's GPTQ, NNCF and AutoRound, which are not installed with this project, and llama.cpp's
  importance matrices. K-quants need rows divisible by 256, which SmolLM2's 576 is not.
"""


@dataclass(frozen=True)
class Shipped:
    """One file, scored."""

    nll: NDArray[np.float64]
    """[rows]"""
    tokens: NDArray[np.int64]
    """[rows]"""
    correct: NDArray[np.int64]
    """[rows], targets that were the likeliest token."""
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
        graph = scored.get("graph")
        return cls(
            np.array(scored["nll"]),
            np.array(scored["tokens"]),
            np.array(scored["correct"]),
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
    rate: float
    """Of the usual way, the best of the sweep."""
    usual: Mapping[str, Shipped]
    """By format; `float` is what was trained."""
    ours: Mapping[str, Shipped]
    """By lane."""


Done = Mapping[str, Sequence[Seed]]
"""By case."""


def write_page(done: Done, revision: str, rates: str, page: Path) -> None:
    """Write the page, records/shipping.json and shipping.svg with its dark variant beside it."""
    texts = [INTRODUCTION.format(revision=revision, rates=rates), *_headline(done)]
    name = page.with_suffix("").name
    texts.append(
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{name}-dark.svg">'
        f'<img alt="Loss above float training against size" src="{name}.svg"></picture>\n\n'
        f"Files that lose more than {HIGHEST} nats are in the tables alone.\n"
    )
    texts += [f"## {case}\n\n{_table(seeds)}" for case, seeds in done.items()]
    write_text(page, "\n".join(texts))
    records = ",\n".join(
        json.dumps(record, ensure_ascii=False)
        for case, seeds in done.items()
        for record in _records(case, seeds, revision)
    )
    write_text(page.parent / "records" / f"{name}.json", f"[\n{records}\n]\n")
    for theme, text in _plots(done).items():
        write_text(page.with_name(f"{name}{theme}.svg"), text)


def _headline(done: Done) -> Iterator[str]:
    """Ours against the usual way, a row a case and lane."""
    header: tuple[str, ...] = ("case", "seeds", "lane", "ours, shipped", "tax", "usual, trained", "ours − that")
    header = (*header, "best usual, shipped", "ours − that", "best within its bytes", "ours − that", "gate")
    rows = []
    for case, seeds in done.items():
        usual = {name: [seed.usual[name] for seed in seeds] for name in FORMATS}
        floats = [seed.usual["float"] for seed in seeds]
        limit = usual[LIMIT][0].size_bytes
        best = min(usual, key=lambda name: _loss(usual[name]))
        small = min((name for name in usual if usual[name][0].size_bytes <= limit), key=lambda name: _loss(usual[name]))
        for lane in seeds[0].ours:
            ours = [seed.ours[lane] for seed in seeds]
            cells = [case, str(len(seeds)), lane, f"{_loss(ours):.4f}", _tax(ours, floats), f"{_loss(floats):.4f}"]
            cells += [_signed(difference(ours, floats))]
            for name in (best, small):
                cells += [f"{_loss(usual[name]):.4f} ({name})", _signed(difference(ours, usual[name]))]
            refused = sum(found.refused is not None for found in ours)
            rows.append((*cells, f"refused {refused} of {len(ours)}" if refused else "passed"))
    yield markdown_table(header, rows)


def difference(ours: Sequence[Shipped], theirs: Sequence[Shipped]) -> Metric:
    """Loss of ours minus theirs, averaged over the seeds, with its interval by a bootstrap of rows in pairs."""
    tokens = ours[0].tokens
    nll = np.mean([our.nll - its.nll for our, its in zip(ours, theirs, strict=True)], axis=0)
    found: Metric = mean(nll / tokens, tokens)
    return found


def _table(seeds: Sequence[Seed]) -> str:
    header: tuple[str, ...] = (
        "way",
        "file",
        "loss as trained",
        "loss shipped",
        "tax",
        "exact graph",
        "verbatim",
        "tokens",
    )
    header = (*header, "MB", "minutes", "CPU minutes", "peak MB")
    floats = [seed.usual["float"] for seed in seeds]
    rows = []
    for name in ("float", *FORMATS):
        way = f"usual, {FORMATS[name].tool}" if name in FORMATS else f"usual, rate {seeds[0].rate:g}"
        rows.append((way, name, *_cells([seed.usual[name] for seed in seeds], floats)))
    for lane in seeds[0].ours:
        rows.append(("**ours**", lane, *_cells([seed.ours[lane] for seed in seeds], floats)))
    return markdown_table(header, rows)


def _cells(found: Sequence[Shipped], floats: Sequence[Shipped]) -> Iterator[str]:
    yield f"{average(_trained(found, floats)):.4f}"
    losses = [one.loss for one in found]
    bounds = interval(losses)
    yield f"{average(losses):.4f}" + (f" [{bounds[0]:.4f}, {bounds[1]:.4f}]" if bounds else "")
    yield _tax(found, floats)
    yield "-" if found[0].graph is None else f"{average(one.graph or 0 for one in found):.4f}"
    yield f"{average(float(np.mean(one.correct == one.tokens)) for one in found):.1%}"
    yield f"{average(float(one.correct.sum() / one.tokens.sum()) for one in found):.1%}"
    yield f"{average(one.size_bytes for one in found) / 1e6:.1f}"
    for name, scale in (("seconds", 60), ("cpu_seconds", 60), ("peak_rss_bytes", 1e6)):
        yield f"{average(one.costs[name] for one in found) / scale:.{0 if scale == 1e6 else 1}f}"


def _trained(found: Sequence[Shipped], floats: Sequence[Shipped]) -> list[float]:
    return [base.loss if one.trained is None else one.trained for one, base in zip(found, floats, strict=True)]


def _tax(found: Sequence[Shipped], floats: Sequence[Shipped]) -> str:
    return f"{_loss(found) - average(_trained(found, floats)):+.4f}"


def _loss(found: Sequence[Shipped]) -> float:
    return average(one.loss for one in found)


def _signed(found: Metric) -> str:
    return f"{found['value']:+.4f} [{found['low']:+.4f}, {found['high']:+.4f}]"


def _records(case: str, seeds: Sequence[Seed], revision: str) -> Iterator[dict[str, Any]]:
    for seed in seeds:
        ways = (("usual", seed.usual), ("ours", seed.ours))
        for way, found in ways:
            for name, one in found.items():
                yield {
                    **{"case": case, "seed": seed.seed, "way": way, "file": name},
                    **({"rate": seed.rate} if way == "usual" else {"revision": revision, "refused": one.refused}),
                    "trained": round(_trained([one], [seed.usual["float"]])[0], 5),
                    "shipped": round(one.loss, 5),
                    **({} if one.graph is None else {"graph": round(one.graph, 5)}),
                    "verbatim": round(float(np.mean(one.correct == one.tokens)), 4),
                    "tokens": round(float(one.correct.sum() / one.tokens.sum()), 4),
                    "bytes": one.size_bytes,
                    **{key: round(value) for key, value in one.costs.items()},
                }


def _plots(done: Done) -> dict[str, str]:
    """Size and loss above the usual way's float training, the mean of all cases, as SVG files in light and dark."""
    tools = list(dict.fromkeys(form.tool for form in FORMATS.values()))
    points = []

    def add(name: str, label: str, series: int, of: Literal["usual", "ours"]) -> None:
        found = [(getattr(seed, of)[name], seed.usual["float"]) for seeds in done.values() for seed in seeds]
        above = average(one.loss - base.loss for one, base in found)
        if above < HIGHEST:
            points.append(Point(average(one.size_bytes for one, _ in found) / 1e6, above, label, series))

    for name in ("merged", "adapter"):
        add(name, f"edge-ft, {name}", 0, "ours")
    for name, form in FORMATS.items():
        add(name, name, 1 + tools.index(form.tool), "usual")
    drawn = scatter(points, Axis("MB", "lower"), Axis("nats above float training", "lower"))
    opening = '<svg xmlns="http://www.w3.org/2000/svg" font-family="system-ui, sans-serif" width="720"'
    drawn = drawn.replace("<svg", opening, 1)
    light, dark = _palettes()
    return {"": _coloured(drawn, light), "-dark": _coloured(drawn, light | dark)}


def _palettes() -> tuple[dict[str, str], dict[str, str]]:
    """The colours of our pages, and those that are others in the dark."""
    style = files("edge_ft").joinpath("page.html").read_text(encoding="utf-8")
    before, _, after = style.partition("@media (prefers-color-scheme: dark)")
    after = after.partition("}")[0]
    return dict(re.findall(r"(--[\w-]+): (#\w+)", before)), dict(re.findall(r"(--[\w-]+): (#\w+)", after))


def _coloured(drawn: str, colours: Mapping[str, str]) -> str:
    return re.sub(r"var\((--[\w-]+)\)", lambda found: colours[found[1]], drawn) + "\n"
