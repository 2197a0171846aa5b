"""README as a package index shows it, where relative links lead nowhere."""

import importlib
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ADDRESS = "https://example.org/someone/focalnet_kernels"


@pytest.fixture
def readme(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "build_tools"))
    yield importlib.import_module("readme")
    sys.modules.pop("readme")


def test_links_become_absolute(readme):
    text = '[a](docs/a.md#b), ![c](c.png), <img src="d.png" width="9">, [e](https://example.org), [f](#here)'
    assert readme.absolute(text, ADDRESS) == (
        f"[a]({ADDRESS}/blob/main/docs/a.md#b), ![c]({ADDRESS}/raw/main/c.png), "
        f'<img src="{ADDRESS}/raw/main/d.png" width="9">, [e](https://example.org), [f](#here)'
    )
    assert readme.absolute(text, None) == text


def test_the_address_is_pyproject_s(readme):
    pyproject = (ROOT / "pyproject.toml").read_text()
    named = re.sub(r"^(# )?Source = .*", f'Source = "{ADDRESS}/"', pyproject, flags=re.M)
    assert readme.repository(named) == ADDRESS
    assert readme.repository(pyproject.replace("\nSource", "\n# Source")) is None


def test_readme_has_no_other_links(readme):
    """Every link of README is one that `absolute` knows, and leads to a file of the repository."""
    text = (ROOT / "README.md").read_text()
    found = re.findall(re.escape(ADDRESS) + r"/(?:blob|raw)/main/([^)\"#]+)", readme.absolute(text, ADDRESS))
    assert len(found) >= 10
    assert [path for path in found if not (ROOT / path).exists()] == []
    assert len(re.findall(r"\]\((?!https:|#)|<img ", text)) == len(found)
