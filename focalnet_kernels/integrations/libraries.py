"""Patching a library before its models are built, so that they are created accelerated; and taking that back."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

from torch import nn

from .. import dispatch
from .._warnings import warn_once
from .patching import OURS, accelerate_block, accelerate_embedding, accelerate_layer, check_level, is_candidate


def patch_timm(
    backend: str | None = None, *, keep_modulator: bool = False, level: str = "block", keep_hidden: bool = False
) -> LibraryPatch:
    """Have timm build its FocalNets with accelerated layers, blocks and patch embeddings from here on, until the
    result's `undo()`.

    Names, shapes and initial values of parameters stay: a seed gives the weights that it gave before. What they do is
    that of `accelerate`, whose arguments these are. A layer or block that is left as it is says why, once.

    Args:
        backend, keep_modulator, level, keep_hidden: see `accelerate`. Of several patches in force the last one's hold.

    Returns:
        A `LibraryPatch`. Models that were built under it stay accelerated after it: see `restore`.

    Raises:
        ImportError: timm is not installed.
        ValueError: `backend` is no backend's name, or `level` none of `accelerate`'s.

    Examples:
        >>> with patch_timm():
        ...     model = timm.create_model("focalnet_tiny_lrf")
    """
    module = importlib.import_module("timm.models.focalnet")
    return LibraryPatch(module, "patch_timm", backend, keep_modulator, level, keep_hidden)


def patch_transformers(
    backend: str | None = None, *, keep_modulator: bool = False, level: str = "block", keep_hidden: bool = False
) -> LibraryPatch:
    """As `patch_timm`, for Hugging Face transformers and whatever it builds, `from_pretrained` too."""
    module = importlib.import_module("transformers.models.focalnet.modeling_focalnet")
    return LibraryPatch(module, "patch_transformers", backend, keep_modulator, level, keep_hidden)


def patch_official(
    module: ModuleType,
    backend: str | None = None,
    *,
    keep_modulator: bool = False,
    level: str = "block",
    keep_hidden: bool = False,
) -> LibraryPatch:
    """As `patch_timm`, for the authors' code or a copy of it.

    Args:
        module: the imported module with the classes of layer and block, such as `classification.focalnet`, or one that
            imports them by name. Layers are the classes whose constructor makes `focal_layers`, blocks those whose
            constructor makes `modulation`, patch embeddings among those whose constructor makes `proj` or `projection`;
            each instance is still recognised as by `accelerate`.
        backend, keep_modulator, level, keep_hidden: see `accelerate`.

    Raises:
        TypeError: `module` is no module.
        ValueError: there is no layer's class in it, `backend` is no backend's name, or `level` none of `accelerate`'s.
    """
    if not isinstance(module, ModuleType):
        raise TypeError(f"patch_official(module): expected an imported module, got {type(module).__name__}")
    return LibraryPatch(module, "patch_official", backend, keep_modulator, level, keep_hidden)


class LibraryPatch:
    """A patch in force: `undo()`, or the end of a `with` block, takes it back. A second `undo()` does nothing.

    Patches of one library may be nested and undone in any order; with the last one gone the classes are
    exactly as they were.
    """

    def __init__(
        self,
        module: ModuleType,
        function: str,
        backend: str | None,
        keep_modulator: bool,
        level: str,
        keep_hidden: bool,
    ):
        if backend is not None:
            dispatch.check_backend(backend, f"{function}(backend)")
        check_level(level, f"{function}(level)")
        self.backend = backend
        self.keep_modulator = keep_modulator
        self.level = level
        self.keep_hidden = keep_hidden
        self._verdicts: dict = {}
        layers = _classes_that_make("focal_layers", module)
        if not layers:
            raise ValueError(
                f"{function}(module): expected classes whose constructor makes `focal_layers`, "
                f"found none in {module.__name__}"
            )
        # of blocks and embeddings whatever the level: where patches are nested, the last one's level holds for them too
        others = [cls for name in ("modulation", "proj", "projection") for cls in _classes_that_make(name, module)]
        self._classes = list(dict.fromkeys([*layers, *others]))
        for cls in self._classes:
            if cls not in _patched:
                _patched[cls] = _patch_constructor(cls)
            _patched[cls].patches.append(self)

    def undo(self) -> None:
        """Let the library build its own layers again."""
        for cls in self._classes:
            constructor = _patched[cls]
            constructor.patches.remove(self)
            if not constructor.patches:
                del _patched[cls]
                # had others patched over ours, it would stay below theirs and do nothing
                if vars(cls)["__init__"] is constructor.ours:
                    cls.__init__ = constructor.original  # type: ignore[method-assign]
        self._classes = []

    def __enter__(self) -> LibraryPatch:
        return self

    def __exit__(self, *exc_info) -> None:
        self.undo()

    def accelerate(self, module: nn.Module) -> None:
        """Accelerate a layer, block or patch embedding that was just built; of the first two say once why not."""
        name = f"{type(module).__module__}.{type(module).__qualname__}"
        if is_candidate(module):
            _, verdict = accelerate_layer(module, self.backend, self.keep_modulator, self._verdicts)
            if verdict.why_not is not None:
                warn_once(f"{name} was built as it is: {verdict.why_not}")
        _, reason = accelerate_block(module, self.level, self.keep_modulator, self.keep_hidden, self._verdicts)
        if reason is not None and self.level == "block" and not self.keep_modulator:
            warn_once(f"{name} was built with its layer alone accelerated: {reason}")
        accelerate_embedding(module, self.backend, self.level, self._verdicts)


@dataclass
class _Constructor:
    original: Callable
    ours: Callable
    patches: list[LibraryPatch]


_patched: dict[type[nn.Module], _Constructor] = {}


def _patch_constructor(cls: type[nn.Module]) -> _Constructor:
    # the constructor and not the class: whoever imported the class by name has it too, and pickles stay readable
    original: Callable = cls.__init__
    patches: list[LibraryPatch] = []

    @functools.wraps(original)
    def __init__(self, *args, **kwargs):
        original(self, *args, **kwargs)
        # a subclass with a constructor of its own is not finished yet, and may change anything
        if patches and _constructors(type(self))[0] is cls:
            patches[-1].accelerate(self)

    cls.__init__ = __init__  # type: ignore[method-assign]
    return _Constructor(original, __init__, patches)


def _classes_that_make(member: str, module: ModuleType) -> list[type[nn.Module]]:
    """The classes whose constructors finish what `module` names and has this member, by the constructors' code."""
    found: dict[type[nn.Module], None] = {}
    for value in vars(module).values():
        if isinstance(value, type) and issubclass(value, nn.Module) and not issubclass(value, OURS):
            constructors = _constructors(value)
            if any(_names(vars(cls)["__init__"], member) for cls in constructors):
                found[constructors[0]] = None
    return list(found)


def _constructors(cls: type) -> list[type]:
    """The classes among its bases that have a constructor of their own, the outermost first."""
    return [base for base in cls.__mro__ if "__init__" in vars(base)]


def _names(constructor: Callable, member: str) -> bool:
    code = getattr(inspect.unwrap(constructor), "__code__", None)
    return code is not None and member in code.co_names
