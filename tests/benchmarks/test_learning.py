"""A small FocalNet learns real scans with every backend as with eager PyTorch: benchmarks/learning.py, in short.

The rule is that of benchmarks/drift.py: rounding makes right trainings differ, and by no more than eager PyTorch's own
differs from float64.
"""

import functools
import importlib
import sys
from pathlib import Path

import pytest
import torch
from distributed.launch import on_two_processes

from focalnet_kernels.bench.records import read
from focalnet_kernels.ops.triton.launch import INTERPRETED

pytest.importorskip("sklearn")
ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks"))
drift = importlib.import_module("drift")
learning = importlib.import_module("learning")

# AdamW takes steps of one size however wrong a gradient is: SGD shows it
SGD = {"optimizer": functools.partial(torch.optim.SGD, momentum=0.9), "peak_rate": 0.03}
PRECISIONS = ("fp32", "bf16")


@pytest.fixture
def wide_weights(monkeypatch):
    """Networks whose modulation counts from the first step, as it does not with the authors' small weights."""
    build = learning.build

    def built():
        network = build()
        for parameter in network.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=1.5 * parameter[0].numel() ** -0.5)
        return network

    monkeypatch.setattr(learning, "build", built)


def first_losses(backend, precision, seed):
    """Of three networks in a row, so that the chance in one counts less. An interpreter has time for one."""
    options = SGD | ({"steps": 2, "batch": 2} if INTERPRETED else {"steps": 6, "batch": 4})
    runs = [learning.train(backend, precision, 1, seed=seed + i, **options) for i in range(1 if INTERPRETED else 3)]
    return [loss for run in runs for loss in run.losses]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_first_losses(backend, precision, seed, wide_weights):
    if backend == "triton" and precision == "bf16":
        pytest.skip("Triton's interpreter computes bfloat16 wrongly")
    exact, eager = (first_losses("reference", p, seed) for p in ("fp64", precision))
    own = first_losses(backend, precision, seed)
    assert drift.distance(own, exact) <= drift.allowed(eager, exact)


def test_a_gradient_off_by_a_percent_is_noticed(seed, wide_weights, monkeypatch):
    exact, eager = (first_losses("reference", precision, seed) for precision in ("fp64", "fp32"))
    build = learning.build

    def built():
        network = build()
        weight = network.layers[0].blocks[0].modulation.h.weight
        weight.register_hook(lambda grad: grad * (1 + 0.01 * torch.randn(grad.shape)))
        return network

    monkeypatch.setattr(learning, "build", built)
    wrong = first_losses("reference", "fp32", seed)
    assert drift.distance(wrong, exact) > drift.allowed(eager, exact)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_begins_to_learn(cpu_kernels, precision, seed, wide_weights):
    losses = learning.train("cpu", precision, epochs=3, seed=seed).losses
    assert losses[0] > 1.5 and sum(losses[-10:]) / 10 < 0.9


def on_two(path, backend, precision, **options):
    """The losses and the accuracy of a run shared out to two processes."""
    arguments = {"backend": backend, "precision": precision, **options, "output": path}
    on_two_processes(learning.__file__, *(word for name, value in arguments.items() for word in (f"--{name}", value)))
    (run,) = drift.runs(read(path))
    return run


def test_two_processes_learn_as_one(cpu_kernels, seed, tmp_path):
    """Each has half of every batch: the same losses, but for the order of sums."""
    options = {"epochs": 1, "steps": 8, "batch": 16, "seed": seed}
    run = on_two(tmp_path / "learning.csv", "cpu", "fp32", **options)
    alone = learning.train("cpu", "fp32", **options)
    assert run.processes == "2"
    torch.testing.assert_close(run.losses, alone.losses, rtol=1e-5, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_learns(cpu_kernels, name, precision, processes, tmp_path):
    if processes == 2:
        accuracy = float(on_two(tmp_path / "learning.csv", name, precision).about["accuracy"])
    else:
        accuracy = learning.train(name, precision).accuracy
    assert accuracy >= 0.97


FILES = sorted(ROOT.glob(f"benchmarks/results/*/{drift.FILE}"))


@pytest.mark.parametrize("path", FILES, ids=[path.parent.name for path in FILES])
def test_committed_trainings(path):
    """Every backend knows 97 of 100 scans in the end, and none is further from float64 than allowed."""
    runs = drift.runs(read(path))
    assert {run.backend for run in runs} >= {"reference", "triton", "cuda"} | ({"cpu"} & {path.parent.name[:3]})
    assert {run.precision for run in runs} >= {*PRECISIONS} and {run.processes for run in runs} == {"1", "2"}
    for run in runs:
        assert float(run.about["accuracy"]) >= 0.97
        exact, eager = (drift.baseline(runs, run, precision).losses for precision in ("fp64", run.precision))
        for first, last in drift.WINDOWS:
            window = slice(first, min(last or len(exact), len(run.losses)))
            if window.start < window.stop:
                own, bound = run.losses[window], drift.allowed(eager[window], exact[window])
                assert drift.distance(own, exact[window]) <= bound, (run.backend, run.precision, window)
