"""`python -m edge_ft.bench.studies NAME [options]`: run one of the project's own studies."""

import sys

from cyclopts import App, CycloptsError

from edge_ft.errors import EdgeFTError, UsageError

__all__ = ["app", "main"]

STUDIES = {
    "checkpoints": "Write docs/checkpoints.md from what the tests recorded.",
    "claims": "Train, export and score every case of docs/claims.md, and write that page.",
    "demo": "Tune, export, run and score a decoder and an encoder on real rows.",
    "demo_device": "A bundle learns where there is no torch.",
    "encoders": "Accuracy, size and speed of one encoder run in every format of its weights.",
    "gpu": "Training speed and memory on a GPU compared with PEFT + Trainer + bitsandbytes.",
    "models": "Write docs/models.md and the table of docs/bundle.md from what the tests recorded.",
    "off_grid": "Fine-tune SmolLM2 on other text, so that its weights lie on no 4-bit grid.",
    "pretrain": "Pretrain a small GPT-2 or T5 from scratch.",
    "races": "The training study on its standard cases: short and long rows, 240 and 2,000 of them.",
    "release": "Build and check the wheel and the sdist, and write what the release changes.",
    "rows": "Write the rows of the tutorials, and print the path of a model for them.",
    "shipping": "From the same rows to a 4-bit file, the usual way and ours, with one scorer.",
    "suite": "Measure the standard bundles beside their float bases, and write a page of each.",
    "training": "Compare the training speed of edge-ft and of PEFT + Trainer on a CPU.",
}
"""Module of each study, which is imported when it is called, and its line in --help."""

app = App(
    name="python -m edge_ft.bench.studies",
    help="The project's own comparisons and generated pages.",
    result_action="return_value",
    version_flags=(),
)
for name, line in STUDIES.items():
    app.command(f"edge_ft.bench.studies.{name}:main", name=name, help=line)


def main() -> None:
    """Run the study that the first argument names; exit with the codes of `edge_ft.errors`."""
    try:
        app(sys.argv[1:], exit_on_error=False, print_error=False)
    except EdgeFTError as error:
        print(f"studies: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except CycloptsError as error:
        print(f"studies: {error}", file=sys.stderr)
        sys.exit(UsageError.exit_code)


if __name__ == "__main__":
    main()
