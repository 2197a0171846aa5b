"""Building: the CUDA kernels for GPUs that need not be there, the toolkit that is found, what setup.py makes of it."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from focalnet_kernels.ops.triton import resources

ROOT = Path(__file__).parents[1]
CUDA = ROOT / "csrc/cuda"

with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(ROOT / "build_tools")
    import toolkit

needs_compiler = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "c++")) is None, reason="there is no C++ compiler"
)
needs_sh = pytest.mark.skipif(os.name == "nt", reason="stands in for nvcc with a shell script")


# --------------------------------------------------------------------------------------------- the kernels

USAGE = re.compile(r"arch = (sm_\d+)|Function (\S+):\s+REG:\d+ STACK:(\d+)")
RESOURCES = re.compile(r"Compiling entry function '(\S+)'.*?(\d+) bytes stack frame", re.S)
SOURCES = sorted(CUDA.glob("*.cu"))


def test_kernels_spill_nothing(tmp_path):
    """As they were built, for every architecture; what is spilled lies on the stack. Compiled here if they were not."""
    libraries = sorted((ROOT / "focalnet_kernels").glob("_cuda*.so"))
    if not libraries:
        for source in SOURCES:
            check_compiled(source, "sm_90", tmp_path)
        return
    pytest.importorskip("triton", reason="its cuobjdump reads the library")
    (tool,) = resources._nvidia_tools("cuobjdump")
    command = [tool, "--dump-resource-usage", libraries[0]]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    stacks, architecture = {}, None
    for found, kernel, stack in USAGE.findall(said):
        architecture = found or architecture
        if kernel:
            stacks[architecture, kernel] = int(stack)
    assert len(stacks) >= 100, f"cuobjdump has come to speak otherwise:\n{said[:1000]}"
    assert not {kernel: stack for kernel, stack in stacks.items() if stack > allowed(*kernel)}


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_kernels_compiled_anew_spill_nothing(source, architecture, tmp_path):
    check_compiled(source, architecture, tmp_path)


def check_compiled(source, architecture, folder):
    found = toolkit.find_toolkit(torch.version.cuda)
    if isinstance(found, str):
        pytest.skip(found)
    command = [found.nvcc, *found.flags(), "-std=c++20", f"-I{ROOT / 'csrc'}", f"-arch={architecture}"]
    command += ["-Xptxas=-v", "-cubin", source, "-o", folder / f"{source.stem}.cubin"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    stacks = {name: int(stack) for name, stack in RESOURCES.findall(done.stderr)}
    assert stacks, f"no kernels, or ptxas has come to speak otherwise:\n{done.stderr}"
    assert not {name: stack for name, stack in stacks.items() if stack > allowed(architecture, name)}


def allowed(architecture, kernel):
    """Bytes of its stack. On sm_80 the backward over images keeps some from image to image, read outside of its inner
    loops, and three of the forwards, held to 80 registers, have two words; some kernels have as much on sm_100 and
    sm_120, where none has run."""
    if architecture == "sm_80":
        return 40 if "images_bwd_kernel" in kernel else 8 if "images_fwd_kernel" in kernel else 0
    return 0 if architecture == "sm_90" else 16


def test_there_are_kernels():
    assert len(SOURCES) >= 5


INCLUDE = re.compile(r'^#include ["<](.+)[">]', re.M)


def closure(source):
    """The names that a source includes, and those of ours in turn."""
    names, todo = set(), [source]
    while todo:
        for name in INCLUDE.findall(todo.pop().read_text()):
            if name not in names and (ROOT / "csrc" / name).exists():
                todo.append(ROOT / "csrc" / name)
            names.add(name)
    return names


def test_kernels_include_no_torch():
    """A .cu file that includes torch takes minutes to compile."""
    for source in CUDA.glob("*.cu"):
        names = closure(source)
        assert "cuda/kernels.h" in names
        assert not [name for name in names if re.match("torch|ATen|c10|Python|pybind", name)], source.name


GNU_ONLY = re.compile(
    r"__attribute__|__builtin_|__extension__|__typeof|\btypeof\b|__int128|\(\{|#pragma GCC|#include_next|<bits/"
    r"|<unistd.h>|\bssize_t\b|__is_same\b|\bM_PI\b|\?:|case [^:]+ \.\.\. "
)


def test_sources_are_portable():
    """What other compilers than GCC and Clang would not take, as far as it can be told from afar."""
    files = [p for folder in ("cuda", "common") for p in (ROOT / "csrc" / folder).iterdir()]
    assert len(files) > 10
    for path in files:
        code = re.sub(r"//.*", "", path.read_text())
        assert not GNU_ONLY.findall(code), path.name


# --------------------------------------------------------------------------------------- find_toolkit


def make_nvcc(home, version):
    """Answers as nvcc does, and compiles nothing."""
    nvcc = home / "bin/nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(f"""#!/bin/sh
case "$1" in
  --version) echo "Cuda compilation tools, release {version}, V{version}.48" ;;
  --dryrun) echo '#$ TOP={home}/bin/..' >&2 ;;
  *) echo "this nvcc compiles nothing" >&2; exit 1 ;;
esac
""")
    nvcc.chmod(0o755)
    return nvcc


@pytest.fixture
def bare(tmp_path, monkeypatch):
    """A machine without any toolkit. Gives its site-packages."""
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    monkeypatch.setattr(toolkit.sysconfig, "get_path", lambda name: str(tmp_path / "site-packages"))
    return tmp_path / "site-packages"


def test_no_toolkit(bare):
    reason = toolkit.find_toolkit("13.2")
    assert "CUDA 13.2 is wanted, but there is no nvcc" in reason and "\n" not in reason
    assert toolkit.find_toolkit(None) == "this torch was built without CUDA"


@needs_sh
def test_a_wrapper_on_path(bare, tmp_path):
    nvcc = make_nvcc(tmp_path / "cuda", "13.0")
    wrapper = tmp_path / "path/nvcc"
    wrapper.parent.mkdir()
    wrapper.write_text(f'#!/bin/sh\nexec {nvcc} "$@"\n')
    wrapper.chmod(0o755)
    found = toolkit.find_toolkit("13.2")
    assert (found.home, found.version) == (tmp_path / "cuda", "13.0")


@needs_sh
def test_cuda_home_comes_first(bare, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(make_nvcc(tmp_path / "a", "13.0").parent))
    monkeypatch.setenv("CUDA_HOME", str(make_nvcc(tmp_path / "b", "13.1").parents[1]))
    assert toolkit.find_toolkit("13.2").home == tmp_path / "b"


@needs_sh
def test_another_cuda(bare, tmp_path, monkeypatch):
    """It is passed over; where there is no other, one line says so."""
    old = make_nvcc(tmp_path / "old", "12.8")
    monkeypatch.setenv("CUDA_HOME", str(old.parents[1]))
    assert toolkit.find_toolkit("13.2") == f"CUDA 13.2 is wanted, but {old} is of CUDA 12.8"
    monkeypatch.setenv("PATH", str(make_nvcc(tmp_path / "new", "13.3").parent))
    assert toolkit.find_toolkit("13.2").home == tmp_path / "new"


@needs_sh
def test_an_nvcc_that_does_not_run(bare, tmp_path, monkeypatch):
    nvcc = make_nvcc(tmp_path / "cuda", "13.0")
    nvcc.write_text("#!/bin/sh\nexit 1\n")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    assert toolkit.find_toolkit("13.2") == f"CUDA 13.2 is wanted, but {nvcc} does not answer"


@needs_sh
def test_pip_packages(bare):
    """They lie beside torch, on no PATH, and have the runtime under its versioned name alone."""
    home = bare / "nvidia/cu13"
    make_nvcc(home, "13.0")
    (home / "lib").mkdir()
    (home / "lib/libcudart.so.13").touch()
    found = toolkit.find_toolkit("13.2")
    assert found.home == home and found.runtime() == home / "lib/libcudart.so.13"


# ---------------------------------------------------------------------------------------------- setup.py


@pytest.fixture
def tree(tmp_path):
    """setup.py over sources that compile in no time."""
    (tmp_path / "focalnet_kernels").mkdir()
    tools = ("build_tools/toolkit.py", "build_tools/readme.py", "build_tools/outcome.py")
    read = ("focalnet_kernels/_version.py", "focalnet_kernels/_namespace.py")
    for name in ("setup.py", "pyproject.toml", "README.md", *tools, *read):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    for name in ("csrc/cpu/nothing.cpp", "csrc/cuda/nothing.cu", "focalnet_kernels/__init__.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


def build(tree, choice, **environment):
    """Runs setup.py. Returns its status, what we say, which libraries it left, and all that was said."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("FOCALNET_KERNELS", "CUDA_", "TORCH_CUDA"))}
    done = subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"],
        cwd=tree,
        env=inherited | {"FOCALNET_KERNELS_BUILD": choice} | environment,
        capture_output=True,
        text=True,
    )
    said = [line for line in done.stderr.splitlines() if line.startswith(("focalnet_kernels: ", "FOCALNET_KERNELS"))]
    libraries = sorted(p.name.partition(".")[0] for p in (tree / "focalnet_kernels").glob("_c*.*"))
    return done.returncode, said, libraries, done.stdout + done.stderr


def test_build_none(tree):
    assert build(tree, "none")[:3] == (0, ["focalnet_kernels: FOCALNET_KERNELS_BUILD=none: no C++ kernels"], [])


def test_build_nonsense(tree):
    status, said, libraries, _ = build(tree, "gpu")
    assert status and said == ["FOCALNET_KERNELS_BUILD: expected auto, none, cpu or cuda, got 'gpu'"] and not libraries


@needs_sh
@needs_compiler
@pytest.mark.parametrize("choice", ["cpu", "auto", "cuda"])
def test_build_without_a_toolkit(tree, choice):
    """An nvcc of another CUDA hides whatever else is on PATH."""
    path = f"{make_nvcc(tree / 'old', '1.0').parent}{os.pathsep}{os.environ['PATH']}"
    if toolkit._pip_folders("bin/nvcc"):
        pytest.skip("the pip package of nvcc is installed")
    status, said, libraries, output = build(tree, choice, PATH=path)
    if choice == "cpu":
        assert (status, said, libraries) == (0, [], ["_cpu"]), output
        return
    (line,) = said
    assert torch.version.cuda is None or "is of CUDA 1.0" in line
    if choice == "auto":
        assert line.startswith("focalnet_kernels: no CUDA kernels: ")
        assert (status, libraries) == (0, ["_cpu"]), output
    else:
        assert line.startswith("focalnet_kernels: FOCALNET_KERNELS_BUILD=cuda: ")
        assert status and not libraries


@needs_sh
@needs_compiler
@pytest.mark.skipif(torch.version.cuda is None, reason="this torch was built without CUDA")
@pytest.mark.parametrize("choice", ["auto", "cuda"])
def test_build_where_nvcc_fails(tree, choice):
    make_nvcc(tree / "cuda", torch.version.cuda)
    status, said, libraries, output = build(tree, choice, CUDA_HOME=str(tree / "cuda"))
    if choice == "auto":
        (line,) = said
        assert line.startswith(f"focalnet_kernels: no focalnet_kernels._cuda{torch.version.cuda.partition('.')[0]}: ")
        assert (status, libraries) == (0, ["_cpu"]), output
        assert set(not_built(tree)) == {"cuda"}
    else:
        assert status and "this nvcc compiles nothing" in output


def not_built(tree):
    path = tree / "focalnet_kernels/_not_built.json"
    return json.loads(path.read_text()) if path.exists() else {}


@needs_compiler
def test_the_first_error_is_said_and_kept(tree):
    """And forgotten once it is mended."""
    source = tree / "csrc/cpu/nothing.cpp"
    source.write_text("#warning this is none\n#error too old for this\n#error and another\n")
    status, said, libraries, _ = build(tree, "auto", FOCALNET_KERNELS_CUDA="1")
    assert status == 0 and not libraries
    (line,) = [line for line in said if "_cpu" in line]
    assert line.startswith("focalnet_kernels: no focalnet_kernels._cpu: ") and line.endswith("too old for this")
    kept = not_built(tree)
    assert kept["cpu"].endswith("too old for this") and kept["cuda"].startswith("CUDA 1 is wanted, but ")
    status, _, _, output = build(tree, "cpu")
    assert status and "and another" in output
    source.write_text("")
    assert build(tree, "cpu")[2] == ["_cpu"] and set(not_built(tree)) == {"cuda"}


@needs_sh
def test_a_compiler_that_is_too_old(tree):
    """What GCC 9 says of the flag that torch sets."""
    old = tree / "g++-9"
    old.write_text("#!/bin/sh\necho \"g++-9: error: unrecognized command line option '-std=c++20'\" >&2\nexit 1\n")
    old.chmod(0o755)
    status, said, libraries, output = build(tree, "auto", CXX=str(old), FOCALNET_KERNELS_CUDA="1")
    assert status == 0 and not libraries, output
    (line,) = [line for line in said if "_cpu" in line]
    assert line.endswith("'-std=c++20'; GCC 10, clang 14 or later is needed"), output


def test_build_without_a_compiler(tree):
    status, said, libraries, output = build(tree, "auto", PATH=str(tree), CXX="none", CC="none")
    assert status == 0 and not libraries, output
    assert said and all(line.startswith("focalnet_kernels: no ") for line in said)
