"""Triton's kernels, compiled for a GPU and run on a CPU, launch by launch."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import struct
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from focalnet_kernels import _calls, dispatch
from focalnet_kernels.ops.triton import launch as launching
from focalnet_kernels.ops.triton.resources import specialization

from . import machine
from .program import Program

MULTIPROCESSORS = 2  # few, so that a program has several tasks
_compiled: dict[str, tuple[Program, int, int]] = {}


class Running(list):
    """In `recorded_launches`'s place: each launch runs at once. Keeps the results."""

    def __init__(self, capability: int, seed: int, metered: bool):
        self.capability, self.seed, self.metered = capability, seed, metered
        self.results: list[machine.Result] = []

    def append(self, launch: launching.Launch) -> None:
        self.seed += 1
        result = run_launch(launch, self.capability, self.seed, self.metered)
        assert not result.races, f"{launch.kernel.__name__}: {result.races}"
        self.results.append(result)


OPS = ("focal_context", "modulate", "focal_modulation", "focal_branch", "mlp_branch")


@contextlib.contextmanager
def emulated(
    capability: int, seed: int = 0, metered: bool = False, multiprocessors: int = MULTIPROCESSORS
) -> Iterator[Running]:
    """Backend "triton" takes CPU tensors, and its launches run here as compiled for sm_`capability`; `metered`: what
    they ask of memory is counted.

    A race is an AssertionError, another fault a `memory.Fault`.
    """
    with contextlib.ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        running = Running(capability, seed, metered)
        patch.setattr(launching, "_recorder", running)
        properties = SimpleNamespace(multi_processor_count=multiprocessors)
        patch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        library = stack.enter_context(torch.library._scoped_library("focalnet_kernels", "IMPL"))
        for op in OPS:
            implementations = [
                dataclasses.replace(i, why_not=lambda call: None) if i.backend == "triton" else i
                for i in dispatch._implementations[op]
            ]
            patch.setitem(dispatch._implementations, op, tuple(implementations))
            module = importlib.import_module(f"focalnet_kernels.ops.{op}.triton_launch")
            for direction in ("fwd", "bwd"):
                if hasattr(module, f"{op}_{direction}_impl"):
                    library.impl(f"{op}_{direction}_triton", getattr(module, f"{op}_{direction}_impl"), "CPU")
        for forget in (launching.multiprocessors.cache_clear, _calls.forget):
            stack.callback(forget)
            forget()
        yield running


def compiled(launch: launching.Launch, capability: int) -> tuple[Program, int, int]:
    """The kernel, its threads, and its bytes of shared memory."""
    signature, constants, attributes, options = specialization(launch)
    key = repr((launch.kernel.__name__, signature, constants, attributes, options, capability))
    if key not in _compiled:
        source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
        built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        _compiled[key] = Program(built.asm["ptx"]), 32 * built.metadata.num_warps, built.metadata.shared
    return _compiled[key]


def run_launch(launch: launching.Launch, capability: int, seed: int = 0, metered: bool = False) -> machine.Result:
    program, threads, shared = compiled(launch, capability)
    constants = specialization(launch)[1]
    values = [v for i, value in enumerate(launch.args) for v in _flat(value, (i,), constants)]
    arguments = bytearray(max([p.offset + p.size for p in program.parameters.values()]))
    regions: dict[int, tuple[str, int, np.ndarray]] = {}
    for parameter, value in zip(program.parameters.values(), values, strict=False):  # then what Triton adds: unused
        if isinstance(value, torch.Tensor):
            storage = value.untyped_storage()
            data = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
            regions.setdefault(storage.data_ptr(), (parameter.name, storage.data_ptr(), data))
            packed = struct.pack("<Q", value.data_ptr())
        elif isinstance(value, float):
            packed = struct.pack("<f", value)
        else:
            packed = int(value).to_bytes(parameter.size, "little", signed=value < 0)
        arguments[parameter.offset : parameter.offset + parameter.size] = packed
    return machine.run(
        program, bytes(arguments), [*regions.values()], launch.programs, threads, shared, seed, metered, True
    )


def _flat(value: Any, path: tuple, constants: dict) -> list:
    """An argument's values, without those that are constants of the compiled kernel."""
    if path in constants:
        return []
    if isinstance(value, tuple):
        return [v for i, inner in enumerate(value) for v in _flat(inner, (*path, i), constants)]
    return [value]
