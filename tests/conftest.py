"""Fixtures of all tests: poisoned memory, backends, instruction sets, seeds."""

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

from focalnet_kernels import _native
from focalnet_kernels.testing import fresh_seed

settings.register_profile(
    "focalnet_kernels",
    deadline=None,
    max_examples=30,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("focalnet_kernels")


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
    if _native.cpu_missing:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"backend cpu: {_native.cpu_missing}")


@pytest.fixture(scope="session")
def cpu_kernels():
    """For tests of the C++ kernels alone."""
    skip_without_cpu_kernels()


@pytest.fixture(scope="session", params=["reference", "cpu"])
def backend(request):
    """Every backend that runs on a CPU."""
    if request.param == "cpu":
        skip_without_cpu_kernels()
    return request.param


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
