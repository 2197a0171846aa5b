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

_recipes: dict[tuple, _Recipe | None] = {}  # by implementation and kind of call; None: it is not launches alone
_MOST_KEPT = 4096
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
        if kind in _recipes:
            recipe = _recipes[kind]
            if recipe is None or recipe.is_hooked():
                return implementation(*args)
            return recipe(tensors)
        with _Watch(tensors) as watch:
            result = implementation(*args)
        if watch.is_sure:
            if len(_recipes) == _MOST_KEPT:
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


class _Output(NamedTuple):
    """A tensor that was made, as it is or with another geometry: (size, strides, offset)."""

    made: int
    geometry: tuple | None


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
            launches = [
                (kernel, run, tree_map_only(Tensor, self._pointer, args)) for kernel, run, args in self.launches
            ]
            outputs = tree_map_only(Tensor, self._output, result)
        except LookupError:
            return None
        return _Recipe(self.device, [(t.shape, t.stride(), t.dtype) for t in self.made], launches, outputs)

    def _pointer(self, tensor: Tensor) -> _Pointer:
        i = self.places.get(id(tensor))
        return _Pointer(i, 0) if i is not None else self._pointer_into(tensor)

    def _pointer_into(self, tensor: Tensor) -> _Pointer:
        owner = self.owners[_memory(tensor)]
        if owner is None:
            raise LookupError("which of several tensors it points into is not known")
        return _Pointer(owner[0], tensor.data_ptr() - owner[1])

    def _output(self, tensor: Tensor) -> _Output:
        for i, made in enumerate(self.made):
            if tensor is made:
                return _Output(i, None)
        i = self._pointer_into(tensor).tensor - self.incoming
        if i < 0 or self.made[i].dtype != tensor.dtype:
            raise LookupError("not a tensor that was made")
        return _Output(i, (tensor.shape, tensor.stride(), tensor.storage_offset()))


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class _Recipe:
    def __init__(
        self, device: torch.device, made: list[tuple], launches: list[tuple[Any, Callable, tuple]], outputs: Any
    ):  # fmt: skip
        self.device, self.made, self.outputs = device, made, outputs
        self.kernels = list({id(kernel): kernel for kernel, *_ in launches}.values())
        # with which arguments are, or hold, pointers
        self.launches = [(run, args, [i for i, a in enumerate(args) if _has_pointers(a)]) for _, run, args in launches]

    def is_hooked(self) -> bool:
        """Whether somebody counts on every launch going by Triton's own way."""
        return any([kernel.pre_run_hooks for kernel in self.kernels])

    def __call__(self, tensors: Sequence[Tensor | None]) -> Any:
        made = [
            torch.empty_strided(size, strides, dtype=dtype, device=self.device) for size, strides, dtype in self.made
        ]
        addresses = [0 if t is None else t.data_ptr() for t in (*tensors, *made)]
        with launching.current(self.device):
            for run, template, pointers in self.launches:
                args = list(template)
                for i in pointers:
                    args[i] = _addressed(args[i], addresses)
                run(*args)
        return _built(self.outputs, made)


def _has_pointers(value: Any) -> bool:
    return isinstance(value, _Pointer) or (isinstance(value, tuple) and any(map(_has_pointers, value)))


def _addressed(value: Any, addresses: list[int]) -> Any:
    if type(value) is _Pointer:
        return addresses[value.tensor] + value.offset
    if isinstance(value, tuple):
        return tuple([_addressed(v, addresses) for v in value])
    return value


def _built(outputs: Any, made: list[Tensor]) -> Any:
    if type(outputs) is _Output:
        tensor = made[outputs.made]
        return tensor if outputs.geometry is None else tensor.as_strided(*outputs.geometry)
    return type(outputs)([_built(output, made) for output in outputs])
