"""The wheel holds the packages on disk, all of them below `edge_ft`, and their imports stay light."""

import ast
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STUDIES = ROOT / "bench" / "studies"
"""The project's own comparisons, which no wheel holds."""
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_every_package_on_disk_is_packaged() -> None:
    on_disk = {
        ".".join(["edge_ft", *([] if top == "edge_ft" else [top]), *init.parent.relative_to(ROOT / top).parts])
        for top in ("edge_ft", "export", "bench")
        for init in (ROOT / top).rglob("__init__.py")
        if init.parent != STUDIES
    }
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == on_disk


def test_the_wheel_holds_every_module_under_one_name(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)],
        check=True,
    )
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"edge_ft"}
    modules = {name for name in names if name.endswith(".py")}
    for top, inside in (("edge_ft", "edge_ft"), ("export", "edge_ft/export"), ("bench", "edge_ft/bench")):
        for file in (ROOT / top).rglob("*.py"):
            assert (f"{inside}/{file.relative_to(ROOT / top).as_posix()}" in modules) == (STUDIES not in file.parents)
    assert {
        "edge_ft/py.typed",
        "edge_ft/page.html",
        "edge_ft/bench/records.schema.json",
        "edge_ft/bench/profiles/pi-class.yaml",
    } <= set(names)
    presets = {f"edge_ft/presets/{file.name}" for file in (ROOT / "edge_ft" / "presets").iterdir()}
    assert presets == {name for name in names if name.startswith("edge_ft/presets/")} != set()


def test_the_version_is_that_of_the_project() -> None:
    import edge_ft

    assert edge_ft.__version__ == PROJECT["project"]["version"]


@pytest.mark.parametrize("name", ["export", "bench"])
def test_top_level_folders_are_imported_below_edge_ft_only(name: str) -> None:
    assert import_module(f"edge_ft.{name}").__name__ == f"edge_ft.{name}"
    outside = f"import importlib.util, sys; sys.path = [p for p in sys.path if p not in ('', {str(ROOT)!r})]; "
    done = subprocess.run(
        [sys.executable, "-P", "-c", f"{outside}print(importlib.util.find_spec({name!r}))"],
        capture_output=True,
        text=True,
        cwd=ROOT.parent,
        check=True,
    )
    assert done.stdout.strip() == "None"


@pytest.mark.parametrize(
    "module",
    [
        *("edge_ft", "edge_ft.cli", "edge_ft.data", "edge_ft.runtime", "edge_ft.runtime.run", "edge_ft.evaluate"),
        *("edge_ft.bench", "edge_ft.export", "edge_ft.evaluate.verify", "edge_ft.tune", "edge_ft.quant.blockwise"),
    ],
)
def test_importing_a_package_brings_no_training_stack(module: str) -> None:
    """Even where torch is installed."""
    script = f"import sys, {module}; print([n for n in ('torch', 'transformers', 'peft', 'onnx') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("room", ["edge_ft.tune", "edge_ft.export", "edge_ft.runtime", "edge_ft.bench", "edge_ft.data"])
def test_exported_names_are_sorted_and_exist(room: str) -> None:
    module = import_module(room)
    constants_first = sorted(module.__all__, key=lambda name: (not name.isupper(), name))  # as ruff sorts
    assert list(module.__all__) == constants_first
    assert all(hasattr(module, name) for name in module.__all__)


def test_no_function_is_long_or_takes_many_parameters() -> None:
    """At most 70 lines and 7 parameters."""
    found = []
    for file in [file for top in ("edge_ft", "export", "bench") for file in (ROOT / top).rglob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                names = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > 70 or len([name for name in names if name not in ("self", "cls")]) > 7:
                    found.append(f"{file.relative_to(ROOT)}: {node.name}")
    assert found == []


@pytest.mark.parametrize("file", ["bench/__init__.py", "bench/report.py", "tune/loop.py"])
def test_a_product_module_that_imports_a_study_is_caught(tmp_path: Path, file: str) -> None:
    tree = tmp_path / "edge_ft"
    shutil.copytree(ROOT / "edge_ft", tree, ignore=shutil.ignore_patterns("__pycache__"))
    for room in ("export", "bench"):
        shutil.copytree(ROOT / room, tree / room, ignore=shutil.ignore_patterns("__pycache__"))
    with (tree / file).open("a", encoding="utf-8") as module:
        module.write("\nfrom edge_ft.bench.studies import datasets\n")
    command = [Path(sys.executable).with_name("lint-imports"), "--no-cache", "--config", ROOT / "pyproject.toml"]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"PYTHONPATH": "."}, check=False
    )
    assert done.returncode == 1
    importer = f"edge_ft.{file.removesuffix('.py').removesuffix('/__init__').replace('/', '.')}"
    assert f"{importer} -> edge_ft.bench.studies" in done.stdout
