"""Lays out the folder that Hugging Face's `kernels` loads, with `get_local_kernel` or from its Hub.

    python build_tools/hub.py OUT [--cuda | --pure]

OUT/build/torch-stable-abi210-cpu-x86_64-linux has the CPU kernels, with --cuda there is another, -cu130-, with those of
CUDA 13 too; --pure compiles nothing: torch-cpu and torch-cuda have the Triton kernels alone. Each is the whole package
under a name of its own, its raw ops in a namespace of their own, so that it lives beside an installed one; `layers` are
focalnet_kernels/integrations/hub.py.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "focalnet_kernels"
NAME = "focalnet-kernels"
LEFT = ("*.so", "__pycache__", "_not_built.json")  # this machine's
STABLE_ABI = "torch-stable-abi210"  # TORCH_TARGET_VERSION in setup.py


def sources(folder: Path) -> list[Path]:
    return sorted(path for s in ("*.py", "*.cpp", "*.cu", "*.h", "*.csv") for path in folder.rglob(s))


def namespace() -> str:
    """A valid name that is the sources' own."""
    digest = hashlib.sha256()
    for path in sources(PACKAGE) + sources(ROOT / "csrc"):
        digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return f"focalnet_kernels_{digest.hexdigest()[:12]}"


def variants(libraries: Path) -> dict[str, tuple[str, list[str]]]:
    """What the Hub calls each variant, the type of its backend, and the libraries that it is served by."""
    system = f"{platform.machine()}-{platform.system().lower()}"
    found = {f"{STABLE_ABI}-cpu-{system}": ("cpu", ["_cpu.abi3.so"])}
    for path in sorted(libraries.glob("_cuda*.abi3.so")):
        major = re.match(r"_cuda(\d+)", path.name)[1]
        found[f"{STABLE_ABI}-cu{major}0-{system}"] = ("cuda", ["_cpu.abi3.so", path.name])
    return found


def build(folder: Path, cuda: bool) -> None:
    """The libraries of the package in `folder`, whose namespace they take."""
    kind = {"FOCALNET_KERNELS_BUILD": "cuda" if cuda else "cpu"}
    subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"], cwd=folder, env=os.environ | kind, check=True
    )


def lay_out(package: Path, target: Path, kind: str, libraries: list[str], name: str) -> None:
    shutil.copytree(package, target, ignore=shutil.ignore_patterns(*LEFT, "README.md"))
    for library in libraries:
        shutil.copy(package / library, target)
    init = target / "__init__.py"
    init.write_text(init.read_text() + "\nfrom .integrations import hub as layers  # noqa: E402, F401\n")
    about = {
        "id": f"{name}_{kind}", "name": NAME, "version": 1, "license": "MIT", "python-depends": [],
        "backend": {"type": kind},
    }  # fmt: skip
    (target / "metadata.json").write_text(json.dumps(about, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--cuda", action="store_true")
    parser.add_argument("--pure", action="store_true")
    arguments = parser.parse_args()
    tree, name = arguments.out / "tree", namespace()
    shutil.rmtree(tree, ignore_errors=True)
    for folder in ("focalnet_kernels", "csrc", "build_tools"):
        shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns(*LEFT))
    for file in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, tree)
    package = tree / "focalnet_kernels"
    text = (package / "_namespace.py").read_text()
    (package / "_namespace.py").write_text(text.replace('NAMESPACE = "focalnet_kernels"', f'NAMESPACE = "{name}"'))
    if not arguments.pure:
        build(tree, arguments.cuda)
    out = arguments.out / "build"
    shutil.rmtree(out, ignore_errors=True)
    found = {f"torch-{kind}": (kind, []) for kind in ("cpu", "cuda")} if arguments.pure else variants(package)
    for variant, (kind, libraries) in found.items():
        lay_out(package, out / variant, kind, libraries, name)
    shutil.rmtree(tree)
    print(*sorted(path.name for path in out.iterdir()), sep="\n")


if __name__ == "__main__":
    main()
