"""One wheel for every Python >= 3.10 and torch >= 2.10, into dist/: `make wheel`.

    python build_tools/make_wheel.py [--cuda MAJOR ...]

It holds the CPU kernels, and the CUDA kernels once for each major version of CUDA of which a toolkit is at hand, or
that `--cuda` names (`--cuda none`: the CPU half alone). auditwheel then gives it the oldest manylinux tag that its
symbols allow: build on an old glibc, as cibuildwheel does, for a wheel that old systems take. torch's libraries and
CUDA's runtime stay torch's. Halves beyond their limits in size are an error. `--cuda-only` leaves the CUDA libraries
where setuptools finds them when it packs the wheel: for cibuildwheel, which has that done by itself.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from toolkit import find_toolkit

ROOT = Path(__file__).parents[1]
MAJORS = ("12", "13")
LARGEST = {"_cpu": 1 << 20, "_cuda": 6 << 20}  # bytes in the wheel; of CUDA four architectures take 5.66 MB
OF_TORCH = ("libtorch*.so*", "libc10*.so*", "libcudart.so*")


def setup(*arguments: str, **environment: str) -> None:
    subprocess.run(
        [sys.executable, "setup.py", "--quiet", *arguments], cwd=ROOT, env=os.environ | environment, check=True
    )


def majors(asked: list[str]) -> list[str]:
    """Of CUDA, to build for."""
    if asked:
        return [] if asked == ["none"] else asked
    found = {major: find_toolkit(major) for major in MAJORS}
    for major, toolkit in found.items():
        print(f"CUDA {major}: {toolkit if isinstance(toolkit, str) else toolkit.nvcc}")
    return [major for major, toolkit in found.items() if not isinstance(toolkit, str)]


def build_cuda(cuda: list[str], *work: str) -> None:
    for major in cuda:
        setup("build_ext", *work, FOCALNET_KERNELS_BUILD="cuda", FOCALNET_KERNELS_CUDA=major)


def build(folder: Path, cuda: list[str]) -> Path:
    """The wheel as setuptools packs it."""
    work = ("--build-lib", str(folder / "lib"), "--build-temp", str(folder / "temp"))
    build_cuda(cuda, *work)
    setup("build", *work, "bdist_wheel", "--dist-dir", str(folder / "dist"), FOCALNET_KERNELS_BUILD="cpu")
    (wheel,) = (folder / "dist").glob("*.whl")
    return wheel


def check_sizes(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        for entry in archive.infolist():
            name = Path(entry.filename).name
            for stem, most in LARGEST.items():
                if name.startswith(stem) and name.endswith(".so"):
                    size = f"{name}: {entry.compress_size / 2**20:.2f} MB of {entry.file_size / 2**20:.2f} unpacked"
                    print(size)
                    if entry.compress_size > most:
                        sys.exit(f"{size}; expected at most {most >> 20} MB")


def repaired(wheel: Path, folder: Path) -> Path:
    excluded = [f"--exclude={name}" for name in OF_TORCH]
    command = [
        sys.executable,
        "-m",
        "auditwheel",
        "repair",
        "--strip",
        *excluded,
        "--wheel-dir",
        str(folder),
        str(wheel),
    ]
    subprocess.run(command, check=True)
    (found,) = folder.glob("*manylinux*.whl")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cuda", action="append", default=[], choices=(*MAJORS, "none"))
    parser.add_argument("--cuda-only", action="store_true")
    arguments = parser.parse_args()
    cuda = majors(arguments.cuda)
    if arguments.cuda_only:
        return build_cuda(cuda)
    folder, dist = ROOT / "build/wheel", ROOT / "dist"
    shutil.rmtree(folder, ignore_errors=True)
    wheel = repaired(build(folder, cuda), folder / "repaired")
    check_sizes(wheel)
    dist.mkdir(exist_ok=True)
    for old in dist.glob("*.whl"):
        old.unlink()
    print(shutil.copy(wheel, dist))


if __name__ == "__main__":
    main()
