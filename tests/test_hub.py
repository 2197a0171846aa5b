"""The folder that Hugging Face's `kernels` loads: the layer that it puts into transformers' models."""

import copy
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers.models.focalnet import modeling_focalnet

import focalnet_kernels
from focalnet_kernels.testing import assert_accurate

kernels = pytest.importorskip("kernels", reason="the pip package kernels is not installed")
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Without compiled kernels: they take minutes."""
    out = tmp_path_factory.mktemp("hub")
    command = [sys.executable, ROOT / "build_tools/hub.py", out, "--pure"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["torch-cpu", "torch-cuda"]
    return out


@pytest.fixture(scope="module")
def kernel(folder):
    return kernels.get_local_kernel(folder, backend="cpu")


@pytest.fixture
def replaced(folder, monkeypatch):
    """kernelize's own way to transformers' class, for a mode."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    cls = kernels.use_kernel_forward_from_hub("FocalNetModulation")(
        type("FocalNetModulation", (modeling_focalnet.FocalNetModulation,), {})
    )

    def make(mode):
        torch.manual_seed(0)
        config = modeling_focalnet.FocalNetConfig(embed_dim=16, depths=[1], focal_levels=[2], focal_windows=[3])
        layer = cls(config, 0, 16)
        repository = kernels.LocalLayerRepository(folder / "build/torch-cpu", layer_name="FocalNetModulation")
        changed = copy.deepcopy(layer)
        with kernels.use_kernel_mapping({"FocalNetModulation": {"cpu": repository}}):
            kernels.kernelize(changed, mode=mode, device="cpu", use_fallback=False)
        assert "focalnet_kernels" in changed.forward.__func__.__module__
        return layer, changed

    return make


def test_it_lives_beside_the_installed_one(kernel):
    assert kernel is not focalnet_kernels and kernel.__version__ == focalnet_kernels.__version__
    own = sys.modules[f"{kernel.__name__}._namespace"].NAMESPACE
    assert own != "focalnet_kernels" and hasattr(getattr(torch.ops, own), "focal_context_fwd_triton")
    x = torch.randn(1, 5, 4, 8)
    layer = focalnet_kernels.FocalModulation(8, 3, 2)
    args, kwargs = layer.functional_arguments(x)
    torch.testing.assert_close(kernel.focal_modulation(*args, **kwargs), layer(x))


def outputs(forward, x, layer):
    x = x.clone().requires_grad_()
    y = forward(x)
    weight = torch.linspace(-1, 1, y.numel()).reshape(y.shape).to(y)
    return [y.detach(), *torch.autograd.grad((y * weight).sum(), [x, *layer.parameters()])]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_transformers_layer(replaced, compiled):
    mode = kernels.Mode.TRAINING | (kernels.Mode.TORCH_COMPILE if compiled else kernels.Mode.TRAINING)
    layer, changed = replaced(mode)
    x = torch.randn(2, 6, 5, 16) + 0.5
    double = copy.deepcopy(layer).double()
    exact = outputs(double, x.double(), double)
    # compiled by torch, sums have errors of their own
    run = partial(torch.compile, fullgraph=True) if compiled else lambda module: module
    eager, found = (outputs(run(module), x, module) for module in (layer, changed))
    for i, (ours, theirs, value) in enumerate(zip(found, eager, exact, strict=True)):
        assert_accurate(f"result {i}", ours, theirs, value, 3 if i else 2)


def test_changed_parts_act(replaced):
    layer, changed = replaced(kernels.Mode.INFERENCE)
    seen = []
    changed.projection_in.register_forward_hook(lambda *_: seen.append(1))
    x = torch.randn(2, 6, 5, 16)
    torch.testing.assert_close(changed(x), layer(x))
    assert seen


@pytest.mark.slow
def test_with_compiled_kernels(tmp_path):
    """In a process of its own, beside the installed package."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, ROOT / "build_tools/hub.py", tmp_path], check=True, env=environment)
    probe = (
        "import kernels, torch, sys, focalnet_kernels\n"
        "k = kernels.get_local_kernel(__import__('pathlib').Path(sys.argv[1]), backend='cpu')\n"
        "layer = focalnet_kernels.FocalModulation(16, 3, 2)\n"
        "args, kwargs = layer.functional_arguments(torch.randn(1, 5, 4, 16))\n"
        "torch.testing.assert_close(k.focal_modulation(*args, **kwargs, backend='cpu'), layer(args[0]))\n"
        "print(k.explain('focal_modulation', *args, **kwargs).backend)\n"
    )
    command = [sys.executable, "-c", probe, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["cpu"]
