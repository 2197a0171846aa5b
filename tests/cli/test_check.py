"""The check command where everything is right, and where a kernel is not; and info, which it begins with."""

import dataclasses
import sys

import pytest
import torch
from click.testing import CliRunner

import focalnet_kernels
from focalnet_kernels import _libraries, dispatch
from focalnet_kernels._calls import forget
from focalnet_kernels.bench.layers import published_layers
from focalnet_kernels.cli import main
from focalnet_kernels.models import list_models
from focalnet_kernels.testing import make_layer_inputs

ONE_LAYER = ("--variant", "focalnet_tiny_iso", "--batch", 1, "--dtype", "float32", "--device", "cpu")


def run(*arguments):
    return CliRunner().invoke(main, list(map(str, arguments)), env={"COLUMNS": "200"})


@pytest.fixture
def replace_forward(monkeypatch):
    """Replaces the forward of the layer's C++ kernel."""

    def replace(function):
        before = dispatch._implementations["focal_modulation"]
        after = tuple(
            dataclasses.replace(i, forward=lambda *args, run=i.forward: function(run, *args))
            if i.backend == "cpu"
            else i
            for i in before
        )
        monkeypatch.setitem(dispatch._implementations, "focal_modulation", after)
        forget()

    yield replace
    forget()


def test_all_is_right(cpu_kernels):
    result = run("check", *ONE_LAYER)
    assert result.exit_code == 0, result.output
    assert f"torch {torch.__version__}" in result.output and "cpu: ready" in result.output
    (row,) = [line for line in result.output.splitlines() if "1x14x14x192 k=3,5,7" in line]
    assert "float32" in row and "right" in row
    assert "not run: triton: " in result.output


@pytest.mark.parametrize(
    "option, value, message",
    [
        ("--device", "banana", "expected cpu, cuda or cuda:N, got 'banana'"),
        ("--device", "cuda:99", "got 'cuda:99', but"),
        ("--compile", "banana", "or an AMD GPU's name such as gfx942, got 'banana'"),
        ("--compile", "sm_90,sm_20", "sm_90"),
        ("--compile", "sm_90,sm_20", "got 'sm_20'"),
        ("--compile", "gfx123", "got 'gfx123'"),
        ("--compile", "", "got ''"),
    ],
)
def test_a_device_that_cannot_be(option, value, message):
    if option == "--compile":
        pytest.importorskip("triton", reason="it knows the names")
    result = CliRunner().invoke(main, ["check", option, value], terminal_width=500)
    assert result.exit_code == 2 and isinstance(result.exception, SystemExit), result.output
    assert option in result.output and message in result.output


def test_a_wrong_kernel_is_found(cpu_kernels, replace_forward):
    def wrong(run, *args):
        y, *saved = run(*args)
        return (y + 1e-3, *saved)

    replace_forward(wrong)
    result = run("check", *ONE_LAYER)
    assert result.exit_code == 1 and "right" not in result.output and "1 failed" in result.output


def test_a_kernel_that_does_not_run_is_told(cpu_kernels, replace_forward):
    def broken(run, *args):
        raise RuntimeError("no kernel image [is available]")

    replace_forward(broken)
    result = run("check", *ONE_LAYER)
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit)
    assert "no kernel image [is available]" in result.output and "1 failed" in result.output


def test_every_published_layer_is_swept(monkeypatch):
    """Without --variant: each different one once, in three dtypes."""
    module, tiny = sys.modules["focalnet_kernels.cli.check"], make_layer_inputs((1, 2, 2, 4), [3])
    monkeypatch.setattr(module, "make_layer_inputs", lambda *args, **options: tiny)
    monkeypatch.setattr(module, "assert_op_accurate", lambda *args: None)
    result = run("check", "--batch", 1, "--device", "cpu")
    assert result.exit_code == 0, result.output
    rows = [
        tuple(cell.strip() for cell in line.split("│")[1:3]) for line in result.output.splitlines() if " k=" in line
    ]
    assert len(rows) == len(set(rows)) == 3 * len({name for name, _ in rows})
    published = {layer for name in list_models() for layer in published_layers(name)}
    assert len(rows) == 3 * len(published) > 100
    for name in ("1x56x56x96 k=3,5", "1x7x7x768 k=3,5,7", "1x14x14x192 k=3,5,7", "1x7x7x2816 k=3,5,7,9 postln"):
        assert (name, "bfloat16") in rows


def test_info():
    result = run("info")
    assert result.exit_code == 0
    first, *lines = result.output.splitlines()
    assert first.startswith(f"focalnet_kernels {focalnet_kernels.__version__}, torch {torch.__version__}, Python ")
    for backend in dispatch.BACKENDS[1:]:
        (line,) = [line for line in lines if line.startswith(f"{backend}: ")]
        assert line.split(": ")[1].startswith(("ready", "off, ")), line


BUILT = "built for compute capability 8.0 9.0+PTX, CUDA 13.0"


@pytest.mark.parametrize(
    "missing, gpu, said",
    [
        (None, True, f"ready, {BUILT}"),
        (None, False, f"off, there is no GPU; {BUILT}"),
        ("the CUDA C++ kernels were not built", True, "off, the CUDA C++ kernels were not built"),
        (
            "_cuda.abi3.so does not load: invalid ELF header",
            False,
            "off, _cuda.abi3.so does not load: invalid ELF header",
        ),
    ],
    ids=["ready", "no-gpu", "not-built", "broken"],
)
def test_info_of_cuda(missing, gpu, said, monkeypatch):
    monkeypatch.setattr(_libraries, "cuda_missing", missing)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.ops.focalnet_kernels, "cuda_build", lambda: "8.0 9.0+PTX, CUDA 13.0", raising=False)
    result = run("info")
    assert result.exit_code == 0
    assert f"cuda: {said}" in result.output.splitlines()
