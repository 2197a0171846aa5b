"""The tables of docs/supported.md and docs/tested.md name tests that exist, and forms that these run over."""

import ast
import importlib
import re
from functools import cache
from pathlib import Path

import pytest
from integrations.foreign_layers import BUILD

TESTS = Path(__file__).parent
ROOT = TESTS.parent
NAMED = re.compile(r"`((?:\w+/)*test_\w+\.py)::(test_\w+)`")
TESTED = (ROOT / "docs/tested.md").read_text()
SUPPORTED = (ROOT / "docs/supported.md").read_text()


@cache
def functions(path):
    return {node.name for node in ast.parse((TESTS / path).read_text()).body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("text", [TESTED, SUPPORTED], ids=["tested.md", "supported.md"])
def test_named_tests_exist(text):
    named = NAMED.findall(text)
    assert len(named) >= 8
    assert not [f"{path}::{name}" for path, name in named if name not in functions(path)]


def test_every_promise_names_a_test():
    rows = [line for line in TESTED.splitlines() if line.startswith("| ") and not line.startswith("| promise")]
    assert len(rows) > 30 and all(NAMED.search(row) for row in rows)


def forms_of(path, name):
    """What a test is parametrised over as its `form`."""
    module = importlib.import_module(path.removesuffix(".py").replace("/", "."))
    for mark in getattr(module, name).pytestmark:
        if mark.name == "parametrize":
            names = mark.args[0].replace(" ", "").split(",") if isinstance(mark.args[0], str) else list(mark.args[0])
            if "form" in names:
                values = [getattr(value, "values", value) for value in mark.args[1]]
                return {value if isinstance(value, str) else value[names.index("form")] for value in values}
    return set()


def test_forms_are_those_of_the_tests():
    """A cell is marked where the row's test runs over the column's form, and nowhere else."""
    table = SUPPORTED[SUPPORTED.index("<!-- forms -->") : SUPPORTED.index("<!-- end of forms -->")]
    header, _, *rows = [line for line in table.splitlines() if line.startswith("|")]
    assert re.findall(r"`(\w+)`", header) == list(BUILD)
    assert len(rows) >= 8
    for row in rows:
        ((path, name),) = NAMED.findall(row)
        marked = [cell.strip() == "x" for cell in row.split("|")[2:-1]]
        assert {form for form, mark in zip(BUILD, marked, strict=True) if mark} == forms_of(path, name), name
