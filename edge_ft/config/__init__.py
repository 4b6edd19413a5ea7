"""The settings of each command: a frozen dataclass per command, each in a file of its name.

The same classes define the command-line flags, the keys of `--config FILE.yaml` and the arguments of the
Python API; a field's docstring is its text in `--help`.
"""

from edge_ft.config.bench import BenchConfig
from edge_ft.config.evaluate import EvalConfig
from edge_ft.config.export import ExportConfig, VerifyConfig
from edge_ft.config.plain import from_plain, misfit
from edge_ft.config.run import RunConfig
from edge_ft.config.shared import (
    INT8_ACTIVATIONS,
    TEXT_TASKS,
    TOKEN_TASKS,
    BaseFormat,
    Group,
    Memory,
    Minimum,
    Pooling,
    ProblemType,
    RowsConfig,
    Task,
    Weights,
    as_plain,
    unescape,
)
from edge_ft.config.tune import PlanConfig, TuneConfig, last_layers, preset_file, without_retired

__all__ = [
    "INT8_ACTIVATIONS",
    "TEXT_TASKS",
    "TOKEN_TASKS",
    "BaseFormat",
    "BenchConfig",
    "EvalConfig",
    "ExportConfig",
    "Group",
    "Memory",
    "Minimum",
    "PlanConfig",
    "Pooling",
    "ProblemType",
    "RowsConfig",
    "RunConfig",
    "Task",
    "TuneConfig",
    "VerifyConfig",
    "Weights",
    "as_plain",
    "from_plain",
    "last_layers",
    "misfit",
    "preset_file",
    "unescape",
    "without_retired",
]
