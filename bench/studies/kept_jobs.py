"""Jobs of a race, each done once in a fresh process: a race that was stopped does only what is missing."""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from edge_ft.bench.meters import machine
from edge_ft.bench.subprocess_job import run_worker
from edge_ft.errors import UsageError, did_you_mean
from edge_ft.files import write_json

__all__ = ["KeptJobs", "chosen_cases"]


class KeptJobs:
    """A folder of results, one JSON file a job.

    Args:
        out: The folder.
        settings: What all jobs of the folder share. Together with the CPU it is kept in `settings.json`.
        threads: CPU threads of each process.

    Raises:
        UsageError: the folder holds results of other settings, of another CPU, or of a version that named them
            otherwise.
    """

    def __init__(self, out: Path, settings: dict[str, Any], threads: int) -> None:
        self.out, self.threads = out, threads
        if old := [file.name for file in sorted((out / "results").glob("*rival-*.json"))]:
            raise UsageError(
                f"{out} holds results of an earlier version ({old[0]}): rename rival-… to baseline-… in results/, or "
                "give another --out"
            )
        file = out / "settings.json"
        wanted = settings | {"cpu": machine()["cpu"]}
        if not file.is_file():
            write_json(file, wanted)
        before = json.loads(file.read_text(encoding="utf-8"))
        for name, value in json.loads(json.dumps(wanted)).items():
            if before.get(name) != value:
                raise UsageError(f"{out} holds results with {name} {before.get(name)}, not {value}: give another --out")

    def file(self, name: str) -> Path:
        """Where the result of a job is kept; it exists when the job was done."""
        return self.out / "results" / f"{name}.json"

    def once(self, name: str, job: dict[str, Any], more: dict[str, Any] | None = None) -> dict[str, Any]:
        """Do a job unless its result is kept.

        Args:
            name: Of the job, unique in the folder.
            job: What `edge_ft.bench.studies.race_worker` reads.
            more: Figures to keep with a new result.

        Returns:
            The result, new or kept.
        """
        if not self.file(name).is_file():
            self.keep(name, self.run(name, job) | (more or {}))
        return dict(json.loads(self.file(name).read_text(encoding="utf-8")))

    def keep(self, name: str, result: dict[str, Any]) -> None:
        """Keep the result of a job that was done elsewhere."""
        write_json(self.file(name), result)

    def run(self, name: str, job: dict[str, Any]) -> dict[str, Any]:
        """Do a job and keep nothing."""
        return run_worker(job, name, self.threads, module="edge_ft.bench.studies.race_worker")


def chosen_cases(cases: str, known: Collection[str]) -> list[str]:
    """Read the value of --cases.

    Returns:
        The names, which commas separate.

    Raises:
        UsageError: there is no such case.
    """
    chosen = cases.split(",")
    for name in chosen:
        if name not in known:
            raise UsageError(f"--cases {name}: there is no such case{did_you_mean(name, list(known))}")
    return chosen
