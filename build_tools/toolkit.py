"""Finds the CUDA toolkit that fits a torch: for setup.py, and for the tests that compile the kernels."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sysconfig
from dataclasses import dataclass
from pathlib import Path

NVCC = ["-O3", "--expt-relaxed-constexpr"]
COMPRESSED = (12, 8)  # the first version that knows Blackwell, and how to make binaries small


@dataclass(frozen=True)
class Toolkit:
    nvcc: Path
    home: Path  # where nvcc says it is: behind a wrapper that is not where the wrapper lies
    version: str

    def architectures(self) -> str:
        """TORCH_CUDA_ARCH_LIST, unless it is set. Newer GPUs go to Triton: PTX is a quarter of the library. But
        where the toolkit does not know Blackwell they compile the PTX when they load it."""
        return "8.0;9.0;10.0;12.0" if self._number() >= COMPRESSED else "8.0;9.0+PTX"

    def flags(self) -> list[str]:
        """nvcc's."""
        return [*NVCC, "--compress-mode=size"] if self._number() >= COMPRESSED else NVCC

    def major(self) -> str:
        return self.version.partition(".")[0]

    def _number(self) -> tuple[int, ...]:
        return tuple(map(int, self.version.split(".")))

    def runtime(self) -> Path | None:
        """libcudart, which the pip packages ship under its versioned name alone."""
        folders = [self.home / "lib64", self.home / "lib", *self.home.glob("targets/*/lib"), *_pip_folders("lib")]
        for folder in folders:
            for name in ("libcudart.so", f"libcudart.so.{self.major()}"):
                if (folder / name).exists():
                    return folder / name
        return None


def find_toolkit(torch_cuda: str | None) -> Toolkit | str:
    """The first toolkit of the same CUDA major version as `torch.version.cuda`, or one line that says why none."""
    if torch_cuda is None:
        return "this torch was built without CUDA"
    major, seen = torch_cuda.partition(".")[0], []
    for nvcc in dict.fromkeys(_candidates()):
        try:
            version = re.search(r"release (\d+\.\d+)", _output(nvcc, "--version"))[1]
            home = Path(re.search(r"^#\$ TOP=(.*)$", _output(nvcc, "--dryrun", "none.cu"), re.MULTILINE)[1].strip())
        except (OSError, TypeError):  # TypeError: no match
            seen.append(f"{nvcc} does not answer")
            continue
        if version.partition(".")[0] == major:
            return Toolkit(nvcc, home.resolve(), version)
        seen.append(f"{nvcc} is of CUDA {version}")
    found = (
        ", ".join(seen) or "there is no nvcc (CUDA_HOME, PATH, the pip packages nvidia-cuda-nvcc and nvidia-cuda-cccl)"
    )
    return f"CUDA {torch_cuda} is wanted, but {found}"


def _candidates():
    name = "nvcc.exe" if os.name == "nt" else "nvcc"
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")):
        if home:
            yield Path(home) / "bin" / name
    if on_path := shutil.which("nvcc"):
        yield Path(on_path)
    for folder in _pip_folders("bin"):
        if (folder / name).exists():
            yield folder / name


def _pip_folders(kind: str):
    return sorted(Path(sysconfig.get_path("purelib")).glob(f"nvidia/*/{kind}"))


def _output(nvcc: Path, *arguments: str) -> str:
    done = subprocess.run([nvcc, *arguments], capture_output=True, text=True)
    return done.stdout + done.stderr
