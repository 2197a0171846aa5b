"""Triton's interpreter, which spends more than half of its time on what these tests do not need."""

import contextlib
from dataclasses import replace
from unittest.mock import patch

from triton.runtime import interpreter


@contextlib.contextmanager
def hastened():
    """No sum of integers is looked at for overflow: in maps this small none comes near. And a launch exchanges Triton's
    language for NumPy once per module, not in every call of a device function."""
    builder = interpreter.interpreter_builder
    options = patch.object(builder, "options", replace(builder.options, sanitize_overflow=False))
    exchange = patch.object(interpreter, "_patch_lang", _once_per_launch(interpreter._patch_lang))
    with options, exchange:
        yield


def _once_per_launch(exchange):
    modules = set()

    def once(function):
        if function.__module__ in modules:
            return None
        scope = exchange(function)
        if not modules:  # the kernel itself, whose launch ends with this
            restore = scope.restore
            scope.restore = lambda: (modules.clear(), restore())
        modules.add(function.__module__)
        return scope

    return once
