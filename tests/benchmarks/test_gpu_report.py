"""The script for GPUs, on a CPU: what it walks, and what dispatch's table gets of it."""

import csv
import importlib
import os
import subprocess
import sys
import time
from pathlib import Path

import cuda_shim
import pytest
import torch

from focalnet_kernels import measured
from focalnet_kernels.bench.records import read

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch):
    """Processes take the path over."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks/gpu"))


def test_the_cuda_kernels_are_walked(tmp_path):
    if reason := cuda_shim.missing():
        pytest.skip(f"backend cuda: {reason}")
    folder = tmp_path / "results" / "cpu"
    options = f"--tiny --device cpu --emulate --parts correct,dispatch --workers 2 --output {folder}"
    command = [sys.executable, "benchmarks/gpu/report.py", *options.split()]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "0"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True)
    found = read(folder / "gpu_correct.csv")
    assert {row["result"] for row in found if row["provider"] == "cuda"} == {"right"}
    assert [row["case"] for row in found if row["provider"] == "triton"] == ["all"], "it says why it is absent"
    found = read(folder / "gpu_dispatch.csv")
    for row in found:  # whatever took how long
        row["p50_ms"] = 2.0 if row["provider"] == "ours cuda" else 1.0
    with (folder / "gpu_dispatch.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, found[0])
        writer.writeheader()
        writer.writerows(found)
    rows = importlib.import_module("dispatch_table").table(folder.parent)
    assert {row["op"] for row in rows} == {"focal_modulation", "focal_context", "modulate"}
    assert {(row["batch"], row["map"], row["kernels"]) for row in rows if row["op"] != "modulate"} == {
        (batch, "7x7", "3x3 5x5 7x7") for batch in ("1", "2")
    }  # fmt: skip
    assert {row["mode"] for row in rows} == {"forward", "forward+backward"}
    assert {row["backends"] for row in rows} == {"reference"}
    assert set(rows[0]) == set(measured.COLUMNS)


OUTCOMES = {
    "1 + 1": 2,
    "1 / 0": "ZeroDivisionError: division by zero",
    "__import__('os')._exit(7)": "its process ended with exit code 7",
    "__import__('time').sleep(99)": "no answer within 3 seconds",
    "2 + 2": 4,
}


def in_processes(*code, **options):
    found = importlib.import_module("processes").in_processes(
        eval, [(c,) for c in code], chunk=len(code), workers=2, **options
    )
    return {task: answer for (task,), answer in found}


def test_processes_survive_what_their_tasks_do():
    assert in_processes(*OUTCOMES, seconds=3.0, until=time.monotonic() + 60) == OUTCOMES


def test_processes_end_with_the_time():
    sleep = "__import__('time').sleep(99)"
    began = time.monotonic()
    found = in_processes("1 + 1", sleep, "2 + 2", seconds=99.0, until=began + 5)
    assert found == {"1 + 1": 2, sleep: None, "2 + 2": None}
    assert time.monotonic() < began + 30


def prepared(code, device):
    return {"forward": eval(code)}


def test_calls_take_turns():
    turns = importlib.import_module("turns")
    codes = {"sum": "lambda: sum(range(9))", "late": "lambda: __import__('time').sleep(99)", "wrong": "1 / 0"}
    with turns.Turns(prepared, {name: (code,) for name, code in codes.items()}, "cpu") as of_all:
        found = list(of_all.measure(["sum", "wrong"], 3, time.monotonic() + 60))
        found += of_all.measure(["late"], 3, time.monotonic() + 1)
    times = next(times for name, mode, times in found if (name, mode) == ("sum", "forward"))
    assert 0 <= times["p20_ms"] <= times["p50_ms"] <= times["p80_ms"]
    assert sorted(found, key=str)[:2] == [("late", "", None), ("sum", "forward", times)]
    assert found[0] == ("wrong", "", "ZeroDivisionError: division by zero")


def test_kernels_can_be_compiled_beforehand():
    measure = importlib.import_module("measure")
    block = next(measure.BLOCKS["dispatch"]([torch.float32], "cpu", True))
    assert measure.compile_kernels(block.cases[0], "authors' form", ())
