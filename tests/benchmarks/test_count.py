"""The arithmetic of benchmarks/count.py and of its tables, on made-up launches."""

import importlib.util
import sys
from collections import Counter
from pathlib import Path

import pytest

from focalnet_kernels.ops.triton.launch import INTERPRETED

pytest.importorskip("triton", reason="the script runs its kernels")
pytestmark = pytest.mark.skipif(INTERPRETED, reason="the interpreter takes the place of compiled kernels")
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def load(name, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def count(monkeypatch):
    return load("count", monkeypatch)


def kernel(count, instructions, flops=0.0):
    return count.Counted(1, count.Cost(Counter(float=instructions)), flops, 32, 0, 8)


@pytest.mark.parametrize(
    ("few", "twice", "whole"),
    [
        ({"k": 10.0}, {"k": 20.0}, 10 * 64),  # grows
        ({"k": 10.0}, {"k": 10.0}, 10),  # does not
        ({"k": 10.0}, {"k": 13.0}, 10 + 63 * 3),  # in part
        ({}, {"k": 20.0}, 20 * 32),  # takes work over
        ({"k": 10.0}, {"k": 4.0}, 4),  # gives work away
    ],
)
def test_what_128_images_take(count, few, twice, whole):
    """Of counts for two images and for four."""
    sizes = ({name: kernel(count, n, 3 * n) for name, n in size.items()} for size in (few, twice))
    found = count.of_a_batch(*sizes, images=2)["k"]
    assert found.cost.instructions == pytest.approx(whole)
    assert found.flops == pytest.approx(3 * whole)


def test_bounds(count):
    cost = count.Cost(Counter(float=6e6, special=1e6))
    cost.traffic.wavefronts = 1e6
    found = count.bounds(cost, 1e9)
    slots = 132 * 4 * 1.98e9
    assert found["issue"] == pytest.approx(1e6 * 7e6 / slots)
    assert found["special"] == pytest.approx(1e6 * 8e6 / slots)  # 4 lanes, 8 clocks
    assert found["shared"] == pytest.approx(1e6 * 4e6 / slots)  # a multiprocessor's one, for its four schedulers
    assert found["tensor"] == pytest.approx(1e6 * 1e9 / (4096 * 132 * 1.98e9))


def test_a_table_of_counts(monkeypatch):
    row = {"op": "an_op", "stage": "1", "direction": "forward", "kernel": "all", "instructions": "446.1"}
    times = {"issue_us": "128.5", "shared_us": "131.2", "bytes_us": "55.0", "special_us": "1", "tensor_us": "1"}
    rows = [
        row | times | {"backend": "cuda", "binds": "shared"},
        row | times | {"backend": "triton", "binds": "bytes", "instructions": "9.6"},
        row | times | {"backend": "cuda", "binds": "issue", "kernel": "one of them"},
        row | times | {"backend": "cuda", "binds": "issue", "op": "another"},
    ]
    *_, line = load("report", monkeypatch).counted(rows, "an_op").splitlines()
    assert line == "| 1 forward | 55 | 446: 128, 131 (shared) | 10: 128, 55 (bytes) |"
    assert load("report", monkeypatch).counted(rows, "a third") == "Not counted yet."
