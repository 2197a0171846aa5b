"""What compilers print, kept while they run; of a failure the first error, also for those who install in silence."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

FILE = "_not_built.json"  # beside the libraries, read by _libraries.py: why each that is missing is
_TOO_OLD = "; GCC 10, clang 14 or later is needed"
_ERROR = re.compile(r"\berror(?: C\d+)?:|(?:: |command )not found", re.I)


@contextlib.contextmanager
def captured(kept: list[str]) -> Iterator[None]:
    """All that this process and its children print meanwhile is added to `kept`, once it is over."""
    sys.stdout.flush()
    sys.stderr.flush()
    before = os.dup(1), os.dup(2)
    with tempfile.TemporaryFile() as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for stream, original in zip((1, 2), before, strict=True):
                os.dup2(original, stream)
                os.close(original)
            file.seek(0)
            kept.append(file.read().decode(errors="replace"))


def first_error(output: str, error: BaseException) -> str:
    """The compiler's first line about an error; without one, what was raised says."""
    line = next((line.strip() for line in output.splitlines() if _ERROR.search(line)), str(error).splitlines()[0])
    return line + _TOO_OLD if "-std=c++20" in line else line


def record(folder: Path, reasons: dict[str, str | None]) -> None:
    """Adds why halves are missing to the package in `folder`; None: it is there."""
    path = folder / FILE
    known = json.loads(path.read_text()) if path.exists() else {}
    known = {half: reason for half, reason in (known | reasons).items() if reason is not None}
    if known:
        path.write_text(json.dumps(known, indent=2) + "\n")
    else:
        path.unlink(missing_ok=True)
