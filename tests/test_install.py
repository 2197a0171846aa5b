"""Importing: without triton, without the extension, with a broken one; never touching a GPU driver."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import focalnet_kernels
from focalnet_kernels import _libraries

PACKAGE = Path(focalnet_kernels.__file__).parent
BINARIES = ("*.so", "*.pyd", "*.dylib", "__pycache__")

# Says where the package came from, what it warned of, and whether the layer works.
PROBE = """
import importlib.abc, json, sys, warnings

class NoTriton(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

import torch
if "no-triton" in sys.argv:
    for name in [n for n in sys.modules if n.partition(".")[0] == "triton"]:
        del sys.modules[name]
    sys.meta_path.insert(0, NoTriton())
if "another-CUDA-beside-ours" in sys.argv:
    torch.version.cuda = "10.2"
before = set(sys.modules)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import focalnet_kernels as fk
    from focalnet_kernels import _libraries
    layer = fk.FocalModulation(8, 3, 2)
    x = torch.randn(1, 4, 5, 8, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    expected = layer(x, return_gates=True)[0]
print(json.dumps({
    "file": fk.__file__,
    "warnings": [[w.category.__name__, str(w.message)] for w in caught],
    "missing": _libraries.cpu_missing,
    "cuda_missing": _libraries.cuda_missing,
    "backend": fk.explain(layer, x).backend,
    "explained": fk.explain(layer, x).reasons.get("cpu"),
    "right": bool(torch.allclose(y, expected, atol=1e-5)) and bool(x.grad.isfinite().all()),
    "cuda": torch.cuda.is_initialized(),
    "triton": sorted(m for m in sys.modules if m.partition(".")[0] == "triton" and m not in before),
    "heavy": sorted({m.partition(".")[0] for m in set(sys.modules) - before}
                    & {"timm", "transformers", "torchvision", "matplotlib", "skimage", "PIL", "click", "rich"}),
}))
"""


def probe(*arguments, path=None):
    """Runs PROBE in a new process, inside `path` (so that it comes first on sys.path), and reads its report."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("FOCALNET_KERNELS")}
    done = subprocess.run(
        [sys.executable, "-c", PROBE, *arguments], env=environment, cwd=path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


CUDA_LIBRARY = next(PACKAGE.glob("_cuda*.so"), None)


@pytest.fixture
def bare_copy(tmp_path):
    """A directory with a copy of the package that has no compiled files."""
    shutil.copytree(PACKAGE, tmp_path / "focalnet_kernels", ignore=shutil.ignore_patterns(*BINARIES))
    return tmp_path


def test_import_is_light():
    found = probe("no-triton")
    assert found["right"]
    assert not found["cuda"], "importing initialised CUDA"
    assert found["triton"] == []
    assert found["heavy"] == []
    assert found["warnings"] == []


def test_works_without_the_extension(bare_copy):
    found = probe("no-triton", path=bare_copy)
    assert found["file"].startswith(str(bare_copy))
    assert found["backend"] == "reference" and found["right"]
    assert "not built" in found["missing"]
    assert found["explained"] == found["missing"]
    assert found["warnings"] == []  # nobody asked for it: `info` and `explain` tell


def test_a_broken_library_warns_once_and_falls_back(bare_copy):
    (bare_copy / "focalnet_kernels" / "_cpu.abi3.so").write_bytes(b"not a library")
    found = probe(path=bare_copy)
    assert found["file"].startswith(str(bare_copy))
    assert found["backend"] == "reference" and found["right"]
    ((category, message),) = found["warnings"]
    assert category == "RuntimeWarning"
    assert message.startswith("focalnet_kernels falls back to other backends: _cpu.abi3.so does not load: ")
    assert found["missing"] in message and found["explained"] == found["missing"]


@pytest.mark.skipif(torch.version.cuda is None, reason="this torch takes no CUDA library")
@pytest.mark.parametrize("fault", ["broken", "another CUDA", "another CUDA beside ours"])
def test_a_cuda_library_that_cannot_be_used(bare_copy, fault):
    """The CUDA runtime that it needs may be absent; or present, but not torch's."""
    major = torch.version.cuda.partition(".")[0]
    library, reason = b"not a library", f"_cuda{major}.abi3.so does not load: "
    if fault != "broken":
        if CUDA_LIBRARY is None:
            pytest.skip(f"the CUDA library was not built: {_libraries.cuda_missing}")
        library = CUDA_LIBRARY.read_bytes()
    if fault == "another CUDA":
        assert b"libcudart.so." in library
        library = library.replace(b"libcudart.so.", b"libcudart.no.")
    if fault == "another CUDA beside ours":
        reason = "the CUDA C++ kernels were built for CUDA "
    (bare_copy / "focalnet_kernels" / f"_cuda{major}.abi3.so").write_bytes(library)
    found = probe(fault.replace(" ", "-"), path=bare_copy)
    assert found["right"]
    ((category, message),) = found["warnings"]
    assert category == "RuntimeWarning"
    assert message.startswith(f"focalnet_kernels falls back to other backends: {reason}")
    assert found["cuda_missing"].startswith(reason)
    if fault == "another CUDA":
        assert "libcudart.no." in message


def test_public_names():
    for name in focalnet_kernels.__all__:
        assert getattr(focalnet_kernels, name).__doc__ or name == "__version__", name


def test_building_asks_for_no_torch():
    """An isolated build would fetch another one than is there."""
    text = (PACKAGE.parent / "pyproject.toml").read_text()
    (requires,) = re.findall(r"^requires = \[(.*)\]$", text, re.M)
    assert "setuptools" in requires and "torch" not in requires


@pytest.fixture(scope="module")
def source_distribution(tmp_path_factory):
    """What `python -m build --sdist` packs where nothing can be compiled, unpacked."""
    tree, packed = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("packed")
    for name in ("focalnet_kernels", "csrc", "build_tools"):
        shutil.copytree(PACKAGE.parent / name, tree / name, ignore=shutil.ignore_patterns(*BINARIES))
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(PACKAGE.parent / name, tree)
    command = f"from setuptools import build_meta; print(build_meta.build_sdist({str(packed)!r}))"
    environment = os.environ | {"FOCALNET_KERNELS_BUILD": "none"}
    done = subprocess.run([sys.executable, "-c", command], cwd=tree, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    archive = packed / done.stdout.splitlines()[-1]
    shutil.unpack_archive(archive, packed)
    return packed / archive.name.removesuffix(".tar.gz")


def files(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc"}


def test_a_source_distribution_builds(source_distribution):
    """It has all that setup.py imports and compiles, and what the package reads."""
    for folder in ("csrc", "build_tools"):
        assert files(source_distribution / folder) == files(PACKAGE.parent / folder)
    needed = {name for name in files(PACKAGE) if Path(name).suffix not in (".so", ".pyd", ".dylib")}
    assert files(source_distribution / "focalnet_kernels") == needed
    command = [sys.executable, "setup.py", "--quiet", "--version"]
    done = subprocess.run(command, cwd=source_distribution, capture_output=True, text=True)
    assert done.returncode == 0 and focalnet_kernels.__version__ in done.stdout, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("isolated", [False, True], ids=["no-isolation", "isolation"])
def test_installs_without_a_compiler(isolated, source_distribution, tmp_path):
    """pip's own install into an empty directory, where neither compiler nor CUDA is to be found."""
    target = tmp_path / "target"
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("FOCALNET_KERNELS", "CUDA"))}
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--target", str(target), str(source_distribution)]
    done = subprocess.run(
        pip + ([] if isolated else ["--no-build-isolation"]),
        env=environment | {"PATH": str(tmp_path), "CXX": "none", "CC": "none"},
        capture_output=True,
        text=True,
    )
    if isolated and "setuptools" in done.stderr and "No matching distribution" in done.stderr:
        pytest.skip("no package registry, from which an isolated build takes setuptools")
    assert done.returncode == 0, done.stdout + done.stderr
    found = probe("no-triton", path=target)
    assert found["file"].startswith(str(target)) and found["backend"] == "reference" and found["right"]
