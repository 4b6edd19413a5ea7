"""Keeps the unit tier fast: its tests train nothing, export nothing and start no process."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

TRAINED = re.compile(r"(llama|bert|smollm2|minilm)(_adapter)?_(run|bundle)|whole")
"""Shared fixtures that train or export a model."""
CALLS = re.compile(r"tune|export|trace\w*")
"""Functions of edge_ft.tune and edge_ft.export that do the same."""
STARTS = {"subprocess.Popen", "os.fork", "os.posix_spawn", "os.exec", "os.system"}
"""Audit events of Python when a process is started."""

_started: list[str] | None = None  # None outside of a unit test


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if _started is not None and event in STARTS:
        _started.append(f"{event}{arguments[:2]}")


sys.addaudithook(_watch)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Refuse a test of this folder that uses what trains or exports."""
    for item in items:
        if isinstance(item, pytest.Function) and Path(__file__).parent in item.path.parents:
            names = [name for name in item.fixturenames if TRAINED.fullmatch(name)]
            names += [
                name
                for name, value in vars(item.module).items()
                if CALLS.fullmatch(name)
                and str(getattr(value, "__module__", "")).startswith(("edge_ft.tune", "edge_ft.export"))
            ]
            if names:
                raise pytest.UsageError(
                    f"{item.nodeid} uses {', '.join(names)}: tests that train or export stand in tests/integration"
                )


@pytest.fixture(autouse=True)
def _no_process() -> Iterator[None]:
    global _started
    _started = []
    yield
    started, _started = _started, None
    assert not started, f"tests that start a process stand in tests/integration or tests/e2e: {started}"
