"""What ships compared with what ships: from the same rows to a 4-bit file, the usual way and ours, with one scorer.

`python -m edge_ft.bench.studies shipping` takes hours. Every training, export and scoring is kept when it ends, and the
same command goes on; docs/studies.md describes the method.
"""

import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree
from typing import Annotated, Any

from cyclopts import Parameter

import edge_ft
from edge_ft.artifacts import RunFolder
from edge_ft.bench.studies.datasets import Rows, decoder_weights, finance_rows, sum_rows, summary_rows, write_splits
from edge_ft.bench.studies.kept_jobs import KeptJobs, chosen_cases
from edge_ft.bench.studies.off_grid import off_grid_model
from edge_ft.bench.studies.shipping_page import write_page
from edge_ft.bench.studies.shipping_records import Seed, Shipped, keep_seed, kept_cases
from edge_ft.bench.studies.usual_formats import FORMATS
from edge_ft.bench.studies.whole_command import tune_command
from edge_ft.progress import Lines, Progress, Silent
from edge_ft.system import default_threads

__all__ = ["CASES", "Case", "Trainings", "main", "revision"]

TRAIN, VALIDATION, TEST = 240, 80, 200
"""Rows of each case."""
EPOCHS, BATCH_SIZE = 2.0, 8
"""Of both: what `edge-ft tune` takes, and the usual way with it."""
ARTICLE_WORDS = 150
"""Of an article's beginning: a whole one takes 500 tokens."""


@dataclass(frozen=True)
class Case:
    """Rows, and how they are read."""

    rows: Callable[[], Rows]
    prompt: str
    completion: str
    passes: int = 1
    """Passes in which the usual way takes the rows of a step: in fewer they do not fit into 24 GiB."""


def _news_rows() -> Rows:
    return [row | {"document": " ".join(row["document"].split()[:ARTICLE_WORDS])} for row in summary_rows()]


SETS: dict[str, Case] = {
    "asdiv": Case(sum_rows, "Problem: {passage}\nQuestion: {question}\nAnswer:", " {answer}"),
    "fiqa": Case(finance_rows, "Question: {question}\nAnswer:", " {answer}", passes=2),
    "xsum": Case(_news_rows, "{document}\n\nSummary:", " {summary}"),
}
CASES = tuple(f"{name}-{base}" for base in ("on-grid", "off-grid") for name in SETS)
"""A set of rows and a base: SmolLM2 as its package holds it, on a 4-bit grid already, or the control."""


class _Trainer:
    """Does the jobs of one case."""

    def __init__(self, name: str, out: Path, threads: int, ours: str, progress: Progress) -> None:
        self.name, self.out, self.threads, self.ours_revision, self.progress = name, out, threads, ours, progress
        rows, _, base = name.partition("-")
        self.case = case = SETS[rows]
        model = str(decoder_weights() if base == "on-grid" else off_grid_model(progress))
        given = out / "given"
        if not (given / "train.jsonl").is_file():
            write_splits(case.rows(), given, train=TRAIN, validation=VALIDATION, test=TEST)
        self.tune = {
            "model": model,
            **{split: str(given / f"{split}.jsonl") for split in ("validation", "test")},
            "data": str(given / "train.jsonl"),
            "prompt": case.prompt,
            "completion": case.completion,
            "split": [1.0, 0.0, 0.0],
        }
        self.jobs = KeptJobs(out, {"tune": self.tune, "epochs": EPOCHS, "threads": threads}, threads)

    def once(self, name: str, job: dict[str, Any]) -> dict[str, Any]:
        """Do a job unless its result is kept."""
        if not self.jobs.file(name).is_file():
            self.progress.say(f"{self.name}: {name}")
        return self.jobs.once(name, {"tune": self.tune, "threads": self.threads, **job})

    def trained(self, seed: int, rate: float) -> dict[str, Any]:
        """Train the usual way."""
        name = f"usual-s{seed}-lr{rate:g}"
        folder = str(self.out.resolve() / "adapters" / name)
        recipe = {"epochs": EPOCHS, "learning_rate": rate, "batch_size": BATCH_SIZE, "passes": self.case.passes}
        job = {"do": "train_usual", "seed": seed, "out": folder, **recipe}
        return self.once(name, job) | {"adapter": folder, "name": name}

    def usual(self, trained: dict[str, Any]) -> dict[str, Shipped]:
        """Ship it in every usual format; `float` is what was trained."""
        found: dict[str, Shipped] = {}
        whole = {name: trained[name] for name in ("seconds", "cpu_seconds", "peak_rss_bytes")}
        for at, name in enumerate(("float", *FORMATS)):
            job = {"do": "score_usual", "adapter": trained["adapter"], "format": name}
            scored = self.once(f"{trained['name']}-{at}-{name.replace(', ', '-').replace(' ', '-')}", job)
            found[name] = Shipped.of(scored, whole | {"seconds": whole["seconds"] + scored["seconds"]})
        return found

    def ours(self, seed: int) -> dict[str, Shipped]:
        """Tune and export with the defaults, both lanes."""
        name = f"ours-{self.ours_revision}-s{seed}"
        folder = self.out.resolve() / "runs" / name
        if not self.jobs.file(f"{name}-tune").is_file():
            self.progress.say(f"{self.name}: {name}-tune")
            rmtree(folder, ignore_errors=True)  # of a training that did not end
            ran = tune_command(self.tune | {"seed": seed}, folder, self.threads)
            watched = {"seconds": ran.seconds, "cpu_seconds": ran.cpu_seconds}
            self.jobs.keep(f"{name}-tune", watched | _of_report(folder))
        tuned = self.jobs.once(f"{name}-tune", {})
        found: dict[str, Shipped] = {}
        for lane in ("merged", "adapter"):
            bundle = self.out.resolve() / "bundles" / f"{name}-{lane}"
            if not self.jobs.file(f"{name}-{lane}").is_file():
                rmtree(bundle, ignore_errors=True)
            exported = self.once(
                f"{name}-{lane}", {"do": "export_ours", "run": str(folder), "out": str(bundle), "lane": lane}
            )
            job = {"do": "score_ours", "run": str(folder), "bundle": exported["bundle"], "lane": lane}
            scored = self.once(f"{name}-{lane}-scores", job)
            whole = {key: tuned[key] + exported[key] for key in ("seconds", "cpu_seconds")}
            whole["peak_rss_bytes"] = max(tuned["peak_rss_bytes"], exported["peak_rss_bytes"])
            found[lane] = Shipped.of(scored, whole, tuned["test_nll"], exported["refused"])
        return found


def _of_report(run: Path) -> dict[str, Any]:
    report = RunFolder.open(run).report()
    return {"test_nll": report["nll"]["test"], "peak_rss_bytes": report["peak_rss_bytes"]}


def revision() -> str:
    """The last commit that changed what `tune` and `export` do; `changed` where the checkout has other changes."""
    root = Path(edge_ft.__file__).resolve().parent.parent

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False)
        return done.stdout.strip()

    found = git("log", "-1", "--format=%h", "--", "edge_ft", "export") or edge_ft.__version__
    return f"{found}-changed" if git("status", "--porcelain", "--", "edge_ft", "export") else found


@dataclass(frozen=True, kw_only=True)
class Trainings:
    """Which trainings are done."""

    cases: str = ",".join(CASES)
    """Which cases, with commas between: asdiv, fiqa or xsum, with -on-grid or -off-grid."""
    seeds: int = 3
    """Number of trainings of each way; 0: write the page of the records that are there."""
    rates: str = "5e-4,1e-3,2e-3"
    """Learning rates of the usual way, swept on seed 0 by the loss of the validation rows."""


def main(
    *,
    trainings: Annotated[Trainings, Parameter(name="*")] = Trainings(),
    out: Path = Path("out/shipping"),
    ours: str | None = None,
    threads: int | None = None,
    write: Path | None = None,
    quiet: bool = False,
) -> None:
    """Compare what ships: 4-bit files of the usual way and of edge-ft from the same rows, scored by one scorer.

    Args:
        trainings: Cases, seeds and learning rates.
        out: Folder of results; what has a result there is not done again.
        ours: Name of our results in `out`; default: the revision of this checkout.
        threads: CPU threads of every process; default: all CPUs that the process may use.
        write: Page to write, with plots and a folder of records beside it; default: shipping.md in `out`. It holds all
            cases and seeds that the records hold, those of other machines too.
        quiet: Do not report progress.

    Raises:
        UsageError: there is no such case.
    """
    progress: Progress = Silent() if quiet else Lines()
    chosen, rates = chosen_cases(trainings.cases, CASES), [float(rate) for rate in trainings.rates.split(",")]
    ours, page, threads = ours or revision(), write or out / "shipping.md", threads or default_threads()
    records = page.parent / "records" / page.stem
    for seed in range(trainings.seeds):
        for name in chosen:
            trainer = _Trainer(name, out / name, threads, ours, progress)
            swept = [trainer.trained(0, rate) for rate in rates]
            best = min(swept, key=lambda result: result["validation_nll"])["learning_rate"]
            trained = trainer.trained(seed, best)
            found = Seed(seed, rates, best, ours, threads, trainer.usual(trained), trainer.ours(seed))
            # After every case, so that a stopped study has a page of what it did.
            keep_seed(records, name, found)
            write_page(kept_cases(records, CASES), page)
    if trainings.seeds == 0:
        write_page(kept_cases(records, CASES), page)
