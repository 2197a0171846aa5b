"""The examples and the benchmark of the forms run, and what the examples train learns."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


def load(name, folder="examples"):
    spec = importlib.util.spec_from_file_location(name, ROOT / folder / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_begins_to_learn_digits(seed):
    pytest.importorskip("sklearn")
    assert load("digits").train(epochs=4, seed=seed) >= 0.8


@pytest.mark.slow
def test_learns_digits(seed):
    pytest.importorskip("sklearn")
    assert load("digits").train(epochs=12, seed=seed) >= 0.95


@pytest.mark.parametrize("shape", [(8, 8), (16, 40), (24, 8)])
@pytest.mark.parametrize("options", [{}, {"in_chans": 3, "out_chans": 5, "dim": 8, "patch_size": 4, "depth": 1}])
def test_decoder_ends_at_the_input_size(shape, options):
    model = load("encoder_decoder").EncoderDecoder(**options)
    image = torch.randn(2, options.get("in_chans", 1), *shape)
    y = model(image)
    assert y.shape == (2, options.get("out_chans", 1), *shape)
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_encoder_decoder_learns_to_find_discs(seed):
    example = load("encoder_decoder")
    torch.manual_seed(seed)
    assert example.train(example.EncoderDecoder(), steps=40, size=32, seed=seed) >= 0.4


def test_the_notebook_runs():
    """Every cell, and what the cells assert."""
    nbformat = pytest.importorskip("nbformat")
    client = pytest.importorskip("nbclient").NotebookClient
    notebook = nbformat.read(ROOT / "examples/first_steps.ipynb", as_version=4)
    client(notebook, timeout=600, kernel_name="python3").execute()
    printed = "".join(o.get("text", "") for cell in notebook.cells for o in cell.get("outputs", []))
    assert "12 focal modulation layers accelerated" in printed and "accuracy on digits" in printed


def test_similarity_benchmark_runs(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", "similarity.py --batch 1 --tokens 9 --dim 8 --contexts 2 --rounds 1".split())
    load("similarity", "benchmarks").main()
    header, *rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert header == ["dtype", "part", "mode", "literal", "fused", "ratio"]
    assert [row[:3] for row in rows] == [
        [dtype, part, mode]
        for dtype in ("float32", "bfloat16")
        for part in ("affine", "layer")
        for mode in ("forward", "forward+backward")
    ]
    assert all(float(cell) >= 0 for row in rows for cell in row[3:])
