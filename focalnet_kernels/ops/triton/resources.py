"""What a recorded launch costs on a GPU that need not be there: compiled ahead of time, read from the machine code."""

from __future__ import annotations

import re
import struct
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .launch import Launch

_POINTERS = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int32: "*i32",
}  # fmt: skip
OLDEST = 80  # compute capability 8.0: tensor cores that know bfloat16
OPTIONS = ("num_warps", "num_stages", "maxnreg")


@dataclass(frozen=True)
class Resources:
    """Of one compiled kernel. None where the target's tools do not tell."""

    shared: int
    registers: int | None = None
    stack: int | None = None
    instructions: int | None = None
    tensor_core: int | None = None


def specialization(launch: Launch) -> tuple[dict, dict, dict, dict]:
    """What of a launch its machine code depends on: types, constants, known divisors, compiler options."""
    names = launch.kernel.arg_names
    signature: dict[str, Any] = {}
    constants: dict[tuple, Any] = {}
    attributes: dict[tuple, Any] = {}
    for i, (parameter, value) in enumerate(zip(launch.kernel.params, launch.args, strict=False)):
        signature[parameter.name] = (
            _type(value) if parameter.do_not_specialize else _describe(value, (i,), constants, attributes)
        )
    options = {k: v for k, v in launch.constants.items() if k in OPTIONS} | {"enable_fp_fusion": True}
    for name, value in launch.constants.items():
        if name not in OPTIONS:
            signature[name] = "constexpr"
            constants[(names.index(name),)] = value
    return signature, constants, attributes, options


def why_not_target(target: str) -> str | None:
    """Why kernels cannot be compiled for a GPU of this name; None where they can."""
    if re.fullmatch(r"gfx(9[0-9a-f]{2}|1\d{3})", target):
        return None
    known = {int(n) for tool in _nvidia_tools("ptxas*") for n in re.findall(r"'sm_(\d+)'", _output(tool, "--help"))}
    name = re.fullmatch(r"sm_(\d+)", target)
    if name and int(name[1]) in known and int(name[1]) >= OLDEST:
        return None
    nvidia = ", ".join(f"sm_{n}" for n in sorted(known) if n >= OLDEST)
    return f"expected {nvidia} or an AMD GPU's name such as gfx942, got {target!r}"


def compile_launch(launch: Launch, target: str) -> Resources:
    """Compile a launch for `target`: "sm_90", "gfx942"."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes, options = specialization(launch)
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    if target.startswith("sm_"):
        built = triton.compile(source, target=GPUTarget("cuda", int(target[3:]), 32), options=options)
        cubin, ptx = built.asm["cubin"], built.asm["ptx"]
        tensor_core = len(re.findall(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b", ptx))
        registers, stack = _registers_and_stack(cubin)
        return Resources(built.metadata.shared, registers, stack, _instructions(cubin), tensor_core)
    options.pop("maxnreg", None)
    built = triton.compile(source, target=GPUTarget("hip", target, 64), options=options)
    return Resources(built.metadata.shared)


def _describe(value, path, constants, attributes):
    """A launch argument's type, specialised as Triton's launcher would: 1 is a constant, multiples of 16 are known."""
    if isinstance(value, tuple):
        return tuple(_describe(v, (*path, i), constants, attributes) for i, v in enumerate(value))
    if isinstance(value, torch.Tensor):
        if value.is_meta or value.data_ptr() % 16 == 0:
            attributes[path] = [["tt.divisibility", 16]]
        return _POINTERS[value.dtype]
    if isinstance(value, float):
        return "fp32"
    if value is None or value == 1:
        constants[path] = value
        return "constexpr"
    if value % 16 == 0:
        attributes[path] = [["tt.divisibility", 16]]
    return _type(value)


def _type(value: int) -> str:
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def _registers_and_stack(cubin: bytes) -> tuple[int, int]:
    (tool,) = _nvidia_tools("cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _output(tool, "--dump-resource-usage", file.name)
    registers, stack = re.findall(r"REG:(\d+) STACK:(\d+)", usage)[0]
    return int(registers), int(stack)


def _instructions(cubin: bytes) -> int:
    """Of 16 bytes, in an ELF file's executable sections. (To disassemble a kernel takes up to seconds.)"""
    EXECUTABLE = 4
    (at,), (size, count) = struct.unpack_from("<Q", cubin, 0x28), struct.unpack_from("<HH", cubin, 0x3A)
    sections = [struct.unpack_from("<QQQQ", cubin, at + i * size + 8) for i in range(count)]
    return sum(length for flags, _, _, length in sections if flags & EXECUTABLE) // 16


def _nvidia_tools(pattern: str) -> list[Path]:
    """Those that come with triton."""
    import triton

    return sorted((Path(triton.__file__).parent / "backends/nvidia/bin").glob(pattern))


def _output(tool: Path, *arguments: str) -> str:
    return subprocess.run([tool, *arguments], capture_output=True, text=True, check=True).stdout
