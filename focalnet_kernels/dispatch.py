"""Which backend runs an op, and why not the others.

Every op lists its implementations in order of preference; what was measured on a device (see measured.py) goes before
it. An implementation says in one sentence why it cannot take a call, or None when it can. `select` takes the first that
can; a backend that the user named must be able to, or the call raises. Everything here is plain Python over a `Call`,
which knows shapes, dtypes and devices, and PyTorch's modes: torch.compile sees constants.
"""

from __future__ import annotations

import difflib
import os
import threading
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from . import measured
from ._calls import Call

ENVIRONMENT = "FOCALNET_KERNELS_BACKEND"
BACKENDS = ("auto", "reference", "cpu", "triton", "cuda")
_FROM_ENVIRONMENT = f"environment variable {ENVIRONMENT}"


class BackendError(RuntimeError):
    """The backend that the user named cannot run this call."""


@dataclass(frozen=True)
class Implementation:
    """One backend's way to run an op.

    Args:
        backend: its name, one of `BACKENDS` without "auto".
        why_not: None, or the reason why it cannot take a call.
        forward: takes the op's arguments (see the op's `op.py`).
        backward: likewise; None where the op recomputes through its reference.
        why_slow: why "auto" leaves a call (in training or not) to others though it could take it, or None. On a GPU
            only where nothing was measured on it.
    """

    backend: str
    why_not: Callable[[Call], str | None]
    forward: Callable
    backward: Callable | None = None
    why_slow: Callable[[Call, bool], str | None] = lambda call, training: None


_implementations: dict[str, tuple[Implementation, ...]] = {}


def register(op: str, *implementations: Implementation) -> None:
    """Declare an op's implementations, the preferred one first."""
    _implementations[op] = implementations


def implementation(op: str, backend: str) -> Implementation:
    """The implementation of `op` by that backend."""
    return next(i for i in _implementations[op] if i.backend == backend)


def check_backend(name: str, source: str) -> str:
    if name not in BACKENDS:
        close = difflib.get_close_matches(str(name), BACKENDS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"{source}: unknown backend {name!r}, expected one of {', '.join(BACKENDS)}{hint}")
    return name


class use_backend:
    """Choose the backend: `use_backend("cpu")` from here on, or `with use_backend("cpu"):` for a block.

    A block holds in the thread that entered it. A thread without a block of its own, such as those in which autograd
    recomputes checkpoints on a GPU, follows the block that was entered last in the process and is still open, else
    what was chosen outside blocks. Blocks may be left in any order; each takes back its own choice alone. "From here
    on" ends with the block that it is said in.

    Args:
        name: "auto" (the fastest that can run), "reference", "cpu", "triton" or "cuda". A named backend that
            cannot run a call raises `BackendError` with the reason. The environment variable
            FOCALNET_KERNELS_BACKEND sets the initial choice (empty: "auto"; in any case of letters). A backward runs on
            its forward's backend; what activation checkpointing recomputes is a forward anew, so its backward belongs
            inside the block.

    Raises:
        ValueError: the name is none of these.
    """

    def __init__(self, name: str):
        self.name = check_backend(name, "use_backend(name)")
        self._entered: list[tuple[_Thread, _Scope]] = []
        thread = _here.thread
        with _changes():
            if thread.last is not None:
                thread.last.before = None  # no block follows it any more: it stays, and what was before it may go
            self._chosen_in = scope = thread.scope or _process
            self._choice = thread.last = scope.choice = _Choice(self.name, scope.choice)

    def __enter__(self) -> use_backend:
        global _latest
        thread = _here.thread
        with _changes():
            self._choice.is_block = True
            self._chosen_in.drop_blocks()
            thread.last = None
            thread.scope = scope = _Scope(self.name)
            thread.scopes.append(scope)
            self._entered.append((thread, scope))
            if not torch.compiler.is_compiling():  # a compiled function starts no threads within its block
                _open.append(scope)
                _latest = scope
        return self

    def __exit__(self, *exc_info) -> None:
        global _latest
        with _changes():
            here = [entry for entry in self._entered if entry[0] is _here.thread]
            entry = (here or self._entered)[-1]  # a generator's block may be left in another thread
            self._entered.remove(entry)
            thread, scope = entry
            thread.scopes.remove(scope)
            thread.scope = thread.scopes[-1] if thread.scopes else None
            if not torch.compiler.is_compiling():
                _open.remove(scope)
                _latest = _open[-1] if _open else None


class _Choice:
    """A name, and the choice before it: `use_backend(name)` does not know yet whether a `with` makes a block of it."""

    def __init__(self, name: str, before: _Choice | None = None):
        self.name, self.before, self.is_block = name, before, False


class _Scope:
    """Where a choice holds: an open block, or the process."""

    def __init__(self, name: str):
        self.choice = _Choice(name)

    def drop_blocks(self) -> None:
        while self.choice.is_block and self.choice.before is not None:
            self.choice = self.choice.before


class _Thread:
    """A thread's open blocks, the innermost last and once more in `scope`; `last`: its choice that may become one."""

    def __init__(self) -> None:
        self.scopes: list[_Scope] = []
        self.scope: _Scope | None = None
        self.last: _Choice | None = None


class _Here(threading.local):
    def __init__(self):
        self.thread = _Thread()


_here = _Here()
_process = _Scope(os.environ.get(ENVIRONMENT, "").lower() or "auto")
_open: list[_Scope] = []  # the blocks of all threads in the order in which they were entered
_latest: _Scope | None = None  # the last of them
_lock = threading.Lock()


def _changes():
    """Guards the choices while they change. What torch.compile traces is one thread's, and it knows no locks."""
    return nullcontext() if torch.compiler.is_compiling() else _lock


def requested_backend() -> str:
    """The backend in force in this thread: "auto" or a name."""
    scope = _here.thread.scope or _latest or _process
    return check_backend(scope.choice.name, _FROM_ENVIRONMENT)


def select(call: Call, training: bool, backend: str | None = None) -> Implementation:
    """The implementation that runs a call.

    Args:
        training: whether its backward will be asked for.
        backend: one for this call alone; None: the one in force.

    Raises:
        BackendError: the user named a backend that cannot.
        ValueError: `backend` is no backend's name.
    """
    name = requested_backend() if backend is None else check_backend(backend, "backend")
    plain = why_plain(exports=name == "auto")
    if plain is not None or torch.compiler.is_compiling():
        return _first(call, training, name, plain)
    chosen = call.chosen.get((name, training))
    if chosen is None:
        chosen = call.chosen[name, training] = _first(call, training, name, plain)
    return chosen


def _first(call: Call, training: bool, name: str, plain: str | None) -> Implementation:
    for candidate, reason in _candidates(call, training, name, plain)[0]:
        if name in ("auto", candidate.backend):
            if reason is None:
                return candidate
            if name != "auto":
                raise BackendError(f"{call.op}: backend {name!r} cannot run this call: {reason}")
    raise BackendError(f"{call.op}: backend {name!r} cannot run this call: it does not implement this op")


def _candidates(
    call: Call, training: bool, name: str, plain: str | None
) -> tuple[list[tuple[Implementation, str | None]], bool]:
    """All implementations in the order in which they are asked, each with the reason why it cannot run this call or,
    on "auto", is not to; and whether the order was measured on this device."""
    known, order = _implementations[call.op], None
    if name == "auto" and call.sizes_are_known():
        # those that are not slower than eager
        order = measured.backends(call.op, call.device, call.dtype, training, call.channels, call.kernels, call.shape)
    if order is None:
        found = list(known)
    else:
        fast = [i for backend in order for i in known if i.backend == backend]
        found = fast + [i for i in known if i not in fast]

    def why_not(candidate: Implementation) -> str | None:
        if candidate.backend != "reference" and plain is not None:
            return plain
        reason = candidate.why_not(call)
        if reason is None and name == "auto" and (order is None or call.device.type == "cpu"):
            return candidate.why_slow(call, training)
        return reason

    return [(candidate, why_not(candidate)) for candidate in found], order is not None


def why_plain(exports: bool) -> str | None:
    """Why this call needs plain PyTorch, whatever its tensors. A user who names a backend may export its raw ops."""
    if torch._C._are_functorch_transforms_active():  # what autograd.Function.apply itself asks
        return "torch.func transforms (grad, vmap, jvp and the like) are left to 'reference', which 'auto' takes there"
    if torch.autograd.forward_ad._current_level >= 0:  # raw ops would drop the tangents without a word
        return "forward-mode differentiation is left to 'reference', which 'auto' takes there"
    # the flag itself: in torch.compile of torch 2.10 is_exporting() always says yes
    if exports and (torch.compiler._is_exporting_flag or torch.jit.is_tracing()):
        return "what is exported or traced must run without this package"
    return None


@dataclass(frozen=True)
class Explanation:
    """What `explain` found: the backend that runs, and for each other one the reason why not."""

    op: str
    backend: str | None
    reasons: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{self.op}: runs on {self.backend!r}" if self.backend else f"{self.op}: cannot run"]
        return "\n".join(lines + [f"  not {name!r}: {reason}" for name, reason in self.reasons.items()])


def explain_call(call: Call, training: bool, backend: str | None = None) -> Explanation:
    """As `select`, with every reason, and without a BackendError."""
    name = requested_backend() if backend is None else check_backend(backend, "backend")
    candidates, was_measured = _candidates(call, training, name, why_plain(exports=name == "auto"))
    chosen, reasons = None, {}
    for candidate, reason in candidates:
        if reason is None and name not in ("auto", candidate.backend):
            reason = f"backend {name!r} was asked for"
        if reason is None and chosen is not None:
            faster = "eager" if chosen == "reference" else repr(chosen)
            reason = f"{faster} was measured faster on this device" if was_measured else f"{chosen!r} is preferred"
        if reason is None:
            chosen = candidate.backend
        else:
            reasons[candidate.backend] = reason
    for other in BACKENDS[1:]:
        if other != chosen:
            reasons.setdefault(other, "not implemented for this op")
    return Explanation(call.op, chosen, reasons)
