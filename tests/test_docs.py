"""README and docs/: what they show runs, and what they name is there."""

import re
import shlex
from pathlib import Path

import pytest
import torch

import focalnet_kernels as fk
from focalnet_kernels.cli import main

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md")), ROOT / "CONTRIBUTING.md"]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.S | re.M)
WITH_CODE = [page for page in PAGES if BLOCK.search(page.read_text())]
ids = {"ids": lambda page: page.name}


def given() -> dict:
    """What README's formula reads: the parts of a layer of ours."""
    layer = fk.FocalModulation(8, focal_window=3, focal_level=2)
    return {
        "f": layer.f, "h": layer.h, "proj": layer.proj, "depthwise_convs": [level[0] for level in layer.focal_layers],
        "gelu": torch.nn.functional.gelu, "L": 2, "C": 8, "x": torch.randn(2, 5, 6, 8), "layer": layer,
    }  # fmt: skip


@pytest.mark.parametrize("page", WITH_CODE, **ids)
def test_code_runs(page, capsys):
    """A page's blocks one after the other, in one namespace."""
    if "timm" in page.read_text():
        timm = pytest.importorskip("timm")
    names: dict = given() | {"timm": timm} if page == README else {}
    for code in BLOCK.findall(page.read_text()):
        exec(compile(code, page.name, "exec"), names)
    if page == README:
        torch.testing.assert_close(names["y"], names["layer"](names["x"]))
        assert "0 kept" in capsys.readouterr().out


def test_some_pages_show_code():
    assert {"README.md", "quickstart.md", "training.md", "inference.md", "detection.md"} <= {p.name for p in WITH_CODE}


COMMAND = re.compile(r"python -m focalnet_kernels ((?:[^`\n\\]|\\\n)+)")


@pytest.mark.parametrize("page", PAGES, **ids)
def test_commands_exist(page):
    text = page.read_text()
    for line in COMMAND.findall(text):
        name, *arguments = shlex.split(line.replace("\\\n", " "), comments=True)
        options = {
            option
            for parameter in main.commands[name].params
            for option in (*parameter.opts, *parameter.secondary_opts)
        }
        assert {argument for argument in arguments if argument.startswith("--")} <= options, line
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"`make ([\w-]+)", text)) | set(re.findall(r"^make ([\w-]+)", text, re.M)) <= targets


@pytest.mark.parametrize("page", PAGES, **ids)
def test_files_and_names_exist(page):
    """Links to files, and `fk.names`. (`make docs` looks at anchors too.)"""
    text = page.read_text()
    links = re.findall(r'(?:\]\(|src=")(?![a-z]+:|#)([^)#"]+)', text)
    assert [link for link in links if not (page.parent / link).exists()] == []
    assert [name for name in re.findall(r"\bfk\.(\w+)", text) if not hasattr(fk, name)] == []


def test_the_reference_has_every_name():
    shown = set(re.findall(r"^::: (\S+)", (ROOT / "docs/api.md").read_text(), re.M))
    missing = {name for name in fk.__all__ if not name.startswith("__")} - {name.rpartition(".")[2] for name in shown}
    assert missing == set()


def test_readme_is_short():
    assert len(README.read_text().splitlines()) < 130
