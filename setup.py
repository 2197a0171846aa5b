"""Builds the C++ and CUDA kernels beside the Python package.

FOCALNET_KERNELS_BUILD = auto (default) | none | cpu | cuda
  auto  builds the CPU kernels where torch and a C++ compiler are at hand, the CUDA kernels where a toolkit of torch's
        CUDA version is too, and otherwise says in one line why not
  none  builds nothing: the pure Python package
  cpu   the CPU kernels alone; a failure is an error
  cuda  both; a failure is an error
FOCALNET_KERNELS_CUDA = 12 or 13 builds the CUDA kernels for torches of that CUDA, not for the torch that is there.
MAX_JOBS and TORCH_CUDA_ARCH_LIST are honoured. No GPU is needed.
FOCALNET_KERNELS_SANITIZE=1 builds with AddressSanitizer and UndefinedBehaviorSanitizer: see `make sanitize`.

The libraries use PyTorch's stable ABI and Python's limited API: one binary serves torch >= 2.10, Python >= 3.10. The
CPU and the CUDA half are two, so that a CPU build of torch loads the first.
"""

import os
import re
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
BUILD = os.environ.get("FOCALNET_KERNELS_BUILD", "").lower() or "auto"
if BUILD not in ("auto", "none", "cpu", "cuda"):
    sys.exit(f"FOCALNET_KERNELS_BUILD: expected auto, none, cpu or cuda, got {BUILD!r}")

SANITIZE = os.environ.get("FOCALNET_KERNELS_SANITIZE", "") or "0"
if SANITIZE not in ("0", "1"):
    sys.exit(f"environment variable FOCALNET_KERNELS_SANITIZE: expected 0 or 1, got {SANITIZE!r}")

if sys.platform == "win32":
    CXX = ["/O2"]
else:
    CXX = ["-O3", "-fvisibility=hidden", "-ffp-contract=fast", "-Wno-maybe-uninitialized", "-Wno-attributes", "-g0"]


def say(message):
    print(f"focalnet_kernels: {message}", file=sys.stderr)


def namespace():
    """Of the raw ops, as the Python half has it."""
    return re.search(r'^NAMESPACE = "(\w+)"', (ROOT / "focalnet_kernels/_namespace.py").read_text(), re.M)[1]


MACROS = [("TORCH_TARGET_VERSION", "0x020a000000000000"), ("FOCALNET_NAMESPACE", namespace())]


def common(half, *suffixes, major=""):
    """What the extensions of both halves are made of. `major`: CUDA's, of which a package may have several."""
    folder = ROOT / "csrc" / half
    return {
        "name": f"focalnet_kernels._{half}{major}",
        "sources": sorted(p.relative_to(ROOT).as_posix() for s in suffixes for p in folder.glob(f"*{s}")),
        "depends": sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "csrc").rglob("*.h")),
        "include_dirs": [str(ROOT / "csrc")],
        "py_limited_api": True,
    }


def cpu_library():
    from torch.utils.cpp_extension import CppExtension

    compile_args, link_args = CXX, []
    if SANITIZE == "1":
        sanitize = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]
        compile_args, link_args = [*compile_args, "-O1", "-g", *sanitize], sanitize
    return CppExtension(
        **common("cpu", ".cpp"),
        define_macros=MACROS,
        extra_compile_args=compile_args,
        extra_link_args=link_args,
    )


def cuda_library(toolkit):
    # torch takes a wrapper's folder for the toolkit's, and wants a GPU where it is not told what to compile for
    os.environ["CUDA_HOME"] = str(toolkit.home)
    architectures = os.environ.setdefault("TORCH_CUDA_ARCH_LIST", toolkit.architectures())
    import torch
    from torch.utils import cpp_extension

    # asked for by FOCALNET_KERNELS_CUDA it may be another's: of torch the CUDA sources need headers that know no CUDA
    torch.version.cuda = toolkit.version
    cpp_extension.CUDA_HOME = str(toolkit.home)
    build = f'"{architectures.replace(";", " ")}, CUDA {toolkit.version}"'
    extension = cpp_extension.CUDAExtension(
        **common("cuda", ".cpp", ".cu", major=toolkit.major()),
        define_macros=[
            *MACROS,
            ("USE_CUDA", None),
            ("FOCALNET_CUDA_BUILD", build.replace('"', '\\"') if sys.platform == "win32" else build),
        ],
        extra_compile_args={"cxx": CXX, "nvcc": toolkit.flags()},
    )
    runtime = toolkit.runtime()
    if runtime and sys.platform != "win32":
        extension.libraries.remove("cudart")
        extension.extra_link_args.append(str(runtime))
    return extension


def extensions():
    try:
        import torch
    except ImportError as error:
        if BUILD in ("cpu", "cuda"):
            raise
        say(f"no C++ kernels: {error} (to build them, install torch first and use --no-build-isolation)")
        return []
    toolkit = find_toolkit(os.environ.get("FOCALNET_KERNELS_CUDA", "") or torch.version.cuda)
    if BUILD == "cpu":
        return [cpu_library()]
    if isinstance(toolkit, str):
        if BUILD == "cuda":
            sys.exit(f"focalnet_kernels: FOCALNET_KERNELS_BUILD=cuda: {toolkit}")
        say(f"no CUDA kernels: {toolkit}")
        found["cuda"] = toolkit
        return [cpu_library()]
    return [cpu_library(), cuda_library(toolkit)]


def build_command():
    from torch.utils.cpp_extension import BuildExtension

    class Build(BuildExtension):
        def run(self):
            reason = self.attempt(super().run, "C++ or CUDA kernels")
            package = Path(self.get_ext_fullpath("focalnet_kernels._cpu")).parent
            if package.is_dir():
                record(package, {half(module.name): reason for module in modules} | found)

        def build_extension(self, extension):
            def build():
                with captured(output):
                    super(Build, self).build_extension(extension)

            output = []
            found[half(extension.name)] = self.attempt(build, extension.name, output)

        def attempt(self, build, what, output=()):
            """None, or why it failed; `output`: what was printed meanwhile, once `build` is through."""
            try:
                build()
            except Exception as error:  # distutils, ninja and compilers fail in their own ways
                if BUILD != "auto":
                    sys.stderr.writelines(output)
                    raise
                reason = first_error("".join(output), error)
                say(f"no {what}: {reason}")
                return reason

    return Build


def half(name):
    """ "cpu" or "cuda", of an extension's name."""
    return re.search(r"_(cpu|cuda)", name)[1]


found = {}  # why each half is missing; None where it is there


sys.path.insert(0, str(ROOT / "build_tools"))
from outcome import captured, first_error, record  # noqa: E402
from readme import absolute, repository  # noqa: E402

options = {}
if BUILD == "none":
    say("FOCALNET_KERNELS_BUILD=none: no C++ kernels")
else:
    from toolkit import find_toolkit

    modules = extensions()
    for module in modules:
        module.optional = BUILD == "auto"
    if modules:
        options = {
            "ext_modules": modules,
            "cmdclass": {"build_ext": build_command()},
            "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
        }

where = repository((ROOT / "pyproject.toml").read_text())
setup(
    long_description=absolute((ROOT / "README.md").read_text(), where),
    long_description_content_type="text/markdown",
    **options,
)
