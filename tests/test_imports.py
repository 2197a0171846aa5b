"""Who imports whom: no circles, and the way down is the one that CONTRIBUTING.md shows."""

import ast
import re
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "focalnet_kernels"
NAME = PACKAGE.name


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {module_name(path): path for path in PACKAGE.rglob("*.py")}


def imported(name, path):
    """The modules of the package that one imports, also within functions."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in SOURCES)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                full = f"{base}.{alias.name}"
                if full in SOURCES or base in SOURCES:
                    yield full if full in SOURCES else base


def graph():
    """{module: modules that it imports}. A package is run before its modules, but needs none of what they import."""
    return {name: set(imported(name, path)) - {name} for name, path in SOURCES.items()}


def room(name):
    """The folder or file of the package that a module is in."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else NAME


def rooms():
    found = {}
    for name, others in graph().items():
        found.setdefault(room(name), set()).update(room(other) for other in others)
    return {name: others - {name} for name, others in found.items()}


def longest(graph):
    """The longest chain of imports, and the first of several in alphabetical order."""
    chains = {}
    for name in TopologicalSorter(graph).static_order():
        below = [chains[other] for other in graph.get(name, ())]
        chains[name] = [name, *min(below, key=lambda chain: (-len(chain), chain), default=[])]
    return min(chains.values(), key=lambda chain: (-len(chain), chain))


def test_modules_import_in_no_circle():
    try:
        TopologicalSorter(graph()).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1][::-1]))


def test_rooms_import_in_no_circle():
    try:
        TopologicalSorter(rooms()).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1][::-1]))


def test_the_map_of_contributing():
    """Every import goes down it, everything stands in it, and its longest chain is the code's."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    lines = re.search(r"<!-- rooms -->\n```\n(.*?)```", text, re.S)[1].splitlines()
    level = {name: i for i, line in enumerate(lines) for name in re.match(r"(.*?)(  |$)", line)[1].split(", ")}
    found = rooms()
    assert set(level) == set(found)
    up = [(name, other) for name, others in found.items() for other in others if level[name] >= level[other]]
    assert not up, "imports that do not go down"
    assert f"The longest chain: {' -> '.join(longest(found))}." in " ".join(text.split())


@pytest.mark.parametrize("leaf", ["_warnings", "_calls", "_version"])
def test_leaves(leaf):
    assert not rooms()[leaf]


def test_nothing_but_the_command_line_imports_the_benchmarks():
    assert [name for name, others in rooms().items() if "bench" in others] == ["cli"]
    assert [name for name, others in rooms().items() if "cli" in others] == ["__main__"]


# each in a fork of a process that has torch: a package whose own imports have not been run, then one module of it
ALONE = """
import importlib, os, sys, types
import torch
folder, *names = sys.argv[1:]
for name in names:
    child = os.fork()
    if child == 0:
        package = types.ModuleType("focalnet_kernels")
        package.__path__ = [folder]
        sys.modules["focalnet_kernels"] = package
        try:
            importlib.import_module(name)
        except BaseException as error:
            print(f"{name}: {type(error).__name__}: {error}", flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""


def test_any_room_may_be_imported_first():
    names = sorted(f"{NAME}.{name}" for name in set(rooms()) - {NAME, "__main__"})
    done = subprocess.run([sys.executable, "-c", ALONE, PACKAGE, *names], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr
