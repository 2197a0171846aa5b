"""README as a package index shows it: links and images with the repository's address, which it cannot know."""

from __future__ import annotations

import re

_SOURCE = re.compile(r'^Source = "(.+?)/?"$', re.M)
_LINK = re.compile(r"(!?)\[([^\]]*)\]\((?![a-z]+:|#)([^)]+)\)")
_IMAGE = re.compile(r'(<img [^>]*?src=")(?![a-z]+:)([^"]+)')


def repository(pyproject: str) -> str | None:
    """Where pyproject.toml says that the source is; None where it does not."""
    found = _SOURCE.search(pyproject)
    return found and found[1]


def absolute(text: str, repository: str | None) -> str:
    """`text` with its relative links made absolute."""
    if repository is None:
        return text

    def link(match):
        kind = "raw" if match[1] else "blob"
        return f"{match[1]}[{match[2]}]({repository}/{kind}/main/{match[3]})"

    return _IMAGE.sub(rf"\1{repository}/raw/main/\2", _LINK.sub(link, text))
