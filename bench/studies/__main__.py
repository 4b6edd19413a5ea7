"""`python -m edge_ft.bench.studies NAME [options]`: run one of the project's own studies."""

import sys

from cyclopts import App, CycloptsError

from edge_ft.errors import EdgeFTError, UsageError

app = App(
    name="python -m edge_ft.bench.studies",
    help="The project's own comparisons and generated pages.",
    result_action="return_value",
)
for name in ("claims", "demo", "encoders", "gpu", "models", "pretrain", "training"):
    app.command(f"edge_ft.bench.studies.{name}:main", name=name)


def main() -> None:
    """Run the study that the first argument names; exit with the codes of `edge_ft.errors`.

    Raises:
        SystemExit: a study failed, or the arguments cannot be used.
    """
    try:
        app(exit_on_error=False, print_error=False)
    except EdgeFTError as error:
        print(f"studies: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except CycloptsError as error:
        print(f"studies: {error}", file=sys.stderr)
        sys.exit(UsageError.exit_code)


if __name__ == "__main__":
    main()
