"""The page of the `shipping` study and its plots."""

import re
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from statistics import mean as average
from typing import Literal

import numpy as np

from edge_ft.bench.report import markdown_table
from edge_ft.bench.studies.curves import interval
from edge_ft.bench.studies.shipping_records import Done, Seed, Shipped
from edge_ft.bench.studies.usual_formats import FORMATS
from edge_ft.evaluate.metrics import Metric, mean
from edge_ft.files import write_text
from edge_ft.plots import Axis, Point, scatter

__all__ = ["write_page"]

LIMIT = "Q4_0, 8-bit head"
"""The format whose bytes are the limit of the comparison at equal bytes."""
HIGHEST = 0.5
"""Nats above float training of the highest point of the plot."""
INTRODUCTION = """# What ships, compared with what ships

`make shipping` (`python -m edge_ft.bench.studies shipping`) trains SmolLM2-135M-Instruct on 240 rows the usual way
and ours, makes 4-bit files of both, and scores those on the same 200 held-out rows. It resumes where it was stopped,
and writes this page; [studies.md](studies.md#shipping) describes the method.

- *Usual*: PEFT LoRA and transformers' `Trainer` over the float model, at the best of the learning rates that the
  tables name by validation loss, best epoch, merged in float, then rounded by the tool of the row. The single rate of
  `fiqa-on-grid` and `xsum-on-grid` is the one that their validation rows chose off the grid. *Ours*:
  `edge-ft tune` and `edge-ft export` with their defaults, at the revision that the tables name.
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
- On `fiqa` the usual way takes the 8 rows of a step in two passes (`gradient_accumulation_steps`): in one it took more
  than 22 GB, and the system killed it.
- Brackets are 95% intervals: of a difference by a bootstrap of rows in pairs (losses averaged over the seeds), of a
  mean over seeds by Student's t.
- Not in the tables: ONNX Runtime's HQQ, k_quant and asymmetric RTN, and its 4-bit head, which lost on `asdiv`
  ([decision 048](decisions/048-four-bits-on-more-rows.md)); Olive's GPTQ, NNCF and AutoRound, which are not installed
  with this project; llama.cpp's importance matrices. K-quants need rows divisible by 256, which SmolLM2's 576 is not.
"""


def write_page(done: Done, page: Path) -> None:
    """Write the page, and its plot beside it, in light and dark."""
    texts = [INTRODUCTION, *_headline(done)]
    name = page.with_suffix("").name
    texts.append(
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{name}-dark.svg">'
        f'<img alt="Loss above float training against size" src="{name}.svg"></picture>\n\n'
        f"Files that lose more than {HIGHEST} nats are in the tables alone.\n"
    )
    texts += [f"## {case}\n\n{_table(seeds)}" for case, seeds in done.items()]
    write_text(page, "\n".join(texts))
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
        way = f"usual, {FORMATS[name].tool}" if name in FORMATS else _sweep(seeds[0])
        rows.append((way, name, *_cells([seed.usual[name] for seed in seeds], floats)))
    for lane in seeds[0].ours:
        revisions = ", ".join(dict.fromkeys(seed.revision for seed in seeds))
        rows.append((f"**ours**, {revisions}", lane, *_cells([seed.ours[lane] for seed in seeds], floats)))
    threads = ", ".join(dict.fromkeys(str(seed.threads) for seed in seeds))
    return markdown_table(header, rows) + f"\nThreads of each process: {threads}.\n"


def _sweep(first: Seed) -> str:
    others = [f"{rate:g}" for rate in first.swept if rate != first.rate]
    return f"usual, rate {first.rate:g}" + (f" (not {', '.join(others)})" if others else "")


def _cells(found: Sequence[Shipped], floats: Sequence[Shipped]) -> Iterator[str]:
    yield f"{average(_trained(found, floats)):.4f}"
    losses = [one.loss for one in found]
    bounds = interval(losses)
    yield f"{average(losses):.4f}" + (f" [{bounds[0]:.4f}, {bounds[1]:.4f}]" if bounds else "")
    yield _tax(found, floats)
    yield "-" if found[0].graph is None else f"{average(one.graph or 0 for one in found):.4f}"
    yield f"{average(one.verbatim for one in found):.1%}"
    yield f"{average(one.likeliest for one in found):.1%}"
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
