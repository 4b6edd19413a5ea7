"""`python -m fuzz`: run, replay, or prove by planted faults."""

import os

# Before torch and tokenizers are imported: a forked process has no threads but its own.
os.environ |= {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
}

import argparse
import sys
from pathlib import Path

sys.dont_write_bytecode = True  # a case must write nothing

from fuzz.kinds import KINDS  # noqa: E402
from fuzz.session import fuzz, import_everything, made_seeds, replay  # noqa: E402


def main() -> int:
    """Parse the arguments and run; returns the exit code: 1 if a case failed."""
    parser = argparse.ArgumentParser(prog="fuzz", description="Fuzz edge-ft's commands.")
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", default=",".join(KINDS), help="comma-separated")
    parser.add_argument("--out", type=Path, default=Path("out/fuzz"))
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--seeds", type=Path, help="folder for the seeds, made where it is missing; default: a temporary one"
    )
    parser.add_argument("--replay", type=Path, help="folder of a kept case")
    parser.add_argument(
        "--planted", action="store_true", help="plant faults one at a time and require that each is found"
    )
    options = parser.parse_args()
    import_everything()
    if options.replay is not None:
        return replay(options.replay)
    with made_seeds(options.seeds) as seeds:
        if options.planted:
            from fuzz.planted import find_planted

            return find_planted(options.seed, seeds, options.out, options.workers)
        report = fuzz(
            options.cases, options.seed, options.kinds.split(","), seeds, options.out.absolute(), options.workers
        )
    width = max(map(len, report["kinds"]))
    for kind, found in report["kinds"].items():
        print(f"{kind:{width}}  " + ", ".join(f"{name}: {count}" for name, count in found.items()))
    print(
        f"{report['cases']} cases in {report['seconds']:.0f} s ({report['cpu_seconds']:.0f} CPU-seconds), "
        f"seed {report['seed']}: {report['failed']} failed; {options.out}/report.json"
    )
    return 1 if report["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
