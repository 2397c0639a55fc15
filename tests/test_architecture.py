"""The house keeps its form: floors, names of files, imports at the top, one place that compiles."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted(path for part in ("flexjax", "pallas_kernels", "scripts") for path in (ROOT / part).rglob("*.py"))
CATCH_ALL = {"utils", "util", "common", "helpers", "misc", "base"}
MOST_LINES = 400


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.fixture(scope="module")
def trees() -> dict[str, ast.Module]:
    return {name_of(path): ast.parse(path.read_text()) for path in SOURCES}


def test_imports_point_down():
    """In a process of its own: the linter's logging set-up closes the streams of handlers that other packages made."""
    lint = "from importlinter import cli; raise SystemExit(cli.lint_imports(no_cache=True, no_logo=True))"
    run = subprocess.run([sys.executable, "-c", lint], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


def test_a_package_folder_is_a_package():
    """A folder without __init__.py is invisible to the import contracts."""
    folders = {path.parent for path in SOURCES if path.parts[len(ROOT.parts)] != "scripts"}
    assert [name_of(folder) for folder in sorted(folders) if not (folder / "__init__.py").exists()] == []


def test_no_catch_all_files():
    assert [name_of(path) for path in SOURCES if path.stem in CATCH_ALL] == []


def test_files_stay_short():
    lengths = {name_of(path): len(path.read_text().splitlines()) for path in SOURCES}
    assert {name: length for name, length in lengths.items() if length > MOST_LINES} == {}


def test_imports_stand_at_the_top(trees):
    inside = [
        f"{name}:{statement.lineno}"
        for name, tree in trees.items()
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for statement in ast.walk(function)
        if isinstance(statement, ast.Import | ast.ImportFrom)
    ]
    assert inside == []


def test_one_file_compiles(trees):
    """Besides, random weights are made once, straight on the device, and the benchmark of kernels compiles what it
    times."""
    uses = {
        name
        for name, tree in trees.items()
        if name.startswith("flexjax/")
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr == "jit"
    }
    assert uses <= {"flexjax/engine/blueprint.py", "flexjax/models/build.py", "flexjax/bench/timing.py"}
