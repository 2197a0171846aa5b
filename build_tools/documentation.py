"""What mkdocs.yml asks of this project: the site has the repository's own layout, with docs/ and README at its top.

A text elsewhere in the repository (an op's README, a machine's report, CONTRIBUTING.md) is a page at its own path:
there are no copies, and every link between texts holds on the site as it does in the repository.
"""

from __future__ import annotations

import re
from pathlib import Path

from readme import repository

ROOT = Path(__file__).parents[1]
SHOWN = (
    "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "CITATION.cff", "focalnet_kernels/ops/*/README.md", "examples/*.py",
    "examples/*.ipynb",
    "benchmarks/results/**/*.md", "benchmarks/results/**/*.png", "benchmarks/results/**/*.csv",
    "benchmarks/results/**/*.txt",
)  # fmt: skip
LINK = re.compile(r'(?P<before>\]\(|src=")(?P<path>(?![a-z]+:|#|/)[^)\s"]+)')


def on_config(config):
    """The published address stands in pyproject.toml alone."""
    config.repo_url = repository((ROOT / "pyproject.toml").read_text())
    config.edit_uri = None
    return config


def on_files(files, config):
    from mkdocs.structure.files import File

    for pattern in SHOWN:
        for path in sorted(ROOT.glob(pattern)):
            name = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Links into docs/, or out of it, as if docs/ lay at the repository's top."""
    in_docs = Path(page.file.abs_src_path).is_relative_to(ROOT / "docs")

    def moved(match):
        path = match["path"].removeprefix("../") if in_docs else match["path"].replace("docs/", "", 1)
        return match["before"] + path

    return LINK.sub(moved, markdown)
