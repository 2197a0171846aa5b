"""An op's launches, found out by its first call of a kind and replayed by later ones.

Plans, views and Triton's look at every argument take Python longer than a small layer takes a GPU, and all of it
follows from sizes, strides, types and alignments of what comes in. So the first call is watched: which kernels it
launched, which of its tensors every pointer points into, which tensors it made. A later call makes such tensors and
launches the same kernels. Only launches are replayed: an implementation that does more (a product by cuBLAS, a copy)
runs as it is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from . import launch as launching

_recipes: dict[tuple, Any] = {}  # by implementation and kind of call; None: it is not launches alone
_MOST_KEPT, _UNKNOWN = 4096, object()
_aten = torch.ops.aten
_ALLOCATIONS = {_aten.empty, _aten.empty_like, _aten.empty_strided, _aten.new_empty, _aten.new_empty_strided}


def replayed(implementation: Callable) -> Callable:
    """A raw op's implementation, which launches Triton's kernels and may do more."""
    if launching.LOOKS_ANEW:
        return implementation

    @functools.wraps(implementation)
    def run(*args):
        if launching.is_looked_at():
            return implementation(*args)
        tensors, kind = _told_apart(implementation, args)
        recipe = _recipes.get(kind, _UNKNOWN)
        if recipe is not _UNKNOWN:
            return implementation(*args) if recipe is None or recipe.is_hooked() else recipe(tensors)
        with _Watch(tensors) as watch:
            result = implementation(*args)
        if watch.is_sure:
            if len(_recipes) >= _MOST_KEPT:
                _recipes.clear()
            _recipes[kind] = watch.recipe(result)
        return result

    return run


def _told_apart(implementation: Callable, args: tuple) -> tuple[list[Tensor | None], tuple]:
    """The tensors of a call; and all that its launches follow from, but for their addresses."""
    tensors: list[Tensor | None] = []
    others = []
    for arg in args:
        if arg is None or isinstance(arg, Tensor):
            tensors.append(arg)
        elif isinstance(arg, (list, tuple)):
            tensors += arg
            others.append(len(arg))
        else:
            others.append(arg)
    kinds = [
        # (each one's device: an address does not say whose it is)
        None if t is None else (t.shape, t.stride(), t.dtype, t.device, t.data_ptr() % 16 == 0)
        for t in tensors
    ]
    return tensors, (implementation, *others, *kinds)


class _Pointer(NamedTuple):
    """So many bytes behind the beginning of a tensor: of those that come in, or else that are made."""

    tensor: int
    offset: int


class _Watch(TorchDispatchMode):
    """Sees what an implementation does with the tensors that come in.

    `is_sure`: whether it does the same with others of their kind. (Not where somebody's hook ran in a launch's place.)
    """

    def __init__(self, tensors: Sequence[Tensor | None]):
        super().__init__()
        incoming = [(i, t) for i, t in enumerate(tensors) if t is not None]
        self.device, self.incoming = incoming[0][1].device, len(tensors)
        self.made: list[Tensor] = []
        self.launches: list[tuple[Any, Callable, tuple]] = []
        self.only_launches = True
        self.places = {id(t): i for i, t in incoming}
        self.is_sure = len(self.places) == len(incoming)  # one that comes twice may be two another time
        # by the address of its memory: whose it is, and where that begins; None where several share it
        self.owners: dict[int, tuple[int, int] | None] = {}
        for i, t in incoming:
            self.owners[_memory(t)] = None if _memory(t) in self.owners else (i, t.data_ptr())

    def __enter__(self):
        launching.tell(self)
        return super().__enter__()

    def __exit__(self, *exception):
        launching.tell(None)
        return super().__exit__(*exception)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        tensors = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        if function.overloadpacket in _ALLOCATIONS:
            self.owners[_memory(result)] = self.incoming + len(self.made), result.data_ptr()
            self.made.append(result)
        elif function._schema.is_mutable or not tensors or any(_memory(t) not in self.owners for t in tensors):
            self.only_launches = False  # it writes, or makes numbers
        return result

    def launched(self, kernel: Any, args: tuple, built: launching.Built | None) -> None:
        if built is None:
            self.is_sure = False
        else:
            run, constants = built
            self.launches.append((kernel, run, (*args, *constants)))

    def recipe(self, result: Any) -> _Recipe | None:
        """None where launches are not all."""
        if not self.only_launches or not self.launches:
            return None
        try:
            launches = [(kernel, run, self._pointers_in(args)) for kernel, run, args in self.launches]
            outputs = tree_map_only(Tensor, self._made_by, result)
        except LookupError:
            return None
        kept = dict(zip(tree_leaves(outputs), tree_leaves(result), strict=True))
        if len(kept) != len(tree_leaves(outputs)):
            return None  # two of one memory
        # an output may have been made with other sizes: pointers do not mind, and views may not be changed in place
        made = [(t.shape, t.stride(), t.dtype) for t in (kept.get(i, t) for i, t in enumerate(self.made))]
        return _Recipe(self.device, self.incoming, made, launches, outputs)

    def _pointers_in(self, args: tuple) -> tuple:
        found = tree_map_only(Tensor, self._pointer, args)
        for leaf in tree_leaves(found):
            if isinstance(leaf, tuple) and any(isinstance(value, Tensor) for value in leaf):
                raise LookupError("tensors in what is no plain tuple")
        return found

    def _pointer(self, tensor: Tensor) -> _Pointer:
        i = self.places.get(id(tensor))
        if i is not None:
            return _Pointer(i, 0)
        owner = self.owners[_memory(tensor)]
        if owner is None:
            raise LookupError("which of several tensors it points into is not known")
        i, offset = owner[0], tensor.data_ptr() - owner[1]
        if i < self.incoming and offset % 16:
            raise LookupError("its alignment is not that of the tensor that it points into")
        return _Pointer(i, offset)

    def _made_by(self, tensor: Tensor) -> int:
        """Which of those that were made an output is, or has all memory of."""
        for i, made in enumerate(self.made):
            if tensor is made:
                return i
        owner = self.owners[_memory(tensor)]
        i = owner[0] - self.incoming if owner else -1
        if (
            i < 0
            or tensor.storage_offset()
            or (tensor.dtype, tensor.numel()) != (self.made[i].dtype, self.made[i].numel())
        ):
            raise LookupError("an output that was not made here")
        return i


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class _Step(NamedTuple):
    """A launch: tensors that are made before it, (size, strides, dtype) each; its arguments, of which `pointers` are or
    hold pointers; and those that were made and that nobody needs after it."""

    made: list[tuple]
    run: Callable
    args: tuple
    pointers: list[int]
    dropped: list[int]


class _Recipe:
    """`made`: by number, as pointers (beyond `incoming`) and `outputs` name them; here they are in order of use."""

    def __init__(
        self, device: torch.device, incoming: int, made: list[tuple],
        launches: list[tuple[Any, Callable, tuple]], outputs: Any,
    ):  # fmt: skip
        self.device = device
        self.kernels = list({id(kernel): kernel for kernel, *_ in launches}.values())
        used = [{p.tensor - incoming for p in _pointers_of(args) if p.tensor >= incoming} for _, _, args in launches]
        order = list(dict.fromkeys([i for of_launch in used for i in sorted(of_launch)] + tree_leaves(outputs)))
        place = {i: at for at, i in enumerate(order)}
        last = {i: step for step, of_launch in enumerate(used) for i in of_launch}
        kept, known = set(tree_leaves(outputs)), 0
        self.steps = []
        for step, ((_, run, args), of_launch) in enumerate(zip(launches, used, strict=True)):
            args = _renumbered(args, incoming, place)
            until = max([known, *[place[i] + 1 for i in of_launch]])
            dropped = [place[i] for i in of_launch if last[i] == step and i not in kept]
            pointers = [i for i, arg in enumerate(args) if _pointers_of(arg)]
            self.steps.append(_Step([made[i] for i in order[known:until]], run, args, pointers, dropped))
            known = until
        self.others = [made[i] for i in order[known:]]  # that no launch has: empty ones
        self.outputs = tree_map_only(int, place.__getitem__, outputs)

    def is_hooked(self) -> bool:
        """Whether somebody counts on every launch going by Triton's own way."""
        return any([kernel.pre_run_hooks for kernel in self.kernels])

    def __call__(self, tensors: Sequence[Tensor | None]) -> Any:
        addresses = [0 if t is None else t.data_ptr() for t in tensors]
        made: list[Tensor | None] = []

        def make(size, strides, dtype):
            made.append(torch.empty_strided(size, strides, dtype=dtype, device=self.device))
            addresses.append(made[-1].data_ptr())

        with launching.current(self.device):
            for step in self.steps:
                for geometry in step.made:
                    make(*geometry)
                args = list(step.args)
                for i in step.pointers:
                    args[i] = _addressed(args[i], addresses)
                step.run(*args)
                for i in step.dropped:
                    made[i] = None
        for geometry in self.others:
            make(*geometry)
        return _filled(self.outputs, made)


def _pointers_of(value: Any) -> list[_Pointer]:
    if isinstance(value, _Pointer):
        return [value]
    return [p for inner in value for p in _pointers_of(inner)] if isinstance(value, tuple) else []


def _renumbered(value: Any, incoming: int, place: dict[int, int]) -> Any:
    if isinstance(value, _Pointer):
        i = value.tensor
        return value if i < incoming else _Pointer(incoming + place[i - incoming], value.offset)
    if isinstance(value, tuple):
        return tuple([_renumbered(inner, incoming, place) for inner in value])
    return value


def _addressed(value: Any, addresses: list[int]) -> Any:
    if type(value) is _Pointer:
        return addresses[value.tensor] + value.offset
    if isinstance(value, tuple):
        return tuple([_addressed(inner, addresses) for inner in value])
    return value


def _filled(outputs: Any, made: list[Tensor | None]) -> Any:
    if type(outputs) is int:
        return made[outputs]
    return type(outputs)([_filled(output, made) for output in outputs])
