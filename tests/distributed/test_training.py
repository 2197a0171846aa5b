"""DDP and FSDP2 on two processes under torchrun, beside one process on the whole batch."""

import functools
import os
import tempfile

import pytest
import torch

import focalnet_kernels as fk
from distributed import train
from distributed.launch import on_two_processes
from focalnet_kernels import _libraries

# the kernels last: of them stderr is to be silent
BACKENDS = ("reference",) if _libraries.cpu_missing else ("reference", "cpu")


@functools.cache
def launched(way):
    """The results of all cases of one way, and what the processes wrote to stderr."""
    with tempfile.TemporaryDirectory() as directory:
        out = os.path.join(directory, "results.pt")
        ran = on_two_processes(train.__file__, way, out, *BACKENDS)
        return torch.load(out), ran.stderr


@functools.cache
def alone(backend):
    with fk.use_backend(backend):
        return train.train(train.build())


@pytest.mark.parametrize("way, case", [(way, case) for way, cases in train.CASES.items() for case in cases])
def test_two_processes_train_as_one(backend, way, case):
    """Every loss, every gradient and the parameters after the last step."""
    if backend not in BACKENDS:
        pytest.skip("no process but this one emulates a GPU")
    results, expected = launched(way)[0][backend, case], alone(backend)
    assert set(results) == set(expected)
    # bfloat16 is held to eager PyTorch by other tests: here it is to arrive
    rtol, atol = (0.1, 2e-2) if case == "bfloat16" else (1e-4, 1e-6)
    for name, value in expected.items():
        torch.testing.assert_close(results[name], value, rtol=rtol, atol=atol, msg=lambda m, name=name: f"{name}: {m}")
    moved = [n for n in expected if n.startswith("gradient") and expected[n].abs().max() > 0]
    assert len(moved) > len(expected) / 2, "no gradients: this test cannot fail"


def test_no_word_about_strides(kernels):
    """Nor about anything else of ours: a layer that fell back to its own forward would say so."""
    before, after = launched("ddp")[1].split(train.CONTROL, 1)
    assert "Grad strides do not match bucket view strides" in after, "the control is silent: this test cannot fail"
    for text in (before, launched("fsdp")[1]):
        assert "strides" not in text and "focalnet_kernels" not in text, text
