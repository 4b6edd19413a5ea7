"""Cases of settings: YAML files for --config, and command lines, with odd names and values."""

import dataclasses
import types
import typing
from pathlib import Path
from random import Random
from typing import Any, Literal

import yaml

from edge_ft.config import (
    BenchConfig,
    EvalConfig,
    ExportConfig,
    PlanConfig,
    RunConfig,
    TuneConfig,
    VerifyConfig,
)
from fuzz.child import Box, Case
from fuzz.mutations import mutate_bytes, mutate_json, odd_text, odd_value

__all__ = ["command_line_case", "config_case"]

SETTINGS: dict[str, Any] = {
    "tune": TuneConfig,
    "plan": PlanConfig,
    "export": ExportConfig,
    "run": RunConfig,
    "eval": EvalConfig,
    "verify": VerifyConfig,
    "bench": BenchConfig,
}
NEEDED: dict[str, dict[str, Any]] = {
    "tune": {
        "model": "llama",
        "data": "sums.jsonl",
        "out": "out",
        "compute": "fp32",
        "max_steps": 1,
        "calibration_rows": 0,
    },
    "plan": {"model": "llama", "data": "sums.jsonl", "compute": "fp32", "calibration_rows": 0},
    "export": {"out": "out"},
    "run": {"max_new_tokens": 2},
    "eval": {"data": "sums.jsonl", "generate": False, "limit": 2},
    "verify": {},
    "bench": {"repeats": 1},
}
"""Settings with which each command does a little."""
TAGS = (
    "!!python/object/apply:os.system ['touch escaped']",
    "!!python/object/new:subprocess.Popen [['touch', 'escaped']]",
    "!!python/name:os.system",
    "!!python/tuple [1, 2]",
    "!!binary aGVsbG8=",
    "!!set {a, b}",
    "2001-01-01",
    "!!timestamp 2001-12-14t21:59:43.10-05:00",
    "0o17",
    "1_000",
    "1:30:00",
    "yes",
    "~",
    "&a [*a]",
    "*nowhere",
    "{<<: 7}",
    "|\n  text\n  text",
    "\t",
    "? a\n: b",
    "-",
)
BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{new}: &{new} [{','.join(['*' + old] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
"""Nine levels of nine aliases each: 387 million texts where they are copied."""


def _choices(settings: Any) -> dict[str, list[Any]]:
    """For every option the values that its type suggests."""
    hints = typing.get_type_hints(settings)
    found: dict[str, list[Any]] = {}
    for field in dataclasses.fields(settings):
        hint = hints[field.name]
        kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        values: list[Any] = []
        for kind in kinds:
            if typing.get_origin(kind) is Literal:
                values += typing.get_args(kind)
            elif kind is bool:
                values += [True, False]
            elif kind is int:
                values += [0, 1, 2, 7, -1, 2**31, 2**63, 10**30]
            elif kind is float:
                values += [0.0, 0.5, 1.0, -1.0, 1e-30, 1e308, float("nan"), float("inf")]
            elif kind is str:
                values += ["auto", "none", "{prompt}", "{", "{nowhere}", "sums.jsonl", "llama"]
            elif kind is Path:
                values += ["out", "out/a/b", "sums.jsonl", "llama", ".", "/", ""]
            elif typing.get_origin(kind) is tuple:
                values += [[], ["a", "b"], [0.5, 0.5, 0.0], [1, 2, 3]]
        found[field.name] = values
    return found


def _base(random: Random, box: Box) -> tuple[str, list[str], dict[str, Any]]:
    """A command, its positional arguments and its settings; the costly commands are rarer."""
    command = random.choice(["run"] * 5 + ["eval"] * 3 + ["verify"] * 2 + ["tune"] * 3 + ["plan"] + ["bench", "export"])
    box.copy("sums.jsonl")
    source: list[str] = []
    if command in ("run", "eval", "verify"):
        source = [box.copy(random.choice(["bundle", "bundle", "classifier", "t5-bundle"])).name]
        source += ["hello"] if command == "run" else []
    elif command in ("tune", "plan"):
        box.copy("llama")
    elif command == "bench":
        source = ["nowhere"]  # what is measured runs in processes of its own
    else:
        source = [box.copy("llama").name]
    if command == "tune" and random.random() < 0.8:
        source = ["--print-config"]
    return command, source, dict(NEEDED[command])


def config_case(random: Random, box: Box) -> Case:
    """A YAML file for --config."""
    command, source, settings = _base(random, box)
    known = _choices(SETTINGS[command])
    kind = random.random()
    expect: Literal["any", "refused"] = "any"
    for name in random.sample(list(known), random.choice([1, 1, 2, 4])):
        settings[name] = random.choice(known[name]) if known[name] and random.random() < 0.7 else odd_value(random)
    text = _yaml(settings)
    if kind < 0.6:
        what = "values"
    elif kind < 0.75:
        what, text = "structure", _yaml(mutate_json(random, settings))
    elif kind < 0.88:
        what, text = "text", f"{text}{random.choice([*known, 'nowhere'])}: {random.choice(TAGS)}\n"
        if "!!python/" in text:
            expect = "refused"
    elif kind < 0.92:
        what, text, expect = "aliases", BOMB, "refused"
    else:
        what = "bytes"
    content = text.encode("utf-8", "surrogatepass")
    (box.work / "settings.yaml").write_bytes(mutate_bytes(random, content) if what == "bytes" else content)
    argv = [command, *source, "--config", "settings.yaml"]
    return Case("configs", argv, f"{command}: {what}", expect=expect)


def _yaml(settings: Any) -> str:
    return yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)


def command_line_case(random: Random, box: Box) -> Case:
    """A command line with options that are odd, missing, doubled or unknown."""
    command, source, settings = _base(random, box)
    known = _choices(SETTINGS[command])
    words: list[str] = []
    for name, value in settings.items():
        words += _words(name, value)
    for name in random.sample(list(known), random.choice([1, 1, 2, 3])):
        value = random.choice(known[name]) if known[name] and random.random() < 0.7 else odd_value(random)
        words += _words(name, value)
    argv = [command, *source, *words]
    for _ in range(random.choice([0, 0, 0, 1, 2])):
        at = random.randrange(len(argv))
        argv[at : at + random.choice([0, 1])] = random.choice(
            [
                [],
                ["--"],
                ["-x"],
                ["--json", "-"],
                ["--quiet"],
                ["--help"],
                [odd_text(random)],
                ["--preset", "thorough"],
                ["--nowhere=1"],
            ]
        )
    argv = [
        word.encode("utf-8", "surrogatepass").replace(b"\0", b"\xff").decode("utf-8", "surrogateescape")
        for word in argv
    ]
    return Case("command lines", argv, f"{command}: {ascii(' '.join(words))[:70]}", stdin=b"hello\n")


def _words(name: str, value: Any) -> list[str]:
    flag = f"--{name.replace('_', '-')}"
    if isinstance(value, bool):
        return [flag if value else f"--no-{flag[2:]}"]
    if isinstance(value, list | tuple):
        return [flag, *map(str, value)]
    return [flag] if value is None else [flag, str(value)]
