"""The command line: flags, progress and exit codes; each command is one call of the Python API."""

from edge_ft.cli.failures import main

__all__ = ["main"]
