"""`python -m edge_ft`, and the command `edge-ft`: the command line, with signals handled from the first import on."""

import signal
import sys

from edge_ft.stopping import SIGNALS, end_process, watched

__all__ = ["main"]


def main() -> None:
    """Run the command line, and exit with one of its codes."""
    try:
        with watched(end_process):
            from edge_ft.cli import main as command_line

            command_line()
    except KeyboardInterrupt:  # while the command line itself was imported
        print("edge-ft: stopped; nothing was written: the same command starts again", file=sys.stderr)
        sys.exit(130)
    finally:
        for number in SIGNALS:  # all is done: the end of the interpreter is not to be interrupted
            signal.signal(number, signal.SIG_IGN)


if __name__ == "__main__":
    main()
