"""Fixtures of all tests: poisoned memory, backends, instruction sets, seeds."""

import os

import cuda_shim
import pytest
import torch
from hypothesis import HealthCheck, settings

from focalnet_kernels import _libraries
from focalnet_kernels.ops.focal_context.triton_plan import tap_tiles
from focalnet_kernels.ops.triton.launch import INTERPRETED
from focalnet_kernels.testing import fresh_seed

settings.register_profile(
    "focalnet_kernels",
    deadline=None,
    max_examples=6 if INTERPRETED else 30,
    print_blob=True,
    # our fixtures say what is tested, and keep nothing of an example that the next one could see
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("focalnet_kernels")


def pytest_collection_modifyitems(config, items):
    """Under TRITON_INTERPRET=1 only what runs on the Triton kernels, once per op: the rest has its own run."""
    if not INTERPRETED:
        return
    for item in items:
        if item.get_closest_marker("slow_interpreted"):
            item.add_marker(pytest.mark.slow)
    chosen = [
        item for item in items if "interpreted" in item.fixturenames or _parameters(item).get("backend") == "triton"
    ]
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = chosen


def _parameters(item):
    return item.callspec.params if hasattr(item, "callspec") else {}


@pytest.fixture(scope="session", autouse=True)
def poisoned_memory():
    """Every torch.empty* comes filled with NaN (the largest integer), from Python and from C++ alike."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = before


def skip_without_cpu_kernels():
    """Skips where the C++ kernels are missing; fails there in CI, where they must not be."""
    if _libraries.cpu_missing:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"backend cpu: {_libraries.cpu_missing}")


@pytest.fixture(scope="session")
def cpu_kernels():
    """For tests of the C++ kernels alone."""
    skip_without_cpu_kernels()


@pytest.fixture(params=["triton"] if INTERPRETED else ["reference", "cpu", "cuda"])
def backend(request):
    """Every backend, on a CPU: the Triton kernels run in Triton's interpreter, with a run of the tests of their own,
    the CUDA kernels in cuda_shim."""
    if request.param == "cpu":
        skip_without_cpu_kernels()
    if request.param == "cuda":
        request.getfixturevalue("cuda_on_cpu")
    return request.param


@pytest.fixture
def cuda_on_cpu():
    """The CUDA kernels take CPU tensors meanwhile. Gives what seeds the order in which their threads run."""
    if reason := cuda_shim.missing():
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"backend cuda: {reason}")
    with cuda_shim.emulated_ops() as seed_threads:
        yield seed_threads


@pytest.fixture
def kernels(backend):
    """Every backend but the reference."""
    if backend == "reference":
        pytest.skip("the reference leaves this to PyTorch")
    return backend


@pytest.fixture(scope="session")
def interpreted():
    """For tests of single Triton kernels on a CPU."""
    if not INTERPRETED:
        pytest.skip("needs TRITON_INTERPRET=1: see `make test`")


@pytest.fixture(scope="session", autouse=True)
def quick_interpreter():
    """With larger tiles than a GPU's, for the form tap by tap."""
    if not INTERPRETED:
        yield
        return
    from interpreter import hastened  # of triton, which need not be there

    with hastened(), tap_tiles(channels=16, segments=64):
        yield


@pytest.fixture
def tiles_of_a_gpu(interpreted):
    """The form tap by tap in its own tiles."""
    with tap_tiles():
        yield


@pytest.fixture(params=["portable", "avx2", "avx512", "avx512_bf16"])
def isa(request, monkeypatch):
    """Every instruction set level of the CPU kernels that this machine has."""
    skip_without_cpu_kernels()
    monkeypatch.setenv("FOCALNET_KERNELS_CPU_ISA", request.param)
    try:
        in_force = torch.ops.focalnet_kernels.cpu_isa()
    except RuntimeError as error:
        pytest.skip(f"{request.param}: {str(error).splitlines()[0]}")
    assert in_force == request.param
    return request.param


@pytest.fixture
def seed():
    """A fresh seed for every test, shown when the test fails."""
    return fresh_seed()


@pytest.fixture
def one_thread():
    """With which few rows are cut by columns, whatever their channels."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
