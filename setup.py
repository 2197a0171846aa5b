"""Builds the C++ kernels beside the Python package.

FOCALNET_KERNELS_BUILD = auto (default) | none | cpu
  auto  builds the CPU kernels where torch and a C++ compiler are at hand, and otherwise says why not and installs
        the pure Python package (reference backend)
  none  builds nothing
  cpu   a failure is an error
FOCALNET_KERNELS_SANITIZE=1 builds with AddressSanitizer and UndefinedBehaviorSanitizer: see `make sanitize`.

The library uses PyTorch's stable ABI and Python's limited API: one binary serves torch >= 2.10, Python >= 3.10.
"""

import os
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
BUILD = os.environ.get("FOCALNET_KERNELS_BUILD", "auto")
if BUILD not in ("auto", "none", "cpu"):
    sys.exit(f"FOCALNET_KERNELS_BUILD: expected auto, none or cpu, got {BUILD!r}")


def say(message):
    print(f"focalnet_kernels: {message}", file=sys.stderr)


def cpu_library():
    """The CPU kernels as an extension, and the command that builds it."""
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    if sys.platform == "win32":
        compile_args, link_args = ["/O2"], []
    else:
        compile_args, link_args = (
            ["-O3", "-fvisibility=hidden", "-ffp-contract=fast", "-Wno-maybe-uninitialized", "-g0"],
            [],
        )
    if os.environ.get("FOCALNET_KERNELS_SANITIZE"):
        sanitize = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]
        compile_args, link_args = [*compile_args, "-O1", "-g", *sanitize], sanitize
    extension = CppExtension(
        "focalnet_kernels._cpu",
        sources=sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "csrc" / "cpu").glob("*.cpp")),
        depends=sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "csrc").rglob("*.h")),
        include_dirs=[str(ROOT / "csrc")],
        define_macros=[("TORCH_TARGET_VERSION", "0x020a000000000000")],
        extra_compile_args=compile_args,
        extra_link_args=link_args,
        py_limited_api=True,
    )
    extension.optional = BUILD == "auto"
    return extension, BuildExtension


options = {}
if BUILD == "none":
    say("FOCALNET_KERNELS_BUILD=none: no C++ kernels")
else:
    try:
        extension, build_ext = cpu_library()
    except ImportError as error:
        if BUILD == "cpu":
            raise
        say(f"no C++ kernels: {error} (to build them, install torch first and use --no-build-isolation)")
    else:

        class Build(build_ext):
            def run(self):
                try:
                    super().run()
                except Exception as error:  # distutils, ninja and compilers fail in their own ways
                    if BUILD == "cpu":
                        raise
                    say(f"no C++ kernels: {str(error).splitlines()[0]}")

        options = {
            "ext_modules": [extension],
            "cmdclass": {"build_ext": Build},
            "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
        }

setup(**options)
